"""An account of exported tensors: each that was trained arrives once, bit for bit, under the name it is loaded by.

Tensors go by as a stream and are not kept: what is compared are digests of their bytes.
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
from ..state import Weights

WAY_OUT = "the checkpoint is sound: keep it, and report this with the names above; nothing was exported"
SHOWN = 5


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a tensor; the norm only says how far off another one is."""

    shape: tuple[int, ...]
    dtype: str
    digest: bytes
    norm: float

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """Of a tensor on any device, any layout in memory."""
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.blake2b(plain.flatten().view(torch.uint8).numpy().data, digest_size=16).digest()
        return cls(tuple(plain.shape), str(plain.dtype), digest, float(plain.double().norm()))

    def distance(self, other: Fingerprint) -> float:
        """0 for the same bits; else a measure to order differences by."""
        if self.digest == other.digest and self.shape == other.shape and self.dtype == other.dtype:
            return 0.0
        if self.shape != other.shape:
            return float("inf")
        return abs(self.norm - other.norm) / max(self.norm, 1e-30) + 1e-30


class Account:
    """What was handed over for export.

    Args:
        dtype_of: what a floating-point tensor, given by name, is exported in; None keeps it as it is.
    """

    def __init__(self, dtype_of: Callable[[str], torch.dtype | None] = lambda name: None) -> None:
        self.dtype_of = dtype_of
        self.entries: dict[str, Fingerprint] = {}

    def record(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The same tensors on the CPU, in the export's dtype, noted as they go by.

        Raises:
            TrainingError: a name comes twice, or a tensor is not finite.
        """
        for name, tensor in weights:
            if name in self.entries:
                raise TrainingError.of(name, "was handed to the export twice", WAY_OUT)
            dtype = (tensor.is_floating_point() and self.dtype_of(name)) or tensor.dtype
            given = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not bool(torch.isfinite(given).all()):
                raise TrainingError.of(name, f"holds nan or infinity in {dtype}", "resume from an earlier checkpoint")
            self.entries[name] = Fingerprint.of(given)
            yield name, given

    def check_names(self, expected: Mapping[str, object]) -> None:
        """Exactly the expected parameters were handed over.

        Raises:
            TrainingError: some were not, or others were.
        """
        _refuse("was trained and not handed to the export", sorted(set(expected) - set(self.entries)))
        _refuse("is no parameter that the export should hold", sorted(set(self.entries) - set(expected)))

    def check_files(self, folder: Path, *, exact: bool) -> None:
        """No file repeats another's tensor; with `exact`, the files hold every handed tensor once and nothing else.

        Args:
            folder: of the export.
            exact: false where the library splits or fuses tensors for its file format, such as experts; loading then
                tells.

        Raises:
            TrainingError: it is otherwise.
        """
        held: Counter[bytes] = Counter()
        names: Counter[str] = Counter()
        by_digest: dict[bytes, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  # not a mapping
                    names[name] += 1
                    if exact:
                        digest = Fingerprint.of(reader.get_tensor(name)).digest
                        held[digest] += 1
                        by_digest[digest] = name
        _refuse("stands in two files", sorted(name for name, count in names.items() if count > 1))
        if exact:
            wanted = Counter(entry.digest for entry in self.entries.values())
            lost = set(wanted - held)
            _refuse("is not in the files as it was", sorted(n for n, e in self.entries.items() if e.digest in lost))
            _refuse("stands in the files and was not trained", sorted(by_digest[d] for d in held - wanted))

    def check_loaded(self, model: nn.Module) -> None:
        """The parameters of the model that was loaded from the files are those that were handed over.

        Raises:
            TrainingError: naming those that are not, worst first.
        """
        loaded = dict(model.named_parameters(remove_duplicate=False))
        _refuse("is not there after loading", sorted(set(self.entries) - set(loaded)))
        distances = {name: entry.distance(Fingerprint.of(loaded[name])) for name, entry in self.entries.items()}
        wrong = sorted((name for name, far in distances.items() if far > 0), key=lambda n: -distances[n])
        _refuse("is another tensor after loading than it was in training", wrong)


def _refuse(rule: str, names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
        raise TrainingError(*(Problem(name, rule + more, WAY_OUT) for name in names[:SHOWN]))
