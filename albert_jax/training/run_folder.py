"""A run's folder, wherever it lies: on a disk it is itself, for one in a bucket stands a local one.

In:  a place: a path, or gs://BUCKET/RUN.
Out: a local folder that has the run's small files, to be read and written like any other. What is
     written there goes to the bucket in the background, a whole object at a time; checkpoints are
     never local: Orbax reads and writes them in the bucket (`checkpoints`).

Promises, of a run in a bucket:
- What was written before a call of `flush` is in the bucket when it returns. The loop calls it
  before each checkpoint, so that whatever kills the run, metrics.jsonl has all lines up to the
  newest checkpoint, as on a disk. In between, lines are there after `_PAUSE` seconds.
- Writing in the background does not fail silently: `flush` raises what went wrong.
- One process at a time writes a run (`claim`).
A run on a disk takes none of these paths: `opened` gives its folder back, `flush` does nothing.
"""

import atexit
import contextlib
import fcntl
import functools
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from albert_jax import storage
from albert_jax.errors import UserError

CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_PAUSE = 5.0  # seconds between two looks at what has changed
_BUSIEST = 0.1  # share of the time that the background may upload
# What a run that goes on does not read again.
_LEFT_THERE = (CHECKPOINTS, "tensorboard", "profile", "report", "compilation_cache", _LOCK)


class _Mirror:
    """A local folder, and the place in a bucket that it stands for."""

    def __init__(self, place: str, folder: pathlib.Path) -> None:
        self.place, self.folder = place, folder
        self.claims: list[storage.Claim] = []
        self._known: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, deep: bool = True) -> None:
        """Copies the small files from there; without `deep`, none that is in a folder below."""
        for name in storage.listing(self.place):
            parts = pathlib.PurePosixPath(name).parts
            if any(part in _LEFT_THERE for part in parts) or ".." in parts:
                continue
            if len(parts) > 1 and not deep:
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                storage.download(storage.join(self.place, name), path)
                self._known[name] = _state(path)

    def start(self) -> None:
        """Begins to upload in the background."""
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    def flush(self) -> None:
        """Uploads all that has changed.

        Raises:
            UserError: the bucket cannot be written, or is another process's by now.
        """
        for claim in self.claims:
            claim.check()
        with self._turn:
            for path in sorted(self.folder.rglob("*")):
                if path.suffix == ".tmp" or not path.is_file():
                    continue
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # gone while we looked
                    state = _state(path)
                    if self._known.get(name) != state:
                        storage.upload(path, storage.join(self.place, name))
                        self._known[name] = state

    def _work(self) -> None:
        pause = _PAUSE
        while not self._over.wait(pause):
            began = time.monotonic()
            with contextlib.suppress(UserError, OSError):
                self.flush()  # the next call from outside finds what failed here, and says so
            pause = max(_PAUSE, (time.monotonic() - began) / _BUSIEST)


_mirrors: dict[pathlib.Path, _Mirror] = {}


@contextlib.contextmanager
def opened(place: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder of a run that is to be written to, as long as the context is open.

    Raises:
        UserError: the bucket cannot be reached; when the context is left: it could not be written.
    """
    if not storage.is_remote(place):
        yield pathlib.Path(place)
        return
    folder = _local_folder(place)
    mirror = _mirrors[folder] = _Mirror(storage.named(place), folder)
    mirror.fetch()
    mirror.start()
    try:
        yield folder
    except BaseException as error:
        if not storage.is_lost(error):  # else there is nothing to write to
            with contextlib.suppress(UserError, OSError):
                mirror.flush()
        raise
    else:
        mirror.flush()
    finally:
        mirror.stop()


@functools.cache
def fetched(place: str | pathlib.Path) -> pathlib.Path:
    """A folder or file to read: a run, or another model. What is in a bucket is copied to the local
    disk until the process ends, but for a run's checkpoints, which `checkpoints` names. With a file
    come those beside it: of a checkpoint of Google's or of a table, they belong to it.

    Raises:
        UserError: the bucket cannot be reached, or has nothing there.
    """
    if not storage.is_remote(place):
        return pathlib.Path(place)
    place = storage.named(place)
    name = ""
    if not storage.listing(place):  # a file, or what names of files begin with
        place, _, name = place.rpartition("/")
        if not any(one.startswith(name) for one in storage.listing(place)):
            raise UserError(f"there is nothing at {place}/{name}.")
    folder = _local_folder(place)
    mirror = _mirrors[folder] = _Mirror(place, folder)
    mirror.fetch(deep=not name)
    if any(one.startswith(f"{CHECKPOINTS}/") for one in storage.listing(place)):
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    return folder / name


def flush(workdir: pathlib.Path) -> None:
    """Sees to it that what was written to a run's folder is where the run lies.

    Raises:
        UserError: the bucket cannot be written, or is another process's by now.
    """
    if (mirror := _mirror_of(workdir)) is not None:
        mirror.flush()


def checkpoints(workdir: pathlib.Path) -> Any:
    """Where the checkpoints of a run are, as Orbax wants it: a path of a disk or of a bucket."""
    place = remote(workdir, CHECKPOINTS)
    return storage.checkpoint_folder(place) if place else workdir / CHECKPOINTS


def remote(workdir: pathlib.Path, name: str = "") -> str:
    """The place in a bucket that a run's folder, or something in it, stands for; "" on a disk."""
    mirror = _mirror_of(workdir)
    if mirror is None:
        return ""
    below = (workdir.relative_to(mirror.folder) / name).as_posix()
    return mirror.place if below == "." else storage.join(mirror.place, below)


def named(workdir: pathlib.Path) -> str:
    """A run's folder, or a path in it, as its user knows it."""
    return remote(workdir) or str(workdir)


def spoken(text: str) -> str:
    """A message with the local folders in it named as their user knows them."""
    for folder, mirror in _mirrors.items():
        text = text.replace(str(folder), mirror.place)
    return text


def claim(workdir: pathlib.Path) -> contextlib.AbstractContextManager[Any]:
    """Keeps other processes from writing this run, while the context is open.

    Raises:
        UserError: one does, or the folder cannot be written.
    """
    mirror = _mirror_of(workdir)
    if mirror is not None:
        busy = f"--workdir={named(workdir)}: {{}} is training there."
        held = storage.Claim(remote(workdir, _LOCK), busy)
        workdir.mkdir(parents=True, exist_ok=True)
        mirror.claims.append(held)
        return held
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--workdir={workdir}: another process is training there.") from None
    return lock


def has(workdir: pathlib.Path, name: str) -> bool:
    """Whether the run has a file, wherever it lies; another process may have written it."""
    place = remote(workdir, name)
    return storage.exists(place) if place else (workdir / name).exists()


def within(seconds: float, work: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `work` returns, or `otherwise` where it fails or takes longer: for last words."""
    found = [otherwise]

    def run() -> None:
        with contextlib.suppress(Exception):
            found[0] = work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def _mirror_of(path: pathlib.Path) -> _Mirror | None:
    for folder in (path, *path.parents) if _mirrors else ():
        if folder in _mirrors:
            return _mirrors[folder]
    return None


def _local_folder(place: str | pathlib.Path) -> pathlib.Path:
    """A new folder that goes when the process ends, named as the place."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="albert_jax-")).resolve()
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    folder = above / storage.named(place).rpartition("/")[2]
    folder.mkdir()
    return folder


def _state(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
