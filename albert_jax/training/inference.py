"""A trained run, loaded for use: its program, and the parameters of one checkpoint."""

import dataclasses
import pathlib
from typing import Any

import jax

from albert_jax import config as config_lib
from albert_jax.training import checkpoint, program, sharding


def load(
    workdir: pathlib.Path, number: int | None = None, batch_size: int | None = None
) -> tuple[program.Program, Any, int]:
    """The program of a run on the devices there are, its parameters, and the step they are of.

    Args:
        workdir: of a run.
        number: which checkpoint; by default the newest, or a fine-tuning's best.
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
        # Nor are rows packed in use, nor is there anything that changes by the step.
        data=dataclasses.replace(cfg.data, packing=False, schedule=""),
        # It may have been trained on another platform, with a kernel that there is not here.
        model=dataclasses.replace(cfg.model, attention="auto"),
        mesh=config_lib.MeshConfig(data=-1, fsdp=1, tensor=1),
        train=dataclasses.replace(
            cfg.train, global_batch_size=-(-size // len(devices)) * len(devices), microbatch_size=0
        ),
    )
    run = program.build(cfg, sharding.make_mesh(cfg, devices))
    params, number = checkpoint.read_params(
        workdir, run.abstract_state.params, number, best=bool(cfg.task.name)
    )
    return run, params, number
