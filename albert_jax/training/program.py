"""A config on a mesh: the model, where its state lives, and the compiled steps.

What `train` runs, `evaluate` reads and a compiler without devices can be asked about is this same
program.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from albert_jax.config import Config, ModelConfig
from albert_jax.errors import UserError
from albert_jax.model import attention, finetuning, layers, pretraining
from albert_jax.training import distillation, objectives, optimizer, sharding, step

_BATCHES_AHEAD = 3  # of the host, in an evaluation


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions over sharded arrays.

    Attributes:
        config, mesh: what it is made from.
        model: the whole model, for any length: of pretraining, or with the head of `config.task`.
        metrics: names of a step's figures.
        attention: the implementation that the steps use.
        batch_sharding: how batches lie on the mesh.
        abstract_state: shapes, dtypes and shardings of the state.
        init_from: (seed) -> state at step 0, born sharded.
        train_step: (state, batch, *frozen) -> state; the old state's memory is used again.
        eval_step: (params, batch) -> what the objective's `outputs` says.
        teacher: whose parameters are frozen; None where nobody teaches.
    """

    config: Config
    mesh: Mesh
    model: Any
    metrics: tuple[str, ...]
    attention: str
    batch_sharding: NamedSharding
    abstract_state: step.TrainState
    init_from: Callable[[jax.Array], step.TrainState]
    train_step: Callable[..., step.TrainState]
    eval_step: Callable[[Any, objectives.Batch], Any]
    teacher: distillation.Teacher | None

    def init(self) -> step.TrainState:
        """The state at step 0."""
        return self.init_from(self._seed())

    def frozen(self) -> tuple[Any, ...]:
        """What `train_step` takes after state and batch, and no step changes: the seed, so that
        programs of other seeds need not be compiled, and what a teacher has learnt.
        """
        return (self._seed(), *([self.teacher.params()] if self.teacher else []))

    @property
    def abstract_frozen(self) -> tuple[Any, ...]:
        """Shapes, dtypes and shardings of what is frozen."""
        seed = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(self.mesh))
        return (seed, *([self.teacher.abstract_params] if self.teacher else []))

    def _seed(self) -> jax.Array:
        seed = np.asarray(self.config.train.seed, np.int32)
        return jax.make_array_from_callback(
            (), sharding.replicated(self.mesh), lambda index: seed[index]
        )

    def evaluated(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Any]:
        """What `eval_step` says of each batch, on the host; batches are this process's rows."""
        rows = self.config.train.global_batch_size
        waiting: collections.deque[Any] = collections.deque()
        for batch in batches:
            whole = sharding.to_global(batch, self.batch_sharding, rows)
            waiting.append(self.eval_step(params, whole))
            # The host stays near the device, so that it can break off and no batches pile up there.
            if len(waiting) >= _BATCHES_AHEAD:
                yield jax.device_get(waiting.popleft())
        yield from map(jax.device_get, waiting)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A pretraining batch's shapes and shardings (see the batch contract in data.examples)."""
        data, rows = self.config.data, self.config.train.global_batch_size
        length, slots = (rows, data.max_seq_length), (rows, data.max_predictions_per_seq)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "input_ids": (length, np.int32),
            "token_type_ids": (length, np.int32),
            "attention_mask": (length, np.int32),
            "masked_lm_positions": (slots, np.int32),
            "masked_lm_ids": (slots, np.int32),
            "masked_lm_weights": (slots, np.float32),
        }
        if self.config.model.sentence_objective != "none":
            shapes["sentence_order_labels"] = ((rows,), np.int32)
        if data.packing:
            pairs = (rows, data.max_pairs_per_seq)
            shapes |= {
                "sentence_order_labels": (pairs, np.int32),
                "sentence_order_weights": (pairs, np.float32),
                "segment_ids": (length, np.int32),
                "cls_positions": (pairs, np.int32),
            }
        return {
            key: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)
            for key, (shape, dtype) in shapes.items()
        }


