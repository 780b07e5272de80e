"""Whether a store is what was written: every hash, every offset, every id.

In:  a store in a folder or in a bucket.
Out: a `Report` that names every file that is broken, and in what.

Opening a store looks at the lengths of its files alone; this reads them all, several at a time, a
block of each, so it takes as long as the disk does and no memory to speak of. A bucket is read from
where it is, without a copy.

Shapes: N entries of a block.
"""

import concurrent.futures
import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from albert_jax import progress as progress_lib
from albert_jax import storage
from albert_jax.data import store, store_copy
from albert_jax.errors import UserError

_BLOCK_BYTES = 4 << 20  # read at once, of each file that is open


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        files: how many the manifest names, the tokenizer's among them.
        size: bytes that were read.
        tokens: of both splits, as the manifest says.
        broken: what is wrong, by the file's name from the store's folder on.
        strangers: files that the manifest does not name.
    """

    files: int
    size: int
    tokens: int
    broken: dict[str, str]
    strangers: list[str]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a file of an array must be."""

    file: store_copy.File
    dtype: np.dtype
    entries: int
    vocab_size: int  # of tokens: more than any; 0 for offsets
    last: int  # of offsets: what they end with


def verify(path: str, workers: int) -> Report:
    """Reads a whole store, with progress.

    Args:
        path: a folder, or gs://BUCKET/FOLDER.
        workers: files read at a time.

    Raises:
        UserError: no store there, one that is not finished, one of a newer format, or a manifest
            that says nothing of the files.
    """
    manifest = store.parse_manifest(store.read_manifest(path), path)
    try:
        wanted = list(_wanted(manifest))
        broken = dict(_sums(manifest))
        tokens = sum(manifest["splits"][split]["tokens"] for split in store.SPLITS)
        tokenizer = store.Store(Path(path), manifest).tokenizer_path.name
        tokenizer_sha256 = manifest["tokenizer"]["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}/{store.MANIFEST} is damaged ({type(error).__name__}: {error}); copy it again."
        ) from None
    there = _listing(path)
    if problem := _tokenizer_problem(path, tokenizer, tokenizer_sha256, there):
        broken[tokenizer] = problem
    readable = []
    for one in wanted:
        found = there.get(one.file.name)
        if found == one.file.size:
            readable.append(one)
        elif found is None:
            broken[one.file.name] = "is missing"
        else:
            broken[one.file.name] = f"is {found:,} bytes long, the manifest says {one.file.size:,}"
    broken |= _read_all(path, readable, workers)
    known = {one.file.name for one in wanted} | {tokenizer, store.MANIFEST}
    return Report(
        files=len(wanted) + 1,
        size=sum(one.file.size for one in readable),
        tokens=tokens,
        broken=dict(sorted(broken.items())),
        strangers=sorted(there.keys() - known),
    )


def _wanted(manifest: dict[str, Any]) -> Iterator[_Wanted]:
    for split in store.SPLITS:
        for index, shard in enumerate(manifest["splits"][split]["shards"]):
            files = store.shard_files(manifest, split, index)
            tokens, sentences, documents = files
            token_dtype = np.dtype(manifest["token_dtype"])
            vocab_size = manifest["tokenizer"]["vocab_size"]
            offset = np.dtype(np.int64)
            yield _Wanted(tokens, token_dtype, shard["tokens"], vocab_size, 0)
            yield _Wanted(sentences, offset, shard["sentences"] + 1, 0, shard["tokens"])
            yield _Wanted(documents, offset, shard["documents"] + 1, 0, shard["sentences"])


def _sums(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the manifest says against itself."""
    for split in store.SPLITS:
        told = manifest["splits"][split]
        for array in store.ARRAYS:
            total = sum(shard[array] for shard in told["shards"])
            if told[array] != total:
                yield (
                    store.MANIFEST,
                    f"says {told[array]:,} {array} of {split}, its shards have {total:,}",
                )


def _listing(path: str) -> dict[str, int]:
    """Names from the store's folder on, and bytes."""
    if storage.is_remote(path):
        return storage.listing(path)
    folder = Path(path)
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }


