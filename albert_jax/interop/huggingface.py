"""Folders of Hugging Face Transformers, both ways: config.json and weights of ALBERT, BERT, RoBERTa
and DistilBERT, bare, with pretraining heads, or with any fine-tuned one.

In:  a folder with `config.json` and `model.safetensors` (or shards of it, or `pytorch_model.bin`,
     read by torch without unpickling code).
Out: our model config, head and parameters; or such a folder, which `AutoModel...` loads.

What a foreign config says decides the maths: activation, epsilon, heads, groups, position offset.
What it says beyond that is named in a note; what would change the maths and is not known here is an
error.

Source: Transformers 5.23, configuration_*.py and modeling_*.py of the four.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop import huggingface_config, tensors, weights
from albert_jax.interop.tensors import Head, Model, Pair, dense, norm


def load(folder: pathlib.Path) -> Model:
    """The model of a folder of Transformers.

    Raises:
        UserError: not such a folder, another architecture, maths that are not ours, weights that
            do not fit (all of them listed).
    """
    fields = huggingface_config.read_config(folder)
    kind = huggingface_config.kind_of(fields, folder)
    with weights.opened(folder) as (shapes, read):
        names = _modern_names(shapes)
        base = f"{fields['model_type']}."
        bare = not any(name.startswith(base) for name in names)
        if bare:
            kind, base = "encoder", ""
        config, notes = huggingface_config.model_config(fields, folder)
        config = _with_heads(config, kind, base, names, read)
        labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        labelled = kind in ("sequence_classification", "token_classification")
        head = Head(
            "pretraining" if kind == "masked_lm" else kind,
            tuple(labels[key] for key in sorted(labels, key=int)) if labelled else (),
            fields.get("problem_type") == "multi_label_classification",
        )
        spare = _pooler_arrays(names) if head.kind in _WITHOUT_POOLER else []
        if spare:
            notes.append(f"{folder}: left out is what its head does not read: {', '.join(spare)}")
        pairs = names_of(config, head, bare)
        like = tensors.shapes(config, head)
        ours_are = {name: shapes[original] for name, original in names.items()}
        known = [*_duplicates(names), *spare]
        if not huggingface_config.has_projection(config):
            known += _identity_projection(config, base)
        params = tensors.gather(
            pairs, like, ours_are, lambda name: read(names[name]), str(folder), known
        )
        _check_tied(fields, names, read)
    return Model(config, head, params, tuple(notes))


def save(
    folder: pathlib.Path,
    config: ModelConfig,
    head: Head,
    params: Any,
    special_ids: Mapping[str, int] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors`; the folder must be there.

    Args:
        folder: where.
        config: of a model whose vocabulary size is known.
        head: what the parameters have on the encoder.
        params: our tree.
        special_ids: `pad_token_id`, `bos_token_id`, `eos_token_id` of the tokenizer.

    Raises:
        UserError: Transformers has no such model.
    """
    fields = huggingface_config.to_config(config, head)
    arrays = tensors.spread(names_of(config, head, bare=head.kind == "encoder"), params)
    if config.model_type == "albert" and not huggingface_config.has_projection(config):
        arrays |= _identity_projection(config, "" if head.kind == "encoder" else "albert.")
    fields |= special_ids or {}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def names_of(config: ModelConfig, head: Head, bare: bool = False) -> list[Pair]:
    """Every parameter of a model with its name there; `bare` names have no family before them."""
    family = config.model_type
    base = "" if bare else f"{family}."
    pairs = _embeddings(config, base)
    pairs += _albert_layers(config, base) if family == "albert" else _layers(config, base)
    pooler = _pooler(config, head, base)
    if pooler:
        pairs += dense(("pooler",), pooler)
    if head.kind == "pretraining":
        pairs += _masked_lm(family)
        if config.sentence_objective != "none":
            sentence = {"albert": "sop_classifier.classifier", "bert": "cls.seq_relationship"}
            pairs += dense(("sentence_order",), sentence[family])
    elif head.kind != "encoder":
        name = "qa_outputs" if head.kind == "question_answering" else "classifier"
        if family == "roberta" and head.kind == "sequence_classification":
            name = "classifier.out_proj"
        pairs += dense(("classifier",), name)
    return pairs


