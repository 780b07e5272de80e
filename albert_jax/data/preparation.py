"""Raw text to a token store: plan the shards, write them in parallel, put the store together.

In:  file patterns, or the documentation of the installed packages, and `Options`.
Out: a whole token store (see `store`), or a `UserError` and no store.

The plan is made of input bytes alone, and a shard is a pure function of its `ShardJob`
(`write_shard`), so the bytes of a store depend on input and options, never on how many processes
wrote it or in what order. Memory is bounded by the largest document part (`text.DOCUMENT_LIMIT`),
whatever the size of the input.

The store grows in `STORE.unfinished` and is moved to `STORE` when it is whole. A finished shard has
a record beside it, written last; `resume` keeps such shards if input and options are still the
same.

Shapes: T tokens, S sentences, D documents, V vocabulary.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax import progress as progress_lib
from albert_jax.data import python_docs, store, text
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

PYTHON_DOCS = "python-docs"

SECTION_SENTENCES = 64  # a document of twice as many is cut into sections for the split
_HASHES = 1 << 64
_ONE_WORD = 30  # characters; a document without white space and no longer is one word
_SHARD_BYTES = (1 << 20, 256 << 20)  # smallest and largest amount of input for one shard
_SHARDS = 256  # aimed at between these
_BATCH_CHARACTERS = 1 << 18  # text encoded at once
_SMALLEST_VOCABULARY = 40  # pieces
_LOCK = "lock"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")

# Told bytes read and documents done, as they are.
Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make of the input.

    Attributes:
        tokenizer: the file of a tokenizer, or None to train one.
        trained_kind: "unigram", "wordpiece" or "bpe", for a tokenizer that is trained here.
        vocab_size: its pieces.
        normalization: how text is normalised before it is encoded.
        reading: how files are understood.
        file_format: "text", "jsonl", or "" to go by each file's name.
        validation_fraction: share of the text that is held out, by sections.
        workers: processes; the store does not depend on it.
        resume: go on with the unfinished store that is there.
    """

    tokenizer: str | None
    trained_kind: str
    vocab_size: int
    normalization: tokenizer_lib.Normalization
    reading: text.Reading
    file_format: str
    validation_fraction: float
    workers: int
    resume: bool

    def __post_init__(self) -> None:
        """Raises UserError for values that make no sense."""
        if not 0 <= self.validation_fraction <= 0.5:
            raise UserError(
                f"--validation_fraction={self.validation_fraction} must lie between 0 and 0.5."
            )
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise UserError(
                f"--vocab_size={self.vocab_size} is too small; {_SMALLEST_VOCABULARY} is the least "
                "that holds the special pieces and an alphabet."
            )
        if self.workers < 1:
            raise UserError(f"--workers={self.workers} must be at least 1.")
        if not _LANGUAGE.fullmatch(self.reading.language):
            raise UserError(
                f"--language={self.reading.language} is not a language code; "
                "give two or three letters, such as en, de or uk."
            )


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
    """

    name: str
    units: tuple[text.Unit, ...]
    folder: Path
    tokenizer: Path
    normalization: tokenizer_lib.Normalization
    reading: text.Reading
    validation_below: int


def prepare(inputs: Sequence[str], output: str, options: Options) -> store.Store:
    """Makes a token store of text.

    Args:
        inputs: glob patterns; "python-docs" stands for the documentation of the installed packages.
        output: the folder to be; must not exist, or be empty.
        options: what to make of it.

    Raises:
        UserError: bad input, an output that is taken, a full disk, a killed worker. What shards
            were finished stay for `resume`; the output folder does not appear.
    """
    path = Path(output)
    _refuse_taken(path)
    folder = path.with_name(path.name + store.UNFINISHED)
    decisive = _decisive(options)
    try:
        with _claimed(folder, decisive, options.resume), _kept_if_useful(folder):
            files = _collect(inputs, folder, options)
            model = _place_tokenizer(files, folder, options)
            records = _write_shards(files, folder, model, options)
            tokenizer = _tokenizer(model, options.normalization)
            manifest = _manifest(records, files, folder, tokenizer, options)
            store.write_manifest(folder, manifest)
            folder.replace(path)
            # Only now: until here a failure must find what to go on with.
            _tidy(path, tokenizer.file_name)
    except OSError as error:
        raise UserError(_why_not_written(error, folder)) from error
    return store.open_store(path)


def write_shard(job: ShardJob, advance: Advance) -> dict[str, Any]:
    """Writes one shard of both splits, and its record when they are finished.

    Returns:
        The record, as JSON: for each split counts and hashes (see `store.ShardWriter.record`), what
        was skipped, and the least and greatest hash of a section.

    Raises:
        UserError: input that cannot be read, or is no text.
        OSError: the disk is full, or a file cannot be written.
    """
    tokenizer = _tokenizer(job.tokenizer, job.normalization)
    token_dtype = _token_dtype(tokenizer.vocab_size)
    skipped = text.Skipped()
    hashes: list[int] = []
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(store.ShardWriter(job.folder / split, job.name, token_dtype))
            for split in store.SPLITS
        }
        for runs in _batches(job, skipped, hashes, advance):
            _encode_and_append(runs, tokenizer, writers)
    record = {
        "identity": _identity(job),
        "validation_below": job.validation_below,
        "skipped": skipped,
        "least_hash": min(hashes, default=None),
        "greatest_hash": max(hashes, default=None),
        **{split: writer.record for split, writer in writers.items()},
    }
    _write_json(_record_path(job), record)
    return record


def plan(files: Sequence[str], options: Options) -> list[tuple[text.Unit, ...]]:
    """The units of each shard, in order: a function of the files' names and sizes alone."""
    total = sum(_weight(path, Path(path).stat().st_size) for path in files)
    smallest, largest = _SHARD_BYTES
    target = min(max(total // _SHARDS, smallest), largest)
    shards: list[tuple[text.Unit, ...]] = []
    shard: list[text.Unit] = []
    weight = 0
    for path in files:
        for unit in text.units(path, options.file_format, options.reading, target):
            shard.append(unit)
            weight += _weight(unit.path, unit.size)
            if weight >= target:
                shards.append(tuple(shard))
                shard, weight = [], 0
    return [*shards, tuple(shard)] if shard else shards


def _weight(path: str, size: int) -> int:
    # Text packs to about a third; what is inside is not known beforehand.
    return 3 * size if path.endswith(".gz") else size


def _batches(
    job: ShardJob, skipped: text.Skipped, hashes: list[int], advance: Advance
) -> Iterator[list[tuple[str, list[str]]]]:
    """Batches of (split, sentences of one of its documents), of about `_BATCH_CHARACTERS`."""
    runs: list[tuple[str, list[str]]] = []
    characters = documents = 0
    for unit in job.units:
        for paragraphs in text.documents(unit, job.reading, skipped, lambda size: advance(size, 0)):
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
        number = _hash("\n".join(section))
        hashes.append(number)
        split = "validation" if number < validation_below else "train"
        if split != run_split and run:
            yield run_split, run
            run = []
        run, run_split = run + section, split
    if run:
        yield run_split, run


def _hash(content: str) -> int:
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


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
) -> None:
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


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, normalization: tokenizer_lib.Normalization) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.Tokenizer.load(path, normalization)


