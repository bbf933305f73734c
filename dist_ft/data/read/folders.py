"""Data files of a folder or a glob, and which of them belong to a split.

The split is recognised by name as on the Hugging Face Hub: `train-00000-of-00002.parquet`, `squad_train.json`,
`test/part-1.jsonl`. Either the names of all files say their split or those of none; a mixture is an error, because the
remaining files could be anything.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import Problem, RequestError
from .remote import DataFile, RemoteFile, list_remote

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings after those of text formats
_WORDS = {  # as in datasets (data_files.py), which counts `eval` as a test split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"({'|'.join(_WORDS)})(?:sets?|data)?")
_DOCUMENTS = {"readme", "license", "licence", "notice", "changelog", "changes", "citation", "copying", "authors"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SHOWN_FILES = 3
_MOST_ENTRIES = 10_000  # looked at in a subfolder whose files are only counted


@dataclass
class Found:
    """Data files of a source that are read, and those beside them that are not, by reason."""

    read: list[DataFile] = field(default_factory=list)
    left_out: dict[str, list[DataFile]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: DataFile) -> None:
        """Add a file that is not read."""
        self.left_out.setdefault(reason, []).append(path)


def ending_of(path: DataFile) -> str:
    """Return the lowercase file extension that determines the data format, ignoring that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def split_of(name: str) -> str | None:
    """Return the split that the name of a file or folder says, or None.

    The word may be anywhere in the name (`squad_train_v2.json`). Names of `.txt` files are often titles, so that only
    their first and last word count.

    Raises:
        RequestError: The name has the words of several splits, such as `train_test.jsonl`.
    """
    stem = name.lower()
    for ending in (*COMPRESSED, *ENDINGS):
        stem = stem.removesuffix(ending)
    words = [word for word in re.split(r"[^a-z]+", stem) if word]
    if ending_of(Path(name)) == ".txt":
        words = [*words[:1], *words[-1:]]
    found = dict.fromkeys(_WORDS[match[1]] for word in words if (match := _WORD.fullmatch(word)))
    if len(found) > 1:
        rule = f"the name has the words of several splits ({', '.join(found)})"
        raise RequestError(Problem(name, rule, "name the files of each split one by one, as a list"))
    return next(iter(found), None)


