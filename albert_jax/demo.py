"""The main job from end to end on text that every machine with the requirements has: `make demo`.

Prepares the documentation of the installed Python packages, pretrains configs/tiny.py on it,
evaluates, draws and answers three lines, each with the command that a user would type. Works in
runs/demo (made anew) and leaves runs/demo/summary.json.

  python -m albert_jax.demo
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from albert_jax import cli
from albert_jax.errors import UserError

FOLDER = pathlib.Path("runs/demo")
LINES = (
    "Returns the [MASK] of the array elements.",
    "If the [MASK] does not exist, an error is raised.",
    "The default [MASK] is used if none is given.",
)


def main(argv: Sequence[str]) -> None:
    """Runs the demo and prints what came of it."""
    cli.parser(__doc__ or "", "demo").parse_args(argv)
    if not pathlib.Path("configs/tiny.py").exists():
        raise UserError("configs/tiny.py is not here; start the demo from the project's folder.")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    store, run, figures = FOLDER / "store", FOLDER / "run", FOLDER / "evaluation.json"
    prepare_seconds = _command(
        "prepare",
        "--input=python-docs",
        f"--output={store}",
        "--train_tokenizer",
        "--vocab_size=8000",
    )
    train_seconds = _command(
        "train", "--config=configs/tiny.py", f"--workdir={run}", f"--config.data.path={store}"
    )
    _command("evaluate", f"--workdir={run}", f"--json={figures}")
    _command("predict", "fill-mask", f"--model={run}", *LINES)
    held_out = json.loads(figures.read_text(encoding="utf-8"))
    summary = {
        **{
            name: held_out[name]
            for name in (
                "unigram_loss",
                "masked_lm_loss",
                "masked_lm_accuracy",
                "sentence_order_accuracy",
            )
        },
        "prepare_seconds": prepare_seconds,
        "train_seconds": train_seconds,
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(_closing(summary, run))


def _closing(summary: dict[str, float], run: pathlib.Path) -> str:
    prepare, train = summary["prepare_seconds"], summary["train_seconds"]
    ours, unigram = summary["masked_lm_loss"], summary["unigram_loss"]
    return f"""
Demo done in {prepare + train:.0f} s (prepare {prepare:.0f} s, train {train:.0f} s).
  held-out masked words   {ours:.2f} nats; a unigram model of the same text has {unigram:.2f}
  held-out words guessed  {summary["masked_lm_accuracy"]:.1%}
  held-out sentence order {summary["sentence_order_accuracy"]:.1%} right; chance is 50 %
  plots                   {run / "report" / "overview.png"}
  checkpoint              {run / "checkpoints"}
  figures                 {FOLDER / "summary.json"}

Next, your own text:
  {_typed("prepare")} --input='texts/*.txt' --output=stores/mine --train_tokenizer
  {_typed("train")} --config=configs/base.py --config.data.path=stores/mine --workdir=runs/mine"""


def _typed(command: str) -> str:
    return f".venv/bin/python -m albert_jax.{command}"


def _command(name: str, *arguments: str) -> float:
    """Runs one of our commands as a user would; returns how many seconds it took."""
    shown = " ".join(f"'{word}'" if " " in word else word for word in arguments)
    print(f"\n$ python -m albert_jax.{name} {shown}", flush=True)
    began = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", f"albert_jax.{name}", *arguments], check=False
    ).returncode
    if code:
        raise UserError(f"the demo ends here: albert_jax.{name} ended with exit code {code}.")
    return time.monotonic() - began


if __name__ == "__main__":
    cli.run(main)
