"""Which paragraphs and documents repeat earlier ones, decided before any shard is written.

In:  the units of all shards, and `Quality`.
Out: for each shard, which of its documents are like an earlier one, and which of its paragraphs are
     the same as an earlier one. The first of each stays.

"Earlier" is in the order of the plan, so the decisions depend on the input and the options alone,
never on which process read what first. It takes three steps:

1. `scan`, a pure function of a shard's units, many at once: of each paragraph a hash, of each
   document a MinHash signature and the hashes of its bands. They go to the disk in sorted runs.
2. `decide`, in one process: goes through the runs of all shards by ranges of the hash, so that it
   holds about `_PARTITION` bytes at a time, however large the input is. (All documents whose hash
   of a band is the same are held together: 16 bytes each.)
3. `documents`, while a shard is written: leaves out what was decided.

Paragraphs are the same if the first 16 bytes of their BLAKE2b are: among 10^12 different ones two
would meet with a probability of 10^-15. Paragraphs of documents that are left out count for
nothing. Documents are alike if at least `unique_documents` of the 128 values of their signatures
agree, an estimate of the Jaccard index of their sequences of five words with a standard error of at
most 0.045; pairs are looked for in the bands of locality-sensitive hashing, which are laid out to
find nearly all of them. (Where a text has no spaces between words, each character counts as one.)

The disk holds 24 bytes for a paragraph meanwhile, and about a kilobyte for a document.

Sources: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", ch. 3 (bands); datasketch (the signatures, and the bands that
suit a threshold). This is the only module that imports datasketch.
Shapes: D documents, M values of a signature, N members of a group.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from albert_jax.data import quality as quality_lib
from albert_jax.data import sources, store
from albert_jax.data.workers import Advance

DECISIONS = ("json", "alike.npy", "repeated.npy")  # what is decided of a shard, and its record
_DECIDED = "decided.json"
_M = 128  # values of a signature
_WORDS = 5  # in a sequence
_PARTITION = 64 << 20  # bytes of records that are compared at once
_PARAGRAPH_RUN = 1 << 20  # paragraphs sorted at once
_DOCUMENT_RUN = 1 << 15  # documents sorted at once
_GROUP = 1 << 15  # signatures compared at once
_SHINGLES = 1 << 12  # hashed at once

_PARAGRAPH = np.dtype([("high", "u8"), ("low", "u8"), ("document", "u4"), ("ordinal", "u4")])
_BAND = np.dtype([("high", "u8"), ("row", "u8")])
# In these scripts a word has no mark where it ends; each character counts as one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
# White space and punctuation, of which none is part of a word.
_MARKS = (
    r"\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u0965\u2000-\u206f"
    r"\u3000-\u303f\uff00-\uff0f"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^{_MARKS}{_UNSPACED}]+")


@dataclasses.dataclass(frozen=True)
class ScanJob:
    """All that decides what a shard's part of the input is compared by.

    Attributes:
        name: that of the shard.
        units: the input, in order.
        identity: what tells whether the input is still the same.
        folder: where to write.
        reading: how the input is understood.
        quality: which documents are looked at, and what is compared.
    """

    name: str
    units: tuple[sources.Unit, ...]
    identity: list[Any]
    folder: Path
    reading: sources.Reading
    quality: quality_lib.Quality

    @property
    def needs(self) -> list[Path]:
        """What has to be in the folder before."""
        return []

    def moved(self, folder: Path) -> Self:
        """The same job in another folder."""
        return dataclasses.replace(self, folder=folder)


def scan(job: ScanJob, advance: Advance) -> dict[str, Any]:
    """Writes the sorted runs of a shard, and its record when they are finished.

    Returns:
        The record, as JSON: the numbers of documents, of compared paragraphs and of runs, and how
        many documents and paragraphs there were before each unit.
    """
    job.folder.mkdir(exist_ok=True)
    paragraphs = _Paragraphs(job)
    signatures = _Signatures(job)
    starts = []
    documents = 0
    skipped = sources.Skipped()  # counted when the shards are written
    for unit in job.units:
        starts.append([documents, paragraphs.count])
        for document in quality_lib.documents(
            unit, job.reading, job.quality, skipped, lambda size: advance(size, 0)
        ):
            if job.quality.unique_paragraphs:
                paragraphs.add(_compared(document, job.quality), documents)
            if job.quality.unique_documents:
                signatures.add(document)
            documents += 1
            advance(0, 1)
    paragraphs.flush()
    signatures.flush()
    record = {
        "identity": job.identity,
        "starts": starts,
        "documents": documents,
        "paragraphs": paragraphs.count,
        "paragraph_runs": paragraphs.runs,
        "document_runs": signatures.runs,
    }
    store.write_json(job.folder / f"{job.name}.json", record)
    return record


def unscanned(jobs: Sequence[ScanJob]) -> list[ScanJob]:
    """The jobs that are still to be done, of all of a store; none if `decide` is done with them.

    What was decided for other input is removed.
    """
    folder = jobs[0].folder
    decided = folder / _DECIDED
    if decided.exists():
        if json.loads(decided.read_bytes()) == _identities(jobs):
            return []
        shutil.rmtree(folder)
    return [job for job in jobs if not _scanned(job)]


def decide(jobs: Sequence[ScanJob]) -> None:
    """Writes, for every shard, what it repeats; all have been scanned."""
    folder, quality = jobs[0].folder, jobs[0].quality
    if (folder / _DECIDED).exists():
        return
    names = [job.name for job in jobs]
    records = [_record(folder, name) for name in names]
    for name, record in zip(names, records, strict=True):
        np.save(folder / f"{name}.alike.npy", np.zeros(record["documents"], bool))
        np.save(folder / f"{name}.repeated.npy", np.zeros(record["paragraphs"], bool))
    # In this order: what is in a document that is left out is not there for others to repeat.
    if quality.unique_documents:
        _mark_alike(folder, names, records, quality.unique_documents)
    if quality.unique_paragraphs:
        _mark_repeated(folder, names, records)
    store.write_json(folder / _DECIDED, _identities(jobs))
    for kind in ("paragraphs", "signatures", "bands"):
        for path in folder.glob(f"*.{kind}.*.npy"):
            path.unlink()


def digest(folder: Path, name: str) -> list[str]:
    """Hashes of what was decided for a shard."""
    return [store.sha256(folder / f"{name}.{kind}.npy") for kind in ("alike", "repeated")]


def documents(
    unit: sources.Unit,
    place: tuple[str, int],
    reading: sources.Reading,
    quality: quality_lib.Quality,
    folder: Path,
    skipped: sources.Skipped,
    advance: Callable[[int], None],
) -> Iterator[list[str]]:
    """The documents of a unit that are kept, without what repeats; each a list of paragraphs.

    Args:
        unit: what to read.
        place: its shard's name, and its number in it.
        reading: how.
        quality: what is left out.
        folder: of the decisions, if there is something to compare.
        skipped: takes note of what is left out.
        advance: told the bytes read from the disk, as they are.

    Raises:
        UserError: as `quality.documents`.
    """
    found = quality_lib.documents(unit, reading, quality, skipped, advance)
    if not quality.needs_comparison:
        yield from found
        return
    name, number = place
    alike_D = np.load(folder / f"{name}.alike.npy", mmap_mode="r", allow_pickle=False)
    repeated = np.load(folder / f"{name}.repeated.npy", mmap_mode="r", allow_pickle=False)
    index, ordinal = _record(folder, name)["starts"][number]
    for document in found:
        compared = 0
        if quality.unique_paragraphs:
            compared = sum(1 for _ in _compared(document, quality))
        drop = repeated[ordinal : ordinal + compared].tolist()
        ordinal += compared
        index += 1
        if alike_D[index - 1]:
            skipped.add("documents like an earlier one", unit.path)
            continue
        if any(drop):
            skipped.add("paragraphs that repeat an earlier one", unit.path, sum(drop))
            verdicts = iter(drop)
            document = [
                paragraph
                for paragraph in document
                if len(paragraph) < quality.unique_paragraphs or not next(verdicts)
            ]
        if document:
            yield document


def _compared(document: list[str], quality: quality_lib.Quality) -> Iterator[str]:
    return (paragraph for paragraph in document if len(paragraph) >= quality.unique_paragraphs)


def _scanned(job: ScanJob) -> bool:
    try:
        return _record(job.folder, job.name)["identity"] == job.identity
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _identities(jobs: Sequence[ScanJob]) -> dict[str, Any]:
    return {job.name: job.identity for job in jobs}


def _record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_bytes())


# Step 1: what is compared


class _Paragraphs:
    """Collects the hashes of a shard's paragraphs and writes them in sorted runs."""

    def __init__(self, job: ScanJob) -> None:
        self.count = 0
        self.runs = 0
        self._job = job
        self._hashes = bytearray()
        self._documents: list[int] = []

    def add(self, paragraphs: Iterator[str], document: int) -> None:
        for paragraph in paragraphs:
            content = " ".join(paragraph.split()).encode()
            self._hashes += hashlib.blake2b(content, digest_size=16).digest()
            self._documents.append(document)
            self.count += 1
        if len(self._documents) >= _PARAGRAPH_RUN:
            self.flush()

    def flush(self) -> None:
        found = len(self._documents)
        if not found:
            return
        records = np.empty(found, _PARAGRAPH)
        hashes = np.frombuffer(bytes(self._hashes), ">u8").reshape(found, 2)
        records["high"], records["low"] = hashes.T
        records["document"] = self._documents
        records["ordinal"] = np.arange(self.count - found, self.count)
        order = np.lexsort((records["low"], records["high"]))
        path = self._job.folder / f"{self._job.name}.paragraphs.{self.runs}.npy"
        np.save(path, records[order])
        self.runs += 1
        self._hashes.clear()
        self._documents.clear()


