"""The `config.json` of Transformers' ALBERT, BERT, RoBERTa and DistilBERT, both ways.

In:  the fields of a `config.json`; or a model config of ours and what stands on the encoder.
Out: the other of the two.

Source: Transformers 5.23, configuration_*.py of the four, their defaults included.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop.tensors import Head

POOLED = ("sequence_classification", "multiple_choice")  # heads over one vector a sequence

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
        "sinusoidal_pos_embds",  # of the initial values alone
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
}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`.

    Raises:
        UserError: no such file, or one of another family.
    """
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


def kind_of(fields: Mapping[str, Any], folder: pathlib.Path) -> str:
    """What the config's architecture has on its encoder: a key of _SUFFIXES.

    Raises:
        UserError: something that this package has not.
    """
    architectures = fields.get("architectures") or [_CLASSES[fields["model_type"]] + "Model"]
    for kind, suffix in _SUFFIXES.items():
        if architectures[0] == _CLASSES[fields["model_type"]] + suffix:
            return kind
    known = ", ".join(_CLASSES[fields["model_type"]] + suffix for suffix in _SUFFIXES.values())
    raise UserError(
        f"{folder / 'config.json'}: architectures is {architectures}; this package reads {known}."
    )


def model_config(fields: Mapping[str, Any], folder: pathlib.Path) -> tuple[ModelConfig, list[str]]:
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
        values["num_hidden_groups"] = len(albert_groups(config))
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
        if head.multi_label:
            fields["problem_type"] = "multi_label_classification"
    fields["tie_word_embeddings"] = True
    fields["dtype"] = "float32"
    return fields


def albert_groups(config: ModelConfig) -> list[dict[str, int]]:
    """Which sets of ours each of their groups is; where halves are shared in different ways, every
    layer becomes a group.
    """
    if config.attention_groups == config.ffn_groups:
        return [{"attention": group, "ffn": group} for group in range(config.ffn_groups)]
    return sets_by_depth(config)


def sets_by_depth(config: ModelConfig) -> list[dict[str, int]]:
    """Which sets of ours each layer has, by half."""
    depths = config.num_hidden_layers
    return [
        {
            "attention": depth * config.attention_groups // depths,
            "ffn": depth * config.ffn_groups // depths,
        }
        for depth in range(depths)
    ]


def has_projection(config: ModelConfig) -> bool:
    """Whether a dense layer stands between embeddings and layers."""
    return config.embedding_size != config.hidden_size or config.project_embeddings


def _their_kind(config: ModelConfig, head: Head) -> str:
    if head.kind == "pretraining" and config.sentence_objective == "none":
        return "masked_lm"
    return head.kind


def _check_exportable(config: ModelConfig, head: Head) -> None:
    family = config.model_type
    if family == "albert":
        return
    misfits = []
    if has_projection(config):
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
    if family == "distilbert" and config.pooler and head.kind not in POOLED:
        misfits.append("model.pooler=True")
    if misfits:
        raise UserError(
            f"{_CLASSES[family]} of Transformers has no " + "; no ".join(misfits) + ". Nothing was "
            "written. (model.model_type=albert has room for projections and sharing.)"
        )
