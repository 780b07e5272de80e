"""A trained model as a folder that plain JAX runs: StableHLO, its weights, and its signature.

In:  a function of (parameters, input ids, segment ids, mask) and its parameters; `encoder`,
     `fill_mask` and `finetuned` make them of our models.
Out: a folder with `model.stablehlo` (`jax.export`), `model.safetensors`, `signature.json` (names,
     dtypes, shapes, limits), `config.json` and a README with the lines that load and run it.

Batch and length are symbols, and one file serves CPUs, TPUs and NVIDIA GPUs. The weights are
arguments of the program and lie beside it, each once: the program is some 30 kB whatever the
model's size, starts sooner than one that carries its weights, and the scan over a shared layer
stays one loop. JAX runs such a file for at least six months of later releases.
[docs.jax.dev/en/latest/export, "Compatibility guarantees"]

Letters: B batch, C choices, L sequence length, D hidden size, V vocabulary, K labels.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from safetensors import numpy as safetensors

from albert_jax.config import ModelConfig
from albert_jax.model import encoder as encoder_lib
from albert_jax.model import finetuning, pretraining

PLATFORMS = ("cpu", "tpu", "cuda")
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
PROGRAM, WEIGHTS, SIGNATURE = "model.stablehlo", "model.safetensors", "signature.json"

Outputs = dict[str, jax.Array]


class Served(NamedTuple):
    """What a folder is to compute.

    Attributes:
        function: (params, input_ids, token_type_ids, attention_mask) -> arrays by name; the three
            are int32 [B, L], of multiple choice [B, C, L].
        params: nested dictionaries of arrays, no more than the function reads.
        max_length: the greatest L.
        choices: whether the inputs are [B, C, L].
    """

    function: Callable[[Any, jax.Array, jax.Array, jax.Array], Outputs]
    params: Any
    max_length: int
    choices: bool = False


def encoder(config: ModelConfig, params: Any, dtype: str = "float32") -> Served:
    """Embeddings of text: `last_hidden_state` [B, L, D] and, where there is a pooler,
    `pooler_output` [B, D], float32.

    Args:
        config: the model's.
        params: of any of our models; its heads are left out.
        dtype: of matrix products; float32, or bfloat16 for speed on a TPU or GPU.
    """
    cfg = _for_serving(config, dtype)
    kept = {name: params[name] for name in ("embeddings", "encoder", "pooler") if name in params}
    model = _Encoder(cfg, with_pooler="pooler" in kept)
    return _served(cfg, kept, lambda params, *inputs: model.apply({"params": params}, *inputs))


def fill_mask(config: ModelConfig, params: Any, dtype: str = "float32") -> Served:
    """Masked-word scores at every position of a pretrained model: `logits` [B, L, V], float32."""
    cfg = dataclasses.replace(_for_serving(config, dtype), sentence_objective="none", pooler=False)
    kept = {name: params[name] for name in ("embeddings", "encoder", "masked_lm")}
    model = pretraining.PretrainingModel(cfg)

    def function(params: Any, *inputs: jax.Array) -> Outputs:
        everywhere_BL = jnp.broadcast_to(jnp.arange(inputs[0].shape[1])[None], inputs[0].shape)
        output: Any = model.apply({"params": params}, *inputs, everywhere_BL)
        return {"logits": output.masked_lm_logits_BPV}

    return _served(cfg, kept, function)


def finetuned(
    config: ModelConfig, params: Any, head: str, num_labels: int, dtype: str = "float32"
) -> Served:
    """A fine-tuned head's scores, float32, by the names of Transformers: `logits`; of question
    answering `start_logits` and `end_logits` [B, L].

    Args:
        config: the encoder's.
        params: of `finetuning.FinetuningModel`.
        head: one of `finetuning.HEADS`.
        num_labels: K.
        dtype: of matrix products in the encoder.
    """
    cfg = _for_serving(config, dtype)
    model = finetuning.FinetuningModel(cfg, head, num_labels)

    def function(params: Any, *inputs: jax.Array) -> Outputs:
        output: Any = model.apply({"params": params}, *inputs)
        if head == "question_answering":
            return {"start_logits": output.logits[..., 0], "end_logits": output.logits[..., 1]}
        return {"logits": output.logits}

    return _served(cfg, params, function)._replace(choices=head == "multiple_choice")


def export(served: Served, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes the folder; files of the same names are replaced.

    Args:
        served: what it computes.
        folder: made where it does not exist.
        config: what is written as `config.json`, for the reader's own use.
    """
    weights = {
        "/".join(path): np.ascontiguousarray(leaf)
        for path, leaf in traverse_util.flatten_dict(jax.device_get(served.params)).items()
    }

    def function(
        weights: dict[str, jax.Array],
        input_ids_BL: jax.Array,
        token_type_ids_BL: jax.Array,
        attention_mask_BL: jax.Array,
    ) -> Outputs:
        params = traverse_util.unflatten_dict(weights, sep="/")
        return served.function(params, input_ids_BL, token_type_ids_BL, attention_mask_BL)

    symbols = "b, c, l" if served.choices else "b, l"
    shape = jax_export.symbolic_shape(symbols, constraints=[f"l <= {served.max_length}"])
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(INPUTS)
    with _no_source_lines():
        exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)(abstract, *inputs)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    signature = {
        "program": PROGRAM,
        "weights": WEIGHTS,
        "platforms": PLATFORMS,
        "inputs": {name: _describe(x) for name, x in zip(INPUTS, inputs, strict=True)},
        "outputs": {name: _describe(x) for name, x in outputs.items()},
        "max_length": served.max_length,
        "jax": importlib.metadata.version("jax"),
        "calling_convention_version": exported.calling_convention_version,
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(weights, folder / WEIGHTS)
    (folder / PROGRAM).write_bytes(exported.serialize())
    for name, content in ((SIGNATURE, signature), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(signature), encoding="utf-8")


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Without the place in the source, and this machine's path to it, of every operation."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


class _Encoder(nn.Module):
    """Embeddings, layers and pooler, by the parameter names that all of our models share."""

    config: ModelConfig
    with_pooler: bool

    @nn.compact
    def __call__(
        self, input_ids_BL: jax.Array, token_type_ids_BL: jax.Array, attention_mask_BL: jax.Array
    ) -> Outputs:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        embeddings = encoder_lib.Embeddings(cfg, dtype, name="embeddings")
        x_BLD, _ = embeddings(input_ids_BL, token_type_ids_BL, None)
        layers = encoder_lib.Encoder(cfg, dtype, name="encoder")
        sequence_BLD = layers(x_BLD, attention_mask_BL).sequence_BLD
        outputs = {"last_hidden_state": sequence_BLD.astype(jnp.float32)}
        if self.with_pooler:
            pooled_BD = encoder_lib.pooled(cfg, dtype, sequence_BLD[:, 0])
            outputs["pooler_output"] = pooled_BD.astype(jnp.float32)
        return outputs


def _for_serving(config: ModelConfig, dtype: str) -> ModelConfig:
    # Kernels are written for one kind of device, and nothing is kept for a backward pass.
    return dataclasses.replace(config, dtype=dtype, attention="xla", remat="none")


def _served(config: ModelConfig, params: Any, function: Callable[..., Any]) -> Served:
    return Served(function, params, config.max_position_embeddings - config.position_offset)


def _describe(x: Any) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else str(dim) for dim in x.shape]
    return {"dtype": x.dtype.name, "shape": shape}


def _readme(signature: dict[str, Any]) -> str:
    def listed(arrays: dict[str, Any]) -> str:
        return "\n".join(
            f"- `{name}`: {x['dtype']} [{', '.join(map(str, x['shape']))}]"
            for name, x in arrays.items()
        )

    return f"""# A model to be served by JAX

`{PROGRAM}` is StableHLO with any batch size `b` and any length `l` up to \
{signature["max_length"]}, for {", ".join(PLATFORMS)}; `{WEIGHTS}` holds its weights. It needs
`jax` (made with {signature["jax"]}; that release or one of the six months after it) and
`safetensors`, nothing else:

```python
from jax import export, jit
from safetensors.numpy import load_file

run = jit(export.deserialize(bytearray(open("{PROGRAM}", "rb").read())).call)
weights = load_file("{WEIGHTS}")
outputs = run(weights, input_ids, token_type_ids, attention_mask)
```

In (`{SIGNATURE}` has the same for programs; `attention_mask` is 1 on tokens, 0 on padding):

{listed(signature["inputs"])}

Out, by name:

{listed(signature["outputs"])}

A new shape is compiled when it is first seen: pad to a few lengths. `jax.device_put(weights)` once
saves a copy to the device at every call.
"""
