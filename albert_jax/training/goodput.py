"""Where a run's wall time goes, over all of its lives, and what to do when it stands still.

`Clock` splits the time into kinds. What has to be made again after a kill or a roll-back, and what
a start takes, is `restart`; goodput is the share of `step`. Each checkpoint carries the clock of
its moment, and each line of metrics.jsonl the clock of its own, so that the next life knows both.

`Watchdog` ends a process in which nothing has moved for too long, so that it can be started again.
"""

import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from albert_jax.training import hosts as hosts_lib
from albert_jax.training import run_folder

KINDS = ("step", "data_wait", "compile", "checkpoint", "evaluation", "restart")

_FIELDS = {kind: f"total_{kind}_seconds" for kind in KINDS}
_LAST_WORDS_SECS = 5.0


class Clock:
    """A stopwatch that always runs, for one kind of time at once.

    Args:
        started: when this process began, in `time.monotonic()`; now by default.
    """

    def __init__(self, started: float | None = None) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kind = "restart"
        self._since = time.monotonic() if started is None else started
        self._moved = time.monotonic()

    @property
    def kind(self) -> str:
        """What the time is spent on now."""
        return self._kind

    @property
    def still(self) -> float:
        """Seconds since something moved: a step was finished, or another kind began or ended."""
        return time.monotonic() - self._moved

    def moved(self) -> None:
        """Says that the work gets on."""
        self._moved = time.monotonic()

    def turn_to(self, kind: str) -> None:
        """From now on the time is spent on this."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since, self._moved = kind, now, now

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """A context whose time is spent on this."""
        before = self._kind
        self.turn_to(kind)
        try:
            yield
        finally:
            self.turn_to(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind until now."""
        self.turn_to(self._kind)
        return dict(self._seconds)

    def rewind(
        self, checkpoint: Mapping[str, float], reached: Mapping[str, float] | None = None
    ) -> None:
        """Goes on from a checkpoint: all that came after it was lost.

        Args:
            checkpoint: its `seconds`; nothing for the very beginning.
            reached: how far an earlier life of the run is known to have come, where this one has
                just begun.
        """
        now, then = sum(self.seconds().values()), sum(checkpoint.values())
        if reached is not None:
            now += max(sum(reached.values()), then)
        self._seconds = {kind: checkpoint.get(kind, 0.0) for kind in KINDS}
        self._seconds["restart"] += max(now - then, 0.0)

    def fields(self) -> dict[str, float]:
        """For a line of metrics.jsonl: `goodput` (share of steps) and `total_KIND_seconds`."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return {
            "goodput": seconds["step"] / total,
            **{_FIELDS[kind]: round(seconds[kind], 3) for kind in KINDS},
        }

    def summary(self) -> str:
        """One line for a person."""
        seconds = self.seconds()
        total = sum(seconds.values())
        shares = ", ".join(
            f"{kind.replace('_', ' ')} {seconds[kind] / total:.1%}"
            for kind in KINDS
            if seconds[kind] >= 0.0005 * total
        )
        return f"time: {_duration(total)} in all: {shares}"


def read_fields(row: Mapping[str, float]) -> dict[str, float]:
    """The seconds that `Clock.fields` put into a line; nothing from a line without them."""
    return {kind: row[field] for kind, field in _FIELDS.items() if field in row}


class Watchdog:
    """A context in which standing still is fatal.

    Then the stacks of all threads go to standard error and to `stacks-PROCESS.txt` in `folder`, and
    the process leaves with exit code 1.

    Args:
        clock: of the run.
        minutes: how long nothing may move; 0 for ever.
        folder: the workdir.
        hosts: the processes of the run.
    """

    def __init__(
        self, clock: Clock, minutes: float, folder: pathlib.Path, hosts: hosts_lib.Hosts
    ) -> None:
        self._clock, self._seconds, self._hosts = clock, 60.0 * minutes, hosts
        self._path = folder / f"stacks-{hosts.index}.txt"
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(max(self._seconds - self._clock.still, 0.05)):
            if self._clock.still < self._seconds:
                continue
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            with contextlib.suppress(OSError), self._path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            run_folder.within(10.0, lambda: run_folder.flush(self._path.parent))
            # If one process stands still all do; each should be heard before the first one leaves.
            time.sleep(_LAST_WORDS_SECS if self._hosts.count > 1 else 0.0)
            self._hosts.leave(
                f"nothing has moved for {self._seconds / 60:.3g} minutes "
                f"(train.stall_minutes), in {self._clock.kind.replace('_', ' ')}; the stacks of "
                f"all threads are in {self._path}; {self._hosts.outlook()}"
            )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
