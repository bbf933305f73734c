"""Resolution of data sources: a file, a glob, a folder, a file of an installed package, or a Hub dataset.

Does not import torch, because the launcher computes fingerprints while planning.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import Problem, RequestError
from ...storage.files import PACKAGE, digest_file, find_package

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}
_HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]*)(?:/(?P<split>[\w.-]+(?:\[\d*:\d*\])?))?)?"
)


@dataclass(frozen=True)
class HubSet:
    """Hugging Face Hub dataset: `owner/name`, `owner/name:config` or `owner/name:config/split[from:to]`."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}:{self.config or ''}/{self.split}"

    def slice(self) -> tuple[str, int, int | None]:
        """Return the split name and the row range: start (inclusive) and stop (exclusive, None for all rows)."""
        split, _, rows = self.split.rstrip("]").partition("[")
        first, _, last = rows.partition(":")
        return split, int(first or 0), int(last) if last else None


def ending_of(path: Path) -> str:
    """Return the lowercase file extension that determines the data format, ignoring a final `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def resolve(sources: str | list[str]) -> list[Path | HubSet]:
    """Return the files and Hub datasets of `sources` in order; files of a glob or folder are sorted by path.

    Raises:
        RequestError: A source does not exist, or a folder contains several splits or no data.
    """
    found: list[Path | HubSet] = []
    for source in [sources] if isinstance(sources, str) else sources:
        found.extend(_resolve(source))
    if not found:
        raise RequestError.of("data", "has no source", "set data.train to a file, a glob, a folder or a Hub id")
    return found


def fingerprint(
    sources: str | list[str], revision: str | None = None, digest: Callable[[Path], str] | None = None
) -> str:
    """Return the SHA-256 of the sources: file contents, names and order, or the id and revision of Hub datasets.

    Args:
        sources: Sources as in the configuration.
        revision: Hub revision.
        digest: Function that hashes the contents of a file, such as the caching one of storage/cache.py. Defaults to
            `digest_file`.

    Raises:
        RequestError: A source does not exist or cannot be read.
    """
    whole = hashlib.sha256()
    for source in resolve(sources):
        if isinstance(source, HubSet):
            whole.update(f"hub\0{source}\0{revision or 'main'}\n".encode())
            continue
        try:
            whole.update(f"file\0{source.name}\0{(digest or digest_file)(source)}\n".encode())
        except OSError as error:
            raise unreadable(source, error) from error
    return whole.hexdigest()


def unreadable(path: Path, error: OSError) -> RequestError:
    """Return the error for an existing file that cannot be read."""
    return RequestError(Problem(str(path), f"cannot be read ({error.strerror or error})", "check its permissions"))


def _resolve(source: str) -> list[Path | HubSet]:
    if source.startswith(PACKAGE):
        return [_package_file(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        return list(_folder_files(path))
    if path.exists():
        return [_known(path)]
    match = _HUB_ID.fullmatch(source)
    local_parent = "/" in source and Path(source.split("/", 1)[0]).is_dir()
    sliced = match is not None and "[" in (match["split"] or "")  # OWNER/NAME:/train[:1000] is not a glob
    if glob.has_magic(source) and not sliced:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise RequestError.of(
                source, "the glob matches no file", _nearest(path) or "check its folder and extension"
            )
        return [_known(file) for file in files]
    if match and ending_of(Path(match["name"])) not in ENDINGS and not local_parent:
        return [HubSet(match["name"], match["config"] or None, match["split"] or "train")]
    raise RequestError.of(
        source, "the file or folder does not exist", _nearest(path) or "use a file path, a glob, or OWNER/NAME"
    )


def _package_file(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    folder = find_package(package)
    if folder is None:
        raise RequestError.of(source, f"the package {package} is not installed", f"run pip install {package}")
    path = folder / inside
    if not inside or not path.is_file():
        raise RequestError.of(
            source, "the package does not contain this file", _nearest(path) or "write package:NAME/PATH"
        )
    return _known(path)


def _known(path: Path) -> Path:
    if ending_of(path) not in ENDINGS:
        raise RequestError.of(
            str(path),
            f"the file extension {path.suffix or '(none)'!r} is not supported",
            f"use one of {' '.join(ENDINGS)} (text formats also with .gz)",
        )
    return path


def _folder_files(folder: Path) -> list[Path]:
    """Return the data files of a folder; several splits raise an error, because test rows would be trained on."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and ending_of(path) in ENDINGS)
    if not files:
        raise RequestError.of(
            str(folder), "the folder contains no data file", f"use files or a glob such as {folder}/**/*.jsonl"
        )
    splits = {_SPLITS[stem] for path in files if (stem := path.name.split(".")[0].lower()) in _SPLITS}
    if len(splits) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise RequestError.of(
            str(folder),
            f"the folder contains several splits ({names})",
            f"use one of them, such as {folder / files[0].name}",
        )
    return files


def _nearest(path: Path) -> str | None:
    """Return a suggestion for a missing path: similar names, or data files of the nearest existing folder."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent and not glob.has_magic(str(parent)):
        path, parent = parent, parent.parent
    if not parent.is_dir():
        return None
    names = [entry.name for entry in sorted(parent.iterdir())[:2000]]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(str(parent / name) for name in near)}?"
    data = [name for name in names if ending_of(Path(name)) in ENDINGS][:5]
    return f"{parent} contains {', '.join(data)}" if data else None