def files_of_folder(folder: Path, split: str) -> Found:
    """Return the data files of a folder that belong to `split`, sorted by path.

    Files in a subfolder are read if its name says a split, or if it is the only one with data and the folder itself
    has none (`data/` of Hub repositories). A folder of `save_to_disk` gives the files that its state.json lists. Hidden
    files are ignored.

    Raises:
        RequestError: The folder contains no data file or none of this split, or only some names say their split.
    """
    if (saved := _saved(folder, split)) is not None:
        return saved
    found, named = Found(), list[tuple[DataFile, str | None]]()
    below: dict[Path, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            its_split = _split_of_folder(entry)
            inside = _data_files_below(entry, None if its_split else _MOST_ENTRIES)
            if its_split is not None:
                named += [(path, its_split) for path in inside]
            elif inside:
                below[entry] = inside
        elif (reason := _why_no_rows(entry)) is not None:
            found.leave_out(reason, entry)
        else:
            named.append((entry, split_of(entry.name)))
    if not named and len(below) == 1:
        return files_of_folder(next(iter(below)), split)
    for paths in below.values():
        for path in paths:
            found.leave_out("in a subfolder", path)
    if not named:
        hint = f"{next(iter(below))}" if below else f"{folder}/**/*.jsonl"
        rule = "the folder contains no data file" + (", only its subfolders do" if below else "")
        raise RequestError.of(str(folder), rule, f"use files, a folder or a glob such as {hint}")
    _take(found, named, split, str(folder))
    return found


def _split_of_folder(folder: Path) -> str | None:
    try:
        return split_of(folder.name)
    except RequestError:  # its name has the words of several splits; its files are left out
        return None


def _data_files_below(folder: Path, most: int | None) -> list[Path]:
    """Return the data files in a folder and its subfolders, of the first `most` entries, without hidden ones."""
    shown = (
        path
        for path in islice(folder.rglob("*"), most)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(path for path in shown if path.is_file() and _why_no_rows(path) is None)


def files_of_glob(pattern: str, split: str) -> Found:
    """Return the data files that match a glob and belong to `split`, sorted by path; empty if nothing matches.

    If the pattern itself says a split (`test-*.parquet`), all matching files are read.

    Raises:
        RequestError: No matching file is a data file or of this split, or only some names say their split.
    """
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    found, kept = Found(), list[DataFile]()
    for path in paths:
        if (reason := _why_no_rows(path)) is not None:
            found.leave_out(reason, path)
        else:
            kept.append(path)
    if paths and not kept:
        raise unsupported(paths[0])
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate([*parts, "*"]) if glob.has_magic(part))
    if any(split_of(part) for part in (*parts[fixed:], parts[-1])):
        found.read = kept
    elif kept:
        _take(found, [(path, _split_below(path, fixed)) for path in kept], split, pattern)
    return found


def files_of_url(url: str, split: str) -> Found:
    """Return the data files behind a URL that belong to `split`: of a folder or glob as above, or the file itself.

    Raises:
        RequestError: As for local files, or the URL cannot be read.
        MachineError: A package is missing.
    """
    if (listed := list_remote(url)) is None:
        return Found([known(RemoteFile(url))])
    files, fixed = listed
    found, kept = Found(), list[RemoteFile]()
    for file in files:
        if (reason := _why_no_rows(file)) is not None:
            found.leave_out(reason, file)
        elif not any(part.startswith(".") for part in file.parts[fixed:]):
            kept.append(file)
    if not kept:
        raise RequestError.of(url, "contains no data file", "use files, a folder or a glob such as FOLDER/*.jsonl")
    if glob.has_magic(url):
        if any(split_of(part) for part in (*RemoteFile(url).parts[fixed:], RemoteFile(url).name)):
            found.read = list(kept)
        else:
            _take(found, [(file, _split_below(file, fixed)) for file in kept], split, url)
        return found
    tops = {file.parts[fixed] for file in kept}
    is_below = all(len(file.parts) > fixed + 1 for file in kept)
    if is_below and len(tops) == 1 and split_of(top := next(iter(tops))) is None:
        return files_of_url(f"{url.rstrip('/')}/{top}", split)
    named = list[tuple[DataFile, str | None]]()
    for file in kept:
        its_split = split_of(file.parts[fixed])
        if len(file.parts) > fixed + 1 and its_split is None:
            found.leave_out("in a subfolder", file)
        else:
            named.append((file, its_split))
    _take(found, named, split, url)
    return found


def known(path: DataFile) -> DataFile:
    """Return the path of a data file.

    Raises:
        RequestError: Its extension is not that of a data format.
    """
    if ending_of(path) not in ENDINGS:
        raise unsupported(path)
    return path


def unsupported(path: DataFile) -> RequestError:
    """Return the error for a file whose extension is not that of a data format."""
    rule = f"the file extension {path.suffix or '(none)'!r} is not supported"
    way_out = f"use one of {' '.join(ENDINGS)} (text formats also with {' '.join(COMPRESSED)})"
    return RequestError(Problem(str(path), rule, way_out))


def describe_left_out(left_out: Mapping[str, Sequence[DataFile]]) -> str:
    """Return the number and first names of the files that are not read, by reason."""
    parts = []
    for reason, paths in left_out.items():
        names = ", ".join(path.name for path in paths[:SHOWN_FILES]) + (", …" if len(paths) > SHOWN_FILES else "")
        parts.append(f"{len(paths)} file{'s' * (len(paths) != 1)} ({reason}): {names}")
    return "; ".join(parts)


def _why_no_rows(path: DataFile) -> str | None:
    """Return why a file is not read as rows, or None if it is."""
    if ending_of(path) not in ENDINGS:
        return "not a data format"
    if path.name.split(".")[0].lower() in _DOCUMENTS:
        return "documentation"
    return "metadata" if path.name in _METADATA else None


def _split_below(path: DataFile, fixed: int) -> str | None:
    """Return the split that the name of a file says, or else that of the nearest folder below the first `fixed`."""
    for part in reversed(path.parts[fixed:]):
        if (found := split_of(part)) is not None:
            return found
    return None


def _take(found: Found, named: Sequence[tuple[DataFile, str | None]], split: str, source: str) -> None:
    """Add the files of `split` to those that are read, and all others to those that are left out."""
    own = [path for path, its in named if its == split]
    unnamed = [path for path, its in named if its is None]
    if len(unnamed) == len(named):
        found.read = unnamed
        return
    splits = "; ".join(
        f"{its}: {_listed(paths)}"
        for its in dict.fromkeys(_WORDS.values())
        if (paths := [path for path, i in named if i == its])
    )
    way_out = f"name the files or a glob that are data.{split}, such as {named[0][0]}"
    if unnamed:
        rule = f"the names of some files say their split ({splits}), those of others do not ({_listed(unnamed)})"
        raise RequestError(Problem(source, rule, way_out))
    if not own:
        raise RequestError(Problem(source, f"contains no {split} rows ({splits})", way_out))
    found.read = own
    for path, its in named:
        if its != split:
            found.leave_out(f"split {its}", path)


def _listed(paths: Sequence[DataFile]) -> str:
    shown = ", ".join(path.name for path in paths[:SHOWN_FILES])
    return shown + (f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else "")


def _saved(folder: Path, split: str) -> Found | None:
    """Return the files of a data set or dictionary of data sets saved with `save_to_disk`, or None for others."""
    if (folder / "dataset_dict.json").is_file():
        parts = [folder / name for name in _read_json(folder / "dataset_dict.json")["splits"]]
        found = Found()
        _take(found, [(part, split_of(part.name)) for part in parts], split, str(folder))
        read = [path for part in parts if part in found.read for path in (_saved(part, split) or Found()).read]
        return Found(read, found.left_out)
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    return Found([folder / file["filename"] for file in _read_json(folder / "state.json")["_data_files"]])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError.of(str(path), f"cannot be read ({error})", "save the data set again") from error
