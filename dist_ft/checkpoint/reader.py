"""Reader for PyTorch Distributed Checkpoint (DCP) files that never executes code from their pickled metadata."""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata


class SafeReader(dcp.FileSystemReader):
    """File system reader that unpickles `.metadata` with an allowlist of the types that DCP itself writes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Load the metadata without executing code that the file refers to.

        Raises:
            pickle.UnpicklingError: If the file refers to anything outside the allowlist.
        """
        metadata = _MetadataUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        assert isinstance(metadata, Metadata)
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_rebuild_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        is_own = module in self.MODULES and isinstance(getattr(__import__(module, fromlist=[name]), name, None), type)
        if is_dtype or is_own or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")


def _enum_member(kind: Any, name: str) -> enum.Enum:
    """Replace `getattr`, with which Python 3.11.0 to 3.11.3 pickle enum members, by a lookup of enum members only."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"an attribute of {kind} is not allowed in checkpoint metadata")
    return kind[name]
