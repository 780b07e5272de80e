"""Which of their arrays is which of ours, written down once for both directions.

A `Pair` says that one array of a foreign checkpoint is one of our parameters, or one set of a stack
of them, perhaps transposed. A format is a list of pairs; `gather` builds our parameters from it and
`spread` their arrays, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.model import finetuning, pretraining


@dataclasses.dataclass(frozen=True)
class Pair:
    """One array in both worlds.

    Attributes:
        ours: the path in our tree.
        theirs: its name there.
        at: which set of a stack, (group, inner); empty for what is no stack.
        transposed: theirs is [out, in].
    """

    ours: tuple[str, ...]
    theirs: str
    at: tuple[int, ...] = ()
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Head:
    """What stands on an encoder.

    Attributes:
        kind: "pretraining", "encoder" (nothing), or one of `finetuning.HEADS`.
        labels: names of the classes, in the order of the scores; one for a regression.
        multi_label: several of the classes may hold at once.
    """

    kind: str = "pretraining"
    labels: tuple[str, ...] = ()
    multi_label: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as it is carried from one format to another.

    Attributes:
        config: the encoder's.
        head: what stands on it.
        params: our tree, NumPy float32.
        notes: what a person should know of how it was read, a line each.
        moments: the optimizer's first and second, as trees like `params`; None where there are
            none.
        step: how many updates made it; 0 where nothing says.
    """

    config: ModelConfig
    head: Head
    params: Any
    notes: tuple[str, ...] = ()
    moments: tuple[Any, Any] | None = None
    step: int = 0


def shapes(config: ModelConfig, head: Head) -> Any:
    """The tree of a model's parameters as shapes; nothing is computed."""
    ids = jnp.zeros((1, 1, 8) if head.kind == "multiple_choice" else (1, 8), jnp.int32)

    def init() -> Any:
        key = jax.random.key(0)
        if head.kind in ("pretraining", "encoder"):
            model = pretraining.PretrainingModel(config)
            return model.init(key, ids, ids, ids, ids[:, :1])["params"]
        model = finetuning.FinetuningModel(config, head.kind, max(len(head.labels), 1))
        return model.init(key, ids, ids, ids)["params"]

    tree = dict(meta.unbox(jax.eval_shape(init)))
    if head.kind == "encoder":
        tree = {name: part for name, part in tree.items() if name in _ENCODER}
    return tree


_ENCODER = ("embeddings", "encoder", "pooler")


def gather(
    pairs: Sequence[Pair],
    like: Any,
    theirs: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
    known: Iterable[str] = (),
) -> Any:
    """Our parameters out of a foreign checkpoint, float32.

    Args:
        pairs: its format.
        like: the tree of our shapes.
        theirs: the shapes of its arrays, by name.
        read: an array of it, by name.
        source: what to call it in a message.
        known: names that it may have besides, which hold nothing of the model.

    Raises:
        UserError: every misfit at once: arrays that are missing, of another shape, or unknown.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(like)
    leaves = {path: leaf.shape for path, leaf in flat.items()}
    misfits = []
    for pair in pairs:
        ours = "/".join(pair.ours) + "".join(f"[{index}]" for index in pair.at)
        shape = leaves[pair.ours][len(pair.at) :]
        wanted = shape[::-1] if pair.transposed else shape
        if pair.theirs not in theirs:
            misfits.append(f"{ours} {list(shape)} has no {pair.theirs} {list(wanted)}")
        elif tuple(theirs[pair.theirs]) != tuple(wanted):
            misfits.append(
                f"{ours} {list(shape)} wants {pair.theirs} {list(wanted)}, which is "
                f"{list(theirs[pair.theirs])}"
            )
    named = {pair.theirs for pair in pairs} | set(known)
    misfits += [
        f"{name} {list(shape)} is nothing that this model has"
        for name, shape in theirs.items()
        if name not in named
    ]
    if misfits:
        raise UserError(
            f"{source} does not fit its own config: {len(misfits)} of its arrays. Nothing was "
            "written.\n  " + "\n  ".join(misfits)
        )
    values = {path: np.zeros(shape, np.float32) for path, shape in leaves.items()}
    for pair in pairs:
        array = read(pair.theirs).astype(np.float32, copy=False)
        values[pair.ours][pair.at] = array.T if pair.transposed else array
    return traverse_util.unflatten_dict(values)


def spread(pairs: Sequence[Pair], params: Any) -> dict[str, np.ndarray]:
    """Their arrays, by name, out of our parameters; float32, contiguous."""
    values = traverse_util.flatten_dict(params)
    arrays = {}
    for pair in pairs:
        array = np.asarray(values[pair.ours], np.float32)[pair.at]
        arrays[pair.theirs] = np.ascontiguousarray(array.T if pair.transposed else array)
    return arrays


def dense(ours: tuple[str, ...], theirs: str, at: tuple[int, ...] = ()) -> list[Pair]:
    """The two arrays of a PyTorch Linear."""
    return [
        Pair((*ours, "kernel"), f"{theirs}.weight", at, transposed=True),
        Pair((*ours, "bias"), f"{theirs}.bias", at),
    ]


def norm(ours: tuple[str, ...], theirs: str, at: tuple[int, ...] = ()) -> list[Pair]:
    """The two arrays of a PyTorch LayerNorm."""
    return [
        Pair((*ours, "scale"), f"{theirs}.weight", at),
        Pair((*ours, "bias"), f"{theirs}.bias", at),
    ]
