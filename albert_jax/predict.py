"""Answers from text with a trained model.

  python -m albert_jax.predict fill-mask --model=runs/tiny "The [MASK] returns the sum of all
  elements."
  python -m albert_jax.predict fill-mask --model=runs/tiny --top_k=3 --json "A [MASK] b." "C
  [MASK]." cat lines.txt | python -m albert_jax.predict fill-mask --model=runs/tiny

fill-mask: for every [MASK] in a text, the most probable pieces with their probabilities.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from albert_jax import cli, config
from albert_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "predict")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="fill-mask")
    fill = jobs.add_parser(
        "fill-mask",
        description="The most probable pieces for every [MASK] of a text.",
        epilog=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fill.add_argument("--model", required=True, type=pathlib.Path, help="a run of albert_jax.train")
    fill.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    fill.add_argument("--top_k", type=int, default=5, help="how many pieces for each [MASK]")
    fill.add_argument("--json", action="store_true", help="one JSON object a text")
    fill.add_argument(
        "texts", nargs="*", metavar="TEXT", help="lines of standard input if there is none"
    )
    args = parser.parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top_k={args.top_k} must be at least 1.")
    texts = args.texts or [line.strip() for line in sys.stdin if line.strip()]
    cfg = config.read_workdir(args.model)

    from albert_jax.tasks import fill_mask
    from albert_jax.training import inference, workdir

    tokenizer = workdir.load_tokenizer(args.model)

    encoded = [fill_mask.encode(tokenizer, text, cfg.data.max_seq_length) for text in texts]
    run, params, _ = inference.load(args.model, args.step)
    for text, answers in zip(
        texts, fill_mask.fill(run, params, tokenizer, encoded, args.top_k), strict=True
    ):
        if args.json:
            masks = [
                [dict(zip(("piece", "probability"), guess, strict=True)) for guess in mask]
                for mask in answers
            ]
            print(json.dumps({"text": text, "masks": masks}, ensure_ascii=False))
            continue
        print(text)
        for number, guesses in enumerate(answers, start=1):
            listed = ", ".join(f"{piece} {probability:.1%}" for piece, probability in guesses)
            print(f"  [MASK]{f' {number}' if len(answers) > 1 else ''}: {listed}")
    return 0


if __name__ == "__main__":
    cli.run(main)
