"""The noise and its account against Opacus's own accountant and what chance must give."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant

from dist_ft.config.plan import SEED_FILE
from dist_ft.config.privacy import PrivacyConfig
from dist_ft.data.order.order import PoissonOrder
from dist_ft.errors import RequestError
from dist_ft.privacy.mechanism import agree_on_privacy, settle_seed
from dist_ft.process.place import Place
from tests.private import make_privacy


def test_noise_has_its_deviation_and_depends_on_seed_and_step_only() -> None:
    like = [torch.zeros(300, 400), torch.zeros(5)]
    privacy = make_privacy(noise_multiplier=2.5, max_grad_norm=0.4)
    first, again = privacy.draw_noise(1, like), make_privacy(noise_multiplier=2.5).draw_noise(1, like)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    values = first[0].double()
    assert float(values.std()) == pytest.approx(1.0, rel=0.01) and abs(float(values.mean())) < 0.01
    assert float((values.abs() < 0.6745).double().mean()) == pytest.approx(0.5, abs=0.01)  # quartiles of a Gaussian
    for other in (privacy.draw_noise(2, like), make_privacy(noise_multiplier=2.5, seed=4).draw_noise(1, like)):
        assert abs(float((values * other[0]).mean())) < 0.02


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.1, 0.01, 300), (0.6, 0.2, 12), (5.0, 1.0, 40)])
def test_epsilon_is_that_of_the_accountant_of_opacus(noise: float, rate: float, steps: int) -> None:
    privacy, accountant = make_privacy(noise_multiplier=noise, sample_rate=rate), RDPAccountant()
    assert privacy.epsilon(0) == 0
    found = []
    for step in range(1, steps + 1):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
        found.append(privacy.epsilon(step))
        if step in (1, 2, steps):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert found[-1] == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-9)
    assert found == sorted(found) and found[0] > 0


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_noise_keeps_the_target(target: float) -> None:
    order = PoissonOrder(2000, 1, 50, 20_000)
    privacy = agree_on_privacy(PrivacyConfig(target_epsilon=target, max_grad_norm=0.7), order, 400)  # type: ignore[call-arg]
    assert target - 0.02 < privacy.epsilon(400) <= target
    assert privacy.delta == pytest.approx(1 / 20_000)
    assert (privacy.sample_rate, privacy.expected_rows, privacy.max_grad_norm) == (0.025, 50, 0.7)
    assert "differential privacy of rows" in privacy.describe(400)


def test_what_promises_nothing_is_refused() -> None:
    order = PoissonOrder(100, 1, 50, 1000)
    with pytest.raises(RequestError, match="no less than 1 / 100 rows"):
        agree_on_privacy(PrivacyConfig(noise_multiplier=1.0, delta=0.01), order, 10)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="however large the noise"):
        agree_on_privacy(PrivacyConfig(target_epsilon=1e-9), order, 10)  # type: ignore[call-arg]


def test_a_secret_seed_is_drawn_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    plans: list[Any] = [
        SimpleNamespace(run_dir=tmp_path / name, config=SimpleNamespace(privacy=PrivacyConfig()))  # type: ignore[call-arg]
        for name in ("one", "two")
    ]
    one, two = (settle_seed(plan, Place()) for plan in plans)
    assert one != two and max(one, two) > 2**64
    assert settle_seed(plans[0], Place()) == one
    assert stat.S_IMODE((tmp_path / "one" / SEED_FILE).stat().st_mode) == 0o600
    plans[0].config.privacy = PrivacyConfig(noise_seed=5)  # type: ignore[call-arg]
    assert settle_seed(plans[0], Place()) == 5
