"""Answers from text with a model: a run, a folder of Transformers or a checkpoint of Google's.

  python -m albert_jax.predict classify --model=runs/sst "A fine film." "Not so good."
  python -m albert_jax.predict classify --model=runs/mrpc --pair="Rain falls." "It rains."
  python -m albert_jax.predict answer --model=runs/squad --context=page.txt "Who wrote it?"
  python -m albert_jax.predict tag --model=runs/ner --input=lines.txt
  python -m albert_jax.predict embed --model=runs/base --input=lines.txt --output=vectors.npy
  python -m albert_jax.predict similarity --model=runs/base --pair="Rain falls." "It rains."
  python -m albert_jax.predict fill-mask --model=runs/tiny "The [MASK] returns the sum."
  python -m albert_jax.predict explain --model=runs/sst --html=why.html "A fine film."

Texts come from the command line, from --input, or from standard input, a line each. On a terminal
answers are for people; with --json, or into a file or pipe, one JSON object a text.
"""

import argparse
import io
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from albert_jax import cli, storage
from albert_jax.errors import UserError

if TYPE_CHECKING:
    from albert_jax.tasks.predictor import Predictor

_HELP = {
    "classify": "the class, the classes or the number of a text, or of a text and its --pair",
    "answer": "the answer to a question in --context; several windows where it is long",
    "tag": "the entities of a text",
    "embed": "a vector of length one for a text",
    "similarity": "the cosine of the vectors of a text and its --pair",
    "fill-mask": "the most probable pieces for every [MASK] of a text",
    "explain": "which words made the decision on a text, or on a text and its --pair",
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "predict")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for job, summary in _HELP.items():
        _add_flags(jobs.add_parser(job, help=summary, description=f"{job}: {summary}."), job)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1.")
    texts = _texts(args)
    if not texts:
        raise UserError("there is no text; give some on the command line, or --input=FILE.")

    import albert_jax

    model = albert_jax.load(args.model, args.step, args.batch_size)
    _JOBS[args.job](model, texts, args)
    return 0


def _add_flags(parser: argparse.ArgumentParser, job: str) -> None:
    parser.add_argument("--model", required=True, type=pathlib.Path, help="what answers")
    parser.add_argument("--step", type=int, help="which checkpoint of a run")
    parser.add_argument("--input", metavar="FILE", help="texts, a line each")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at once")
    if job != "embed":
        parser.add_argument("--json", action="store_true", help="one JSON object a text")
    if job in ("classify", "similarity", "explain"):
        parser.add_argument(
            "--pair", help="the text beside each text; without it, after a tab in a line"
        )
    if job == "answer":
        parser.add_argument(
            "--context", required=True, help="the text that has the answer, or a file of it"
        )
    if job == "fill-mask":
        parser.add_argument("--top_k", type=int, default=5, help="how many pieces for each [MASK]")
    if job == "embed":
        parser.add_argument("--output", metavar="FILE.npy")
    if job == "explain":
        parser.add_argument("--html", metavar="FILE", help="a coloured page")
    parser.add_argument("texts", nargs="*", metavar="TEXT")


