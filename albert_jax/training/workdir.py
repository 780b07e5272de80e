"""A run's folder: whose it is, that it is this run's, which batches the run leaves out, and its
tokenizer, so that it can be carried away from its token store.

Process 0 alone writes here (checkpoints apart); the others are told what it found.
"""

import json
import pathlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from albert_jax import config as config_lib
from albert_jax.config import Config
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.training import hosts as hosts_lib
from albert_jax.training import run_folder

_SKIPPED, _NORMALIZATION = "skipped_batches.json", "normalization.json"


def prepare(workdir: pathlib.Path, config: Config) -> AbstractContextManager[Any]:
    """Makes the folder or checks that it holds this very run; returns what keeps others out while
    it is open.

    Raises:
        UserError: another run's folder, one in use, or one that cannot be written.
    """
    lock = run_folder.claim(workdir)
    path = workdir / "config.json"
    if path.exists():
        differing = config_lib.differing_fields(config, config_lib.read_workdir(workdir))
        if differing:
            raise UserError(
                f"--workdir={run_folder.named(workdir)} holds a run with another config; choose "
                "another folder, or set back:\n  " + "\n  ".join(differing)
            )
    else:
        _write_whole(path, config.to_json())
        run_folder.flush(workdir)  # the other processes look for it
    return lock


def check_shared(workdir: pathlib.Path, config: Config, hosts: hosts_lib.Hosts) -> None:
    """Checks that all processes were given the same config, and see the same folder.

    Process 0 has to have prepared it. Every process calls this.

    Raises:
        UserError: in a process where something differs.
    """
    leaders = config_lib.resolve(json.loads(hosts.share("config", config.to_json)))
    # Even what may change from start to start: on two meshes, they would wait for each other.
    allowed = frozenset({"data.path"})
    if differing := config_lib.differing_fields(config, leaders, allowed):
        raise UserError(
            f"process {hosts.index} was given another config or store than process 0:\n  "
            + "\n  ".join(differing)
        )
    if not run_folder.has(workdir, "config.json"):
        raise UserError(
            f"--workdir={run_folder.named(workdir)} is another folder on process {hosts.index} "
            "than on process 0; choose one on storage that all of them share."
        )


def read_skipped(workdir: pathlib.Path) -> list[int]:
    """The numbers of the batches that the run leaves out.

    Raises:
        UserError: a file that does not say so.
    """
    path = workdir / _SKIPPED
    if not path.exists():
        return []
    try:
        return [int(number) for number in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no list of batch numbers: {error}") from None


def write_skipped(workdir: pathlib.Path, numbers: Sequence[int]) -> None:
    """Writes them down, whole or not at all."""
    _write_whole(workdir / _SKIPPED, json.dumps(sorted(numbers)) + "\n")


def write_tokenizer(spoken: Tokenizer, workdir: pathlib.Path) -> None:
    """Puts a tokenizer into a run's folder, where `load_tokenizer` finds it."""
    (workdir / spoken.file_name).write_bytes(spoken.content)
    options = json.dumps(spoken.normalization.record())
    (workdir / _NORMALIZATION).write_text(options + "\n", encoding="utf-8")


def load_tokenizer(workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        UserError: the run does not have one.
    """
    path = workdir / _NORMALIZATION
    try:
        options = Normalization(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say how text is normalised: {error}") from None
    kept = [workdir / name for name in tokenizer_lib.FILES if (workdir / name).exists()]
    if len(kept) != 1:
        raise UserError(
            f"{workdir} must hold one of {', '.join(tokenizer_lib.FILES)}, the tokenizer it was "
            f"trained with; it holds {len(kept)} of them."
        )
    return Tokenizer.load(kept[0], options)


def _write_whole(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
