"""A trained run, loaded for use: its program, the parameters of one checkpoint, its tokenizer.

The tokenizer lies in the workdir itself, so that a run can be carried away from its token store.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax

from albert_jax import config as config_lib
from albert_jax.data import store, tokenizer
from albert_jax.errors import UserError
from albert_jax.training import checkpoint, program, sharding

_NORMALIZATION = "normalization.json"


def load(
    workdir: pathlib.Path, number: int | None = None, batch_size: int | None = None
) -> tuple[program.Program, Any, int]:
    """The program of a run on the devices there are, its parameters, and the step they are of.

    Args:
        workdir: of a pretraining run.
        number: which checkpoint; the newest by default.
        batch_size: sequences at once, rounded up to what the devices share evenly; the run's by
            default.

    Raises:
        UserError: no run there, or no such checkpoint.
    """
    cfg = config_lib.read_workdir(workdir)
    devices = jax.devices()
    size = batch_size or cfg.train.global_batch_size
    cfg = dataclasses.replace(
        cfg,
        # It may have been trained on another platform, with a kernel that there is not here.
        model=dataclasses.replace(cfg.model, attention="auto"),
        mesh=config_lib.MeshConfig(data=-1, fsdp=1, tensor=1),
        train=dataclasses.replace(
            cfg.train, global_batch_size=-(-size // len(devices)) * len(devices), microbatch_size=0
        ),
    )
    run = program.build(cfg, sharding.make_mesh(cfg, devices))
    nothing = UserError(f"{workdir} has no checkpoint yet; albert_jax.train saves the first one.")
    folder = workdir / "checkpoints"
    if not folder.is_dir():  # which opening it would make
        raise nothing
    with checkpoint.Checkpoints(folder) as saved:
        found = saved.steps
        if not found:
            raise nothing
        number = found[-1] if number is None else number
        if number not in found:
            raise UserError(f"{workdir} has no checkpoint of step {number}; there are: {found}.")
        return run, saved.restore_params(run.abstract_state.params, number), number


def keep_tokenizer(data: store.Store, workdir: pathlib.Path) -> None:
    """Copies the store's tokenizer and what text is normalised with into a run's folder."""
    shutil.copyfile(data.path / store.TOKENIZER, workdir / store.TOKENIZER)
    options = dataclasses.asdict(data.tokenizer().normalization)
    (workdir / _NORMALIZATION).write_text(json.dumps(options) + "\n", encoding="utf-8")


def load_tokenizer(workdir: pathlib.Path) -> tokenizer.Tokenizer:
    """The tokenizer of a run.

    Raises:
        UserError: the run does not have one.
    """
    path = workdir / _NORMALIZATION
    try:
        options = tokenizer.Normalization(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say how text is normalised: {error}") from None
    return tokenizer.Tokenizer.load(workdir / store.TOKENIZER, options)
