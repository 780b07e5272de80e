"""Compiles a run's training step, and finds settings of it that the device's memory holds.

In:  a config, a mesh of devices (real ones, or the compiler's descriptions of them), and how much
     memory each has.
Out: `Fitted`: the program, compiled, with what it needs.

`train` and `compile` both ask here, so that what `auto` becomes is one answer: the least
rematerialisation, and with it the largest microbatch, that the compiler says fits.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from albert_jax.config import AUTO, Config
from albert_jax.errors import UserError
from albert_jax.training import program, sharding
from albert_jax.training.compilation_cache import Cache

# From the least that is computed twice to the most.
REMAT_BY_COST = ("none", "dots", "full")
# Below this the matrix unit starves; smaller microbatches come last.
_SMALL = 8


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a compiled step needs of one device's memory, in bytes.

    Attributes:
        arguments: state and batch.
        outputs: the new state.
        aliased: the part of the outputs that takes the place of arguments.
        temporaries: activations, gradients, copies.
        code: the program itself.
        host: memory of the host that the device's program uses.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int

    @property
    def total(self) -> int:
        """All that must be there at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class DoesNotFitError(Exception):
    """A step that needs more memory than there is.

    Attributes:
        needed, available: bytes on one device.
    """

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(
            f"needs {needed / 2**30:.2f} GiB on each device, which has {available / 2**30:.2f}"
        )
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A step ready to run.

    Attributes:
        run: the program; its config has no `auto` in microbatch and rematerialisation.
        traced: the step's trace, for counting.
        compiled: the executable, called as `run.train_step`.
        memory: what it needs; None where the platform does not say.
        seconds: of tracing, lowering and compiling.
    """

    run: program.Program
    traced: Any
    compiled: jax.stages.Compiled
    memory: Memory | None
    seconds: float


def fit(
    config: Config,
    mesh: Mesh,
    available: int | None,
    options: Mapping[str, str] | None = None,
    cache: Cache | None = None,
    on_miss: Callable[[Config, DoesNotFitError], None] | None = None,
    batch: Any = None,
) -> Fitted:
    """Compiles the step, with the first of the settings it leaves open that fits.

    Args:
        config: its vocabulary size is known; `train.microbatch_size` and `model.remat` may be auto.
        mesh: where it will run.
        available: bytes of one device's memory (see `memory_limit`); None: not known, nothing is
            refused, and `auto` becomes remat=dots and the whole share at once.
        options: for the compiler.
        cache: where compiled steps are kept.
        on_miss: told of each setting that does not fit.
        batch: shapes, dtypes and shardings of a batch; pretraining's by default.

    Raises:
        DoesNotFitError: none does; it is the one that needs the least.
        UserError: a config that makes no program on this mesh, or one that the compiler fails on.
    """
    share = config.train.global_batch_size // sharding.batch_shards(mesh)
    found = list(settings(config, share)) if available is not None else [_usual(config)]
    misses: list[DoesNotFitError] = []
    for candidate in found:
        try:
            return compile_step(candidate, mesh, available, options, cache, batch)
        except DoesNotFitError as error:
            misses.append(error)
            if on_miss is not None:
                on_miss(candidate, error)
    raise min(misses, key=lambda miss: miss.needed)


def settings(config: Config, share: int) -> Iterator[Config]:
    """What `auto` may become, best first; the config itself where nothing is auto.

    Args:
        config: the run.
        share: sequences of the global batch that fall to one device.
    """
    remats = REMAT_BY_COST if config.model.remat == "auto" else (config.model.remat,)
    sizes = [config.train.microbatch_size]
    if config.train.microbatch_size == AUTO:
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
    large = [size for size in sizes if size == 0 or size >= min(_SMALL, share)]
    small = [size for size in sizes if size not in large]
    for part in (large, small):
        for remat in remats:
            for size in part:
                yield _with(config, remat, size)


def compile_step(
    config: Config,
    mesh: Mesh,
    available: int | None,
    options: Mapping[str, str] | None = None,
    cache: Cache | None = None,
    batch: Any = None,
) -> Fitted:
    """Compiles the step of a config without `auto`; arguments and errors as in `fit`."""
    return compile_program(program.build(config, mesh), available, options, cache, batch)


def compile_program(
    run: program.Program,
    available: int | None,
    options: Mapping[str, str] | None = None,
    cache: Cache | None = None,
    batch: Any = None,
) -> Fitted:
    """Compiles a program's step; the other arguments and errors as in `fit`."""
    start, mesh = time.monotonic(), run.mesh
    batch = batch or run.abstract_batch()
    traced = run.train_step.trace(run.abstract_state, batch, *run.abstract_frozen)
    lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
    try:
        compiled = (
            cache.compile(lowered, options or {}) if cache else lowered.compile(dict(options or {}))
        )
    except jax.errors.JaxRuntimeError as error:
        missing = _out_of_memory(str(error))
        if missing is None:
            raise UserError(
                f"the compiler for {mesh.devices.flat[0].device_kind} does not manage this step: "
                f"{str(error).splitlines()[0]} (Another mesh, microbatch or attention may do.)"
            ) from error
        temporaries, limit = missing
        raise DoesNotFitError(temporaries + argument_bytes(run, batch), limit) from None
    memory = _memory(compiled)
    if memory is not None and available is not None and memory.total > available:
        raise DoesNotFitError(memory.total, available)
    return Fitted(run, traced, compiled, memory, time.monotonic() - start)


def memory_limit(device: Any) -> int | None:
    """How many bytes a program may use on a device; of a CPU's, its share of the machine's memory.
    None where nobody says.
    """
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        sharing = len(device.client.local_devices())
        return pages * os.sysconf("SC_PAGE_SIZE") // sharing if pages > 0 else None
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def argument_bytes(run: program.Program, batch: Any = None) -> int:
    """Of state, batch (pretraining's by default) and whatever is frozen, on one device."""
    return device_bytes((run.abstract_state, batch or run.abstract_batch(), run.abstract_frozen))


def device_bytes(tree: Any) -> int:
    """The bytes of a tree of abstract arrays that one device holds."""
    return sum(
        leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _usual(config: Config) -> Config:
    remat = "dots" if config.model.remat == "auto" else config.model.remat
    return _with(config, remat, max(config.train.microbatch_size, 0))


def _with(config: Config, remat: str, microbatch_size: int) -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, microbatch_size=microbatch_size),
    )


def _memory(compiled: jax.stages.Compiled) -> Memory | None:
    stats: Any = compiled.memory_analysis()
    if stats is None:
        return None
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes,
    )


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes of temporaries, bytes available) out of the TPU compiler's refusal.

    Two ways of saying it: "... temporaries (29.81G) exceeds available HBM (15.75G)" and "Used
    29.81G of 15.75G hbm".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amount = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({amount}\) exceeds available HBM \({amount}\)", message) or re.search(
        rf"Used {amount} of {amount} hbm", message
    )
    if found is None:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, used_unit, limit, limit_unit = found.groups()
    return int(float(used) * units[used_unit]), int(float(limit) * units[limit_unit])