class _Signatures:
    """Collects the signatures of a shard's documents and writes them, and their bands sorted."""

    def __init__(self, job: ScanJob) -> None:
        self.runs = 0
        self._job = job
        self._rows: list[np.ndarray] = []

    def add(self, document: list[str]) -> None:
        self._rows.append(signature("\n".join(document)))
        if len(self._rows) == _DOCUMENT_RUN:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        signatures_DM = np.stack(self._rows)
        bands, rows = _bands(self._job.quality.unique_documents)
        path = self._job.folder / f"{self._job.name}.signatures.{self.runs}.npy"
        np.save(path, signatures_DM)
        found = np.empty((bands, len(signatures_DM)), _BAND)
        for band in range(bands):
            values = np.ascontiguousarray(signatures_DM[:, band * rows : (band + 1) * rows])
            hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values]
            found[band]["high"] = np.frombuffer(b"".join(hashes), ">u8")
            found[band]["row"] = np.arange(len(signatures_DM))
            found[band] = found[band][np.argsort(found[band]["high"], kind="stable")]
        np.save(path.with_name(f"{self._job.name}.bands.{self.runs}.npy"), found)
        self.runs += 1
        self._rows.clear()


def signature(text: str) -> np.ndarray:
    """The MinHash signature of a text's sequences of five words, uint32 [M]."""
    import datasketch

    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.casefold()) or [text]]
    hashes = np.array(words, np.uint64)
    # A polynomial of the words modulo 2^64; its upper half depends on all of them. A text of fewer
    # than five words is a sequence of its own.
    size = min(_WORDS, len(hashes))
    mixed = np.zeros(len(hashes) - size + 1, np.uint64)
    for place in range(size):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(mixed)]
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    shingles = (mixed >> np.uint64(32)).astype(np.uint32)
    made = datasketch.MinHash(_M, hashfunc=int, permutations=_permutations(), scheme="affine32")
    for start in range(0, len(shingles), _SHINGLES):
        made.update_batch(shingles[start : start + _SHINGLES].tolist())
    return made.hashvalues


