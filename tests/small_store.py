"""A token store of made-up text, made by the command itself: small, and learnable. And how tests
run commands.
"""

import contextlib
import importlib
import io
import pathlib
import random
import subprocess
import sys
import traceback
from unittest import mock

from albert_jax import cli
from albert_jax.training import cpu_memory

_NOUNS = ("cat", "dog", "bird", "fish", "horse", "sailor", "doctor", "teacher", "river", "house")
_VERBS = ("sees", "likes", "follows", "finds", "paints", "remembers", "carries", "forgets")
_PLACES = ("in the morning", "near the bridge", "before the rain", "under the tree", "by the sea")


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [
        f"The {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)} "
        f"{rng.choice(_PLACES)}."
        for _ in range(count)
    ]


def make(folder: pathlib.Path, documents: int = 60) -> pathlib.Path:
    """Writes documents, runs `prepare`, returns the store."""
    text = "\n\n".join("\n".join(sentences(seed, 30)) for seed in range(documents))
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8")
    store = folder / "store"
    run_here(
        "prepare",
        f"--input={source}",
        f"--output={store}",
        "--train_tokenizer",
        "--vocab_size=60",
        "--validation_fraction=0.2",
        "--workers=1",
    )
    return store


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"albert_jax.{name}", *arguments]


def run_command(name: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(name, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def run_here(name: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """As `run_command`, in this process: its imports, seconds of each start, are done already.

    For what is not about a process: its signals, its environment, what libraries write past Python.
    """
    main = importlib.import_module(f"albert_jax.{name}").main
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [name, *arguments]),
        mock.patch.object(cpu_memory, "keep_freed"),  # for good, of whatever tests come after
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.run(main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:  # what the interpreter would do
            traceback.print_exc()
            code = 1
    done = subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), errors.getvalue())
    assert done.returncode == expect, done.stdout + done.stderr
    return done