def _texts(args: argparse.Namespace) -> list[str]:
    if args.texts:
        return args.texts
    try:
        lines = storage.content(args.input).decode().splitlines() if args.input else sys.stdin
        return [line.strip("\n") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input={args.input} cannot be read: {error}") from None


def _pairs(texts: list[str], args: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """First and second texts; no second ones where there are none."""
    if args.pair is not None:
        return texts, [args.pair] * len(texts)
    tabs = [text.count("\t") for text in texts]
    if not any(tabs):
        return texts, None
    if odd := [number for number, count in enumerate(tabs, 1) if count != 1]:
        raise UserError(f"text {odd[0]} does not have one tab, between a text and its pair.")
    first, second = zip(*(text.split("\t") for text in texts), strict=True)
    return list(first), list(second)


def _classify(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    def line(answer: dict[str, Any]) -> str:
        if "value" in answer:
            said = f"{answer['value']:.4g}"
        elif "labels" in answer:
            said = "|".join(answer["labels"]) or "none"
        else:
            said = f"{answer['label']} {answer['probability']:.1%}"
        cut = " (cut)" if answer.get("truncated") else ""
        beside = f" / {answer['text_pair']}" if "text_pair" in answer else ""
        return f"{said}{cut}\t{answer['text']}{beside}"

    _print(model.classify(*_pairs(texts, args)), args, line)


def _answer(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    context = args.context
    remote = context.startswith("gs://")
    try:
        if remote or pathlib.Path(context).is_file():
            context = storage.content(context).decode()
    except (OSError, UnicodeDecodeError) as error:
        if remote:
            raise UserError(f"--context={context} cannot be read: {error}") from None
        # Else too long for a file's name: it is the text itself.
    _print(
        model.answer(texts, [context] * len(texts)),
        args,
        lambda one: (
            f"{one['answer'] or '(no answer)'}\t{one['probability']:.1%}\t{one['question']}"
        ),
    )


def _tag(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    def line(answer: dict[str, Any]) -> str:
        found = [
            f"{one['text']} {one['type']} {one['probability']:.1%}" for one in answer["entities"]
        ]
        return f"{answer['text']}\n  {', '.join(found) or 'no entities'}"

    _print(model.tag(texts), args, line)


def _embed(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    import numpy as np

    vectors = model.embed(texts)
    if args.output is None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
        return
    file = io.BytesIO()
    np.save(file, vectors, allow_pickle=False)
    storage.save(args.output, file.getvalue())
    print(f"{args.output}: {vectors.shape[0]} vectors of {vectors.shape[1]}, float32")


def _similarity(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    first, second = _pairs(texts, args)
    if second is None:
        raise UserError("similarity is of two texts: --pair=TEXT, or a tab between two in a line.")
    answers = [
        {"text": one, "text_pair": other, "similarity": cosine}
        for one, other, cosine in zip(first, second, model.similarity(first, second), strict=True)
    ]
    _print(
        answers, args, lambda one: f"{one['similarity']:.4f}\t{one['text']} / {one['text_pair']}"
    )


def _fill_mask(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise UserError(f"--top_k={args.top_k} must be at least 1.")

    def line(answer: dict[str, Any]) -> str:
        lines = [answer["text"]]
        for number, guesses in enumerate(answer["masks"], start=1):
            listed = ", ".join(f"{one['piece']} {one['probability']:.1%}" for one in guesses)
            lines.append(f"  [MASK]{f' {number}' if len(answer['masks']) > 1 else ''}: {listed}")
        return "\n".join(lines)

    answers = [
        {
            "text": text,
            "masks": [
                [{"piece": piece, "probability": share} for piece, share in mask] for mask in masks
            ],
        }
        for text, masks in zip(texts, model.fill_mask(texts, args.top_k), strict=True)
    ]
    _print(answers, args, line)


def _explain(model: "Predictor", texts: list[str], args: argparse.Namespace) -> None:
    first, second = _pairs(texts, args)
    found = [
        model.explain(text, second[number] if second else None) for number, text in enumerate(first)
    ]
    if args.html:
        storage.save(args.html, "".join(one.html() for one in found).encode())

    def line(record: dict[str, Any]) -> str:
        words = sorted(record["words"], key=lambda word: -abs(word["attribution"]))
        listed = ", ".join(f"{word['text']} {word['attribution']:+.3f}" for word in words[:10])
        return f"{record['label']} {record['score']:.3f}\t{' / '.join(record['texts'])}\n  {listed}"

    _print([one.record() for one in found], args, line)


def _print(
    answers: Iterable[dict[str, Any]],
    args: argparse.Namespace,
    line: Callable[[dict[str, Any]], str],
) -> None:
    for answer in answers:
        as_json = args.json or not sys.stdout.isatty()
        print(json.dumps(answer, ensure_ascii=False) if as_json else line(answer))


_JOBS: dict[str, Callable[..., None]] = {
    "classify": _classify,
    "answer": _answer,
    "tag": _tag,
    "embed": _embed,
    "similarity": _similarity,
    "fill-mask": _fill_mask,
    "explain": _explain,
}


if __name__ == "__main__":
    cli.run(main)
