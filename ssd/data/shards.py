"""Files that are read in ranges, wherever they lie: on this machine, behind a URL, or as what a command prints.

What gives ranges (https servers that know Range, s3:// and the like by fsspec) is read in place. What does not
(servers without Range, `pipe:COMMAND` as WebDataset's reader takes) is fetched once into the cache folder, which is said.
The cache folder is `~/.cache/ssd`, or what the environment variable SSD_CACHE names.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import wrap_file

from ssd.errors import UserError

OPEN_FILES = 128  # that a process keeps: systems allow about a thousand, and data may lie in more shards
AHEAD_BYTES = 1 << 20  # of a pass from start to end, in one request
ATTEMPTS = 5
PATIENCE_S, SLOWEST = 60.0, 100_000  # for an answer to begin, and bytes a second that are still waited for
FIRST_WAIT_S = 0.5
TIMEOUT_S = 60


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


class Shard:
    """A file that is read in ranges.

    Args:
        name: what the user calls it.
        size: bytes.
        stamp: changes when the content does, as far as that can be told without reading it.
        index_file: where what is known of the content may be kept.
    """

    def __init__(self, name: str, size: int, stamp: str, index_file: Path):
        self.name, self.size, self.stamp, self.index_file = name, size, stamp, index_file

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes at the end of the file. Raises OSError where this file is damaged or gone, UserError where its
        place cannot be reached."""
        raise NotImplementedError

    def ahead(self) -> "Shard":
        """The same, for small reads from start to end."""
        return self


class LocalShard(Shard):
    def __init__(self, path: str | Path, name: str | None = None):
        status = os.stat(path)
        super().__init__(name or str(path), status.st_size, str(status.st_mtime_ns), Path(f"{path}.index.json"))
        self.path, self._inode = str(path), status.st_ino

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(opened(self.path, self._inode).number, size, offset)


class Descriptor:
    """A file that is open, until nobody holds it."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def opened(path: str, inode: int) -> Descriptor:
    """For reading, by one of the files that were read last; `inode` tells it from another of that name.

    Processes that are forked share it, which `pread` does not mind: it has no place in the file.
    """
    return Descriptor(os.open(path, os.O_RDONLY))


class RemoteShard(Shard):
    """A URL of any kind that fsspec reads, in ranges. A request that fails is repeated a few times, later each time."""

    def __init__(self, url: str, size: int, stamp: str):
        super().__init__(url, size, stamp, cached(url, ".index.json"))

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        for attempt in range(ATTEMPTS):
            try:
                filesystem, path = filesystem_of(self.name)  # of this process: fsspec keeps one for each
                # a connection may die without a word, and would be waited for for ever
                patience = {"timeout": PATIENCE_S + size / SLOWEST} if filesystem.async_impl else {}
                data = filesystem.cat_file(path, start=offset, end=offset + size, **patience)
                break
            except FileNotFoundError:
                raise UserError(f"'{self.name}' is gone. It was there when the run began.") from None
            except Exception as error:  # each kind of place has its own
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"'{self.name}' cannot be read, after {ATTEMPTS} attempts: {type(error).__name__}: {error}. When it "
                        "can be reached again, go on from the last checkpoint."
                    ) from None
                time.sleep(FIRST_WAIT_S * 2**attempt)
        if len(data) > size:
            raise UserError(
                f"'{self.name}' gave {len(data)} bytes where {size} were asked for: it has lost its ranges."
            )
        return data

    def ahead(self) -> Shard:
        return ReadAhead(self)


class ReadAhead(Shard):
    """A shard whose small reads are served from larger ones."""

    def __init__(self, shard: Shard, block: int = AHEAD_BYTES):
        super().__init__(shard.name, shard.size, shard.stamp, shard.index_file)
        self.shard, self.block = shard, block
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if size > self.block:
            return self.shard.read(offset, size)
        if not (self._start <= offset and offset + size <= self._start + len(self._data)):
            self._start, self._data = offset, self.shard.read(offset, self.block)
        return self._data[offset - self._start : offset - self._start + size]


def open_shard(path: str) -> Shard:
    """Raises UserError for what cannot be reached or fetched."""
    if path.startswith("pipe:"):
        return LocalShard(fetched(path, "", lambda file: printed(path, file)), path)
    if path.startswith(("http://", "https://")):
        return open_web(path)
    return open_other(path) if is_remote(path) else LocalShard(path)


def open_web(url: str) -> Shard:
    with answer(url, {"Range": "bytes=0-0"}) as found:
        stamp = found.headers.get("ETag") or found.headers.get("Last-Modified") or ""
        whole = re.fullmatch(r"bytes 0-0/(\d+)", found.headers.get("Content-Range", ""))
        if found.status == 206 and whole:
            return RemoteShard(url, int(whole[1]), stamp)
        size = int(found.headers.get("Content-Length", -1))
    if not is_fetched(url, f"{stamp} {size}"):
        warnings.warn(f"{url}: its server gives no ranges, so it is fetched whole into {cache_folder()}.", stacklevel=2)
    return LocalShard(fetched(url, f"{stamp} {size}", lambda file: downloaded(url, size, file)), url)


def open_other(url: str) -> Shard:
    """s3://, gs:// and what else fsspec knows."""
    try:
        filesystem, path = filesystem_of(url)
        about = filesystem.info(path)
        return RemoteShard(url, int(about["size"]), str(about.get("ETag") or filesystem.ukey(path)))
    except ImportError as error:
        raise UserError(
            f"'{url}' needs a package: {error}. Install it, for instance with pip install 'ssd[remote]'."
        ) from None
    except FileNotFoundError:
        raise UserError(f"there is no shard '{url}'.") from None
    except Exception as error:  # each kind of place has its own
        raise UserError(f"'{url}' cannot be opened: {type(error).__name__}: {error}.") from None


