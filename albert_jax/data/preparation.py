"""Raw text to a token store: plan the shards, write them in parallel, put the store together.

In:  file patterns, or the documentation of the installed packages, and `Options`.
Out: a whole token store (see `store`), or a `UserError` and no store.

A shard is a pure function of its job (see `shards`), so the bytes of a store depend on input and
options, never on how many processes wrote it or in what order. Memory is bounded by the largest
document part (`sources.DOCUMENT_LIMIT`), whatever the size of the input.

The store grows in `STORE.unfinished` and is moved to `STORE` when it is whole. A finished shard has
a record beside it, written last; `resume` keeps such shards if input and options are still the
same.

Shapes: T tokens, V vocabulary.
"""

import dataclasses
import importlib.metadata
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax import progress as progress_lib
from albert_jax import storage
from albert_jax.data import (
    beam,
    claim,
    duplicates,
    python_docs,
    shards,
    sources,
    store,
    text,
    upload,
    workers,
)
from albert_jax.data import quality as quality_lib
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

PYTHON_DOCS = "python-docs"

_HASHES = 1 << 64
_SMALLEST_VOCABULARY = 40  # pieces
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make of the input.

    Attributes:
        tokenizer: the file of a tokenizer, or None to train one.
        trained_kind: "unigram", "wordpiece" or "bpe", for a tokenizer that is trained here.
        vocab_size: its pieces.
        normalization: how text is normalised before it is encoded.
        reading: how files are understood.
        file_format: one of `sources.FORMATS`, or "" to go by each file's name.
        validation_fraction: share of the text that is held out, by sections.
        workers: processes; the store does not depend on it.
        cluster: the machines that write the shards, through Beam; None for processes of our own.
        resume: go on with the unfinished store that is there.
        tfds_data_dir: where TFDS keeps its datasets, if not in its usual folder.
        quality: which documents and paragraphs are left out.
    """

    tokenizer: str | None
    trained_kind: str
    vocab_size: int
    normalization: tokenizer_lib.Normalization
    reading: sources.Reading
    file_format: str
    validation_fraction: float
    workers: int
    resume: bool
    cluster: beam.Cluster | None = None
    tfds_data_dir: str | None = None
    quality: quality_lib.Quality = dataclasses.field(default_factory=quality_lib.Quality)

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


def prepare(inputs: Sequence[str], output: str, options: Options) -> store.Store:
    """Makes a token store of text.

    Args:
        inputs: glob patterns; "python-docs" stands for the documentation of the installed packages.
        output: the folder to be, here or in a bucket (gs://, see `upload`); must not exist, or be
            empty.
        options: what to make of it.

    Raises:
        UserError: bad input, an output that is taken, a full disk, a killed worker. What shards
            were finished stay for `resume`; the output folder does not appear.
    """
    if options.cluster:
        options.cluster.check(inputs, output)
    given = _given_tokenizer(options)
    decisive = _decisive(options, given)
    if storage.is_remote(output):
        decisive = {**decisive, "inputs": list(inputs)}
        here = options
        if options.cluster:
            cluster = dataclasses.replace(options.cluster, place=storage.named(output))
            here = dataclasses.replace(options, cluster=cluster)
        made = upload.prepare(
            output, decisive, options.resume, lambda folder: prepare(inputs, str(folder), here)
        )
        if here.cluster:
            here.cluster.clear()
        return made
    path = Path(output)
    claim.refuse_taken(path)
    folder = path.with_name(path.name + store.UNFINISHED)
    try:
        with (
            claim.claimed(folder, decisive, options.resume) as check,
            claim.kept_if_useful(folder),
        ):
            files = _collect(inputs, folder, options)
            _compare(files, folder, options)
            model = _place_tokenizer(files, folder, options)
            jobs, records = _write_shards(files, folder, model, options)
            tokenizer = given or shards.load_tokenizer(model, options.normalization)
            manifest = _manifest(jobs, records, files, folder, tokenizer, options)
            check()
            store.write_manifest(folder, manifest)
            folder.replace(path)
            # Only now: until here a failure must find what to go on with.
            claim.tidy(path, tokenizer.file_name)
            shutil.rmtree(path / shards.DUPLICATES, ignore_errors=True)
    except OSError as error:
        raise UserError(claim.why_not_written(error, folder)) from error
    return store.open_store(path)


def _given_tokenizer(options: Options) -> tokenizer_lib.Tokenizer | None:
    if not options.tokenizer:
        return None
    return tokenizer_lib.Tokenizer.load(options.tokenizer, options.normalization)


def _decisive(options: Options, given: tokenizer_lib.Tokenizer | None) -> dict[str, Any]:
    if given:
        tokenizer, library = given.sha256, given.library
    else:
        tokenizer = f"trained {options.trained_kind}, {options.vocab_size} pieces"
        library = "sentencepiece" if options.trained_kind == "unigram" else "tokenizers"
    return {
        "tokenizer": tokenizer,
        **dataclasses.asdict(options.normalization),
        **dataclasses.asdict(options.reading),
        "format": options.file_format,
        "quality": options.quality.record(),
        **_libraries(library),
        "validation_fraction": options.validation_fraction,
    }


def _libraries(tokenizer: str) -> dict[str, str]:
    """What else decides the bytes: other versions may part sentences or normalise otherwise."""
    versions = {name: importlib.metadata.version(name) for name in (tokenizer, "sentencex")}
    return {**versions, "unicode": unicodedata.unidata_version}


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
            files.update(dict.fromkeys(sources.find([item], options.tfds_data_dir)))
    if not files:
        raise UserError("--input names nothing; give a file, a pattern, tfds:NAME or python-docs.")
    if not any(map(sources.size, files)):
        raise UserError(
            f"the input is empty: its files have 0 bytes each ({', '.join(list(files)[:3])})."
        )
    return list(files)


def _documentation(folder: Path, processes: int) -> Path:
    """The packages' documentation as JSON Lines in the folder; beside it, what it is of."""
    path = folder / f"{PYTHON_DOCS}.jsonl"
    if not path.exists():
        modules = python_docs.find_modules()
        groups = [tuple(modules[i : i + 64]) for i in range(0, len(modules), 64)]
        extracts: list[list[python_docs.Extract]] = [[] for _ in groups]
        with progress_lib.Progress("read docs", sum(m.size for m in modules), "B") as progress:
            for index, result in workers.parallel(_extract, groups, processes, progress, "modules"):
                extracts[index] = result
        unfinished = path.with_name(path.name + store.UNFINISHED)
        about = python_docs.write(unfinished, [one for group in extracts for one in group])
        store.write_json(folder / f"{PYTHON_DOCS}.json", about)
        unfinished.replace(path)
    return path


def _extract(
    modules: tuple[python_docs.Module, ...], advance: workers.Advance
) -> list[python_docs.Extract]:
    extracts = []
    for module in modules:
        extracts.append(python_docs.extract(module))
        advance(module.size, 1)
    return extracts


def _compare(files: Sequence[str], folder: Path, options: Options) -> None:
    """Finds out what repeats, if that is to be left out."""
    if not options.quality.needs_comparison:
        return
    jobs = [
        duplicates.ScanJob(
            name=name,
            units=units,
            identity=shards.states(units),
            folder=folder / shards.DUPLICATES,
            reading=options.reading,
            quality=options.quality,
        )
        for name, units in _planned(files, options)
    ]
    todo = duplicates.unscanned(jobs)
    jobs[0].folder.mkdir(exist_ok=True)
    total = sum(unit.size for job in todo for unit in job.units)
    with progress_lib.Progress("compare", total, "B") as progress:
        _each(duplicates.scan, todo, options, progress)
    duplicates.decide(jobs)


def _planned(files: Sequence[str], options: Options) -> list[tuple[str, tuple[sources.Unit, ...]]]:
    """Name and units of each shard."""
    planned = shards.plan(files, options.file_format, options.reading)
    return [(f"{index:05d}-of-{len(planned):05d}", units) for index, units in enumerate(planned)]


def _place_tokenizer(files: Sequence[str], folder: Path, options: Options) -> Path:
    """The tokenizer in its place in the store: copied, or trained on the input."""
    if options.tokenizer:
        path = folder / tokenizer_lib.file_name(options.tokenizer)
        path.write_bytes(storage.content(options.tokenizer))
        return path
    path = folder / tokenizer_lib.TRAINED_FILES[options.trained_kind]
    units = [
        (unit, (name, number))
        for name, shard in _planned(files, options)
        for number, unit in enumerate(shard)
    ]
    # In no order, since a large input is not read to its end.
    order = sorted(range(len(units)), key=lambda index: shards.text_hash(str(index)))
    job = _TrainingJob(tuple(units[index] for index in order), path, options)
    trained_on = folder / "vocabulary.json"
    states = {"units": shards.states([unit for unit, _ in job.units])}
    if path.exists() and trained_on.exists() and json.loads(trained_on.read_bytes()) == states:
        return path
    total = sum(unit.size for unit, _ in job.units)
    less = "train a vocabulary on a part of the input and give it as --tokenizer"
    with progress_lib.Progress("vocabulary", total, "B") as progress:
        # Two workers, of which one has work: a process that Ctrl-C can end at once.
        for _ in workers.parallel(_train_tokenizer, [job], 2, progress, "documents", less):
            store.write_json(trained_on, states)
    return path


@dataclasses.dataclass(frozen=True)
class _TrainingJob:
    units: tuple[tuple[sources.Unit, tuple[str, int]], ...]  # and the place of each, by shard
    path: Path
    options: Options


def _train_tokenizer(job: _TrainingJob, advance: workers.Advance) -> None:
    def sentences() -> Iterator[str]:
        reading = job.options.reading
        skipped = sources.Skipped()  # counted when the shards are written
        for unit, place in job.units:
            for paragraphs in duplicates.documents(
                unit,
                place,
                reading,
                job.options.quality,
                job.path.parent / shards.DUPLICATES,
                skipped,
                lambda size: advance(size, 0),
            ):
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
) -> tuple[list[shards.ShardJob], list[dict[str, Any]]]:
    """Writes all shards that are not finished yet; the jobs and records of all, in order."""
    jobs = [
        shards.ShardJob(
            name=name,
            units=units,
            folder=folder,
            tokenizer=tokenizer,
            normalization=options.normalization,
            reading=options.reading,
            validation_below=round(options.validation_fraction * _HASHES),
            quality=options.quality,
        )
        for name, units in _planned(files, options)
    ]
    total = sum(unit.size for job in jobs for unit in job.units)
    with progress_lib.Progress("prepare", total, "B") as progress:
        records = _each(shards.complete, jobs, options, progress)
        if not any(record[split]["tokens"] for record in records for split in store.SPLITS):
            for job in jobs:
                shards.record_path(job).unlink()  # nothing that is worth going on with
            raise UserError(_why_nothing(records))
        below = _threshold(records, jobs[0].validation_below)
        jobs = [dataclasses.replace(job, validation_below=below) for job in jobs]
        # None as a rule; else as few as hold the one section that has to change sides.
        others = [index for index, record in enumerate(records) if _differs(record, below)]
        again = _each(shards.complete, [jobs[index] for index in others], options, progress)
        for index, record in zip(others, again, strict=True):
            records[index] = record
    return jobs, records


