"""Local copies of what a store in a bucket holds: made on first use, verified, and kept.

In:  a store's place, a folder, and the files that are wanted, with their sizes and hashes.
Out: these files in the folder, each with the bytes that its hash names.

A file gets its name when it is whole, verified and on the disk itself, so a copying that was killed
goes on where it was, file by file. Processes that copy into one folder take turns. Under a global
shuffle every host needs every shard: two bytes a token on each host's disk (four with a vocabulary
of over 65,536), and a sixth on top for where sentences begin.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from albert_jax import progress as progress_lib
from albert_jax import storage
from albert_jax.errors import UserError

_AT_ONCE = 8  # files
_UNFINISHED = ".part"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a store.

    Attributes:
        name: from the store's folder on.
        size: bytes.
        sha256: hexadecimal.
    """

    name: str
    size: int
    sha256: str


def complete(place: str, folder: Path, files: Sequence[File]) -> None:
    """Copies what is missing.

    Raises:
        UserError: the store cannot be reached, or is damaged; the disk is too small.
    """
    if not _missing(folder, files):
        return
    with _turn(folder):
        missing = _missing(folder, files)
        total = sum(file.size for file in missing)
        _check_room(place, folder, total)
        with progress_lib.Progress("copy store", total, "B") as progress:
            pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
            try:
                copies = [pool.submit(_copy, place, folder, file, progress) for file in missing]
                for copy in concurrent.futures.as_completed(copies):
                    copy.result()
            finally:
                pool.shutdown(cancel_futures=True)


def drop(folder: Path, files: Sequence[File]) -> None:
    """Deletes copies. Who has one memory-mapped keeps it."""
    for file in files:
        (folder / file.name).unlink(missing_ok=True)


def _missing(folder: Path, files: Sequence[File]) -> list[File]:
    missing = []
    for file in files:
        path = folder / file.name
        if not path.exists() or path.stat().st_size != file.size:
            missing.append(file)
    return missing


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Holds the folder, when its turn has come."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"note: waits for another process that copies to {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_room(place: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the local copy of {place} needs {needed / 1e9:.1f} GB more in {folder}, where "
            f"{free / 1e9:.1f} GB are free. Make room, set {storage.CACHE} to a folder on a larger "
            "disk, mount the bucket and give its path, or train with data.shuffle=shard."
        )


def _copy(place: str, folder: Path, file: File, progress: progress_lib.Progress) -> None:
    source, path = storage.join(place, file.name), folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        found = storage.download(source, unfinished, progress.advance)
    except FileNotFoundError:
        raise UserError(f"{source} is missing; copy or prepare the store again.") from None
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: no room for {source} in {folder}. Make room, or set "
                f"{storage.CACHE} to a folder on a larger disk."
            ) from None
        raise
    if found != file.sha256:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"{source} is damaged: its SHA-256 begins {found[:12]}, in the manifest it begins "
            f"{file.sha256[:12]}. Copy or prepare the store again."
        )
    unfinished.replace(path)
