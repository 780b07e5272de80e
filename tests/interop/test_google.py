"""Checkpoints of Google's code, read and written: no bit changes, and no misfit passes.

That the numbers are the released code's, test_google_reference shows.
"""

import json
import pathlib

import google_reference
import jax
import numpy as np
import pytest
import transformers

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop import google, huggingface, tensors
from albert_jax.interop.tensors import Head


@pytest.fixture(scope="module")
def folder(shared_data: pathlib.Path) -> pathlib.Path:
    return shared_data / "reference" / "google_tf1"


def test_reading_and_writing_changes_no_bit(folder: pathlib.Path, tmp_path: pathlib.Path):
    imported = google.load(folder / "model.ckpt-6")
    google.save(
        tmp_path, imported.config, imported.head, imported.params, imported.step, imported.moments
    )
    ours, theirs = (
        google_reference.variables(tmp_path / "model.ckpt-6"),
        google_reference.variables(folder / "model.ckpt-6"),
    )
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert np.array_equal(ours[name], array), name
    given = json.loads((folder / "albert_config.json").read_text())
    written = json.loads((tmp_path / "albert_config.json").read_text())
    assert {name: written[name] for name in given} == given

    # Google -> ours -> Hugging Face -> ours.
    huggingface.save(tmp_path, imported.config, imported.head, imported.params)
    again = huggingface.load(tmp_path)
    assert again.config == imported.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, imported.params))
    model, info = transformers.AlbertForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    del model


def test_a_module_of_tensorflow_hub(folder: pathlib.Path, tmp_path: pathlib.Path):
    imported = google.load(folder / "model.ckpt-6")
    google.save_module(tmp_path, imported.config, imported.head, imported.params)
    names = google_reference.variables(tmp_path / "variables" / "variables")
    assert all(name.startswith("module/bert/") or name.startswith("module/cls/") for name in names)
    assert "module/bert/encoder/transformer/group_1/inner_group_1/LayerNorm_1/gamma" in names
    again = google.load(tmp_path)
    assert again.config == imported.config
    assert again.moments is None
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, imported.params))


def test_bert_goes_to_google_and_back(tmp_path: pathlib.Path):
    cfg = ModelConfig(
        model_type="bert",
        vocab_size=40,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_hidden_groups=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=12,
        sentence_objective="nsp",
        dtype="float32",
    )
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float32),
        tensors.shapes(cfg, Head()),
    )
    google.save(tmp_path, cfg, Head(), params)
    names = google_reference.variables(tmp_path / "model.ckpt-0")
    assert names["bert/encoder/layer_1/attention/output/LayerNorm/gamma"].shape == (16,)
    again = google.load(tmp_path)
    assert again.config == cfg
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))


def test_misfits_are_listed_and_foreign_models_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path
):
    with pytest.raises(UserError, match="is no checkpoint"):
        google.load(tmp_path)
    imported = google.load(folder / "model.ckpt-0")
    google.save(tmp_path, imported.config, imported.head, imported.params)
    path = tmp_path / "albert_config.json"
    path.write_text(path.read_text().replace('"num_hidden_groups": 2', '"num_hidden_groups": 1'))
    with pytest.raises(UserError, match=r"bert/encoder/transformer/group_1/.* is nothing that"):
        google.load(tmp_path)
    erf = ModelConfig(hidden_act="gelu", attention_groups=1, ffn_groups=12)
    with pytest.raises(UserError) as caught:
        google.to_config(erf, Head("question_answering"))
    assert "model.hidden_act=gelu" in str(caught.value)
    assert "model.ffn_groups=12" in str(caught.value)
    assert "head for question answering" in str(caught.value)