# Where the store grows


def _refuse_taken(path: Path) -> None:
    if (path / store.MANIFEST).exists():
        raise UserError(
            f"{path} is a token store already; choose another --output, or delete it first."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} holds something else; choose another --output. Nothing was changed."
        )


@contextlib.contextmanager
def _claimed(folder: Path, ours: dict[str, Any], resume: bool) -> Iterator[None]:
    """Holds the folder for this process; to resume, what is in it must be the same work."""
    begun = folder / "options.json"
    if (
        not begun.exists()
        and folder.exists()
        and {path.name for path in folder.iterdir()} - {_LOCK}
    ):
        raise UserError(
            f"{folder} holds something else; choose another --output. Nothing was changed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another albert_jax.prepare is writing {folder}; let it finish, or stop it."
            ) from None
        if not begun.exists():
            _write_json(begun, ours)
        elif not resume:
            raise UserError(
                f"{folder} holds an unfinished store; "
                "add --resume to go on with it, or delete it to start over."
            )
        else:
            theirs = json.loads(begun.read_bytes())
            differing = [
                f"{key}: {theirs.get(key)} there, {ours[key]} now"
                for key in ours
                if theirs.get(key) != ours[key]
            ]
            if differing:
                raise UserError(
                    f"{folder} was begun with other options ({'; '.join(differing)}); "
                    "give the same ones, or delete it to start over."
                )
        yield


