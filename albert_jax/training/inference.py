"""A trained run, loaded for use: its program, the parameters of one checkpoint, its tokenizer.

The tokenizer lies in the workdir itself, so that a run can be carried away from its token store.
"""

import dataclasses
import json
import pathlib
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
        distillation=config_lib.DistillationConfig(),  # the teacher has done its work
        # It may have been trained on another platform, with a kernel that there is not here.
        model=dataclasses.replace(cfg.model, attention="auto"),
        mesh=config_lib.MeshConfig(data=-1, fsdp=1, tensor=1),
        train=dataclasses.replace(
            cfg.train, global_batch_size=-(-size // len(devices)) * len(devices), microbatch_size=0
        ),
    )
    run = program.build(cfg, sharding.make_mesh(cfg, devices))
    params, number = checkpoint.read_params(workdir, run.abstract_state.params, number)
    return run, params, number


def keep_tokenizer(data: store.Store, workdir: pathlib.Path) -> None:
    """Copies the store's tokenizer and what text is normalised with into a run's folder."""
    write_tokenizer(data.tokenizer(), workdir)


def write_tokenizer(spoken: tokenizer.Tokenizer, workdir: pathlib.Path) -> None:
    """Puts a tokenizer into a run's folder, where `load_tokenizer` finds it."""
    (workdir / spoken.file_name).write_bytes(spoken.content)
    options = json.dumps(spoken.normalization.record())
    (workdir / _NORMALIZATION).write_text(options + "\n", encoding="utf-8")


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
    kept = [workdir / name for name in tokenizer.FILES if (workdir / name).exists()]
    if len(kept) != 1:
        raise UserError(
            f"{workdir} must hold one of {', '.join(tokenizer.FILES)}, the tokenizer it was "
            f"trained with; it holds {len(kept)} of them."
        )
    return tokenizer.Tokenizer.load(kept[0], options)
