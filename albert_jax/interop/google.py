"""Checkpoints of Google's TensorFlow 1 code, both ways: ALBERT and BERT, pretraining heads or a
classifier, the optimizer's slots where wanted; and the folders of TensorFlow Hub.

In:  a checkpoint (`model.ckpt-125000`), or a folder with one, or an exported module
     (`variables/variables`, names behind `module/`); beside it `albert_config.json` or
     `bert_config.json`.
Out: our config, head, parameters, moments and step; or such files.

Google's "gelu" is the tanh approximation, in ALBERT's code and in BERT's.

Sources: google-research/albert modeling.py, lamb_optimizer.py; google-research/bert modeling.py.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop import tensors
from albert_jax.interop.tensors import Head, Model, Pair

CONFIGS = {"albert": "albert_config.json", "bert": "bert_config.json"}
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
)
_ALBERT_FIELDS = ("embedding_size", "num_hidden_groups", "inner_group_num")
_HARMLESS = ("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks")
_MOMENTS = ("adam_m", "adam_v")
_STEP = "global_step"
_MODULE = "module/"


def load(path: pathlib.Path) -> Model:
    """The model of a checkpoint or of a folder that holds one.

    Raises:
        UserError: no checkpoint or no config there, maths that are not ours, variables that do not
            fit (all of them listed).
    """
    import tensorflow as tf

    prefix = _prefix(path)
    config, notes = _read_config(path)
    reader = tf.train.load_checkpoint(str(prefix))
    names = {name.removeprefix(_MODULE): name for name in reader.get_variable_to_shape_map()}
    shapes = {
        short: tuple(reader.get_variable_to_shape_map()[name]) for short, name in names.items()
    }
    config, head = _with_heads(config, shapes)
    pairs, like = names_of(config, head), tensors.shapes(config, head)

    def gathered(slot: str) -> Any:
        ending = f"/{slot}" if slot else ""
        found = [dataclasses.replace(pair, theirs=pair.theirs + ending) for pair in pairs]
        known = [name for name in shapes if slot or name == _STEP or name.endswith(_MOMENTS)]
        return tensors.gather(
            found, like, shapes, lambda name: reader.get_tensor(names[name]), str(prefix), known
        )

    params, moments = gathered(""), None
    if all(f"{pair.theirs}/{slot}" in shapes for pair in pairs for slot in _MOMENTS):
        moments = (gathered(_MOMENTS[0]), gathered(_MOMENTS[1]))
    step = int(reader.get_tensor(names[_STEP])) if _STEP in names else 0
    return Model(config, head, params, tuple(notes), moments, step)


def save(
    folder: pathlib.Path,
    config: ModelConfig,
    head: Head,
    params: Any,
    step: int = 0,
    moments: tuple[Any, Any] | None = None,
) -> None:
    """Writes `model.ckpt-STEP.*`, `checkpoint` and the config; the folder must be there.

    Raises:
        UserError: Google's code has no such model.
    """
    import tensorflow as tf

    fields = to_config(config, head)
    arrays = _variables(config, head, params, step, moments)
    name = f"model.ckpt-{step}"
    tf.raw_ops.SaveV2(
        prefix=str(folder / name),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=list(arrays.values()),
    )
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n', encoding="utf-8")
    _write_config(folder / CONFIGS[config.model_type], fields)


def save_module(
    folder: pathlib.Path,
    config: ModelConfig,
    head: Head,
    params: Any,
) -> None:
    """Writes the layout of a TensorFlow Hub module: a SavedModel whose variables are called
    `module/...`, and the config in `assets/`. It holds weights for those that read them, and no
    graph to call.

    Raises:
        UserError: Google's code has no such model.
    """
    import tensorflow as tf

    fields, v1 = to_config(config, head), tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        for name, array in tensors.spread(names_of(config, head), params).items():
            variable = v1.get_variable(
                _MODULE + name, array.shape, initializer=v1.zeros_initializer(), use_resource=False
            )
            variable.load(array, session)
        builder = v1.saved_model.Builder(str(folder / "module"))
        builder.add_meta_graph_and_variables(session, [])
        builder.save()
    for entry in (folder / "module").iterdir():
        entry.replace(folder / entry.name)
    (folder / "module").rmdir()
    (folder / "assets").mkdir(exist_ok=True)
    _write_config(folder / "assets" / CONFIGS[config.model_type], fields)


def to_config(config: ModelConfig, head: Head) -> dict[str, Any]:
    """The fields of `albert_config.json` or `bert_config.json`.

    Raises:
        UserError: Google's code has no such model.
    """
    misfits = []
    if head.kind not in ("pretraining", "encoder", "sequence_classification"):
        misfits.append(f"head for {head.kind.replace('_', ' ')} that is read here")
    if config.model_type not in CONFIGS:
        misfits.append(f"model.model_type={config.model_type}")
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.hidden_act not in activations:
        misfits.append(f"model.hidden_act={config.hidden_act} (its gelu is the tanh approximation)")
    if config.layer_norm_eps != 1e-12:
        misfits.append(f"model.layer_norm_eps={config.layer_norm_eps:g}, but 1e-12")
    if config.position_offset or not config.type_vocab_size or config.project_embeddings:
        misfits.append(
            f"model.position_offset={config.position_offset}, type_vocab_size="
            f"{config.type_vocab_size} or project_embeddings={config.project_embeddings}"
        )
    if config.model_type == "bert" and config.embedding_size != config.hidden_size:
        misfits.append(f"model.embedding_size={config.embedding_size} in BERT")
    if config.model_type == "albert" and config.attention_groups != config.ffn_groups:
        misfits.append(
            f"model.attention_groups={config.attention_groups} beside "
            f"model.ffn_groups={config.ffn_groups}"
        )
    if misfits:
        raise UserError("Google's code has no " + "; no ".join(misfits) + ". Nothing was written.")
    fields: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
    fields["hidden_act"] = activations[config.hidden_act]
    if config.model_type == "albert":
        fields |= {
            "embedding_size": config.embedding_size,
            "num_hidden_groups": config.ffn_groups,
            "inner_group_num": config.inner_group_num,
            "net_structure_type": 0,
            "gap_size": 0,
            "num_memory_blocks": 0,
            "down_scale_factor": 1,
        }
    return fields


def names_of(config: ModelConfig, head: Head) -> list[Pair]:
    """Every parameter of a model with its variable's name."""
    pairs = [
        Pair(("embeddings", name), f"bert/embeddings/{name}")
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    pairs += _norm(("embeddings", "layer_norm"), "bert/embeddings/LayerNorm")
    if config.embedding_size != config.hidden_size:
        pairs += _dense(("embeddings", "projection"), "bert/encoder/embedding_hidden_mapping_in")
    pairs += _albert_layers(config) if config.model_type == "albert" else _bert_layers(config)
    if config.pooler:
        pairs += _dense(("pooler",), "bert/pooler/dense")
    if head.kind == "pretraining":
        pairs += [
            *_dense(("masked_lm", "dense"), "cls/predictions/transform/dense"),
            *_norm(("masked_lm", "layer_norm"), "cls/predictions/transform/LayerNorm"),
            Pair(("masked_lm", "bias"), "cls/predictions/output_bias"),
        ]
        if config.sentence_objective != "none":
            pairs += _scores(("sentence_order",), "cls/seq_relationship/")
    elif head.kind == "sequence_classification":
        pairs += _scores(("classifier",), "")
    return pairs


_ALBERT_BLOCK = {
    ("attention", "query"): "attention_1/self/query",
    ("attention", "key"): "attention_1/self/key",
    ("attention", "value"): "attention_1/self/value",
    ("attention", "output"): "attention_1/output/dense",
    ("attention", "layer_norm"): "LayerNorm",
    ("ffn", "intermediate"): "ffn_1/intermediate/dense",
    ("ffn", "output"): "ffn_1/intermediate/output/dense",
    ("ffn", "layer_norm"): "LayerNorm_1",
}
_BERT_LAYER = {
    ("attention", "query"): "attention/self/query",
    ("attention", "key"): "attention/self/key",
    ("attention", "value"): "attention/self/value",
    ("attention", "output"): "attention/output/dense",
    ("attention", "layer_norm"): "attention/output/LayerNorm",
    ("ffn", "intermediate"): "intermediate/dense",
    ("ffn", "output"): "output/dense",
    ("ffn", "layer_norm"): "output/LayerNorm",
}


def _albert_layers(config: ModelConfig) -> list[Pair]:
    return [
        pair
        for group in range(config.ffn_groups)
        for inner in range(config.inner_group_num)
        for (half, part), name in _ALBERT_BLOCK.items()
        for pair in _part(
            ("encoder", half, part),
            f"bert/encoder/transformer/group_{group}/inner_group_{inner}/{name}",
            (group, inner),
        )
    ]


def _bert_layers(config: ModelConfig) -> list[Pair]:
    depths, inners = config.num_hidden_layers, config.inner_group_num
    groups = {"attention": config.attention_groups, "ffn": config.ffn_groups}
    return [
        pair
        for depth in range(depths)
        for inner in range(inners)
        for (half, part), name in _BERT_LAYER.items()
        for pair in _part(
            ("encoder", half, part),
            f"bert/encoder/layer_{depth * inners + inner}/{name}",
            (depth * groups[half] // depths, inner),
        )
    ]


def _part(ours: tuple[str, ...], theirs: str, at: tuple[int, ...]) -> list[Pair]:
    return (_norm if ours[-1] == "layer_norm" else _dense)(ours, theirs, at)


def _dense(ours: tuple[str, ...], theirs: str, at: tuple[int, ...] = ()) -> list[Pair]:
    return [Pair((*ours, name), f"{theirs}/{name}", at) for name in ("kernel", "bias")]


def _norm(ours: tuple[str, ...], theirs: str, at: tuple[int, ...] = ()) -> list[Pair]:
    names = {"scale": "gamma", "bias": "beta"}
    return [Pair((*ours, mine), f"{theirs}/{name}", at) for mine, name in names.items()]


def _scores(ours: tuple[str, ...], place: str) -> list[Pair]:
    return [
        Pair((*ours, "kernel"), f"{place}output_weights", transposed=True),
        Pair((*ours, "bias"), f"{place}output_bias"),
    ]


def _variables(
    config: ModelConfig, head: Head, params: Any, step: int, moments: tuple[Any, Any] | None
) -> dict[str, np.ndarray]:
    pairs = names_of(config, head)
    arrays = tensors.spread(pairs, params)
    for slot, tree in zip(_MOMENTS, moments or (), strict=False):
        arrays |= {f"{name}/{slot}": array for name, array in tensors.spread(pairs, tree).items()}
    return {**arrays, _STEP: np.asarray(step, np.int64)}


def _with_heads(config: ModelConfig, shapes: dict[str, Any]) -> tuple[ModelConfig, Head]:
    objective, head = "none", Head("encoder")
    if "cls/predictions/output_bias" in shapes:
        head = Head("pretraining")
        if "cls/seq_relationship/output_weights" in shapes:
            objective = "nsp" if config.model_type == "bert" else "sop"
    elif "output_weights" in shapes:
        labels = tuple(f"LABEL_{index}" for index in range(shapes["output_weights"][0]))
        head = Head("sequence_classification", labels)
    pooler = "bert/pooler/dense/kernel" in shapes
    return dataclasses.replace(config, pooler=pooler, sentence_objective=objective), head


def _prefix(path: pathlib.Path) -> pathlib.Path:
    """Where the checkpoint's files begin."""
    if path.with_name(path.name + ".index").exists():
        return path
    if (path / "variables" / "variables.index").exists():
        return path / "variables" / "variables"
    found = [entry.with_suffix("") for entry in path.glob("*.index")] if path.is_dir() else []
    if not found:
        raise UserError(
            f"{path} is no checkpoint: there is no {path.name}.index, no variables/variables.index "
            "and no *.index in it."
        )
    return max(found, key=_number)


def _number(prefix: pathlib.Path) -> int:
    ending = prefix.name.rpartition("-")[2]
    return int(ending) if ending.isdigit() else -1


def _read_config(path: pathlib.Path) -> tuple[ModelConfig, list[str]]:
    places = [path, path / "assets", path.parent]
    files = [place / name for place in places for name in CONFIGS.values()]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UserError(f"{path}: no {' or '.join(CONFIGS.values())} in it or beside it.")
    family = next(family for family, name in CONFIGS.items() if name == file.name)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    wanted = _FIELDS + (_ALBERT_FIELDS if family == "albert" else ())
    # The first published ALBERTs leave these out; their code's defaults are 1.
    fields = {"num_hidden_groups": 1, "inner_group_num": 1} | fields
    missing = [name for name in (*wanted, "hidden_act") if name not in fields]
    if missing:
        raise UserError(f"{file} does not say {', '.join(missing)}.")
    if fields["hidden_act"] not in _ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act {fields['hidden_act']!r} is not one of: {', '.join(_ACTIVATIONS)}."
        )
    if fields.get("ln_type", "postln") != "postln":
        raise UserError(f"{file}: ln_type {fields['ln_type']!r}; this package has postln.")
    known = {*_FIELDS, *_ALBERT_FIELDS, *_HARMLESS, "hidden_act", "ln_type"}
    notes = [
        f"{file} also says {name}={json.dumps(value)}, which nothing here reads"
        for name, value in fields.items()
        if name not in known
    ]
    values = {name: fields[name] for name in wanted}
    if family == "bert":
        values |= {
            "embedding_size": fields["hidden_size"],
            "num_hidden_groups": fields["num_hidden_layers"],
        }
    config = ModelConfig(
        **values,
        model_type=family,
        hidden_act=_ACTIVATIONS[fields["hidden_act"]],
        sentence_objective="none",
        dtype="float32",
    )
    return config, notes


def _write_config(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
