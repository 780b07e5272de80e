"""The arrays of a PyTorch checkpoint folder, read one at a time and never unpickled."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors

from albert_jax.errors import UserError

_SAFE, _INDEX, _PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[tuple[Shapes, Read]]:
    """The shapes of all arrays by name, and a function that reads one as float32.

    Raises:
        UserError: no weights there, or none that can be read safely.
    """
    if (folder / _SAFE).exists() or (folder / _INDEX).exists():
        with contextlib.ExitStack() as stack:
            # Through JAX, because NumPy has no bfloat16.
            files = [stack.enter_context(_open(path)) for path in _shards(folder)]
            places = {name: file for file in files for name in file.keys()}  # noqa: SIM118
            shapes = {
                name: tuple(file.get_slice(name).get_shape()) for name, file in places.items()
            }
            yield shapes, lambda name: np.asarray(places[name].get_tensor(name), np.float32)
    elif (folder / _PICKLED).exists():
        arrays = _torch_arrays(folder / _PICKLED)
        yield (
            {name: tuple(tensor.shape) for name, tensor in arrays.items()},
            lambda name: arrays[name].float().numpy(),
        )
    else:
        raise UserError(f"{folder} has neither {_SAFE} nor {_PICKLED}.")


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="flax")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _SAFE).exists():
        return [folder / _SAFE]
    path = folder / _INDEX
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} does not list the shards: {error}") from None
    if any(pathlib.PurePath(name).name != name for name in names):
        raise UserError(f"{path} names files outside its folder: {', '.join(names)}.")
    return [folder / name for name in names]


def _torch_arrays(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} can only be read with PyTorch: pip install torch, or save the model as "
            f"{_SAFE}."
        ) from None
    try:
        arrays = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no plain file of arrays
        raise UserError(
            f"{path} is not a plain file of arrays, or damaged: {str(error).splitlines()[0]}"
        ) from None
    return {name: array for name, array in arrays.items() if isinstance(array, torch.Tensor)}