def filesystem_of(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    web = {"client_kwargs": {"trust_env": True}} if url.startswith("http") else {}
    return url_to_fs(url, use_listings_cache=False, **web)


def answer(url: str, headers: dict[str, str]) -> Any:
    """Of a web server, its body not yet read. Raises UserError where there is none."""
    request = urllib.request.Request(url, headers=headers)
    for attempt in range(ATTEMPTS):
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise UserError(f"there is no shard '{url}' ({error.code} {error.reason}).") from None
            if error.code == 416:
                raise UserError(f"'{url}' is empty. Write it again.") from None
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise UserError(f"'{url}' is refused: {error.code} {error.reason}. May it be read from here?") from None
        except (OSError, ValueError) as error:
            if attempt == ATTEMPTS - 1 or isinstance(error, ValueError):
                raise UserError(f"'{url}' cannot be reached: {error}. Is the address right?") from None
        time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


# ---------------------------------------------------------------------- what is fetched whole


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("SSD_CACHE") or os.path.join(base, "ssd"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be made ({error.strerror}). Name another in the environment variable "
            "SSD_CACHE."
        ) from None
    return folder


def cached(address: str, suffix: str) -> Path:
    """A file for what belongs to an address."""
    return cache_folder() / (hashlib.sha256(address.encode()).hexdigest()[:32] + suffix)


def is_fetched(address: str, stamp: str) -> bool:
    return cached(f"{address} {stamp}", ".tar").is_file()


def fetched(address: str, stamp: str, write: Callable[[BinaryIO], None]) -> Path:
    """The file that `write` fills, once for all runs and processes of this machine."""
    file = cached(f"{address} {stamp}", ".tar")
    with locked(file.with_suffix(".lock")):
        if file.is_file():
            return file
        unfinished = file.with_suffix(f".{os.getpid()}")
        try:
            with open(unfinished, "wb") as out:
                write(out)
            os.replace(unfinished, file)
        except OSError as error:
            raise UserError(
                f"'{address}' cannot be kept in {file.parent}: {error.strerror or error}. Make room there, or name another "
                "folder in the environment variable SSD_CACHE."
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)
    return file


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    import fcntl

    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def downloaded(url: str, size: int, out: BinaryIO) -> None:
    free = shutil.disk_usage(cache_folder()).free
    if size > free:
        raise OSError(f"{size / 2**30:.1f} GiB do not fit into the {free / 2**30:.1f} GiB that are free")
    with answer(url, {}) as found:
        shown = wrap_file(found, max(size, 0), description=url.rpartition("/")[2], disable=not sys.stdout.isatty())
        with shown as body:
            for piece in pieces(body, url):
                out.write(piece)
    if size >= 0 and out.tell() != size:
        raise UserError(f"'{url}' broke off after {out.tell()} of {size} bytes. Start again.")


def pieces(body: BinaryIO, url: str) -> Iterator[bytes]:
    """What arrives, to its end. Raises UserError where the connection breaks, which is no fault of the disk."""
    try:
        while piece := body.read(AHEAD_BYTES):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"'{url}' broke off: {type(error).__name__}: {error}. Start again.") from None


def printed(address: str, out: BinaryIO) -> None:
    """What the command behind `pipe:` writes to its standard output."""
    command = address.removeprefix("pipe:").strip()
    done = subprocess.run(command, shell=True, stdout=out, stderr=subprocess.PIPE, check=False)
    if done.returncode or not os.fstat(out.fileno()).st_size:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"'{address}' gave no shard: the command ended with status {done.returncode}"
            f"{': ' + said[-1] if said else ' and printed nothing'}."
        )
