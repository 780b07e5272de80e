"""How fast text becomes a token store, start-up included, beside what it could and could not be.

    python benchmarks/prepare_speed.py [--input='texts/*.txt'] [--tokenizer=MODEL] [--copies=10]

Prints one line each for the command with one and with two workers, with the seconds of processor
time and the most memory that all its processes took together; for bare SentencePiece on the same
lines of the same files; and for the obvious Python version, which normalises and encodes a sentence
at a time. Then, of one worker's processor time, the share of each phase. Figures are of this run on
this machine; whatever else runs there is in the seconds, but hardly in the processor time.
"""

import argparse
import collections
import contextlib
import glob
import io
import itertools
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import sentencepiece
import sentencex

from albert_jax import prepare as prepare_command
from albert_jax.data import sentencepiece_tokenizer, sources, store, text, tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = pathlib.Path(os.environ.get("ALBERT_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", default=f"{DATA}/corpus/en_novels/*.txt", metavar="GLOB")
    parser.add_argument("--tokenizer", default=f"{DATA}/tokenizer/spiece.model", metavar="MODEL")
    parser.add_argument("--copies", type=int, default=1, help="read the input so many times")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(flags, pathlib.Path(folder))


def measure(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    paths = [pathlib.Path(path) for path in sorted(glob.glob(flags.input))]  # noqa: PTH207
    if not paths:
        sys.exit(f"no files {flags.input}; see --input")
    for copy, path in itertools.product(range(flags.copies), paths):
        (folder / f"{copy}-{path.name}").symlink_to(path.resolve())
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} files, {megabytes:.1f} MB, {flags.copies} times, {os.cpu_count()} cores")
    titles = f"{'tokens/s':>12}{'MB/s':>8}{'seconds':>9}{'cpu s':>8}{'peak MiB':>10}"
    print(f"{'':<40}{titles}")
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as output:
            command = arguments(flags, folder, output, workers)
            report(
                f"prepare, workers={workers}", flags.copies * megabytes, *prepare(command, output)
            )
    lines = [line for path in paths for line in path.read_text(encoding="utf-8-sig").split("\n")]
    processor = sentencepiece.SentencePieceProcessor(model_file=flags.tokenizer)
    for threads in (1, 2):
        *times, ids = timed(lambda n=threads: processor.encode(lines, num_threads=n))
        report(f"bare SentencePiece, threads={threads}", megabytes, sum(map(len, ids)), *times)
    part = lines[:: max(1, len(lines) // 20_000)]
    *times, tokens = timed(lambda: obvious(processor, part))
    size = sum(len(line.encode()) + 1 for line in part) / 1e6
    report(f"obvious Python, on {size:.1f} MB", size, tokens, *times)
    flags.copies = 1
    for path in [*folder.glob("[1-9]*-*")]:
        path.unlink()
    shares(flags, folder)


def arguments(
    flags: argparse.Namespace, folder: pathlib.Path, output: str, workers: int
) -> list[str]:
    """What a user would type behind the command's name."""
    return [
        "--document=file",
        f"--input={folder}/*",
        f"--tokenizer={flags.tokenizer}",
        f"--output={output}/store",
        f"--workers={workers}",
    ]


def shares(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prints how much of the processor time of one worker each phase takes."""
    clock = Clock()
    patches = [
        (sources, "documents", clock.iterated("reading, paragraphs", sources.documents)),
        (text, "sentences", clock.called("splitting sentences", text.sentences)),
        (tokenizer, "normalize_all", clock.called("normalising", tokenizer.normalize_all)),
        (
            sentencepiece_tokenizer._SentencePieceTokenizer,
            "encode_batch",
            clock.called("encoding", sentencepiece_tokenizer._SentencePieceTokenizer.encode_batch),
        ),
        (store.ShardWriter, "append", clock.called("writing", store.ShardWriter.append)),
        (store.ShardWriter, "__exit__", clock.called("writing", store.ShardWriter.__exit__)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        output = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        run = clock.called("all else: start, split by hash, manifest", prepare_command.main)
        run(arguments(flags, folder, output, 1))
    total = sum(clock.seconds.values())
    print(f"of {total:.2f} s of processor time, one worker:")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:<44}{seconds:>6.2f} s{seconds / total:>7.1%}")


class Clock:
    """Processor time by phase; while a phase calls another, only that one's time runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._phases: list[str] = []
        self._since = time.process_time()

    def called(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed_function(*args: Any, **kwargs: Any) -> Any:
            with self._in(phase):
                return function(*args, **kwargs)

        return timed_function

    def iterated(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The generator function, timed while it works for its next item."""

        def timed_function(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            while True:
                with self._in(phase):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return timed_function

    @contextlib.contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        self._turn()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._phases:
            self.seconds[self._phases[-1]] += now - self._since
        self._since = now


def prepare(command: list[str], output: str) -> tuple[int, float, float, float]:
    """Tokens, seconds, processor seconds and peak MiB of the command as a user types it."""
    began, used = time.perf_counter(), processor_time(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-m", "albert_jax.prepare", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(memory(pid) for pid in family(process.pid)))
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"albert_jax.prepare {' '.join(command)} fails")
    splits = store.open_store(f"{output}/store").manifest["splits"]
    tokens = sum(split["tokens"] for split in splits.values())
    return tokens, seconds, processor_time(resource.RUSAGE_CHILDREN) - used, peak


def processor_time(who: int) -> float:
    """Seconds, the user's and the system's."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def obvious(processor: sentencepiece.SentencePieceProcessor, lines: list[str]) -> int:
    """Tokens of the lines, by the rules as they are written down."""
    tokens = 0
    for line in lines:
        for sentence in sentencex.segment("en", line):  # pyright: ignore[reportAttributeAccessIssue]
            text = unicodedata.normalize("NFKD", " ".join(sentence.split()))
            text = "".join([c for c in text if not unicodedata.combining(c)]).lower()
            pieces = []
            for piece in processor.EncodeAsPieces(text):
                if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                    pieces += [*processor.EncodeAsPieces(piece[:-1].lstrip("\u2581")), ","]
                else:
                    pieces.append(piece)
            tokens += len([processor.PieceToId(piece) for piece in pieces])
    return tokens


def family(pid: int) -> list[int]:
    """A process and all below it; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def memory(pid: int) -> float:
    """MiB a process holds, its share of what it shares."""
    try:
        rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next(
        (int(line.split()[1]) / 1024 for line in rollup.splitlines() if line.startswith("Pss:")),
        0.0,
    )


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds and processor seconds it took, and its result."""
    began, used = time.perf_counter(), processor_time(resource.RUSAGE_SELF)
    result = work()
    return time.perf_counter() - began, processor_time(resource.RUSAGE_SELF) - used, result


def report(
    name: str, megabytes: float, tokens: int, seconds: float, used: float, peak: float = 0.0
) -> None:
    """One line of the table."""
    shown = f"{peak:>10.0f}" if peak else ""
    print(
        f"{name:<40}{tokens / seconds:>12,.0f}{megabytes / seconds:>8.1f}{seconds:>9.2f}"
        f"{used:>8.2f}{shown}"
    )


if __name__ == "__main__":
    main()
