"""One shard of a token store, made of its input alone.

In:  a `ShardJob`: a stretch of the input, a tokenizer, and how to read the one with the other.
Out: the shard's files (see `store`), how often each piece occurs in them, and a record, in the
     folder of the job.

`plan` cuts the input by names and sizes alone, and a shard is a pure function of its job, so its
bytes are the same whichever process or machine writes it, in whatever order and however often. The
record is written last: a shard without one is not finished. Memory is bounded by the largest
document part (`sources.DOCUMENT_LIMIT`).

Shapes: T tokens, S sentences, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax.data import duplicates, sources, store, text
from albert_jax.data import quality as quality_lib
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.data.workers import Advance

DUPLICATES = "duplicates"  # a folder in that of the unfinished store
SECTION_SENTENCES = 64  # a document of twice as many is cut into sections for the split

_SHARD_BYTES = (1 << 20, 256 << 20)  # smallest and largest amount of input for one shard
_SHARDS = 256  # aimed at between these
_ONE_WORD = 30  # characters; a document without white space and no longer is one word
_BATCH_CHARACTERS = 1 << 18  # text encoded at once


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """All that decides one shard.

    Attributes:
        name: `NNNNN-of-NNNNN`.
        units: the input, in order.
        folder: where `train/` and `validation/` are.
        tokenizer: path of its file in the store.
        normalization: used with it.
        reading: how the input is understood.
        validation_below: a section with a hash under this is held out.
        quality: which documents and paragraphs are left out.
    """

    name: str
    units: tuple[sources.Unit, ...]
    folder: Path
    tokenizer: Path
    normalization: tokenizer_lib.Normalization
    reading: sources.Reading
    validation_below: int
    quality: quality_lib.Quality = dataclasses.field(default_factory=quality_lib.Quality)

    @property
    def duplicates(self) -> Path:
        """Where it is decided what repeats, before any shard is written."""
        return self.folder / DUPLICATES


def plan(
    files: Sequence[str], file_format: str, reading: sources.Reading
) -> list[tuple[sources.Unit, ...]]:
    """The units of each shard, in order: a function of the files' names and sizes alone.

    Args:
        files: paths, in order.
        file_format: one of `sources.FORMATS`, or "" to go by each file's name.
        reading: how they are understood.
    """
    total = sum(sources.weight(path, sources.size(path)) for path in files)
    smallest, largest = _SHARD_BYTES
    target = min(max(total // _SHARDS, smallest), largest)
    shards: list[tuple[sources.Unit, ...]] = []
    shard: list[sources.Unit] = []
    weight = 0
    for path in files:
        for unit in sources.units(path, file_format, reading, target):
            shard.append(unit)
            weight += sources.weight(unit.path, unit.size)
            if weight >= target:
                shards.append(tuple(shard))
                shard, weight = [], 0
    return [*shards, tuple(shard)] if shard else shards


def complete(job: ShardJob, advance: Advance) -> dict[str, Any]:
    """The record of a shard that is there already, of this input and unharmed; else writes it."""
    record = _finished(job)
    if not record:
        return write_shard(job, advance)
    advance(sum(unit.size for unit in job.units), 0)
    return record


def write_shard(job: ShardJob, advance: Advance) -> dict[str, Any]:
    """Writes one shard of both splits, and its record when they are finished.

    Returns:
        The record, as JSON: for each split counts and hashes (see `store.ShardWriter.record`), what
        was skipped, and the least and greatest hash of a section.

    Raises:
        UserError: input that cannot be read, or is no text.
        OSError: the disk is full, or a file cannot be written.
    """
    tokenizer = load_tokenizer(job.tokenizer, job.normalization)
    dtype = token_dtype(tokenizer.vocab_size)
    skipped = sources.Skipped()
    hashes: list[int] = []
    counts = np.zeros((len(store.SPLITS), tokenizer.vocab_size), np.int64)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(store.ShardWriter(job.folder / split, job.name, dtype))
            for split in store.SPLITS
        }
        for runs in _batches(job, skipped, hashes, advance):
            _encode_and_append(runs, tokenizer, writers, counts)
    record = {
        "identity": _identity(job),
        "validation_below": job.validation_below,
        "skipped": skipped,
        "least_hash": min(hashes, default=None),
        "greatest_hash": max(hashes, default=None),
        "counts_sha256": _write_counts(job, counts),
        **{split: writer.record for split, writer in writers.items()},
    }
    store.write_json(record_path(job), record)
    return record


def piece_counts(job: ShardJob) -> dict[str, np.ndarray]:
    """How often each piece occurs in each split of a finished shard, int64 [V]."""
    return dict(zip(store.SPLITS, np.load(_counts_path(job), allow_pickle=False), strict=True))


def _finished(job: ShardJob) -> dict[str, Any]:
    """The record of a shard that is there already, of this input and unharmed; else empty."""
    try:
        record = json.loads(record_path(job).read_bytes())
        same = (
            record["identity"] == _identity(job)
            and record["counts_sha256"] == store.sha256(_counts_path(job))
            and record["validation_below"] == job.validation_below
            and all(
                record[split]["sha256"][array]
                == store.sha256(job.folder / split / f"{job.name}.{array}.npy")
                for split in store.SPLITS
                for array in store.ARRAYS
            )
        )
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return record if same else {}


def states(units: Sequence[sources.Unit]) -> list[list[Any]]:
    """What tells whether the input is still the same, as JSON."""
    return [[unit.path, unit.start, unit.end, *sources.state(unit.path)] for unit in units]


def record_path(job: ShardJob) -> Path:
    """Where the record of a finished shard is."""
    return job.folder / f"{job.name}.json"


def _counts_path(job: ShardJob) -> Path:
    return job.folder / f"{job.name}.counts.npy"


def _write_counts(job: ShardJob, counts: np.ndarray) -> str:
    """Writes them as the shard's other files are written; returns the SHA-256."""
    with store.appearing(_counts_path(job)) as unfinished:
        with unfinished.open("wb") as file:
            np.save(file, counts, allow_pickle=False)
        return store.sha256(unfinished)