@contextlib.contextmanager
def _kept_if_useful(folder: Path) -> Iterator[None]:
    """After a failure keeps what another run can go on with, and says so; else nothing."""
    try:
        yield
    except BaseException as error:
        finished = len(list(folder.glob("*-of-*.json")))
        if not finished:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        kept = (
            f"Shards finished so far: {finished}, kept in {folder}; "
            "the same command with --resume goes on from there."
        )
        if isinstance(error, OSError):
            raise UserError(f"{_why_not_written(error, folder)}\n{kept}") from error
        if isinstance(error, UserError):
            raise UserError(f"{error}\n{kept}") from error
        if isinstance(error, KeyboardInterrupt):
            print(kept, file=sys.stderr)
        raise


def _tidy(folder: Path, tokenizer: str) -> None:
    """Removes what only the work needed."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in (tokenizer, store.MANIFEST):
            path.unlink()


def _decisive(options: Options) -> dict[str, Any]:
    if options.tokenizer:
        given = tokenizer_lib.Tokenizer.load(options.tokenizer, options.normalization)
        tokenizer, library = given.sha256, given.library
    else:
        tokenizer = f"trained {options.trained_kind}, {options.vocab_size} pieces"
        library = "sentencepiece" if options.trained_kind == "unigram" else "tokenizers"
    return {
        "tokenizer": tokenizer,
        **dataclasses.asdict(options.normalization),
        **dataclasses.asdict(options.reading),
        "format": options.file_format,
        **_libraries(library),
        "validation_fraction": options.validation_fraction,
    }


def _libraries(tokenizer: str) -> dict[str, str]:
    """What else decides the bytes: other versions may part sentences or normalise otherwise."""
    versions = {name: importlib.metadata.version(name) for name in (tokenizer, "sentencex")}
    return {**versions, "unicode": unicodedata.unidata_version}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    unfinished = path.with_name(path.name + store.UNFINISHED)
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.replace(path)


def _why_not_written(error: OSError, folder: Path) -> str:
    what = f"{error.filename or folder}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full, or a limit on files is reached ({what}). A store takes about half "
            "the room of its text."
        )
    return f"the system refused: {what}."


# Input and tokenizer


def _collect(inputs: Sequence[str], folder: Path, options: Options) -> list[str]:
    """The files to read; the packages' documentation becomes one of them.

    Raises:
        UserError: nothing there, or nothing in it.
    """
    files: dict[str, None] = {}
    for item in inputs:
        if item == PYTHON_DOCS:
            files[str(_documentation(folder, options.workers))] = None
        else:
            files.update(dict.fromkeys(text.find_files([item])))
    if not files:
        raise UserError("--input names nothing; give a file, a pattern or python-docs.")
    if not any(Path(path).stat().st_size for path in files):
        raise UserError(
            f"the input is empty: its files have 0 bytes each ({', '.join(list(files)[:3])})."
        )
    return list(files)


def _documentation(folder: Path, workers: int) -> Path:
    """The packages' documentation as JSON Lines in the folder; beside it, what it is of."""
    path = folder / f"{PYTHON_DOCS}.jsonl"
    if not path.exists():
        modules = python_docs.find_modules()
        groups = [tuple(modules[i : i + 64]) for i in range(0, len(modules), 64)]
        extracts: list[list[python_docs.Extract]] = [[] for _ in groups]
        with progress_lib.Progress("read docs", sum(m.size for m in modules), "B") as progress:
            for index, result in _parallel(_extract, groups, workers, progress, "modules"):
                extracts[index] = result
        unfinished = path.with_name(path.name + store.UNFINISHED)
        about = python_docs.write(unfinished, [one for group in extracts for one in group])
        _write_json(folder / f"{PYTHON_DOCS}.json", about)
        unfinished.replace(path)
    return path


