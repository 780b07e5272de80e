"""A job's files between machines that share a folder, or nothing but a bucket.

In:  a task and its jobs (see `beam`), made out to a folder of the machine that leads the work.
Out: what the task writes, in that folder, as if the machine had done it itself.

Through a bucket (`Exchange`): the leader sends what a job `needs` beside its input. A worker does
the job in a folder of its own and sends what it wrote, the record last, so that a job is there
whole or not at all; one that is there from a work that was stopped is brought back and, if the task
finds it unharmed, kept. The leader then fetches all.

The arrays of a store go to where they are to be in the end, the rest beside it, under
`PLACE.unfinished/TASK`. What is fetched takes the room of the store on the leader's disk.
"""

import concurrent.futures
import contextlib
import dataclasses
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from albert_jax import progress as progress_lib
from albert_jax import storage
from albert_jax.data import store
from albert_jax.errors import UserError

_AT_ONCE = 8  # requests
FAILED = ".failed"


@dataclasses.dataclass(frozen=True)
class Shared:
    """A folder that all machines see: there is nothing to exchange.

    Attributes:
        folder: that of the jobs.
    """

    folder: Path

    def send_needs(self, jobs: Sequence[Any]) -> None:
        """As `Exchange.send_needs`."""
        for job in jobs:
            self._failed(job).unlink(missing_ok=True)

    def work(self, job: Any, do: Callable[[Any], Any]) -> None:
        """As `Exchange.work`.

        Raises:
            UserError: the folder is not seen from here.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is not seen from {socket.gethostname()}; --output must be at a "
                "place that all machines share, or in a bucket."
            )
        do(job)

    def fail(self, job: Any, message: str) -> None:
        """As `Exchange.fail`."""
        self._failed(job).write_text(message, encoding="utf-8")

    def names(self) -> set[str]:
        """As `Exchange.names`."""
        return {path.name for path in self.folder.iterdir()}

    def failure(self, job: Any) -> str:
        """As `Exchange.failure`."""
        return self._failed(job).read_text(encoding="utf-8")

    def fetch(self, jobs: Sequence[Any]) -> None:
        """As `Exchange.fetch`."""

    def _failed(self, job: Any) -> Path:
        return self.folder / f"{job.name}{FAILED}"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A bucket, through which the files of a task's jobs go.

    Attributes:
        place: of the store to be, gs://….
        task: its name.
    """

    place: str
    task: str

    def send_needs(self, jobs: Sequence[Any]) -> None:
        """The leader's part before the work: what the jobs need; and no failure of an old one."""
        names = {
            path.relative_to(job.folder).as_posix(): path for job in jobs for path in job.needs
        }
        old = [name for name in self.names() if name.endswith(FAILED)]
        for _ in _all(lambda name: storage.upload(names[name], self._of(name)), names):
            pass
        for name in old:
            storage.delete(self._of(name))

    def work(self, job: Any, do: Callable[[Any], Any]) -> None:
        """The worker's part: `do` with the job, which is made out to a folder of its own here."""
        with tempfile.TemporaryDirectory(prefix="albert_jax-") as folder:
            there = job.moved(Path(folder))
            for path in there.needs:
                self._download(path.relative_to(there.folder).as_posix(), there.folder)
            record = there.folder / f"{job.name}.json"
            names = self.names()
            for name in self._written(job, names) if record.name in names else ():
                self._download(name, there.folder)
            before = _files(there)
            do(there)
            # What was written is another file, though it may hold the same.
            new = [name for name, state in _files(there).items() if before.get(name) != state]
            for name in sorted(new, key=lambda name: name == record.name):
                storage.upload(there.folder / name, self._of(name))

    def fail(self, job: Any, message: str) -> None:
        """Tells the leader what is wrong with a job."""
        storage.write(self._of(f"{job.name}{FAILED}"), message.encode())

    def names(self) -> set[str]:
        """Of the records and failures that are there."""
        return {name for name in storage.listing(self._of("")) if "/" not in name}

    def failure(self, job: Any) -> str:
        """What `fail` has told of a job."""
        return storage.read(self._of(f"{job.name}{FAILED}")).decode()

    def fetch(self, jobs: Sequence[Any]) -> None:
        """The leader's part after the work: brings what was written, the record last."""
        names = self.names()
        size = sum(unit.size for job in jobs for unit in job.units)
        with progress_lib.Progress("fetch", size, "B") as progress:

            def bring(job: Any) -> None:
                record = f"{job.name}.json"
                for name in [n for n in self._written(job, names) if n != record] + [record]:
                    self._download(name, job.folder)

            for job in _all(bring, jobs):
                progress.advance(sum(unit.size for unit in job.units))

    def _written(self, job: Any, there: set[str]) -> list[str]:
        """The files of a job that is done, from its folder on."""
        begun = f"{job.name}."
        names = [name for name in there if name.startswith(begun)]
        if self.task == "complete":
            names += [
                f"{split}/{begun}{array}.npy" for split in store.SPLITS for array in store.ARRAYS
            ]
        return names

    def _of(self, name: str) -> str:
        if name.partition("/")[0] in store.SPLITS:
            return storage.join(self.place, name)
        return f"{storage.named(self.place)}{store.UNFINISHED}/{self.task}/{name}"

    def _download(self, name: str, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), store.appearing(path) as unfinished:
            storage.download(self._of(name), unfinished)


def clear(place: str) -> None:
    """Deletes all that was exchanged for a store, but for the store itself."""
    storage.delete_folder(f"{storage.named(place)}{store.UNFINISHED}")


def _files(job: Any) -> dict[str, tuple[int, int]]:
    """The files that a job has written, from its folder on, and what tells one from another."""
    states = {path: path.stat() for path in job.folder.rglob(f"{job.name}.*")}
    return {
        path.relative_to(job.folder).as_posix(): (state.st_ino, state.st_mtime_ns)
        for path, state in states.items()
        if path not in job.needs
    }


def _all(do: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
    """Does it with all of them, several at a time; each again, when it is done."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            doing = {pool.submit(do, thing): thing for thing in things}
            for done in concurrent.futures.as_completed(doing):
                done.result()
                yield doing[done]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
