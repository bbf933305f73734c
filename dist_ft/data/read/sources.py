"""What a source names: a file, a glob, a folder, a file of an installed package, or a data set of the hub.

No torch here: the launcher asks for fingerprints while it plans.
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
    """A data set of the Hugging Face hub: `owner/name`, `owner/name:config` or `owner/name:config/split[from:to]`."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}:{self.config or ''}/{self.split}"

    def slice(self) -> tuple[str, int, int | None]:
        """The split, and which of its rows: from the first number, up to but without the second."""
        split, _, rows = self.split.rstrip("]").partition("[")
        first, _, last = rows.partition(":")
        return split, int(first or 0), int(last) if last else None


def ending_of(path: Path) -> str:
    """The ending that tells a file's kind, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def resolve(sources: str | list[str]) -> list[Path | HubSet]:
    """The files and hub sets that `sources` name, in order; those of a glob or a folder are sorted by path.

    Raises:
        RequestError: a source names nothing, or a folder mixes splits or holds no data.
    """
    found: list[Path | HubSet] = []
    for source in [sources] if isinstance(sources, str) else sources:
        found.extend(_resolve(source))
    if not found:
        raise RequestError.of("data", "no source is named", "name a file, a glob, a folder or a hub id")
    return found


def fingerprint(
    sources: str | list[str], revision: str | None = None, digest: Callable[[Path], str] | None = None
) -> str:
    """Hash of what the sources hold: file contents, names and order; for a hub set its id and revision.

    Args:
        sources: as in the configuration.
        revision: hub revision.
        digest: hash of a file's bytes; `digest_file` if not given (cache.py gives one that remembers).

    Raises:
        RequestError: a source names nothing or cannot be read.
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
    """The error for a file that is there and cannot be read."""
    return RequestError(Problem(str(path), f"cannot be read ({error.strerror or error})", "see its permissions"))


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
    sliced = match is not None and "[" in (match["split"] or "")  # as in OWNER/NAME:/train[:1000]
    if glob.has_magic(source) and not sliced:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise RequestError.of(source, "the glob matches no file", _nearest(path) or "see its folder and ending")
        return [_known(file) for file in files]
    if match and ending_of(Path(match["name"])) not in ENDINGS and not local_parent:
        return [HubSet(match["name"], match["config"] or None, match["split"] or "train")]
    raise RequestError.of(
        source, "there is no such file or folder", _nearest(path) or "give the path of a file, a glob, or OWNER/NAME"
    )


def _package_file(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    folder = find_package(package)
    if folder is None:
        raise RequestError.of(source, f"the package {package} is not installed", f"pip install {package}")
    path = folder / inside
    if not inside or not path.is_file():
        raise RequestError.of(source, "the package has no such file", _nearest(path) or "write package:NAME/PATH")
    return _known(path)


def _known(path: Path) -> Path:
    if ending_of(path) not in ENDINGS:
        raise RequestError.of(
            str(path),
            f"the ending {path.suffix or '(none)'!r} tells no kind of data",
            f"known are {' '.join(ENDINGS)} (text kinds also with .gz)",
        )
    return path


def _folder_files(folder: Path) -> list[Path]:
    """The data files of a folder. One that mixes splits would train on the test rows, so it is refused."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and ending_of(path) in ENDINGS)
    if not files:
        raise RequestError.of(
            str(folder), "the folder holds no data file", f"name files or a glob such as {folder}/**/*.jsonl"
        )
    splits = {_SPLITS[stem] for path in files if (stem := path.name.split(".")[0].lower()) in _SPLITS}
    if len(splits) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise RequestError.of(
            str(folder), f"the folder mixes splits ({names})", f"name one of them, such as {folder / files[0].name}"
        )
    return files


def _nearest(path: Path) -> str | None:
    """What to suggest instead of a path that is not there: names near it, or its first folder that is not there."""
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
    return f"in {parent} there are {', '.join(data)}" if data else None