def build(config: Config, mesh: Mesh) -> Program:
    """The program of a config whose vocabulary size is known; nothing is computed yet.

    One that differs from the last in its seeds alone shares what that has compiled.
    """
    return dataclasses.replace(_of_any_seed(config.with_seeds(0, 0), mesh), config=config)


@functools.lru_cache(maxsize=2)  # as given, and with what it left open
def _of_any_seed(config: Config, mesh: Mesh) -> Program:
    tensor_shards = mesh.shape[layers.TENSOR_AXIS]
    platform = mesh.devices.flat[0].platform
    implementation = attention.choose(
        config.model,
        config.data.max_seq_length,
        platform,
        tensor_shards,
        config.data.packing,
    )
    # Kernels are for the step's lengths alone; for all else, initial values among it, there is xla.
    whole_model = _model(config, "xla", "no")
    teacher = distillation.on_mesh(config, mesh)
    model = _model(config, implementation, _unroll(config.model, platform), tensor_shards)
    objective = _objective(config, model, teacher)
    whole_objective = _objective(config, whole_model, None)
    boxed = jax.eval_shape(lambda: whole_objective.init_params(0))
    names = sharding.axis_names(boxed)
    tx = optimizer.optimizer(config.optimizer, config.train.steps, names, config.model)
    weights = None
    if optimizer.has_layer_decay(config.optimizer):
        weights = optimizer.gradient_weights(config.optimizer, config.train.steps, config.model)
    recipe = step.Recipe(
        objective=objective,
        optimizer=tx,
        dropout=_has_dropout(config),
        microbatches=sharding.microbatches(config, mesh),
        log_every_steps=config.log.every_steps,
        gradient_weights=weights,
    )
    if config.task.head == "embedding" and recipe.microbatches > 1:
        raise UserError(
            f"train.microbatch_size={config.train.microbatch_size}: a query is told from the "
            "passages of its whole batch, which cannot be handled in parts; set it to 0."
        )

    def init_from(seed: jax.Array) -> step.TrainState:
        params = meta.unbox(whole_objective.init_params(seed))
        return step.init_state(params, recipe)

    shapes = jax.eval_shape(init_from, jax.ShapeDtypeStruct((), np.int32))
    specs = jax.tree.map(
        lambda leaf, names: sharding.param_spec(mesh, names, leaf.shape), shapes.params, names
    )
    state_shardings = _state_shardings(shapes, specs, tx, mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    everywhere = PartitionSpec()

    def gathered(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, spec: sharding.gathered(
                leaf, spec, step.compute_dtype(path, config.model)
            ),
            params,
            specs,
        )

    def device_gradients(
        params: Any, number: jax.Array, batch: objectives.Batch, seed: jax.Array, *taught_by: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        first_row = sharding.first_row(mesh, config.train.global_batch_size)
        teaching = teacher.gathered(*taught_by) if teacher else None
        grads, metrics = step.gradients(
            gathered(params), number, seed, batch, first_row, recipe, teaching
        )
        return jax.tree.map(sharding.reduced, grads, specs), metrics

    def device_eval(params: Any, batch: objectives.Batch) -> Any:
        return objective.outputs(gathered(params), batch)

    # Nothing inside may differ from device to device unawares: kernels cannot say what they return.
    on_devices = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    gradients = on_devices(
        device_gradients,
        in_specs=(
            specs,
            everywhere,
            batch_sharding.spec,
            everywhere,
            *([teacher.specs] if teacher else []),
        ),
        out_specs=(specs, everywhere),
    )
    eval_step = on_devices(device_eval, in_specs=(specs, batch_sharding.spec), out_specs=everywhere)

    def train_step(
        state: step.TrainState, batch: objectives.Batch, *frozen: Any
    ) -> step.TrainState:
        return step.train_step(state, batch, recipe, lambda *given: gradients(*given, *frozen))

    teacher_shardings = (
        [jax.tree.map(lambda leaf: leaf.sharding, teacher.abstract_params)] if teacher else []
    )
    return Program(
        config=config,
        mesh=mesh,
        model=whole_model,
        metrics=recipe.metrics,
        attention=implementation,
        batch_sharding=batch_sharding,
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            state_shardings,
        ),
        init_from=jax.jit(init_from, out_shardings=state_shardings),
        train_step=jax.jit(
            train_step,
            in_shardings=(
                state_shardings,
                batch_sharding,
                sharding.replicated(mesh),
                *teacher_shardings,
            ),
            out_shardings=state_shardings,
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            eval_step,
            in_shardings=(state_shardings.params, batch_sharding),
            out_shardings=sharding.replicated(mesh),
        ),
        teacher=teacher,
    )


def _unroll(model: ModelConfig, platform: str) -> str:
    """`model.unroll`, decided. Of a step on a CPU (4 layers of 256), keeping what the backward pass
    needs in the loop's stacks was a sixth; others update them in place.
    """
    if model.unroll != "auto":
        return model.unroll
    return "yes" if platform == "cpu" and model.remat == "none" else "no"


def _model(config: Config, implementation: str, unroll: str, shards: int = 1) -> Any:
    model = dataclasses.replace(config.model, attention=implementation, unroll=unroll)
    task = config.task
    if not task.head:
        return pretraining.PretrainingModel(model, shards)
    return finetuning.FinetuningModel(model, task.head, max(len(task.label_names), 1), shards)


def _objective(
    config: Config, model: Any, teacher: distillation.Teacher | None
) -> objectives.Objective:
    if config.task.head:
        return objectives.Finetuning(model, sharding.BATCH_AXES)
    taught = teacher.model if teacher else None
    return objectives.Pretraining(model, sharding.BATCH_AXES, taught, config.distillation)


def _has_dropout(config: Config) -> bool:
    rates = [config.model.hidden_dropout_prob, config.model.attention_probs_dropout_prob]
    if config.task.head:
        rates.append(config.model.classifier_dropout_prob)
    return max(rates) > 0


def parameter_counts(run: Program) -> dict[str, int]:
    """How many parameters each component has, in the order in which data meets them."""
    params = run.abstract_state.params
    parts = {
        "embeddings": {k: v for k, v in params["embeddings"].items() if k != "projection"},
        "projection": params["embeddings"].get("projection", {}),
        "attention": params["encoder"]["attention"],
        "feed-forward": params["encoder"]["ffn"],
        "pooler": params.get("pooler", {}),
        "masked-word head": params.get("masked_lm", {}),
        "sentence head": params.get("sentence_order", {}),
        f"{run.config.task.head.replace('_', ' ')} head": params.get("classifier", {}),
    }
    return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts.items()}


