"""The token store: memory-mapped shards of token ids, and the manifest that vouches for them.

    STORE/manifest.json  tokenizer.model (or vocab.txt, or tokenizer.json)
          train/       00000-of-00026.tokens.npy  00000-of-00026.sentences.npy
          00000-of-00026.documents.npy  … validation/  likewise

In:  shards as `ShardWriter` streams them to the disk, a piece at a time.
Out: `open_store(path).split("train")`: arrays that the system reads as they are touched.

A folder is a store only with its manifest, which is written last. Opening checks that every file is
there and as long as the manifest says; it does not read the data: `verify` does. A store in a
bucket, gs://…, is copied to the local disk when it is opened (`store_copy`), or shard by shard as
they are wanted (`Store.fetch`).

Shapes: T tokens, S sentences, D documents.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from albert_jax import storage
from albert_jax.data import lease, store_copy
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
ARRAYS = ("tokens", "sentences", "documents")
OFFSETS = ARRAYS[1:]
# A store is written beside its place under this ending and moved there when it is whole.
UNFINISHED = ".unfinished"

_USUAL_TOKENIZER = tokenizer_lib.TRAINED_FILES["unigram"]
_FETCHES = 3
_SHARD_NAME = re.compile(r"[\w-]+")
HEADER_BYTES = 128  # of each .npy file: room for any shape, so that it can be written last


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a split, memory-mapped.

    Attributes:
        tokens: uint16 or uint32 [T], ids without special tokens.
        sentences: int64 [S+1], offsets into `tokens`; starts with 0, ends with T.
        documents: int64 [D+1], offsets into `sentences`; starts with 0, ends with S.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


@dataclasses.dataclass(frozen=True)
class Store:
    """A whole token store.

    Attributes:
        path: its folder, or the folder of its local copy.
        manifest: what `manifest.json` says.
        source: where it is a copy from, gs://…; empty for a store on this machine.
    """

    path: Path
    manifest: dict[str, Any]
    source: str = ""

    @property
    def place(self) -> str:
        """Where the store is, for people and for `data.path`."""
        return self.source or str(self.path)

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of "train" or "validation", memory-mapped, in order; some may be empty. Of a
        store in a bucket, what is not on the local disk yet is copied there.
        """
        return self._all(name, ARRAYS)

    def offsets(self, name: str) -> tuple[Shard, ...]:
        """As `split`, but for the tokens: zeros stand for them, which take no memory."""
        return self._all(name, OFFSETS)

    def fetch(self, split: str, index: int, arrays: Sequence[str] = ARRAYS) -> Shard:
        """One shard, memory-mapped; of a store in a bucket it is made local first, silently.

        For corpora larger than the disk: open the store with `whole=False`, fetch a shard before it
        is needed, and `drop` it when it is done with. Safe to call from several threads and
        processes, but fetching is one at a time for all processes that share a cache.

        Args:
            split, index: which shard.
            arrays: what of it; zeros stand for the rest.

        Raises:
            UserError: the bucket cannot be reached, the shard is damaged, the disk is full.
        """
        for _ in range(_FETCHES - 1):
            try:
                return self._fetched(split, index, arrays)
            except FileNotFoundError:  # another process that shares the cache has dropped it
                continue
        return self._fetched(split, index, arrays)

    def drop(self, split: str, index: int, arrays: Sequence[str] = ARRAYS) -> None:
        """Deletes the local copy of a shard, or of some of its arrays. A `Shard` that is in use
        stays readable, and its room is free when the last one goes. Of a store on this machine it
        deletes nothing.
        """
        if self.source:
            store_copy.drop(self.path, shard_files(self.manifest, split, index, arrays))

    def _fetched(self, split: str, index: int, arrays: Sequence[str]) -> Shard:
        if self.source:
            files = shard_files(self.manifest, split, index, arrays)
            store_copy.complete(self.source, self.path, files, shown=False)
        return self._shard(split, index, arrays)

    def _all(self, split: str, arrays: Sequence[str]) -> tuple[Shard, ...]:
        shards = range(len(self.manifest["splits"][split]["shards"]))
        if self.source:
            files = [
                file
                for index in shards
                for file in shard_files(self.manifest, split, index, arrays)
            ]
            store_copy.complete(self.source, self.path, files)
        return tuple(self._shard(split, index, arrays) for index in shards)

    def _shard(self, split: str, index: int, arrays: Sequence[str]) -> Shard:
        record = self.manifest["splits"][split]["shards"][index]
        found = {}
        for array in ARRAYS:
            if array in arrays:
                found[array] = self._array(split, record["name"], array)
            else:
                dtype = self.manifest["token_dtype"] if array == "tokens" else np.int64
                entries = record[array] + (array != "tokens")
                found[array] = np.broadcast_to(np.zeros((), dtype), (entries,))
        return Shard(**found)

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer the store was written with, and its normalisation.

        Raises:
            UserError: the file is not the one the manifest names.
        """
        normalization = tokenizer_lib.Normalization(**self.manifest["normalization"])
        tokenizer = tokenizer_lib.Tokenizer.load(self.tokenizer_path, normalization)
        if tokenizer.sha256 != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{self.tokenizer_path} is not the tokenizer of this store: its SHA-256 begins "
                f"{tokenizer.sha256[:12]}, in the manifest it begins "
                f"{self.manifest['tokenizer']['sha256'][:12]}. Put the right file back."
            )
        return tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer's file is."""
        return self.path / self.manifest["tokenizer"].get("file", _USUAL_TOKENIZER)

    @property
    def vocab_size(self) -> int:
        """V, number of pieces of the tokenizer."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def unigram_loss(self) -> float:
        """Cross-entropy of the validation split under the frequencies of train, nats per token."""
        return self.manifest["unigram_loss"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the data: what a run takes to be the same store."""
        decisive = [
            self.manifest["format_version"],
            self.manifest["tokenizer"]["sha256"],
            self.manifest["normalization"],
            [self.manifest["splits"][split]["shards"] for split in SPLITS],
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _array(self, split: str, shard: str, array: str) -> np.ndarray:
        path = self.path / split / f"{shard}.{array}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            if self.source:
                raise
            raise UserError(f"{path} is missing; copy or prepare the store again.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the store again.") from None


def open_store(path: str | Path, whole: bool = True) -> Store:
    """The store in a folder, or in a bucket.

    Args:
        path: a folder, or gs://BUCKET/FOLDER.
        whole: of a bucket: copy all that is not on the local disk yet, with progress; otherwise
            only the manifest and the tokenizer, the shards being for `Store.fetch`.

    Raises:
        UserError: no store there, one that was not finished, one of a newer format, or one with a
            file that is missing or not as long as the manifest says; a bucket that cannot be
            reached, or a file there that is damaged.
    """
    if storage.is_remote(path):
        return _open_copy(storage.named(path), whole)
    path = Path(path)
    manifest = parse_manifest(read_manifest(path), str(path))
    for split in SPLITS:
        for index in range(len(manifest["splits"][split]["shards"])):
            for wanted in shard_files(manifest, split, index):
                file = path / wanted.name
                found = file.stat().st_size if file.exists() else None
                if found != wanted.size:
                    raise UserError(
                        f"{file} is {'missing' if found is None else f'{found:,} bytes long'}; the "
                        f"manifest says {wanted.size:,} bytes. Copy or prepare the store again."
                    )
    return Store(path, manifest)


def _open_copy(place: str, whole: bool) -> Store:
    """The store in a bucket: its local copy is named by what decides its data."""
    content = read_manifest(place)
    manifest = parse_manifest(content, place)
    folder = copy_folder(Store(Path(), manifest).fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    opened = Store(folder, manifest, source=place)
    tokenizer = opened.tokenizer_path
    if not tokenizer.exists() or sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        try:
            text = storage.read(storage.join(place, tokenizer.name))
        except FileNotFoundError:
            raise UserError(f"{place}/{tokenizer.name}, its tokenizer, is missing.") from None
        with appearing(tokenizer) as unfinished:
            unfinished.write_bytes(text)
    files = [
        file
        for split in SPLITS
        for index in range(len(manifest["splits"][split]["shards"]))
        for file in shard_files(manifest, split, index)
    ]
    if whole:
        store_copy.complete(place, folder, files)
    with appearing(folder / MANIFEST) as unfinished:
        unfinished.write_bytes(content)
    return opened


def copy_folder(fingerprint: str) -> Path:
    """Where the local copy of a store in a bucket is."""
    return storage.cache_folder() / "stores" / fingerprint[:32]


def read_manifest(path: str | Path) -> bytes:
    """The manifest's file of the store in a folder, or in a bucket.

    Raises:
        UserError: there is no store, or it is not finished.
    """
    try:
        if storage.is_remote(path):
            return storage.read(storage.join(path, MANIFEST))
        return (Path(path) / MANIFEST).read_bytes()
    except FileNotFoundError:
        if storage.is_remote(path):
            raise UserError(
                f"no token store {path} (no {MANIFEST} there); albert_jax.prepare "
                f"--output={path} makes one, and goes on with one that it could not finish."
            ) from None
        raise UserError(_why_no_store(Path(path))) from None
    except OSError as error:
        raise UserError(
            f"{path}/{MANIFEST} cannot be read ({error}); prepare the store again."
        ) from None


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """What the manifest of the store at a place says.

    Raises:
        UserError: it is none, or none that is known here.
    """
    named = f"{place}/{MANIFEST}"
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{named} cannot be read ({error}); prepare the store again.") from None
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise UserError(f"{named} is not the manifest of a token store (no format_version).")
    if manifest["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{place} has store format {manifest['format_version']}, this version reads up to "
            f"{FORMAT_VERSION}; update albert_jax, or prepare the store again."
        )
    if (file := manifest["tokenizer"].get("file", _USUAL_TOKENIZER)) not in tokenizer_lib.FILES:
        raise UserError(
            f"{named} names the tokenizer {file!r}, which is none of "
            f"{', '.join(tokenizer_lib.FILES)}; prepare the store again."
        )
    return manifest


def shard_files(
    manifest: dict[str, Any], split: str, index: int, arrays: Sequence[str] = ARRAYS
) -> list[store_copy.File]:
    """The files of a shard's arrays, in their order, and what the manifest says of each."""
    shard = manifest["splits"][split]["shards"][index]
    if not _SHARD_NAME.fullmatch(shard["name"]):  # it becomes a path
        raise UserError(f"the manifest names a shard {shard['name']!r}; prepare the store again.")
    files = []
    for array in arrays:
        itemsize = np.dtype(manifest["token_dtype"]).itemsize if array == "tokens" else 8
        entries = shard[array] + (array != "tokens")
        name = f"{split}/{shard['name']}.{array}.npy"
        files.append(
            store_copy.File(name, HEADER_BYTES + entries * itemsize, shard["sha256"][array])
        )
    return files


def tokenizer_record(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
    """What the manifest says of the tokenizer; its file only where it is not the usual one."""
    record = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    if tokenizer.file_name != _USUAL_TOKENIZER:
        record["file"] = tokenizer.file_name
    return record


def unigram_loss(train_V: np.ndarray, validation_V: np.ndarray) -> float:
    """Nats per validation token under the frequencies of train, one added to each."""
    measured_V = validation_V if validation_V.any() else train_V
    log_probs_V = np.log(train_V + 1.0) - math.log(train_V.sum() + len(train_V))
    return float(-(measured_V @ log_probs_V) / measured_V.sum())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest under a temporary name, to the disk itself, and renames it."""
    with appearing(folder / MANIFEST) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file of JSON that is there whole, or not at all."""
    with appearing(path) as unfinished:
        unfinished.write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when it is whole; another writer has another."""
    unfinished = _name_beside(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _name_beside(path: Path) -> Path:
    """A name that no other writer of the same file uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")


class ShardWriter:
    """Streams one shard of one split to its three files; holds nothing.

    A file appears under its name when it is whole. So two who write the same shard at a time, as
    happens where a machine that seemed lost comes back, do not harm each other.

    with ShardWriter(folder / "train", "00000-of-00026", np.uint16) as writer:
        writer.append(tokens_T, sentence_lengths_S, document_lengths_D)
    writer.record  # counts and hashes, for the manifest
    """

    def __init__(self, folder: Path, name: str, token_dtype: type[np.unsignedinteger]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        dtypes = {
            "tokens": np.dtype(token_dtype),
            "sentences": np.dtype(np.int64),
            "documents": np.dtype(np.int64),
        }
        self._name = name
        self._arrays = {
            array: _NpyStream(folder / f"{name}.{array}.npy", dtype)
            for array, dtype in dtypes.items()
        }
        self.record: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._arrays["sentences"].append(np.zeros(1, np.int64))
        self._arrays["documents"].append(np.zeros(1, np.int64))
        return self

    def append(
        self, tokens_T: np.ndarray, sentence_lengths_S: np.ndarray, document_lengths_D: np.ndarray
    ) -> None:
        """Adds whole documents: their tokens, tokens a sentence, sentences a document."""
        sentences, documents = self._arrays["sentences"], self._arrays["documents"]
        first_token, first_sentence = self._arrays["tokens"].count, sentences.count - 1
        self._arrays["tokens"].append(tokens_T)
        sentences.append(first_token + np.cumsum(sentence_lengths_S, dtype=np.int64))
        documents.append(first_sentence + np.cumsum(document_lengths_D, dtype=np.int64))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is not None:
            for stream in self._arrays.values():
                stream.abandon()
            return
        hashes = {array: stream.finish() for array, stream in self._arrays.items()}
        self.record = {
            "name": self._name,
            "documents": self._arrays["documents"].count - 1,
            "sentences": self._arrays["sentences"].count - 1,
            "tokens": self._arrays["tokens"].count,
            "sha256": hashes,
        }


class _NpyStream:
    """A one-dimensional .npy file of unknown length; the header, of fixed size, is written last."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._unfinished = _name_beside(path)
        self._dtype = dtype
        self._file = self._unfinished.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self.count = 0

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self.count += len(values)

    def finish(self) -> str:
        """Closes the file and gives it its name; returns its SHA-256."""
        self._file.seek(0)
        self._file.write(header(self._dtype, self.count))
        self._file.close()
        digest = sha256(self._unfinished)
        self._unfinished.replace(self._path)
        return digest

    def abandon(self) -> None:
        # Closing flushes, and flushing is what fails on a full disk; the error under way matters
        # more.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._unfinished.unlink()


def header(dtype: np.dtype, entries: int) -> bytes:
    """What a file of an array begins with.

    Format 1.0 of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    description = {"descr": dtype.str, "fortran_order": False, "shape": (entries,)}
    text = repr(description).encode()
    room = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_no_store(path: Path) -> str:
    unfinished = path.with_name(path.name + UNFINISHED)
    if unfinished.is_dir():
        if writer := lease.holder(unfinished):
            finished = len(list(unfinished.glob("*-of-*.json")))
            return (
                f"{path} is being written by {writer} (shards finished so far: {finished}); it can "
                "be read when it is whole."
            )
        return (
            f"{path} was not finished: {unfinished} is what there is of it. "
            "Give the same albert_jax.prepare command again with --resume."
        )
    if not path.exists():
        return f"no token store {path} (seen from {Path.cwd()}); albert_jax.prepare makes one."
    return f"{path} is not a token store (no {MANIFEST}); albert_jax.prepare makes one."
