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
from albert_jax.interop import tensors, weights
from albert_jax.interop.tensors import Head, Model, Pair, dense, norm

# Their name for a model with a head: "Albert" + "ForMaskedLM". "masked_lm" is what "pretraining" is
# called where there is no sentence head.
_SUFFIXES = {
    "pretraining": "ForPreTraining",
    "masked_lm": "ForMaskedLM",
    "encoder": "Model",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
}
_CLASSES = {"albert": "Albert", "bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_POOLED = ("sequence_classification", "multiple_choice")

# Ours -> theirs, for what is the same number under perhaps another name; and theirs' defaults,
# which hold where a config.json leaves a field out.
_SHARED_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
}
_FIELDS = {
    "albert": {
        **_SHARED_FIELDS,
        "embedding_size": "embedding_size",
        "num_hidden_groups": "num_hidden_groups",
        "inner_group_num": "inner_group_num",
        "classifier_dropout_prob": "classifier_dropout_prob",
    },
    "bert": {**_SHARED_FIELDS, "classifier_dropout_prob": "classifier_dropout"},
    "roberta": {**_SHARED_FIELDS, "classifier_dropout_prob": "classifier_dropout"},
    "distilbert": {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "max_position_embeddings": "max_position_embeddings",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "classifier_dropout_prob": "seq_classif_dropout",
    },
}
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "classifier_dropout_prob": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "albert": {
        **_BERT_DEFAULTS,
        "vocab_size": 30000,
        "embedding_size": 128,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        "classifier_dropout_prob": 0.1,
    },
    "bert": _BERT_DEFAULTS,
    "roberta": {**_BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1},
    "distilbert": {**_BERT_DEFAULTS, "num_hidden_layers": 6, "classifier_dropout_prob": 0.2},
}
# The same function under other names.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}
# What a config.json may say without changing what the model computes.
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "_num_labels",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_token_id",
        "down_scale_factor",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "gap_size",
        "gradient_checkpointing",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "mask_token_id",
        "model_type",
        "net_structure_type",
        "num_labels",
        "num_memory_blocks",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "problem_type",
        "qa_dropout",
        "return_dict",
        "sep_token_id",
        "tie_weights_",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
# What must have this value, or the model computes something that ours does not.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "sinusoidal_pos_embds": (False, True),  # of the initial values alone: they are in the file
}


