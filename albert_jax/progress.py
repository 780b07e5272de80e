"""Progress of long work: a live bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TextIO, TypeVar

import tqdm

Thing = TypeVar("Thing")


class Progress:
    """Counts towards `total` and shows it.

    with Progress("prepare", total=bytes_in, unit="B") as progress:
        progress.advance(4096, "12 documents")

    On a terminal: one line redrawn by tqdm. Elsewhere: a line at the start of each
        `plain_every_secs`.

    Args:
        label: what is being done, one word.
        total: how many units make it whole; None where nobody knows.
        unit: "B" shows as kB/MB, anything else as it is.
        initial: units done before this process began.
        stream: where to write; standard error by default, so that standard output stays data.
        plain_every_secs: pause between two plain lines.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        plain_every_secs: float = 10.0,
    ) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._plain_every_secs = plain_every_secs
        self._next_plain = time.monotonic() + min(2.0, plain_every_secs)
        self._bar = tqdm.tqdm(
            desc=label,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            initial=initial,
            dynamic_ncols=True,
            file=self._stream if self._live else _Nowhere(),
            mininterval=0.2,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self, units: int, note: str = "") -> None:
        """Adds `units` to what is done; `note` stands behind the figures."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(units)
        if not self._live and time.monotonic() >= self._next_plain:
            self._next_plain = time.monotonic() + self._plain_every_secs
            self.write(_plain_line(self._bar))

    def over(self, things: Iterable[Thing]) -> Iterator[Thing]:
        """`things`, one unit each."""
        for thing in things:
            yield thing
            self.advance(1)

    def write(self, line: str) -> None:
        """Prints a line of its own without tearing the bar."""
        if self._live:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the finished bar on the terminal; in plain mode, nothing more."""
        self._bar.close()


class _Nowhere:
    """A stream for the bar that nobody sees; tqdm still does the arithmetic."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def _plain_line(bar: "tqdm.tqdm") -> str:
    layout = (
        "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} "
        "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    )
    return bar.format_meter(**{**bar.format_dict, "bar_format": layout if bar.total else None})