def _each(
    task: beam.Task, jobs: Sequence[beam.Job], options: Options, progress: progress_lib.Progress
) -> list[dict[str, Any]]:
    """The records that a task makes of the jobs, in order; here or on many machines."""
    if options.cluster:
        return beam.each(task, jobs, options.cluster, progress)
    processes = min(options.workers, max(len(jobs), 1))
    done = workers.parallel(task, jobs, processes, progress, "documents")
    return [record for _, record in sorted(done, key=lambda one: one[0])]


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
    skipped = sources.Skipped()
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


# Putting the store together


def _manifest(
    jobs: list[shards.ShardJob],
    records: list[dict[str, Any]],
    files: Sequence[str],
    folder: Path,
    tokenizer: tokenizer_lib.Tokenizer,
    options: Options,
) -> dict[str, Any]:
    """All that is known of the store; of time and place it holds but the names of the files."""
    about_docs = folder / f"{PYTHON_DOCS}.json"
    skipped = sources.Skipped()
    for path in files:
        if sources.size(path) == 0:
            skipped.add("empty files", path)
    for record in records:
        skipped.merge(record["skipped"])
    listed: list[dict[str, Any]] = []
    for path in files:
        source: dict[str, Any] = {"path": path, "bytes": sources.size(path)}
        if Path(path).parent == folder:
            about = json.loads(about_docs.read_bytes())
            source |= {"path": PYTHON_DOCS, "packages": about["packages"]}
            skipped.merge(
                {reason: (count, PYTHON_DOCS) for reason, count in about["skipped"].items()}
            )
        listed.append(source)
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
    counts = {split: np.zeros(tokenizer.vocab_size, np.int64) for split in store.SPLITS}
    for job in jobs:
        for split, counts_V in shards.piece_counts(job).items():
            counts[split] += counts_V
    return {
        "format": "albert_jax token store",
        "format_version": store.FORMAT_VERSION,
        "tokenizer": store.tokenizer_record(tokenizer),
        "token_dtype": shards.token_dtype(tokenizer.vocab_size).__name__,
        "normalization": tokenizer.normalization.record(),
        "libraries": _libraries(tokenizer.library),
        "language": options.reading.language,
        "document": options.reading.document,
        # A store for which nothing was chosen is as it ever was.
        **({"quality": quality} if (quality := options.quality.record()) else {}),
        "split_rule": (
            "A document is cut, where it has the length for two, into sections of at least "
            f"{shards.SECTION_SENTENCES} sentences that end with a paragraph. A section is held "
            "out for validation if the BLAKE2b hash, 8 bytes long, of its sentences (before "
            "normalisation, joined by line feeds, UTF-8) is less than validation_below as a "
            "big-endian number. "
            "This is validation_fraction of 2^64, moved just so far that neither split is empty."
        ),
        "validation_fraction": options.validation_fraction,
        "validation_below": jobs[0].validation_below,
        "unigram_loss": store.unigram_loss(counts["train"], counts["validation"]),
        "unknown_share": float(
            sum(c[tokenizer.unk_id] for c in counts.values())
            / sum(c.sum() for c in counts.values())
        ),
        "skipped": {
            reason: {"count": count, "first": where} for reason, (count, where) in skipped.items()
        },
        "sources": listed,
        "splits": splits,
    }