def _extract(
    modules: tuple[python_docs.Module, ...], advance: Advance
) -> list[python_docs.Extract]:
    extracts = []
    for module in modules:
        extracts.append(python_docs.extract(module))
        advance(module.size, 1)
    return extracts


def _place_tokenizer(files: Sequence[str], folder: Path, options: Options) -> Path:
    """The tokenizer in its place in the store: copied, or trained on the input."""
    if options.tokenizer:
        path = folder / tokenizer_lib.file_name(options.tokenizer)
        shutil.copyfile(options.tokenizer, path)
        return path
    path = folder / tokenizer_lib.TRAINED_FILES[options.trained_kind]
    units = [unit for shard in plan(files, options) for unit in shard]
    # In no order, since a large input is not read to its end.
    order = sorted(range(len(units)), key=lambda index: _hash(str(index)))
    job = _TrainingJob(tuple(units[index] for index in order), path, options)
    trained_on = folder / "vocabulary.json"
    states = {"units": _states(job.units)}
    if path.exists() and trained_on.exists() and json.loads(trained_on.read_bytes()) == states:
        return path
    total = sum(unit.size for unit in job.units)
    less = "train a vocabulary on a part of the input and give it as --tokenizer"
    with progress_lib.Progress("vocabulary", total, "B") as progress:
        # Two workers, of which one has work: a process that Ctrl-C can end at once.
        for _ in _parallel(_train_tokenizer, [job], 2, progress, "documents", less):
            _write_json(trained_on, states)
    return path


@dataclasses.dataclass(frozen=True)
class _TrainingJob:
    units: tuple[text.Unit, ...]
    path: Path
    options: Options


def _train_tokenizer(job: _TrainingJob, advance: Advance) -> None:
    def sentences() -> Iterator[str]:
        reading = job.options.reading
        skipped = text.Skipped()  # counted when the shards are written
        for unit in job.units:
            for paragraphs in text.documents(unit, reading, skipped, lambda size: advance(size, 0)):
                advance(0, 1)
                for paragraph in paragraphs:
                    yield from text.sentences(paragraph, reading.language)

    tokenizer_lib.train(
        sentences(),
        job.path,
        job.options.vocab_size,
        job.options.normalization,
        kind=job.options.trained_kind,
    )


# Shards


def _write_shards(
    files: Sequence[str], folder: Path, tokenizer: Path, options: Options
) -> list[dict[str, Any]]:
    """Writes all shards that are not finished yet; returns the records of all, in order."""
    shards = plan(files, options)
    jobs = [
        ShardJob(
            name=f"{index:05d}-of-{len(shards):05d}",
            units=units,
            folder=folder,
            tokenizer=tokenizer,
            normalization=options.normalization,
            reading=options.reading,
            validation_below=round(options.validation_fraction * _HASHES),
        )
        for index, units in enumerate(shards)
    ]
    records = [_finished(job) for job in jobs]
    sizes = [sum(unit.size for unit in job.units) for job in jobs]
    done = sum(size for size, record in zip(sizes, records, strict=True) if record)

    def write(which: list[int]) -> None:
        chosen = [jobs[index] for index in which]
        workers = min(options.workers, max(len(chosen), 1))
        for index, record in _parallel(write_shard, chosen, workers, progress, "documents"):
            records[which[index]] = record

    with progress_lib.Progress("prepare", sum(sizes), "B", initial=done) as progress:
        write([index for index, record in enumerate(records) if not record])
        if not any(record[split]["tokens"] for record in records for split in store.SPLITS):
            for job in jobs:
                _record_path(job).unlink()  # nothing that is worth going on with
            raise UserError(_why_nothing(records))
        below = _threshold(records, jobs[0].validation_below)
        jobs = [dataclasses.replace(job, validation_below=below) for job in jobs]
        # None as a rule; else as few as hold the one section that has to change sides.
        write([index for index, record in enumerate(records) if _differs(record, below)])
    return records