def _embeddings(config: ModelConfig, base: str) -> list[Pair]:
    tables = ["word_embeddings", "position_embeddings"]
    if config.type_vocab_size:
        tables.append("token_type_embeddings")
    pairs = [Pair(("embeddings", name), f"{base}embeddings.{name}.weight") for name in tables]
    pairs += norm(("embeddings", "layer_norm"), f"{base}embeddings.LayerNorm")
    if huggingface_config.has_projection(config):
        pairs += dense(("embeddings", "projection"), f"{base}encoder.embedding_hidden_mapping_in")
    return pairs


# (half, part) of ours -> theirs, inside a layer.
_ALBERT_LAYER = {
    ("attention", "query"): "attention.query",
    ("attention", "key"): "attention.key",
    ("attention", "value"): "attention.value",
    ("attention", "output"): "attention.dense",
    ("attention", "layer_norm"): "attention.LayerNorm",
    ("ffn", "intermediate"): "ffn",
    ("ffn", "output"): "ffn_output",
    ("ffn", "layer_norm"): "full_layer_layer_norm",
}
_BERT_LAYER = {
    ("attention", "query"): "attention.self.query",
    ("attention", "key"): "attention.self.key",
    ("attention", "value"): "attention.self.value",
    ("attention", "output"): "attention.output.dense",
    ("attention", "layer_norm"): "attention.output.LayerNorm",
    ("ffn", "intermediate"): "intermediate.dense",
    ("ffn", "output"): "output.dense",
    ("ffn", "layer_norm"): "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    ("attention", "query"): "attention.q_lin",
    ("attention", "key"): "attention.k_lin",
    ("attention", "value"): "attention.v_lin",
    ("attention", "output"): "attention.out_lin",
    ("attention", "layer_norm"): "sa_layer_norm",
    ("ffn", "intermediate"): "ffn.lin1",
    ("ffn", "output"): "ffn.lin2",
    ("ffn", "layer_norm"): "output_layer_norm",
}


def _albert_layers(config: ModelConfig, base: str) -> list[Pair]:
    pairs = []
    for group, sets in enumerate(huggingface_config.albert_groups(config)):
        for inner in range(config.inner_group_num):
            layer = f"{base}encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            pairs += _layer(layer, _ALBERT_LAYER, sets, inner)
    return pairs


def _layers(config: ModelConfig, base: str) -> list[Pair]:
    distilled = config.model_type == "distilbert"
    place = f"{base}transformer.layer" if distilled else f"{base}encoder.layer"
    parts = _DISTILBERT_LAYER if distilled else _BERT_LAYER
    pairs = []
    for depth, sets in enumerate(huggingface_config.sets_by_depth(config)):
        for inner in range(config.inner_group_num):
            number = depth * config.inner_group_num + inner
            pairs += _layer(f"{place}.{number}", parts, sets, inner)
    return pairs


def _layer(
    theirs: str, parts: Mapping[tuple[str, str], str], sets: Mapping[str, int], inner: int
) -> list[Pair]:
    pairs = []
    for (half, part), name in parts.items():
        kind = norm if part == "layer_norm" else dense
        pairs += kind(("encoder", half, part), f"{theirs}.{name}", (sets[half], inner))
    return pairs


def _pooler(config: ModelConfig, head: Head, base: str) -> str | None:
    """Their name of the dense layer over the first position; None where the model has none."""
    family = config.model_type
    if head.kind in huggingface_config.POOLED:
        return {
            "albert": "albert.pooler",
            "bert": "bert.pooler.dense",
            "roberta": (
                "classifier.dense"
                if head.kind == "sequence_classification"
                else "roberta.pooler.dense"
            ),
            "distilbert": "pre_classifier",
        }[family]
    unread = family == "distilbert" or head.kind in _WITHOUT_POOLER
    if not config.pooler or unread:
        return None
    return f"{base}pooler" if family == "albert" else f"{base}pooler.dense"


