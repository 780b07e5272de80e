"""The released TF1 code's tiny model: its configuration, checkpoints and expected values, in our
terms.
"""

import json
import pathlib
from typing import Any

import numpy as np

from albert_jax import config

# Google's "gelu" is the tanh approximation.
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}

_BLOCK = {
    "attention": {
        "query": "attention_1/self/query",
        "key": "attention_1/self/key",
        "value": "attention_1/self/value",
        "output": "attention_1/output/dense",
        "layer_norm": "LayerNorm",
    },
    "ffn": {
        "intermediate": "ffn_1/intermediate/dense",
        "output": "ffn_1/intermediate/output/dense",
        "layer_norm": "LayerNorm_1",
    },
}
_DENSE = {"kernel": "kernel", "bias": "bias"}
_NORM = {"scale": "gamma", "bias": "beta"}


def model_config(folder: pathlib.Path) -> config.ModelConfig:
    fields = json.loads((folder / "albert_config.json").read_text())
    fields.pop("down_scale_factor")
    fields["hidden_act"] = _ACTIVATIONS[fields["hidden_act"]]
    return config.ModelConfig(**fields, dtype="float32")


def params(folder: pathlib.Path, step: int, groups: int, inner: int) -> dict[str, Any]:
    """The checkpoint's variables in our tree."""
    import tensorflow as tf

    read = tf.train.load_checkpoint(str(folder / f"model.ckpt-{step}")).get_tensor

    def leaves(prefix: str) -> dict[str, np.ndarray]:
        names = _NORM if "LayerNorm" in prefix.rsplit("/", 1)[-1] else _DENSE
        return {ours: read(f"{prefix}/{theirs}") for ours, theirs in names.items()}

    def stacked(part: str) -> dict[str, np.ndarray]:
        sets = [
            [
                leaves(f"bert/encoder/transformer/group_{g}/inner_group_{i}/{part}")
                for i in range(inner)
            ]
            for g in range(groups)
        ]
        return {
            key: np.stack([np.stack([one[key] for one in row]) for row in sets])
            for key in sets[0][0]
        }

    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return {
        "embeddings": {
            **{name: read(f"bert/embeddings/{name}") for name in tables},
            "layer_norm": leaves("bert/embeddings/LayerNorm"),
            "projection": leaves("bert/encoder/embedding_hidden_mapping_in"),
        },
        "encoder": {
            half: {ours: stacked(theirs) for ours, theirs in parts.items()}
            for half, parts in _BLOCK.items()
        },
        "pooler": leaves("bert/pooler/dense"),
        "masked_lm": {
            "dense": leaves("cls/predictions/transform/dense"),
            "layer_norm": leaves("cls/predictions/transform/LayerNorm"),
            "bias": read("cls/predictions/output_bias"),
        },
        "sentence_order": {
            "kernel": read("cls/seq_relationship/output_weights").T,
            "bias": read("cls/seq_relationship/output_bias"),
        },
    }


def expected(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        return dict(file)
