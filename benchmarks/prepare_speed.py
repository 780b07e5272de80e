"""How fast text becomes a token store, start-up included, beside what it could and could not be.

    python benchmarks/prepare_speed.py [--input='texts/*.txt'] [--tokenizer=spiece.model]

Prints one line each for the command with one and with two workers, with the most memory that all
its processes held at once; for bare SentencePiece on the same lines of the same files; and for the
obvious Python version, which normalises and encodes a sentence at a time. Figures are of this run
on this machine; whatever else runs there is in them.
"""

import argparse
import glob
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import sentencepiece
import sentencex

from albert_jax.data import store

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = pathlib.Path(os.environ.get("ALBERT_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", default=f"{DATA}/corpus/en_novels/*.txt", metavar="GLOB")
    parser.add_argument("--tokenizer", default=f"{DATA}/tokenizer/spiece.model", metavar="MODEL")
    flags = parser.parse_args()
    paths = [pathlib.Path(path) for path in sorted(glob.glob(flags.input))]  # noqa: PTH207
    if not paths:
        sys.exit(f"no files {flags.input}; see --input")
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} files, {megabytes:.1f} MB, {os.cpu_count()} cores")
    print(f"{'':<40}{'tokens/s':>12}{'MB/s':>8}{'seconds':>9}{'peak MiB':>10}")
    for workers in (1, 2):
        report(f"prepare, workers={workers}", megabytes, *prepare(flags, workers))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8-sig").split("\n")]
    processor = sentencepiece.SentencePieceProcessor(model_file=flags.tokenizer)
    for threads in (1, 2):
        seconds, ids = timed(lambda n=threads: processor.encode(lines, num_threads=n))
        report(f"bare SentencePiece, threads={threads}", megabytes, sum(map(len, ids)), seconds)
    part = lines[:: max(1, len(lines) // 20_000)]
    seconds, tokens = timed(lambda: obvious(processor, part))
    size = sum(len(line.encode()) + 1 for line in part) / 1e6
    report(f"obvious Python, on {size:.1f} MB", size, tokens, seconds)


def prepare(flags: argparse.Namespace, workers: int) -> tuple[int, float, float]:
    """Tokens, seconds and peak MiB of the command as a user types it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "albert_jax.prepare", "--document=file"),
            *(f"--input={flags.input}", f"--tokenizer={flags.tokenizer}"),
            *(f"--output={folder}/store", f"--workers={workers}"),
        ]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(memory(pid) for pid in family(process.pid)))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"{' '.join(command)} fails")
        splits = store.open_store(f"{folder}/store").manifest["splits"]
        return sum(split["tokens"] for split in splits.values()), seconds, peak


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


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds it took, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def report(name: str, megabytes: float, tokens: int, seconds: float, peak: float = 0.0) -> None:
    """One line of the table."""
    shown = f"{peak:>10.0f}" if peak else f"{'':>10}"
    print(f"{name:<40}{tokens / seconds:>12,.0f}{megabytes / seconds:>8.1f}{seconds:>9.2f}{shown}")


if __name__ == "__main__":
    main()