def _masked_lm(family: str) -> list[Pair]:
    place, transform, layer_norm, bias = {
        "albert": ("predictions", "dense", "LayerNorm", "bias"),
        "bert": ("cls.predictions", "transform.dense", "transform.LayerNorm", "bias"),
        "roberta": ("lm_head", "dense", "layer_norm", "bias"),
        "distilbert": ("", "vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    }[family]
    at = f"{place}." if place else ""
    return [
        *dense(("masked_lm", "dense"), at + transform),
        *norm(("masked_lm", "layer_norm"), at + layer_norm),
        Pair(("masked_lm", "bias"), at + bias),
    ]


def _identity_projection(config: ModelConfig, base: str) -> dict[str, np.ndarray]:
    """What theirs needs where ours projects nothing: their ALBERT always has the dense layer."""
    place = f"{base}encoder.embedding_hidden_mapping_in"
    return {
        f"{place}.weight": np.eye(config.hidden_size, dtype=np.float32),
        f"{place}.bias": np.zeros(config.hidden_size, np.float32),
    }


def _with_heads(
    config: ModelConfig,
    kind: str,
    base: str,
    names: Mapping[str, str],
    read: Callable[[str], np.ndarray],
) -> ModelConfig:
    """The config with what only the arrays tell: pooler, sentence head, projection."""
    pooler = bool(_pooler_arrays(names)) and kind not in _WITHOUT_POOLER
    objective = "none"
    if kind in ("pretraining", "masked_lm"):
        if any(name.startswith("sop_classifier.") for name in names):
            objective = "sop"
        elif any(name.startswith("cls.seq_relationship.") for name in names):
            objective = "nsp"
    projection = False
    if config.model_type == "albert" and config.embedding_size == config.hidden_size:
        projection = not all(
            name in names and np.array_equal(read(names[name]), array)
            for name, array in _identity_projection(config, base).items()
        )
    return dataclasses.replace(
        config, pooler=pooler, sentence_objective=objective, project_embeddings=projection
    )


_WITHOUT_POOLER = ("token_classification", "question_answering")


def _pooler_arrays(names: Mapping[str, str]) -> list[str]:
    """The arrays of a pooler; older files of heads over pieces have one that nothing reads."""
    endings = ("pooler", "pooler.dense")
    return [name for name in names if name.rpartition(".")[0].endswith(endings)]


def _modern_names(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Today's name of every array -> the name in the file. The oldest files call a LayerNorm's two
    arrays gamma and beta, as TensorFlow does.
    """
    names = {}
    for original in shapes:
        name = original
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(f"LayerNorm{old}"):
                name = name.removesuffix(old) + new
        names[name] = original
    return names


# The output matrix under its own name, though it is the word table; and constants.
_TIED = (
    "predictions.decoder.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
)


def _duplicates(names: Mapping[str, str]) -> list[str]:
    constants = ("embeddings.position_ids", "embeddings.token_type_ids")
    biases = tuple(name.replace(".weight", ".bias") for name in _TIED[:3])
    return [name for name in names if name in (*_TIED, *biases) or name.endswith(constants)]


def _check_tied(
    fields: Mapping[str, Any], names: Mapping[str, str], read: Callable[[str], np.ndarray]
) -> None:
    """Refuses a masked-word head whose output matrix is not the word table."""
    words = f"{fields['model_type']}.embeddings.word_embeddings.weight"
    for name in _TIED:
        if name in names and not np.array_equal(read(names[name]), read(names[words])):
            raise UserError(
                f"{name} is another matrix than {words}; here, as in the published models, they "
                "are one. Nothing was written."
            )
