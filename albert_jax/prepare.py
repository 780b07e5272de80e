"""Makes a token store of your own text: the first of the two commands to a trained model.

Examples:
  plain text, a blank line between documents; makes a vocabulary of 30,000 pieces of it
    python -m albert_jax.prepare --input='texts/*.txt' --output=store --train_tokenizer

  every file one document, and a vocabulary that is there already
    python -m albert_jax.prepare --input='novels/*.txt.gz' --document=file --output=store \\
      --tokenizer=spiece.model

  JSON Lines in German, an object a document
    python -m albert_jax.prepare --input='notes/**/*.jsonl' --text_field=body --language=de \\
      --keep_accents --output=store --train_tokenizer --vocab_size=20000

  for BERT with the vocabulary it was published with, for RoBERTa with one made of the input
    python -m albert_jax.prepare --input='texts/*.txt' --output=store --tokenizer=vocab.txt
    python -m albert_jax.prepare --input='texts/*.txt' --output=store --train_tokenizer=bpe

  no text at hand: the documentation of the installed Python packages
    python -m albert_jax.prepare --input=python-docs --output=store --train_tokenizer \\
      --vocab_size=8000

  on many machines, through Apache Beam (launch/prepare_dataflow.sh does all of it on Google Cloud)
    python -m albert_jax.prepare --input='gs://BUCKET/texts/*.txt' --output=gs://BUCKET/store \\
      --tokenizer=spiece.model --runner=DataflowRunner \\
      --beam_options='--project=P --region=R --temp_location=gs://BUCKET/tmp'

  is a store, here or copied, still what was written?
    python -m albert_jax.prepare --verify=store

  Wikipedia out of TFDS, or Parquet files, without what repeats
    python -m albert_jax.prepare --input=tfds:wikipedia/20230601.en --output=store \\
      --tokenizer=spiece.model
    python -m albert_jax.prepare --input='crawl/*.parquet' --min_characters=200 \\
      --keep=mine:is_german --unique_paragraphs --unique_documents --output=store \\
      --tokenizer=spiece.model

In plain text a line is a paragraph of one or more sentences, or it was wrapped at some width; this
is told apart document by document, and wrapped lines are joined again. The store is complete when
it appears under its name; what was stopped or failed goes on with --resume.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from albert_jax import cli
from albert_jax.data import beam, preparation, quality, sources, store, tokenizer, verify
from albert_jax.errors import UserError

_DEFAULT_VOCABULARY = 30_000  # pieces
# The config of a family, and the pieces that its model has.
_CONFIGS = {
    "albert": ("configs/base.py", 30_000),
    "bert": ("configs/bert_base.py", 30_522),
    "roberta": ("configs/roberta_base.py", 50_265),
}

# Where marks are no ornament but vowels, tones or what makes another consonant.
# fmt: off
_MARKS_ARE_LETTERS = frozenset((
    "ar", "as", "bn", "bo", "brx", "ckb", "dv", "dz", "fa", "gu", "he", "hi", "ja", "km", "kn",
    "ks", "ku", "lo", "mai", "ml", "mni", "mr", "my", "ne", "or", "pa", "ps", "sa", "sat", "sd",
    "si", "ta", "te", "th", "ti", "ug", "ur", "vi", "yi", "yo",
))
# Where none are written, or none but in foreign words. All others lose some.
_WITHOUT_ACCENTS = frozenset((
    "am", "en", "id", "ka", "ko", "la", "ms", "nl", "sw", "xh", "wuu", "yue", "zh", "zu",
))
# fmt: on
_DOTLESS = frozenset({"az", "crh", "kk", "tr", "tt"})


def main(argv: Sequence[str]) -> None:
    """Prepares a store as the command line says and prints what is in it; or verifies one."""
    flags = _flags(argv)
    if flags.verify:
        _verify(flags.verify, flags.workers)
        return
    cluster = beam.Cluster(flags.runner, tuple(shlex.split(flags.beam_options)))
    for note in _language_notes(flags):
        print(f"note: {note}", file=sys.stderr)
    began = time.monotonic()
    made = preparation.prepare(
        _inputs(flags.input),
        flags.output,
        preparation.Options(
            tokenizer=flags.tokenizer,
            trained_kind=flags.train_tokenizer or "",
            vocab_size=flags.vocab_size or _DEFAULT_VOCABULARY,
            normalization=tokenizer.Normalization(
                not flags.cased, flags.keep_accents, flags.compatible_with
            ),
            reading=sources.Reading(
                flags.document, flags.text_field, flags.language, flags.errors == "skip"
            ),
            file_format=flags.format or "",
            validation_fraction=flags.validation_fraction,
            workers=flags.workers,
            resume=flags.resume,
            cluster=cluster if flags.runner else None,
            tfds_data_dir=flags.tfds_data_dir,
            quality=quality.Quality(
                flags.min_characters, flags.keep, flags.unique_paragraphs, flags.unique_documents
            ),
        ),
    )
    print(_summary(made, time.monotonic() - began))


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "prepare")
    add = parser.add_argument
    add(
        "--input",
        action="append",
        metavar="GLOB[,GLOB...]",
        help="files of UTF-8 text, JSON Lines or WikiExtractor's output, plain or packed (.gz, "
        ".bz2, .xz, .zst); of Parquet; tfds:NAME or tfds:NAME@SPLIT; or python-docs; may be "
        "repeated",
    )
    add("--output", metavar="STORE", help="the folder to make")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece .model (ALBERT), a vocab.txt of WordPieces (BERT) or a "
        "tokenizer.json (RoBERTa), with the control pieces of its family",
    )
    vocabulary.add_argument(
        "--train_tokenizer",
        nargs="?",
        const="unigram",
        choices=tuple(tokenizer.TRAINED_FILES),
        help="make a vocabulary of the input: unigram (ALBERT, the default), wordpiece (BERT) or "
        "bpe (RoBERTa)",
    )
    add(
        "--compatible_with",
        choices=tokenizer.COMPATIBLE_WITH,
        default="google",
        help="whose ids a SentencePiece model gives: those of Google's code, which cuts 2010, "
        "before the comma, or those of Hugging Face transformers, which does not, and cuts at "
        "every hyphen, stop, quote and bracket first (default: google)",
    )
    add("--vocab_size", type=int, metavar="N", help="pieces to train (default: 30000)")
    add(
        "--language",
        default="en",
        metavar="CODE",
        help="where sentences end, such as de or uk (default: en)",
    )
    add(
        "--document",
        choices=("blank_line", "file"),
        default="blank_line",
        help="what ends a document of plain text (default: blank_line)",
    )
    add(
        "--format",
        choices=sources.FORMATS,
        help="of all files (default: by name; *.jsonl is JSON Lines, *.parquet is Parquet, wiki_00 "
        "is of WikiExtractor, all else is text)",
    )
    add(
        "--text_field",
        default="text",
        metavar="NAME",
        help="where a JSON object, a Parquet file or a TFDS dataset has its text (default: text)",
    )
    add(
        "--tfds_data_dir",
        metavar="DIR",
        help="where TFDS has its datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    add(
        "--errors",
        choices=("stop", "skip"),
        default="stop",
        help="at what is no UTF-8 text, or no JSON: stop and name the place, or leave it out "
        "and count it (default: stop)",
    )
    add("--cased", action="store_true", help="keep capitals; bpe always does")
    add("--keep_accents", action="store_true", help="keep accents; bpe and cased wordpiece do")
    add(
        "--min_characters",
        type=int,
        default=0,
        metavar="N",
        help="leave out documents of fewer characters",
    )
    add(
        "--keep",
        default="",
        metavar="MODULE:FUNCTION",
        help="keep only the documents for whose text your own Python function returns True: a "
        "language filter, or any other rule",
    )
    add(
        "--unique_paragraphs",
        type=int,
        nargs="?",
        const=100,
        default=0,
        metavar="N",
        help="leave out paragraphs of at least N characters that repeat an earlier one (default "
        "of N: 100)",
    )
    add(
        "--unique_documents",
        type=float,
        nargs="?",
        const=0.8,
        default=0.0,
        metavar="X",
        help="leave out documents that share X of their five-word sequences with an earlier one, "
        "by MinHash (default of X: 0.8)",
    )
    add(
        "--validation_fraction",
        type=float,
        default=0.02,
        metavar="X",
        help="share of the text that is held out (default: 0.02)",
    )
    add(
        "--workers",
        type=int,
        default=_cores(),
        metavar="N",
        help="processes on this machine; the store does not depend on it (default: the cores)",
    )
    add("--resume", action="store_true", help="go on with an unfinished store")
    add(
        "--runner",
        choices=beam.RUNNERS,
        help="write the shards with Apache Beam, on many machines; the store is the same. Input "
        "and output must be where all of them see it",
    )
    add(
        "--beam_options",
        default="",
        metavar="'--NAME=VALUE ...'",
        help="what the runner gets, such as --project, --region and --temp_location for Dataflow",
    )
    add(
        "--verify",
        metavar="STORE",
        help="read a store that is there and check every hash, offset and id; name all that is "
        "broken. Goes with --workers alone",
    )
    flags = parser.parse_args(argv)
    if flags.verify:
        if flags.input or flags.output or flags.tokenizer or flags.train_tokenizer:
            parser.error("--verify makes no store; leave out --input, --output and the tokenizer")
        return flags
    if not (flags.input and flags.output and (flags.tokenizer or flags.train_tokenizer)):
        parser.error("needs --input, --output, and --tokenizer or --train_tokenizer (or --verify)")
    if flags.beam_options and not flags.runner:
        parser.error("--beam_options goes with --runner")
    if flags.tokenizer and flags.vocab_size:
        parser.error("--vocab_size goes with --train_tokenizer; --tokenizer has its own size")
    if (flags.cased or flags.keep_accents) and str(flags.tokenizer).endswith(".json"):
        parser.error("a tokenizer.json says itself what --cased and --keep_accents would")
    if flags.compatible_with != "google" and flags.train_tokenizer in ("wordpiece", "bpe"):
        parser.error("--compatible_with is for SentencePiece; others give the same ids anyway")
    return flags


def _verify(path: str, workers: int) -> None:
    """Prints that a store is whole, or fails with all that is broken in it."""
    began = time.monotonic()
    report = verify.verify(path, workers)
    for name in report.strangers:
        print(f"note: {path}/{name} does not belong to the store.")
    if report.broken:
        one = len(report.broken) == 1
        lines = [f"{path}/{name} {problem}" for name, problem in report.broken.items()]
        raise UserError(
            "\n".join(
                [
                    f"{path} is broken in {len(lines)} of {report.files} files:",
                    *lines,
                    f"Copy {'this file' if one else 'these files'} again from where the store came "
                    "from, or prepare it again; the others are whole.",
                ]
            )
        )
    seconds = time.monotonic() - began
    print(
        f"{path} is whole: {report.files:,} files, {report.tokens:,} tokens, "
        f"{report.size / 1e6:,.1f} MB in {seconds:.1f} s ({report.size / seconds / 1e6:,.0f} MB/s)"
    )


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(values: Sequence[str]) -> list[str]:
    """The patterns of all --input flags; a comma parts them unless a file has it in its name."""
    return [
        pattern
        for value in values
        for pattern in ([value] if Path(value).exists() else value.split(","))
        if pattern
    ]


def _language_notes(flags: argparse.Namespace) -> list[str]:
    """What normalisation does to the language at hand, if it does harm and could be told not to."""
    kind = flags.train_tokenizer or Path(flags.tokenizer).suffix
    language = flags.language.partition("-")[0]
    if kind in ("bpe", ".json"):
        return []  # as they are, or as the file says
    notes = []
    keeps_accents = flags.keep_accents or (flags.cased and kind in ("wordpiece", ".txt"))
    if not keeps_accents and language in _MARKS_ARE_LETTERS:
        notes.append(
            f"vowel signs, tones or other marks that are letters in --language={language} are "
            "taken away, as English models want it; --keep_accents keeps them."
        )
    elif not keeps_accents and language not in _WITHOUT_ACCENTS:
        notes.append(
            f"accents, which tell words of --language={language} apart, are taken away, as English "
            "models want it; --keep_accents keeps them."
        )
    if not flags.cased and language in _DOTLESS:
        notes.append(
            f"small letters of --language={language} are made as in English, where I becomes i "
            "and not \u0131; --cased keeps capitals."
        )
    return notes


def _summary(made: store.Store, seconds: float) -> str:
    manifest = made.manifest
    splits = manifest["splits"]
    columns = [
        (
            name,
            *(f"{split[unit]:,}" for unit in ("documents", "sentences", "tokens")),
            _mean(split["sentences"], split["documents"]),
            _mean(split["tokens"], split["sentences"]),
        )
        for name, split in splits.items()
    ]
    names = ("", "documents", "sentences", "tokens", "sentences a document", "tokens a sentence")
    tokens = sum(split["tokens"] for split in splits.values())
    read = sum(source["bytes"] for source in manifest["sources"])
    lines = [
        *(
            f"{name:<22}{train:>16}{validation:>14}"
            for name, train, validation in zip(names, *columns, strict=True)
        ),
        f"{'unknown tokens':<22}{manifest['unknown_share']:>16.3%}",
        f"{'unigram loss':<22}{made.unigram_loss:>16.3f}  nats a token, for a model to beat",
        f"{'vocabulary':<22}{made.vocab_size:>16,}",
        f"{'time':<22}{seconds:>14.1f} s  {tokens / seconds:,.0f} tokens/s, "
        f"{read / seconds / 1e6:.1f} MB/s",
    ]
    for reason, skip in manifest["skipped"].items():
        lines.append(f"left out or cut: {skip['count']:,} {reason} (first: {skip['first']})")
    lines += [f"note: {hint}" for hint in _hints(made)]
    config, vocab_size = _CONFIGS[made.tokenizer().family]
    command = ["python", "-m", "albert_jax.train", f"--config={config}"]
    if made.vocab_size != vocab_size:
        command.append("--config.model.vocab_size=0")
    command += [f"--config.data.path={made.place}", f"--workdir=runs/{Path(config).stem}"]
    return "\n".join([*lines, f"the store is {made.place}; next:", f"  {shlex.join(command)}"])


def _mean(total: int, count: int) -> str:
    return f"{total / count:.1f}" if count else "-"


def _hints(made: store.Store) -> list[str]:
    """What a person would want to be told about a store that is whole but odd."""
    manifest = made.manifest
    train = manifest["splits"]["train"]
    hints = []
    if not manifest["splits"]["validation"]["tokens"]:
        hints.append("nothing is held out, so a run cannot be evaluated on this store.")
    if manifest["unknown_share"] > 0.02:
        hints.append("many unknown tokens: is the vocabulary for this language, and for --cased?")
    if manifest["document"] == "blank_line" and train["sentences"] < 3 * train["documents"]:
        hints.append(
            "documents are very short; if a blank line does not end a document here, "
            "give --document=file."
        )
    return hints


if __name__ == "__main__":
    cli.run(main)
