"""What the released TF1 code made of its tiny model: checkpoints, and values it computed."""

import pathlib

import numpy as np


def variables(prefix: pathlib.Path) -> dict[str, np.ndarray]:
    """All variables of a checkpoint, as TensorFlow reads them."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def expected(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Batches, outputs and losses, by name."""
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        return dict(file)