@functools.cache
def _permutations() -> Any:
    import datasketch

    return datasketch.MinHash(_M, seed=1, scheme="affine32").permutations


@functools.cache
def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many values find nearly all pairs above the threshold."""
    import datasketch

    # Pairs found for nothing cost a comparison, pairs not found are not found.
    index = datasketch.MinHashLSH(threshold, _M, weights=(0.1, 0.9))
    return index.b, index.r


# Step 2: what repeats


def _mark_repeated(folder: Path, names: list[str], records: list[dict[str, Any]]) -> None:
    runs = [
        (shard, _mapped(folder / f"{name}.paragraphs.{run}.npy"))
        for shard, name in enumerate(names)
        for run in range(records[shard]["paragraph_runs"])
    ]
    dtype = np.dtype([*_PARAGRAPH.descr, ("shard", "i8")])
    for slices in _partitions([run for _, run in runs]):
        seen = np.zeros(0, dtype)
        pending: list[np.ndarray] = []
        for (shard, _), records_ in zip(runs, slices, strict=True):
            if not len(records_):
                continue
            alike_D = _mapped(folder / f"{names[shard]}.alike.npy")
            records_ = records_[~alike_D[records_["document"]]]
            pending.append(np.empty(len(records_), dtype))
            for field in _PARAGRAPH.names or ():
                pending[-1][field] = records_[field]
            pending[-1]["shard"] = shard
            if sum(part.nbytes for part in pending) > 2 * _PARTITION:
                seen = _settle(seen, pending, folder, names)
                pending = []
        _settle(seen, pending, folder, names)


def _settle(
    seen: np.ndarray, pending: list[np.ndarray], folder: Path, names: list[str]
) -> np.ndarray:
    """Marks what is in `seen` or comes again in `pending`; returns the first of each hash."""
    records = np.concatenate([seen, *pending])
    records = records[np.lexsort((records["low"], records["high"]))]  # stable, so firsts are first
    again = np.zeros(len(records), bool)
    again[1:] = (records["high"][1:] == records["high"][:-1]) & (
        records["low"][1:] == records["low"][:-1]
    )
    repeated = records[again]
    for shard in np.unique(repeated["shard"]).tolist():
        _mark(
            folder / f"{names[shard]}.repeated.npy",
            repeated["ordinal"][repeated["shard"] == shard],
        )
    return records[~again]


def _mark_alike(
    folder: Path, names: list[str], records: list[dict[str, Any]], threshold: float
) -> None:
    runs = [
        (shard, run)
        for shard, record in enumerate(records)
        for run in range(record["document_runs"])
    ]
    bands = [_mapped(folder / f"{names[shard]}.bands.{run}.npy") for shard, run in runs]
    signatures = [_mapped(folder / f"{names[shard]}.signatures.{run}.npy") for shard, run in runs]
    for band in range(_bands(threshold)[0]):
        for slices in _partitions([found[band] for found in bands]):
            hashes = np.concatenate([found["high"] for found in slices])
            run_of = np.repeat(np.arange(len(slices)), list(map(len, slices)))
            row_of = np.concatenate([found["row"] for found in slices])
            order = np.argsort(hashes, kind="stable")  # of equal ones, in the order of the plan
            begins = np.r_[0, np.flatnonzero(np.diff(hashes[order])) + 1]
            sizes = np.diff(np.r_[begins, len(order)])
            alike: dict[int, list[int]] = {}
            for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
                group = order[begin : begin + size]
                members = list(zip(run_of[group].tolist(), row_of[group].tolist(), strict=True))
                for index in _followers(members, signatures, threshold):
                    shard, run = runs[members[index][0]]
                    alike.setdefault(shard, []).append(run * _DOCUMENT_RUN + members[index][1])
            for shard, ordinals in alike.items():
                _mark(folder / f"{names[shard]}.alike.npy", ordinals)


def _followers(
    members: list[tuple[int, int]], signatures: list[np.ndarray], threshold: float
) -> Iterator[int]:
    """Which members of a group are alike one before, of those that are like none before."""
    leaders_NM = np.zeros((0, _M), np.uint32)
    for start in range(0, len(members), _GROUP):
        chosen = members[start : start + _GROUP]
        rows_NM = np.concatenate([leaders_NM, [signatures[run][row] for run, row in chosen]])
        left_N = np.arange(len(rows_NM))
        leads_N = np.zeros(len(rows_NM), bool)
        while len(left_N):
            leads_N[left_N[0]] = True
            share_N = (rows_NM[left_N] == rows_NM[left_N[0]]).mean(1)
            left_N = left_N[share_N < threshold]
        yield from (start - len(leaders_NM) + np.flatnonzero(~leads_N)).tolist()
        leaders_NM = rows_NM[leads_N]


def _partitions(runs: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The runs, sorted by `high`, cut at the same values into parts of about `_PARTITION`."""
    count = -(-sum(run.nbytes for run in runs) // _PARTITION)
    begins = [0] * len(runs)
    for part in range(1, count + 1):
        edge = (part << 64) // count
        if part < count:
            ends = [bisect.bisect_left(run["high"], edge, key=int) for run in runs]
        else:
            ends = [len(run) for run in runs]
        yield [np.array(run[a:b]) for run, a, b in zip(runs, begins, ends, strict=True)]
        begins = ends


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _mark(path: Path, places: Any) -> None:
    marks = np.load(path, mmap_mode="r+", allow_pickle=False)
    marks[places] = True
    marks.flush()
