"""The teacher of a run: any checkpoint of ours, frozen, in the student's step.

In:  `config.distillation`: a run's folder, a checkpoint of it, and which of its layers start the
     student.
Out: `Teacher`: its model, and where its parameters lie on the mesh; they are read once a run.

The teacher is split over the mesh by the student's rules and gathered once a step. Its matrices are
kept in the student's `model.dtype`, in which it also computes; it has no dropout, no gradient and
no optimizer state, and no checkpoint of the student holds it. Its sentence head is not used. Family
and size are free, but for what the losses need: one vocabulary, and one hidden size where hidden
states are compared.

Source: Sanh et al. 2019, arXiv:1910.01108; huggingface/transformers, research project distillation
(distiller.py, scripts/extract_distilbert.py).
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from albert_jax import config as config_lib
from albert_jax.config import Config, ModelConfig
from albert_jax.errors import UserError
from albert_jax.model import attention, layers, pretraining
from albert_jax.training import checkpoint, objectives, run_folder, sharding
from albert_jax.training import workdir as workdir_lib

# What a student takes over from its teacher besides the layers, and what where both have the same
# sentence objective.
_STARTS = ("embeddings", "encoder", "masked_lm")
_STARTS_SENTENCES = ("pooler", "sentence_order")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher on a mesh; nothing is read yet.

    Attributes:
        workdir, number: the run, and the step of its checkpoint.
        model: one device's part of it, as the step runs it.
        specs: how each parameter is split.
        saved: shapes, dtypes and shardings of the parameters as they are read.
        abstract_params: the same, as the step takes them.
    """

    workdir: pathlib.Path
    number: int
    model: pretraining.PretrainingModel
    specs: Any
    saved: Any
    abstract_params: Any

    def params(self) -> Any:
        """The parameters as the step takes them.

        Raises:
            UserError: no such checkpoint, or one that does not fit its config.
        """

        def rounded(params: Any) -> Any:
            return jax.tree.map(
                lambda leaf, kept: leaf.astype(kept.dtype), params, self.abstract_params
            )

        where = jax.tree.map(lambda kept: kept.sharding, self.abstract_params)
        return jax.jit(rounded, out_shardings=where)(self._read())

    def gathered(self, params: Any) -> Any:
        """The parameters whole but for their tensor split; inside a shard_map."""
        return jax.tree.map(
            lambda leaf, spec: sharding.gathered(leaf, spec, leaf.dtype).astype(leaf.dtype),
            params,
            self.specs,
        )

    def started(self, student: Any, config: Config) -> Any:
        """The student's parameters, begun with the teacher's: embeddings, the layers that
        `distillation.student_layers` names, the masked-word head, and where both have the same
        sentence objective the pooler and the sentence head.

        A set of the student's that serves several depths begins as the first of them. What the
        student does not have is left out.

        Args:
            student: fresh parameters; taken over.
            config: the run's.

        Raises:
            UserError: as `params`; or shapes that do not fit, all of them named.
        """
        theirs, ours = self.model.config, config.model
        taken = _STARTS
        if ours.sentence_objective == theirs.sentence_objective:
            taken += _STARTS_SENTENCES

        sets = {half: _sets(half, config, theirs) for half in ("attention", "ffn")}

        def picked(params: Any) -> dict[str, Any]:
            leaves = jax.tree_util.tree_leaves_with_path({part: params.get(part) for part in taken})
            return {
                _name(path): leaf[sets[path[1].key]] if path[0].key == "encoder" else leaf
                for path, leaf in leaves
            }

        found = jax.eval_shape(picked, self.saved)
        misfits = [
            f"{_name(path)}: the student's is {leaf.shape}, the teacher has "
            + (str(found[_name(path)].shape) if _name(path) in found else "none")
            for path, leaf in jax.tree_util.tree_leaves_with_path(student)
            if path[0].key in taken
            and (_name(path) not in found or found[_name(path)].shape != leaf.shape)
        ]
        if misfits:
            raise UserError(
                f"distillation.student_layers: the student cannot start from {self.workdir}; make "
                "their sizes in model.* equal, or leave student_layers empty:\n  "
                + "\n  ".join(misfits)
            )

        def begun(student: Any, params: Any) -> Any:
            found = picked(params)
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: found.get(_name(path), leaf), student
            )

        where = jax.tree.map(lambda leaf: leaf.sharding, student)
        return jax.jit(begun, out_shardings=where, donate_argnums=0)(student, self._read())

    def _read(self) -> Any:
        return checkpoint.read_params(self.workdir, self.saved, self.number)[0]