def _threshold(records: Sequence[dict[str, Any]], below: int) -> int:
    """The hash under which a section is held out: `below`, or the nearest with both splits filled.

    It depends on the hashes alone, so it is the same whoever finds it out. 0 holds out nothing.
    """
    least = [record["least_hash"] for record in records if record["least_hash"] is not None]
    greatest = [record["greatest_hash"] for record in records if record["least_hash"] is not None]
    if below == 0 or min(least) == max(greatest):
        return 0
    if min(least) >= below:
        return min(least) + 1
    return min(below, max(greatest))


def _why_nothing(records: Sequence[dict[str, Any]]) -> str:
    skipped = text.Skipped()
    for record in records:
        skipped.merge(record["skipped"])
    left_out = "; ".join(f"{count:,} {reason}" for reason, (count, _) in skipped.items())
    return "there is nothing to train on in the input" + (
        f"; left out were {left_out}. Is a blank line the end of a document here? See --document."
        if left_out
        else ", only white space."
    )


def _differs(record: dict[str, Any], below: int) -> bool:
    """Whether another threshold than the shard was written with moves one of its sections."""
    written, least, greatest = (
        record["validation_below"],
        record["least_hash"],
        record["greatest_hash"],
    )
    if least is None or written == below:
        return False
    return least < below if written < below else greatest >= below


def _record_path(job: ShardJob) -> Path:
    return job.folder / f"{job.name}.json"


def _identity(job: ShardJob) -> list[Any]:
    """What tells whether a finished shard is still the wanted one; options are checked apart."""
    return [_tokenizer(job.tokenizer, job.normalization).sha256, *_states(job.units)]


def _states(units: Sequence[text.Unit]) -> list[list[Any]]:
    states = []
    for unit in units:
        status = Path(unit.path).stat()
        states.append([unit.path, unit.start, unit.end, status.st_size, status.st_mtime_ns])
    return states


