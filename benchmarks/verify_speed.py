"""How fast `prepare --verify` is, beside reading the same files and doing nothing with them.

    python benchmarks/verify_speed.py [MEGABYTES]

Prints megabytes a second of both, with one and with two files at a time, and the ratio: with the
files in the system's cache, which is the work's speed, and out of it, where the disk sets the pace.
TMPDIR says which disk.
"""

import concurrent.futures
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from albert_jax.data import store, verify

_VOCABULARY = 30_000
_SHARDS = 8


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        _make(path, megabytes * 1_000_000 // _SHARDS // 2)
        size = sum(file.stat().st_size for file in path.rglob("*.npy"))
        for cached in (True, False) if hasattr(os, "posix_fadvise") else (True,):  # macOS has none
            print("files in the system's cache" if cached else "files on the disk alone")
            forget = (lambda: None) if cached else (lambda: _forget(path))
            for workers in (1, 2):
                read = _fastest(lambda workers=workers: _read(path, workers), forget)
                check = _fastest(lambda workers=workers: verify.verify(folder, workers), forget)
                print(
                    f"  {workers} at a time: read {size / read / 1e6:,.0f} MB/s, verify "
                    f"{size / check / 1e6:,.0f} MB/s, {check / read:.1f} x the time"
                )


def _make(path: Path, tokens: int) -> None:
    rng = np.random.default_rng(1)
    splits = {}
    for split in store.SPLITS:
        records = []
        for index in range(_SHARDS if split == "train" else 1):
            with store.ShardWriter(path / split, f"{index:05d}-of-00008", np.uint16) as writer:
                lengths_S = np.full(tokens // 25, 25)
                tokens_T = rng.integers(5, _VOCABULARY, lengths_S.sum(), np.uint16)
                writer.append(tokens_T, lengths_S, np.array([len(lengths_S)]))
            records.append(writer.record)
        totals = {array: sum(record[array] for record in records) for array in store.ARRAYS}
        splits[split] = {**totals, "shards": records}
    (path / "tokenizer.model").write_bytes(b"")
    tokenizer = {"sha256": hashlib.sha256(b"").hexdigest(), "vocab_size": _VOCABULARY}
    store.write_manifest(
        path,
        {
            "format_version": store.FORMAT_VERSION,
            "tokenizer": tokenizer,
            "token_dtype": "uint16",
            "normalization": {},
            "unigram_loss": 0.0,
            "splits": splits,
        },
    )


def _read(path: Path, workers: int) -> None:
    def read(file: Path) -> None:
        buffer = bytearray(4 << 20)
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):  # pyright: ignore[reportAttributeAccessIssue]
                pass

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(read, path.rglob("*.npy")))


def _forget(path: Path) -> None:
    """Takes the files out of the system's cache."""
    for file in path.rglob("*.npy"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not written yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fastest(run: Callable[[], object], before: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        before()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
