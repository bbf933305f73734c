"""Resolution of data sources: a file, a glob, a folder, a URL, a file of an installed package, or a Hub dataset.

Does not import torch, because the launcher computes fingerprints while planning.
"""

from __future__ import annotations

import bz2
import contextlib
import difflib
import glob
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...errors import Problem, RequestError
from ...storage.files import PACKAGE, digest_file, find_package
from .folders import ENDINGS, Found, ending_of, files_of_folder, files_of_glob, files_of_url, known
from .remote import DataFile, RemoteFile, is_url

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


@dataclass
class Survey:
    """Files and Hub datasets of a split in the order in which they are read, and the files beside them, by reason."""

    read: list[DataFile | HubSet] = field(default_factory=list)
    left_out: dict[str, list[DataFile]] = field(default_factory=dict)


def survey(sources: str | list[str], split: str = "train") -> Survey:
    """Return the files and Hub datasets of `sources` that belong to `split`; see folders.py for folders and globs.

    A file that is named itself is read whatever its name says. A Hub id without a split stands for `split`.

    Raises:
        RequestError: A source does not exist, or has no data or none of this split.
    """
    found = Survey()
    for source in [sources] if isinstance(sources, str) else sources:
        _add(found, source, split)
    if not found.read:
        raise RequestError.of("data", "has no source", "set data.train to a file, a glob, a folder or a Hub id")
    return found


def resolve(sources: str | list[str], split: str = "train") -> list[DataFile | HubSet]:
    """Return the files and Hub datasets of `sources` that belong to `split` (see `survey`)."""
    return survey(sources, split).read


def fingerprint(
    sources: str | list[str],
    revision: str | None = None,
    digest: Callable[[Path], str] | None = None,
    split: str = "train",
) -> str:
    """Return the SHA-256 of the sources: file contents, names and order, or the id and revision of Hub datasets.

    Of a file behind a URL, the address and what its file system tells of the content count (see remote.py).

    Args:
        sources: Sources as in the configuration.
        revision: Hub revision.
        digest: Function that hashes the contents of a file, such as the caching one of storage/cache.py. Defaults to
            `digest_file`.
        split: Split to which the files of folders and globs must belong.

    Raises:
        RequestError: A source does not exist or cannot be read.
    """
    whole = hashlib.sha256()
    for source in resolve(sources, split):
        if isinstance(source, HubSet):
            whole.update(f"hub\0{source}\0{revision or 'main'}\n".encode())
            continue
        if isinstance(source, RemoteFile):
            whole.update(f"url\0{source}\0{source.digest()}\n".encode())
            continue
        try:
            whole.update(f"file\0{source.name}\0{(digest or digest_file)(source)}\n".encode())
        except OSError as error:
            raise unreadable(source, error) from error
    return whole.hexdigest()


def unreadable(path: DataFile, error: OSError) -> RequestError:
    """Return the error for an existing file that cannot be read."""
    return RequestError(Problem(str(path), f"cannot be read ({error.strerror or error})", "check its permissions"))


@contextlib.contextmanager
def open_file(path: DataFile) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed as its extension says."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    with path.open("rb") as file:
        opener = openers.get(path.suffix.lower())
        if opener is None:
            yield file
        else:
            with opener(file, "rb") as opened:
                yield opened


def _open_zst(file: IO[bytes], mode: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode), "zstd"))


def size_of(path: DataFile) -> int:
    """Return the number of bytes of a file as it is stored."""
    return path.size() if isinstance(path, RemoteFile) else path.stat().st_size


def _add(found: Survey, source: str, split: str) -> None:
    if source.startswith(PACKAGE):
        found.read.append(_package_file(source))
        return
    if is_url(source):
        _extend(found, files_of_url(source, split))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        _extend(found, files_of_folder(path, split))
        return
    if path.exists():
        found.read.append(known(path))
        return
    match = _HUB_ID.fullmatch(source)
    local_parent = "/" in source and Path(source.split("/", 1)[0]).is_dir()
    sliced = match is not None and "[" in (match["split"] or "")  # OWNER/NAME:/train[:1000] is not a glob
    if glob.has_magic(source) and not sliced:
        files = files_of_glob(str(path), split)
        if not files.read:
            raise RequestError.of(
                source, "the glob matches no file", _nearest(path) or "check its folder and extension"
            )
        _extend(found, files)
    elif match and ending_of(Path(match["name"])) not in ENDINGS and not local_parent:
        found.read.append(HubSet(match["name"], match["config"] or None, match["split"] or split))
    else:
        raise RequestError.of(
            source, "the file or folder does not exist", _nearest(path) or "use a file path, a glob, or OWNER/NAME"
        )


def _extend(found: Survey, files: Found) -> None:
    found.read += files.read
    for reason, paths in files.left_out.items():
        found.left_out.setdefault(reason, []).extend(paths)


def _package_file(source: str) -> DataFile:
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    folder = find_package(package)
    if folder is None:
        raise RequestError.of(source, f"the package {package} is not installed", f"run pip install {package}")
    path = folder / inside
    if not inside or not path.is_file():
        raise RequestError.of(
            source, "the package does not contain this file", _nearest(path) or "write package:NAME/PATH"
        )
    return known(path)


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