def describe(run: Program) -> str:
    """What is about to run, in a few lines: parameters by component, mesh, batch."""
    counts = parameter_counts(run)
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    config, mesh = run.config, run.mesh
    device = mesh.devices.flat[0]
    batches = [_described_batch(config.at(stage), mesh) for stage in config.stages]
    if config.data.schedule:
        batches = [
            f"  from step {stage.first_batch:,} on: {batch}, {stage.masked_lm_prob:.0%} masked"
            for stage, batch in zip(config.stages, batches, strict=True)
        ]
    return (
        f"model: {sum(counts.values()):,} parameters: {listed}\n"
        f"devices: {mesh.size} x {device.device_kind}, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        + f"; {config.model.dtype}, {run.attention} attention\n"
        + ("batches:\n" if config.data.schedule else "batch: ")
        + "\n".join(batches)
    )


def _described_batch(config: Config, mesh: Mesh) -> str:
    share = config.train.global_batch_size // sharding.batch_shards(mesh)
    micro = share // sharding.microbatches(config, mesh)
    return (
        f"{config.train.global_batch_size} sequences of {config.data.max_seq_length}, "
        f"{share} a device"
        + (f" in {share // micro} microbatches of {micro}" if micro < share else "")
    )


def _state_shardings(
    shapes: step.TrainState, specs: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> step.TrainState:
    """Optimizer slots lie where their parameters lie; counters are everywhere."""
    everywhere = sharding.replicated(mesh)
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    opt_state = optax.tree_map_params(
        tx,
        lambda _, where: where,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    rest = jax.tree.map(lambda _: everywhere, shapes)
    return rest.replace(params=params, opt_state=opt_state)