def load(folder: pathlib.Path) -> Model:
    """The model of a folder of Transformers.

    Raises:
        UserError: not such a folder, another architecture, maths that are not ours, weights that
            do not fit (all of them listed).
    """
    fields = _read_config(folder)
    kind = _kind(fields, folder)
    with weights.opened(folder) as (shapes, read):
        names = _modern_names(shapes)
        prefix = f"{fields['model_type']}."
        bare = not any(name.startswith(prefix) for name in names)
        if bare:
            kind = "encoder"
        config, notes = _model_config(fields, folder)
        config = _with_heads(config, kind, names, read)
        labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        labelled = kind in ("sequence_classification", "token_classification")
        head = Head(
            "pretraining" if kind == "masked_lm" else kind,
            tuple(labels[key] for key in sorted(labels, key=int)) if labelled else (),
        )
        projected = _has_projection(config)
        pairs = names_of(config, head, bare)
        like = tensors.shapes(config, head)
        ours_are = {name: shapes[original] for name, original in names.items()}
        identity = _identity_projection(config, "" if bare else prefix)
        known = [*_duplicates(names), *(identity if not projected else ())]
        params = tensors.gather(
            pairs, like, ours_are, lambda name: read(names[name]), str(folder), known
        )
        notes += _check_tied(fields, names, read)
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
    fields = to_config(config, head)
    arrays = tensors.spread(names_of(config, head, bare=head.kind == "encoder"), params)
    if config.model_type == "albert" and not _has_projection(config):
        arrays |= _identity_projection(config, "" if head.kind == "encoder" else "albert.")
    fields |= special_ids or {}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def to_config(config: ModelConfig, head: Head) -> dict[str, Any]:
    """The fields of a `config.json` for a model of ours.

    Raises:
        UserError: Transformers has no such model.
    """
    family = config.model_type
    _check_exportable(config, head)
    fields: dict[str, Any] = {
        "architectures": [_CLASSES[family] + _SUFFIXES[_their_kind(config, head)]],
        "model_type": family,
    }
    values = dataclasses.asdict(config)
    if family == "albert":
        values["num_hidden_groups"] = len(_albert_sets(config))
    else:
        values["num_hidden_layers"] = config.num_hidden_layers * config.inner_group_num
    for ours, theirs in _FIELDS[family].items():
        fields[theirs] = values[ours]
    if family == "distilbert":
        fields |= {"qa_dropout": config.classifier_dropout_prob, "sinusoidal_pos_embds": False}
    if head.labels:
        fields["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
        fields["label2id"] = {label: index for index, label in enumerate(head.labels)}
        if len(head.labels) == 1 and head.kind == "sequence_classification":
            fields["problem_type"] = "regression"
    fields["tie_word_embeddings"] = True
    fields["dtype"] = "float32"
    return fields


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
    if _has_projection(config):
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


def _albert_sets(config: ModelConfig) -> list[dict[str, int]]:
    """Which sets of ours each of their groups is; where halves are shared in different ways, every
    layer becomes a group.
    """
    if config.attention_groups == config.ffn_groups:
        return [{"attention": group, "ffn": group} for group in range(config.ffn_groups)]
    return _sets_by_depth(config)


def _sets_by_depth(config: ModelConfig) -> list[dict[str, int]]:
    depths = config.num_hidden_layers
    return [
        {
            "attention": depth * config.attention_groups // depths,
            "ffn": depth * config.ffn_groups // depths,
        }
        for depth in range(depths)
    ]


def _albert_layers(config: ModelConfig, base: str) -> list[Pair]:
    pairs = []
    for group, sets in enumerate(_albert_sets(config)):
        for inner in range(config.inner_group_num):
            layer = f"{base}encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            pairs += _layer(layer, _ALBERT_LAYER, sets, inner)
    return pairs


def _layers(config: ModelConfig, base: str) -> list[Pair]:
    distilled = config.model_type == "distilbert"
    place = f"{base}transformer.layer" if distilled else f"{base}encoder.layer"
    parts = _DISTILBERT_LAYER if distilled else _BERT_LAYER
    pairs = []
    for depth, sets in enumerate(_sets_by_depth(config)):
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
    if head.kind in _POOLED:
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
    if head.kind == "encoder" and config.pooler:
        return {"albert": "pooler", "bert": "pooler.dense", "roberta": "pooler.dense"}.get(family)
    if head.kind == "pretraining" and config.pooler and family != "distilbert":
        return f"{base}pooler" if family == "albert" else f"{base}pooler.dense"
    return None


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


def _has_projection(config: ModelConfig) -> bool:
    return config.embedding_size != config.hidden_size or config.project_embeddings


def _identity_projection(config: ModelConfig, base: str) -> dict[str, np.ndarray]:
    """What theirs needs where ours projects nothing: their ALBERT always has the dense layer."""
    place = f"{base}encoder.embedding_hidden_mapping_in"
    return {
        f"{place}.weight": np.eye(config.hidden_size, dtype=np.float32),
        f"{place}.bias": np.zeros(config.hidden_size, np.float32),
    }


def _their_kind(config: ModelConfig, head: Head) -> str:
    if head.kind == "pretraining" and config.sentence_objective == "none":
        return "masked_lm"
    return head.kind


def _check_exportable(config: ModelConfig, head: Head) -> None:
    family = config.model_type
    if family == "albert":
        return
    misfits = []
    if _has_projection(config):
        misfits.append(
            f"model.embedding_size={config.embedding_size} with a projection to "
            f"model.hidden_size={config.hidden_size}"
        )
    if head.kind == "pretraining" and family != "bert" and config.sentence_objective != "none":
        misfits.append(f"model.sentence_objective={config.sentence_objective}")
    offset = config.pad_token_id + 1 if family == "roberta" else 0
    if config.position_offset != offset:
        misfits.append(f"model.position_offset={config.position_offset}, but {offset}")
    if family == "distilbert" and config.type_vocab_size:
        misfits.append(f"model.type_vocab_size={config.type_vocab_size}")
    if family == "distilbert" and config.layer_norm_eps != 1e-12:
        misfits.append(f"model.layer_norm_eps={config.layer_norm_eps:g}, but 1e-12")
    if family == "distilbert" and config.pooler and head.kind not in _POOLED:
        misfits.append("model.pooler=True")
    if misfits:
        raise UserError(
            f"{_CLASSES[family]} of Transformers has no " + "; no ".join(misfits) + ". Nothing was "
            "written. (model.model_type=albert has room for projections and sharing.)"
        )


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") not in _CLASSES:
        found = fields.get("model_type") if isinstance(fields, dict) else None
        raise UserError(
            f"{path}: model_type is {found!r}; this package reads {', '.join(_CLASSES)}."
        )
    return fields


def _kind(fields: Mapping[str, Any], folder: pathlib.Path) -> str:
    architectures = fields.get("architectures") or [_CLASSES[fields["model_type"]] + "Model"]
    for kind, suffix in _SUFFIXES.items():
        if architectures[0] == _CLASSES[fields["model_type"]] + suffix:
            return kind
    known = ", ".join(_CLASSES[fields["model_type"]] + suffix for suffix in _SUFFIXES.values())
    raise UserError(
        f"{folder / 'config.json'}: architectures is {architectures}; this package reads {known}."
    )


def _model_config(fields: Mapping[str, Any], folder: pathlib.Path) -> tuple[ModelConfig, list[str]]:
    """The encoder that a config.json describes, and notes on what it says besides."""
    family, path = fields["model_type"], folder / "config.json"
    for name, allowed in _REQUIRED.items():
        if name in fields and fields[name] not in allowed:
            raise UserError(
                f"{path}: {name}={fields[name]!r} makes another model than this package has; "
                f"it reads {name}={allowed[0]!r}."
            )
    values = dict(_DEFAULTS[family])
    for ours, theirs in _FIELDS[family].items():
        if fields.get(theirs) is not None:
            values[ours] = fields[theirs]
    if values["hidden_act"] not in _ACTIVATIONS:
        raise UserError(
            f"{path}: activation {values['hidden_act']!r} is not one of: {', '.join(_ACTIVATIONS)}."
        )
    values["hidden_act"] = _ACTIVATIONS[values["hidden_act"]]
    if values["classifier_dropout_prob"] is None:  # then theirs is the hidden layers'
        values["classifier_dropout_prob"] = values["hidden_dropout_prob"]
    if family != "albert":
        values |= {
            "embedding_size": values["hidden_size"],
            "num_hidden_groups": values["num_hidden_layers"],
        }
    if family == "roberta":
        values["position_offset"] = values["pad_token_id"] + 1
    if family == "distilbert":
        values["type_vocab_size"] = 0
    known = {*_FIELDS[family].values(), *_HARMLESS, *_REQUIRED}
    unknown = {name: value for name, value in fields.items() if name not in known}
    notes = [
        f"{path} also says {name}={json.dumps(value)}, which nothing here reads"
        for name, value in sorted(unknown.items())
    ]
    config = ModelConfig(
        **values,
        model_type=family,
        sentence_objective="none",
        dtype="float32",
        attention_groups=0,
        ffn_groups=0,
    )
    return config, notes


def _with_heads(
    config: ModelConfig,
    kind: str,
    names: Mapping[str, str],
    read: Callable[[str], np.ndarray],
) -> ModelConfig:
    """The config with what only the arrays tell: pooler, sentence head, projection."""
    pooler = any(name.rpartition(".")[0].endswith(("pooler", "pooler.dense")) for name in names)
    objective = "none"
    if kind in ("pretraining", "masked_lm"):
        if any(name.startswith("sop_classifier.") for name in names):
            objective = "sop"
        elif any(name.startswith("cls.seq_relationship.") for name in names):
            objective = "nsp"
    projection = False
    if config.model_type == "albert" and config.embedding_size == config.hidden_size:
        base = "" if kind == "encoder" and not _prefixed(names, "albert.") else "albert."
        projection = not all(
            name in names and np.array_equal(read(names[name]), array)
            for name, array in _identity_projection(config, base).items()
        )
    return dataclasses.replace(
        config, pooler=pooler, sentence_objective=objective, project_embeddings=projection
    )


def _prefixed(names: Mapping[str, str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


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
) -> list[str]:
    """Refuses a masked-word head whose output matrix is not the word table."""
    words = f"{fields['model_type']}.embeddings.word_embeddings.weight"
    for name in _TIED:
        if name in names and not np.array_equal(read(names[name]), read(names[words])):
            raise UserError(
                f"{name} is another matrix than {words}; here, as in the published models, they "
                "are one. Nothing was written."
            )
    return []