def resolve(config: Config, tokenizer_sha256: str) -> Config:
    """The config with the number of its teacher's checkpoint; as it is where there is no teacher.

    Args:
        config: a run's; its vocabulary size is known.
        tokenizer_sha256: of the tokenizer of the run's token store.

    Raises:
        UserError: the teacher's run is none, has no checkpoint, or reads with another tokenizer.
    """
    options = config.distillation
    if not options.teacher:
        return config
    workdir = run_folder.fetched(options.teacher)
    config_lib.read_workdir(workdir)
    theirs = workdir_lib.load_tokenizer(workdir).sha256
    if theirs != tokenizer_sha256:
        raise UserError(
            f"distillation.teacher={options.teacher} reads with another tokenizer (SHA-256 "
            f"{theirs[:12]}...) than the token store was made with ({tokenizer_sha256[:12]}...); "
            "teacher and student must have the same pieces. Prepare the text with the teacher's: "
            f"albert_jax.prepare --tokenizer={options.teacher}/..."
        )
    number = options.teacher_step or checkpoint.newest_in(workdir)
    if not number:
        raise UserError(f"distillation.teacher={options.teacher} has no checkpoint yet.")
    return dataclasses.replace(
        config, distillation=dataclasses.replace(options, teacher_step=number)
    )


def on_mesh(config: Config, mesh: Mesh) -> Teacher | None:
    """The teacher of a run, laid out on its mesh; None where it has none.

    Raises:
        UserError: no run there, or one that cannot teach this student.
    """
    options = config.distillation
    if not options.teacher:
        return None
    workdir = run_folder.fetched(options.teacher)
    theirs = config_lib.read_workdir(workdir).model
    shards = mesh.shape[layers.TENSOR_AXIS]
    _check(config, theirs, shards)
    theirs = dataclasses.replace(
        theirs,
        dtype=config.model.dtype,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attention="auto",
        remat="none",  # there is no backward pass to recompute for
    )
    platform = mesh.devices.flat[0].platform
    implementation = attention.choose(theirs, config.data.max_seq_length, platform, shards)
    whole = pretraining.PretrainingModel(dataclasses.replace(theirs, attention="xla"))
    boxed = jax.eval_shape(lambda: objectives.Pretraining(whole).init_params(0))
    names = sharding.axis_names(boxed)
    shapes = meta.unbox(boxed)
    specs = jax.tree.map(
        lambda leaf, names: sharding.param_spec(mesh, names, leaf.shape), shapes, names
    )

    saved = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        shapes,
        specs,
    )

    def kept(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        matrix = sum(name not in layers.STACK_AXES for name in names) > 1
        return leaf.update(dtype=jnp.dtype(theirs.dtype)) if matrix else leaf

    return Teacher(
        workdir=workdir,
        number=options.teacher_step,
        model=pretraining.PretrainingModel(
            dataclasses.replace(theirs, attention=implementation), shards
        ),
        specs=specs,
        saved=saved,
        abstract_params=jax.tree.map(kept, saved, names),
    )


def _check(config: Config, theirs: ModelConfig, shards: int) -> None:
    """Raises UserError where the losses, the examples or the mesh do not suit the teacher."""
    options, ours = config.distillation, config.model
    teacher = f"distillation.teacher={options.teacher}"
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(
            f"{teacher} has {theirs.vocab_size} pieces, the student model.vocab_size="
            f"{ours.vocab_size}; they must have the same vocabulary."
        )
    if options.cosine_weight and theirs.hidden_size != ours.hidden_size:
        raise UserError(
            f"{teacher} has hidden states of {theirs.hidden_size}, the student model.hidden_size="
            f"{ours.hidden_size}, so they have no cosine; set distillation.cosine_weight=0."
        )
    length = theirs.max_position_embeddings - theirs.position_offset
    if config.data.max_seq_length > length:
        raise UserError(
            f"data.max_seq_length={config.data.max_seq_length} is longer than the {length} "
            f"positions of {teacher}."
        )
    if ours.sentence_objective != "none" and theirs.type_vocab_size == 1:
        raise UserError(
            f"{teacher} knows one kind of segment, and the student's examples have two "
            f"(model.sentence_objective={ours.sentence_objective}); set it to none."
        )
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(theirs, name) % shards:
            raise UserError(
                f"mesh.tensor={shards} does not divide the {name}={getattr(theirs, name)} of "
                f"{teacher}."
            )
    chosen = options.layers
    if chosen and len(chosen) != ours.num_hidden_layers:
        raise UserError(
            f"distillation.student_layers={options.student_layers} names {len(chosen)} layers, "
            f"the student has model.num_hidden_layers={ours.num_hidden_layers}."
        )
    if chosen and max(chosen) >= theirs.num_hidden_layers:
        raise UserError(
            f"distillation.student_layers={options.student_layers}: {teacher} has layers 0 to "
            f"{theirs.num_hidden_layers - 1}."
        )


def _sets(half: str, config: Config, theirs: ModelConfig) -> np.ndarray:
    """Which of the teacher's sets of attention or feed-forward parameters each set of the student's
    begins as.
    """
    ours = config.model
    depths, groups = ours.num_hidden_layers, getattr(ours, f"{half}_groups")
    first_depths = [-(-group * depths // groups) for group in range(groups)]
    their_groups = getattr(theirs, f"{half}_groups")
    return np.asarray(
        [
            config.distillation.layers[depth] * their_groups // theirs.num_hidden_layers
            for depth in first_depths
        ]
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
