"""Files behind URLs such as `s3://BUCKET/rows.jsonl`, `gs://`, `hf://` or `memory://`, read through fsspec.

Credentials come from where the file system's package looks for them (environment, configuration files), never from the
URL: places of rows are shown and stored.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ...errors import DistFtError, MachineError, RequestError

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+]*)://(?P<path>.+)")
_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "sha256", "blob_id")  # what file systems tell of the content
_CHANGED = ("LastModified", "last_modified", "updated", "mtime", "created")  # and of the time of the last change


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with the attributes of a path that readers need."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(self.url.split("://", 1)[1])

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """The last extension of the name."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """All extensions of the name."""
        return self._path.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the path, beginning with the bucket or host."""
        return tuple(part for part in self._path.parts if part != "/")

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file; it is read block by block.

        Raises:
            RequestError: The file cannot be opened.
            MachineError: A package is missing.
        """
        with _errors(self.url):
            files, path = _open_system(self.url)
            opened: IO[bytes] = files.open(path, mode)
            return opened

    def size(self) -> int:
        """Return the number of bytes; 0 if the file system does not tell."""
        with _errors(self.url):
            files, path = _open_system(self.url)
            return int(files.info(path).get("size") or 0)

    def digest(self) -> str:
        """Return a hash of the file: what its file system tells of its content, or of the time of its last change.

        If it tells neither, the file is read.
        """
        with _errors(self.url):
            files, path = _open_system(self.url)
            info = files.info(path)
            told = {key: str(info[key]) for key in (*_CONTENT, *_CHANGED) if info.get(key)}
            if told:
                return hashlib.sha256(json.dumps([info.get("size"), told], sort_keys=True).encode()).hexdigest()
            whole = hashlib.sha256()
            with files.open(path, "rb") as file:
                while block := file.read(1 << 22):
                    whole.update(block)
            return whole.hexdigest()


DataFile = Path | RemoteFile


def is_url(source: str) -> bool:
    """Return whether a source is a URL."""
    return _URL.fullmatch(source) is not None


def list_remote(url: str) -> tuple[list[RemoteFile], int] | None:
    """Return the files of a folder or glob, sorted, and the number of fixed parts of its path; None for a file.

    Raises:
        RequestError: The file or folder does not exist, or the URL contains a password or a query.
        MachineError: A package is missing.
    """
    _check(url)
    with _errors(url):
        files, path = _open_system(url)
        if glob.has_magic(path):
            found = files.glob(path)
            parts = RemoteFile(url).parts
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        elif files.isfile(path):
            return None
        elif files.isdir(path):
            found, fixed = files.find(path), len(RemoteFile(url.rstrip("/")).parts)
        else:
            raise RequestError.of(url, "the file or folder does not exist", "check its address and your permissions")
        named = [RemoteFile(files.unstrip_protocol(name)) for name in found if not files.isdir(name)]
        return sorted(named, key=str), fixed


def _check(url: str) -> None:
    host = url.split("://", 1)[1].split("/", 1)[0]
    if "@" in host:
        way_out = "give credentials in the way that the package of this protocol reads them"
        raise RequestError.of(f"{url.split('://', 1)[0]}://…", "contains a user name or password", way_out)
    if "?" in url and url.startswith("http"):
        way_out = "download the file, or use an address without a query"
        raise RequestError.of(url.split("?", 1)[0], "addresses with a query are not supported", way_out)


def _open_system(url: str) -> tuple[Any, str]:
    import fsspec

    files, path = fsspec.url_to_fs(url)
    return files, path


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Raise errors of a file system as errors with a way out."""
    try:
        yield
    except DistFtError:
        raise
    except ImportError as error:  # fsspec's message names the package
        protocol = url.split("://", 1)[0]
        way_out = f"install the fsspec package of this protocol (pip install {_package(protocol)})"
        raise MachineError.of(url, f"the file system {protocol}:// needs a package ({error})", way_out) from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        way_out = "use a protocol of fsspec, such as s3://, gs:// or hf://"
        raise RequestError.of(url, f"the protocol {url.split('://', 1)[0]}:// is not known", way_out) from error
    except Exception as error:  # errors of storage clients share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "check its address, your credentials and the network"
        raise RequestError.of(url, f"cannot be read ({type(error).__name__}: {reason})", way_out) from error


def _package(protocol: str) -> str:
    """Return the package of a protocol: that of its file system's class, as fsspec knows it."""
    from fsspec.registry import known_implementations

    module = known_implementations.get(protocol, {}).get("class", protocol).split(".")[0]
    return "fsspec[http]" if protocol in ("http", "https") else module