def _finished(job: ShardJob) -> dict[str, Any]:
    """The record of a shard that is there already, of this input and unharmed; else empty."""
    try:
        record = json.loads(_record_path(job).read_bytes())
        same = (
            record["identity"] == _identity(job)
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


# Putting the store together


def _manifest(
    records: list[dict[str, Any]],
    files: Sequence[str],
    folder: Path,
    tokenizer: tokenizer_lib.Tokenizer,
    options: Options,
) -> dict[str, Any]:
    """All that is known of the store; of time and place it holds but the names of the files."""
    about_docs = folder / f"{PYTHON_DOCS}.json"
    skipped = text.Skipped()
    for path in files:
        if Path(path).stat().st_size == 0:
            skipped.add("empty files", path)
    for record in records:
        skipped.merge(record["skipped"])
    sources: list[dict[str, Any]] = []
    for path in files:
        source: dict[str, Any] = {"path": path, "bytes": Path(path).stat().st_size}
        if Path(path).parent == folder:
            about = json.loads(about_docs.read_bytes())
            source |= {"path": PYTHON_DOCS, "packages": about["packages"]}
            skipped.merge(
                {reason: (count, PYTHON_DOCS) for reason, count in about["skipped"].items()}
            )
        sources.append(source)
    splits = {
        split: {
            **{
                array: sum(record[split][array] for record in records)
                for array in reversed(store.ARRAYS)
            },
            "shards": [record[split] for record in records],
        }
        for split in store.SPLITS
    }
    counts = {split: _count(records, folder, split, tokenizer.vocab_size) for split in store.SPLITS}
    below = records[0]["validation_below"]
    return {
        "format": "albert_jax token store",
        "format_version": store.FORMAT_VERSION,
        "tokenizer": store.tokenizer_record(tokenizer),
        "token_dtype": _token_dtype(tokenizer.vocab_size).__name__,
        "normalization": tokenizer.normalization.record(),
        "libraries": _libraries(tokenizer.library),
        "language": options.reading.language,
        "document": options.reading.document,
        "split_rule": (
            "A document is cut, where it has the length for two, into sections of at least "
            f"{SECTION_SENTENCES} sentences that end with a paragraph. A section is held out for "
            "validation if the BLAKE2b hash, 8 bytes long, of its sentences (before normalisation, "
            "joined by line feeds, UTF-8) is less than validation_below as a big-endian number. "
            "This is validation_fraction of 2^64, moved just so far that neither split is empty."
        ),
        "validation_fraction": options.validation_fraction,
        "validation_below": below,
        "unigram_loss": _unigram_loss(counts["train"], counts["validation"]),
        "unknown_share": float(
            sum(c[tokenizer.unk_id] for c in counts.values())
            / sum(c.sum() for c in counts.values())
        ),
        "skipped": {
            reason: {"count": count, "first": where} for reason, (count, where) in skipped.items()
        },
        "sources": sources,
        "splits": splits,
    }


def _count(records: list[dict[str, Any]], folder: Path, split: str, vocab_size: int) -> np.ndarray:
    """How often each piece occurs in a split, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for record in records:
        path = folder / split / f"{record[split]['name']}.tokens.npy"
        tokens_T = np.load(path, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(tokens_T), 1 << 20):
            counts += np.bincount(tokens_T[start : start + (1 << 20)], minlength=vocab_size)
    return counts


def _unigram_loss(train_V: np.ndarray, validation_V: np.ndarray) -> float:
    """Nats per validation token under the frequencies of train, one added to each."""
    measured_V = validation_V if validation_V.any() else train_V
    log_probs_V = np.log(train_V + 1.0) - math.log(train_V.sum() + len(train_V))
    return float(-(measured_V @ log_probs_V) / measured_V.sum())


# Processes


def _parallel(
    task: Callable[[Any, Advance], Any],
    jobs: Sequence[Any],
    workers: int,
    progress: progress_lib.Progress,
    unit: str,
    if_killed: str = "give fewer --workers",
) -> Iterator[tuple[int, Any]]:
    """(index of the job, result) as jobs are finished; with one worker, in this process.

    Args:
        task: called with a job and where to tell bytes and units done.
        jobs: small things to pickle.
        workers: processes.
        progress: shows bytes, and units in its note.
        unit: what else is counted.
        if_killed: advice for when a worker was, most likely for its memory.

    Raises:
        UserError: a worker was killed from outside.
    """
    if workers == 1:
        units = 0

        def advance(size: int, more: int) -> None:
            nonlocal units
            units += more
            progress.advance(size, f"{units:,} {unit}")

        for index, job in enumerate(jobs):
            yield index, task(job, advance)
        return
    # Not forked: the parent may have threads, and macOS forbids it.
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", 2)
    told = 0
    todo = collections.deque(enumerate(jobs))
    running: dict[concurrent.futures.Future[Any], int] = {}
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (done,))
    # A pipe to a worker that died is an error to report, not our end as it is on `| head`.
    with _ignoring(signal.SIGPIPE):
        try:
            while todo or running:
                # Processes are started here and inherit this: Ctrl-C is the parent's to handle.
                with _ignoring(signal.SIGINT):
                    while todo and len(running) < 2 * workers:
                        index, job = todo.popleft()
                        running[executor.submit(_work, task, job)] = index
                finished, _ = concurrent.futures.wait(
                    running, 0.1, concurrent.futures.FIRST_COMPLETED
                )
                progress.advance(done[0] - told, f"{done[1]:,} {unit}")
                told = done[0]
                for future in finished:
                    yield running.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, most likely because memory ran out; {if_killed}."
            ) from None
        finally:
            for process in multiprocessing.active_children() if running else ():
                process.kill()
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can it be set, and only there are such signals handled
        return
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, handler)


_done: Any = None  # in a worker: bytes and units that all of them have done, shared


def _begin_worker(done: Any) -> None:
    global _done
    _done = done
    # Nobody else ends a worker whose parent was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: Callable[[Any, Advance], Any], job: Any) -> Any:
    return task(job, _advance_shared)


def _advance_shared(size: int, units: int) -> None:
    with _done.get_lock():
        _done[0] += size
        _done[1] += units
