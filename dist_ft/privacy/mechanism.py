"""The differential privacy mechanism: noise, privacy guarantee and accounting (by Opacus).

The mechanism is DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1) with AdamW for the update: each row is
sampled independently, its gradient is clipped, and Gaussian noise is added to the sum. Two data sets are neighbors if
one has an additional row. `privacy/ddp.py` and `privacy/fsdp.py` apply the mechanism.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config.plan import SEED_FILE, Plan
from ..config.privacy import PrivacyConfig
from ..data.order.chance import random_words
from ..errors import RequestError
from ..process import comm
from ..process.place import Place

if TYPE_CHECKING:
    from ..data.order.order import PoissonOrder


DELTA_SHARE = 0.1  # default delta, as a share of 1 / rows


@dataclass(frozen=True)
class Privacy:
    """Parameters of a run's mechanism, with its noise and its privacy accounting."""

    noise_multiplier: float  # standard deviation of the noise / max_grad_norm
    sample_rate: float  # probability that a row is in a step
    delta: float
    max_grad_norm: float  # of a single row
    expected_rows: float  # per step; the sum of gradients is divided by it
    seed: int  # of the noise
    hooks: bool = True  # whether to try Opacus's hooks for gradients of rows

    def epsilon(self, steps: int) -> float:
        """Return epsilon at `delta` after `steps` steps, by Rényi differential privacy (Mironov et al. 2019).

        It equals the result of Opacus's RDPAccountant after that many calls of `step`.
        """
        from opacus.accountants.analysis import rdp

        if steps == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with few steps, the best order is the last one: the bound is looser
            orders = self._orders
            epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=self._spent_by_a_step * steps, delta=self.delta)
        return float(epsilon)

    def draw_noise(self, step: int, like: list[Tensor]) -> list[Tensor]:
        """Draw noise with standard deviation `noise_multiplier * max_grad_norm`, as a function of (seed, step)."""
        return list(self.stream_noise(step, (t.shape for t in like), like[0].device))

    def stream_noise(self, step: int, shapes: Iterable[torch.Size], device: torch.device) -> Iterator[Tensor]:
        """Yield the same noise one full tensor at a time; each depends on the shapes before it."""
        scale = self.noise_multiplier * self.max_grad_norm
        words = random_words("noise", self.seed, step)
        if device.type == "cuda":  # the CUDA generator uses 64 bits of the seed, the CPU generator only 32
            generator = torch.Generator(device).manual_seed(int(words.random_raw() >> np.uint64(1)))
            for shape in shapes:
                yield torch.randn(shape, device=device, generator=generator).mul_(scale)
        else:
            source = np.random.Generator(words)
            for shape in shapes:
                noise = source.standard_normal(tuple(shape), dtype=np.float32)
                yield torch.from_numpy(np.asarray(noise)).to(device).mul_(scale)

    def describe(self, steps: int) -> str:
        """Describe the privacy guarantee in one line."""
        return (
            f"differential privacy of rows: epsilon {self.epsilon(steps):.3f} at delta {self.delta:.2g} after {steps} "
            f"steps; noise multiplier {self.noise_multiplier:.4f}, rows sampled with probability "
            f"{self.sample_rate:.4g}, their gradients clipped at {self.max_grad_norm:g}"
        )

    def tell(self, steps: int) -> Iterator[tuple[str, str]]:
        """Yield the privacy guarantee after `steps` steps as rows of a table."""
        yield "epsilon", f"{self.epsilon(steps):.4g} after {steps:,} steps"
        yield "delta", f"{self.delta:.4g}"
        yield "noise multiplier", f"{self.noise_multiplier:.4f}"
        yield "norm to which each row's gradient is clipped", f"{self.max_grad_norm:g}"
        yield "rows expected in a step", f"{self.expected_rows:g}, each with probability {self.sample_rate:.4g}"
        yield "accountant", "Rényi differential privacy over Poisson sampling (Opacus's RDPAccountant)"

    @cached_property
    def _orders(self) -> list[float]:
        from opacus.accountants import RDPAccountant

        return list(RDPAccountant.DEFAULT_ALPHAS)

    @cached_property
    def _spent_by_a_step(self) -> Any:
        from opacus.accountants.analysis import rdp

        return rdp.compute_rdp(q=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=1, orders=self._orders)


def agree_on_privacy(config: PrivacyConfig, order: PoissonOrder, steps: int) -> Privacy:
    """Call `find_privacy` and use rank 0's noise multiplier everywhere, since hosts may differ in the last bit."""
    found = find_privacy(config, order, steps)
    return replace(found, noise_multiplier=comm.from_main(found.noise_multiplier))


def find_privacy(config: PrivacyConfig, order: PoissonOrder, steps: int) -> Privacy:
    """Return the mechanism of a run of `steps` steps, with the noise required for its target epsilon.

    Raises:
        RequestError: Delta is too large to guarantee anything, or no noise reaches the target.
    """
    delta = DELTA_SHARE / order.samples if config.delta is None else config.delta
    if delta >= 1 / order.samples:
        rule = f"{delta:g} is no less than 1 / {order.samples} rows, so that publishing a whole row would satisfy it"
        raise RequestError.of("privacy.delta", rule, f"set it below {1 / order.samples:.2g}")
    noise = config.noise_multiplier
    if noise is None:
        assert config.target_epsilon is not None
        noise = _find_noise(config.target_epsilon, delta, order.rate, steps)
    return Privacy(
        noise_multiplier=noise,
        sample_rate=order.rate,
        delta=delta,
        max_grad_norm=config.max_grad_norm,
        expected_rows=float(order.global_batch_size),
        seed=order.seed,
        hooks=config.grad_sample_mode == "auto",
    )


def settle_seed(plan: Plan, place: Place) -> int:
    """Return the seed of noise and sampling: `privacy.noise_seed`, or a secret one stored in the run's folder."""
    if plan.config.privacy.noise_seed is not None:
        return plan.config.privacy.noise_seed
    seed: int | None = None
    if place.is_main:
        file = plan.run_dir / SEED_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(str(secrets.randbits(128)), encoding="ascii")
        seed = int(file.read_text(encoding="ascii"))
    return int(comm.from_main(seed))


def _find_noise(target: float, delta: float, rate: float, steps: int) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp
    from opacus.accountants.utils import get_noise_multiplier

    orders = RDPAccountant.DEFAULT_ALPHAS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        least, _ = rdp.get_privacy_spent(orders=orders, rdp=[0.0] * len(orders), delta=delta)
        if target <= least:  # Opacus would search for minutes before it fails
            rule = f"this bound stays above {least:.3g} at delta {delta:.2g}, however large the noise"
            raise RequestError.of("privacy.target_epsilon", rule, "raise it, or privacy.delta")
        try:
            found = get_noise_multiplier(
                target_epsilon=target,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant="rdp",
                epsilon_tolerance=min(0.01, target / 100),
            )
        except ValueError as error:
            rule = f"no noise keeps {steps} steps within {target:g}"
            raise RequestError.of("privacy.target_epsilon", rule, "raise it, or train fewer steps") from error
    return float(found)