def text_hash(content: str) -> int:
    """The first 8 bytes of the BLAKE2b of a text, as a number."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type of the two that holds all ids."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@functools.lru_cache(maxsize=1)
def load_tokenizer(
    path: Path, normalization: tokenizer_lib.Normalization
) -> tokenizer_lib.Tokenizer:
    """The tokenizer of a file, kept for the next shard."""
    return tokenizer_lib.Tokenizer.load(path, normalization)


def _identity(job: ShardJob) -> list[Any]:
    """What tells whether a finished shard is still the wanted one; options are checked apart."""
    decided = duplicates.digest(job.duplicates, job.name) if job.quality.needs_comparison else []
    return [load_tokenizer(job.tokenizer, job.normalization).sha256, *states(job.units), *decided]


def _batches(
    job: ShardJob, skipped: sources.Skipped, hashes: list[int], advance: Advance
) -> Iterator[list[tuple[str, list[str]]]]:
    """Batches of (split, sentences of one of its documents), of about `_BATCH_CHARACTERS`."""
    runs: list[tuple[str, list[str]]] = []
    characters = documents = 0
    for number, unit in enumerate(job.units):
        for paragraphs in duplicates.documents(
            unit,
            (job.name, number),
            job.reading,
            job.quality,
            job.duplicates,
            skipped,
            lambda size: advance(size, 0),
        ):
            documents += 1
            document = [text.sentences(paragraph, job.reading.language) for paragraph in paragraphs]
            if len(paragraphs) == 1 and _is_one_word(paragraphs[0]):
                skipped.add("documents of one word", unit.path)
                continue
            for split, sentences in _split(document, job.validation_below, hashes):
                runs.append((split, sentences))
                characters += sum(map(len, sentences))
            if characters >= _BATCH_CHARACTERS:
                advance(0, documents)
                yield runs
                runs, characters, documents = [], 0, 0
    advance(0, documents)
    if runs:
        yield runs


def _is_one_word(paragraph: str) -> bool:
    return len(paragraph) <= _ONE_WORD and len(paragraph.split()) == 1


def _split(
    document: list[list[str]], validation_below: int, hashes: list[int]
) -> Iterator[tuple[str, list[str]]]:
    """Cuts a document (sentences of each paragraph) where it changes between the splits.

    A section is the whole document, or a stretch of it of at least `SECTION_SENTENCES` that ends
    with a paragraph; neighbours of the same split stay together. Whether a section is held out is
    decided by its text alone: the first 8 bytes of its BLAKE2b, as a number.
    """
    run: list[str] = []
    run_split = ""
    for section in _sections(document):
        number = text_hash("\n".join(section))
        hashes.append(number)
        split = "validation" if number < validation_below else "train"
        if split != run_split and run:
            yield run_split, run
            run = []
        run, run_split = run + section, split
    if run:
        yield run_split, run


def _sections(document: list[list[str]]) -> Iterator[list[str]]:
    left = sum(map(len, document))
    section: list[str] = []
    for paragraph in document:
        section += paragraph
        # What is left must make another section, or belongs to this one.
        if len(section) >= SECTION_SENTENCES and left - len(section) >= SECTION_SENTENCES:
            yield section
            left -= len(section)
            section = []
    if section:
        yield section


def _encode_and_append(
    runs: list[tuple[str, list[str]]],
    tokenizer: tokenizer_lib.Tokenizer,
    writers: dict[str, store.ShardWriter],
    counts: np.ndarray,
) -> None:
    """Adds the documents to the shards of their splits, and their pieces to `counts`."""
    between = tokenizer.between_sentences
    ids_T, offsets = tokenizer.encode_batch(
        [between + run[i] if i else run[i] for _, run in runs for i in range(len(run))]
    )
    lengths_S = np.diff(offsets)
    run_of_S = np.repeat(np.arange(len(runs)), [len(run) for _, run in runs])
    split_of_run = np.array([store.SPLITS.index(split) for split, _ in runs])
    for index, split in enumerate(store.SPLITS):
        # A sentence of nothing but marks that were normalised away has no tokens.
        chosen_S = (split_of_run[run_of_S] == index) & (lengths_S > 0)
        tokens_T = ids_T[np.repeat(chosen_S, lengths_S)]
        sizes = np.bincount(run_of_S[chosen_S], minlength=len(runs))
        writers[split].append(tokens_T, lengths_S[chosen_S], sizes[sizes > 0])
        counts[index] += np.bincount(tokens_T, minlength=counts.shape[1])
