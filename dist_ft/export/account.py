"""Verification of exported tensors: each trained tensor must be stored exactly once, bit for bit, under its own name.

Tensors are streamed and not kept in memory; digests of their bytes are compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import Problem, TrainingError
from ..state import Beat, Weights, unwatched

WAY_OUT = "nothing was exported; the checkpoint is intact: keep it, and report this error with the tensor names above"
SHOWN = 5


@dataclass(frozen=True)
class Fingerprint:
    """Shape, dtype, digest and norm of a tensor; the norm is only used to rank differences."""

    shape: tuple[int, ...]
    dtype: str
    digest: bytes
    norm: float

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """Compute the fingerprint of a tensor on any device and in any memory layout."""
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.blake2b(plain.flatten().view(torch.uint8).numpy().data, digest_size=16).digest()
        return cls(tuple(plain.shape), str(plain.dtype), digest, float(plain.double().norm()))

    def distance(self, other: Fingerprint) -> float:
        """Return 0 for identical bits, otherwise a positive value by which differences can be ranked."""
        if self.digest == other.digest and self.shape == other.shape and self.dtype == other.dtype:
            return 0.0
        if self.shape != other.shape:
            return float("inf")
        return abs(self.norm - other.norm) / max(self.norm, 1e-30) + 1e-30


class Account:
    """Record of the tensors that were passed to the export.

    Args:
        dtype_of: returns the export dtype of the floating-point tensor with the given name; None keeps its dtype.
        tick: called for each tensor recorded or compared.
    """

    def __init__(
        self, dtype_of: Callable[[str], torch.dtype | None] = lambda name: None, tick: Beat = unwatched
    ) -> None:
        self.dtype_of = dtype_of
        self.tick = tick
        self.entries: dict[str, Fingerprint] = {}

    def record(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors on the CPU in their export dtype and record the fingerprint of each.

        Raises:
            TrainingError: If a name occurs twice or a tensor contains NaN or inf.
        """
        for name, tensor in weights:
            if name in self.entries:
                raise TrainingError.of(name, "was passed to the export twice", WAY_OUT)
            dtype = (tensor.is_floating_point() and self.dtype_of(name)) or tensor.dtype
            given = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not bool(torch.isfinite(given).all()):
                raise TrainingError.of(name, f"contains NaN or inf in {dtype}", "resume from an earlier checkpoint")
            self.entries[name] = Fingerprint.of(given)
            self.tick(f"exporting {name}")
            yield name, given

    def check_names(self, expected: Mapping[str, object]) -> None:
        """Check that exactly the expected parameters were passed to the export.

        Raises:
            TrainingError: If parameters are missing or unexpected.
        """
        _refuse("was trained but not passed to the export", sorted(set(expected) - set(self.entries)))
        _refuse("is not one of the parameters to export", sorted(set(self.entries) - set(expected)))

    def check_files(self, folder: Path, *, exact: bool) -> None:
        """Check that no tensor is stored twice and, with `exact`, that the files hold exactly the recorded tensors.

        Args:
            folder: folder of the export.
            exact: whether stored tensors must equal the recorded ones; set it to False if the library splits or fuses
                tensors in its file format (such as experts), which `check_loaded` then covers.

        Raises:
            TrainingError: If a tensor is duplicated, missing, changed or unexpected.
        """
        held: Counter[bytes] = Counter()
        names: Counter[str] = Counter()
        by_digest: dict[bytes, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  # not a mapping
                    names[name] += 1
                    self.tick(f"checking {name} of the exported files")
                    if exact:
                        digest = Fingerprint.of(reader.get_tensor(name)).digest
                        held[digest] += 1
                        by_digest[digest] = name
        _refuse("is stored in more than one file", sorted(name for name, count in names.items() if count > 1))
        if exact:
            wanted = Counter(entry.digest for entry in self.entries.values())
            lost = set(wanted - held)
            _refuse("is missing or changed on disk", sorted(n for n, e in self.entries.items() if e.digest in lost))
            _refuse("is in the files but was not passed to the export", sorted(by_digest[d] for d in held - wanted))

    def check_loaded(self, model: nn.Module) -> None:
        """Check that the parameters of the model loaded from the files equal the recorded tensors.

        Raises:
            TrainingError: If parameters are missing or differ; the largest differences are named first.
        """
        loaded = dict(model.named_parameters(remove_duplicate=False))
        _refuse("is missing after loading", sorted(set(self.entries) - set(loaded)))
        distances = {}
        for name, entry in self.entries.items():
            distances[name] = entry.distance(Fingerprint.of(loaded[name]))
            self.tick(f"checking {name} of the exported model")
        wrong = sorted((name for name, far in distances.items() if far > 0), key=lambda n: -distances[n])
        _refuse("differs from the trained tensor after loading", wrong)


def _refuse(rule: str, names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
        raise TrainingError(*(Problem(name, rule + more, WAY_OUT) for name in names[:SHOWN]))