def _tokenizer_problem(path: str, name: str, wanted: str, there: dict[str, int]) -> str:
    if name not in there:
        return "is missing"
    with _opened(path, name) as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found == wanted:
        return ""
    return f"is not the tokenizer of this store: {_hashes(found, wanted)}"


def _read_all(path: str, files: list[_Wanted], workers: int) -> dict[str, str]:
    over = threading.Event()
    with progress_lib.Progress("verify", sum(one.file.size for one in files), "B") as progress:
        lock = threading.Lock()

        def advance(size: int) -> None:
            with lock:
                progress.advance(size)

        def check(one: _Wanted) -> str:
            try:
                with _opened(path, one.file.name) as file:
                    return "; ".join(_problems(_Blocks(file, over, advance), one))
            except OSError as error:
                return f"cannot be read ({error.strerror or error})"

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            try:
                found = list(pool.map(check, files))
            except BaseException:
                over.set()  # Ctrl-C: the files under way are left, too
                pool.shutdown(cancel_futures=True)
                raise
    return {one.file.name: problem for one, problem in zip(files, found, strict=True) if problem}


def _opened(path: str, name: str) -> BinaryIO:
    if storage.is_remote(path):
        return storage.opened(storage.join(path, name))
    return (Path(path) / name).open("rb", buffering=0)


class _Blocks:
    """A file's blocks: each is valid until the next one."""

    def __init__(self, file: BinaryIO, over: threading.Event, advance: Any) -> None:
        self.hash = hashlib.sha256()
        self._file, self._over, self._advance = file, over, advance
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))

    def take(self, size: int) -> memoryview:
        """The next bytes, fewer only at the file's end."""
        filled = 0
        while filled < size and not self._over.is_set():
            count = self._file.readinto(self._buffer[filled:size])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                break
            filled += count
        block = self._buffer[:filled]
        self.hash.update(block)
        self._advance(filled)
        return block


def _problems(blocks: _Blocks, wanted: _Wanted) -> Iterator[str]:
    header = bytes(blocks.take(store.HEADER_BYTES))
    if header != store.header(wanted.dtype, wanted.entries):
        yield f"does not begin as an array of {wanted.entries:,} {wanted.dtype}"
    problem = ""
    first, before = 0, -1
    while block := blocks.take(_BLOCK_BYTES):
        itemsize = wanted.dtype.itemsize
        entries_N = np.frombuffer(block[: len(block) // itemsize * itemsize], wanted.dtype)
        if len(entries_N):
            problem = problem or _value_problem(entries_N, first, before, wanted)
            before = int(entries_N[-1])
            first += len(entries_N)
    if not problem and not wanted.vocab_size and before != wanted.last:
        problem = f"ends with {before:,}, not with {wanted.last:,}"
    if (found := blocks.hash.hexdigest()) != wanted.file.sha256:
        yield f"holds other bytes than were written: {_hashes(found, wanted.file.sha256)}"
    if problem:
        yield problem


def _value_problem(entries_N: np.ndarray, first: int, before: int, wanted: _Wanted) -> str:
    """What is wrong with a block that begins with entry `first`, after the value `before`."""
    if wanted.vocab_size:
        if entries_N.max() < wanted.vocab_size:
            return ""
        at = int(np.argmax(entries_N >= wanted.vocab_size))
        return (
            f"token {first + at:,} is {entries_N[at]:,}, the vocabulary has {wanted.vocab_size:,}"
        )
    if first == 0 and entries_N[0] != 0:
        return f"begins with {entries_N[0]:,}, not with 0"
    if entries_N[0] > before and (entries_N[1:] > entries_N[:-1]).all():
        return ""
    at = 0 if entries_N[0] <= before else 1 + int(np.argmax(entries_N[1:] <= entries_N[:-1]))
    earlier = before if at == 0 else entries_N[at - 1]
    return f"entry {first + at:,} is {entries_N[at]:,}, not more than {earlier:,} before it"


def _hashes(found: str, wanted: str) -> str:
    return f"its SHA-256 begins {found[:12]}, in the manifest it begins {wanted[:12]}"
