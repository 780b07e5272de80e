"""Any model that this package can read, whatever made it, and where its tokenizer lies.

In:  a run of ours (or what `convert` made of another model), a folder of Transformers, a checkpoint
     or module of Google's.
Out: a `Model`, and its `Tokenizer` where there is one.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from albert_jax import config as config_lib
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.interop import google, huggingface, tensors
from albert_jax.interop.tensors import Head, Model
from albert_jax.training import checkpoint, optimizer, program, sharding, workdir

# Where a tokenizer may lie, best first.
_TOKENIZER_FILES = {
    "albert": ("spiece.model", "30k-clean.model", "tokenizer.json"),
    "bert": ("vocab.txt", "tokenizer.json"),
    "roberta": ("tokenizer.json",),
    "distilbert": ("vocab.txt", "tokenizer.json"),
}


def read(path: pathlib.Path, step: int | None = None, slots: bool = False) -> Model:
    """The model at `path`.

    Args:
        path: see above.
        step: which checkpoint of a run of ours; by default the newest, or a fine-tuning's best.
        slots: read a run's moments too (a checkpoint of Google's always gives them).

    Raises:
        UserError: nothing there that can be read, or what is there does not fit itself.
    """
    if kind(path) == "albert_jax":
        return _read_run(path, step, slots)
    if step is not None:
        raise UserError(f"--step={step}: {path} is no run of albert_jax, which has steps.")
    return huggingface.load(path) if kind(path) == "huggingface" else google.load(path)


def kind(path: pathlib.Path) -> str:
    """What made the model at `path`: "albert_jax", "huggingface" or "google".

    Raises:
        UserError: nothing that is known here.
    """
    if (path / "checkpoints").is_dir():
        return "albert_jax"
    if (path / "config.json").exists():
        return "huggingface"
    beside = [path, path / "assets", path.parent]
    if any((place / name).exists() for place in beside for name in google.CONFIGS.values()):
        return "google"
    raise UserError(
        f"{path} is no model: neither a run of albert_jax (checkpoints/), nor a folder of "
        f"Transformers (config.json), nor a checkpoint of Google's beside its "
        f"{' or '.join(google.CONFIGS.values())}."
    )


def read_tokenizer(path: pathlib.Path, model: Model, given: str | None = None) -> Tokenizer | None:
    """The tokenizer of the model at `path`; None where there is none.

    Args:
        path: of the model.
        model: read from there.
        given: a tokenizer's file, instead of the model's own.

    Raises:
        UserError: it has more pieces than the model has embeddings for: the ids of the rest would
            make NaNs or, worse, none.
    """
    found = _find_tokenizer(path, model.config.model_type, given)
    if found is not None and found.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} pieces and the model {path} only "
            f"vocab_size={model.config.vocab_size}; they do not belong together."
        )
    return found


def _find_tokenizer(path: pathlib.Path, family: str, given: str | None) -> Tokenizer | None:
    source = kind(path)
    if given is None and source == "albert_jax":
        return workdir.load_tokenizer(path)
    normalization = _normalization(path, source)
    if given is not None:
        return Tokenizer.load(given, normalization)
    for place in (path, path / "assets", path.parent if source == "google" else path):
        for name in _TOKENIZER_FILES[family]:
            if (place / name).is_file():
                return Tokenizer.load(place / name, normalization)
    return None


def _normalization(path: pathlib.Path, source: str) -> Normalization:
    """What a folder of Transformers says of its text; elsewhere as released."""
    if source != "huggingface":
        return Normalization()
    file = path / "tokenizer_config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    return Normalization(
        lower_case=bool(fields.get("do_lower_case", True)),
        keep_accents=bool(fields.get("keep_accents", False)),
        compatible_with=str(fields.get("compatible_with", "huggingface")),
    )


def tokenizer_files(spoken: Tokenizer, model: Model) -> dict[str, bytes]:
    """The files, by name, that give a folder of Transformers this tokenizer, and give it back to
    `read_tokenizer` as it is.
    """
    from albert_jax.data import huggingface_tokenizer

    config = model.config
    files = huggingface_tokenizer.export(
        spoken,
        segments=config.type_vocab_size > 1,
        max_length=config.max_position_embeddings - config.position_offset,
    )
    fields = json.loads(files["tokenizer_config.json"])
    fields |= {
        "do_lower_case": spoken.normalization.lower_case,
        "keep_accents": spoken.normalization.keep_accents,
        "compatible_with": spoken.normalization.compatible_with,
    }
    files["tokenizer_config.json"] = (json.dumps(fields, indent=2) + "\n").encode()
    return files


def write_run(folder: pathlib.Path, model: Model, spoken: Tokenizer | None) -> None:
    """Writes a model as a run of ours that has ended: `predict`, `convert` and `train --init` read
    it. The folder must be there, and empty.
    """
    longest = model.config.max_position_embeddings - model.config.position_offset
    config = config_lib.Config(
        model=dataclasses.replace(model.config, attention="auto"),
        data=config_lib.DataConfig(
            max_seq_length=longest, max_predictions_per_seq=max(1, round(0.15 * longest))
        ),
        train=config_lib.TrainConfig(steps=max(model.step, 1), global_batch_size=8),
    )
    if model.head.kind != "pretraining":
        labels = json.dumps(model.head.labels, ensure_ascii=False)
        kind = "multi_label" if model.head.multi_label else "classification"
        task = config_lib.TaskConfig(head=model.head.kind, labels=labels, kind=kind)
        config = dataclasses.replace(config, task=task)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    if spoken is not None:
        workdir.write_tokenizer(spoken, folder)
    checkpoint.write_params(folder, model.params, model.step)


def _read_run(path: pathlib.Path, step: int | None, slots: bool) -> Model:
    config = config_lib.read_workdir(path)
    head = Head()
    if config.task.head:
        several = config.task.kind == "multi_label"
        head = Head(config.task.head, config.task.label_names, several)
    if head.kind == "embedding":  # it has nothing of its own: an encoder without a pooler
        head = Head("encoder")
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, pooler=False, sentence_objective="none"),
        )
    if slots:
        return _read_state(path, config, step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=here),
        tensors.shapes(config.model, head),
    )
    params, number = checkpoint.read_params(path, like, step, best=bool(config.task.name))
    return Model(config.model, head, jax.device_get(params), step=number)


def _read_state(path: pathlib.Path, config: config_lib.Config, step: int | None) -> Model:
    """With the optimizer's moments."""
    alone = dataclasses.replace(
        config,
        distillation=config_lib.DistillationConfig(),
        model=dataclasses.replace(config.model, attention="xla"),
        mesh=config_lib.MeshConfig(data=1),
        train=dataclasses.replace(config.train, microbatch_size=0),
    )
    run = program.build(alone, sharding.make_mesh(alone, jax.local_devices()[:1]))
    with checkpoint.Checkpoints(path) as saved:
        number = saved.chosen(step)
        state: Any = jax.device_get(saved.restore(run.abstract_state, number))
    return Model(
        config.model,
        Head(),
        state.params,
        moments=optimizer.moments(state.opt_state),
        step=number,
    )
