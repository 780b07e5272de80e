"""Equal to PyTorch Transformers, both ways, for every family and head: numbers, gradients, weights.

The models are small and random, biases and LayerNorms too, so that a transposed, swapped or
forgotten array shows.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop import huggingface, huggingface_config, tensors
from albert_jax.interop.tensors import Head, Model
from albert_jax.model import finetuning, pretraining

BATCH, LENGTH, LABELS = 3, 11, 3
SMALL: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8, "hidden_size": 24, "intermediate_size": 40},
    "bert": {"hidden_size": 24, "intermediate_size": 40},
    "roberta": {"hidden_size": 24, "intermediate_size": 40, "layer_norm_eps": 1e-5},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_heads": 3, "n_layers": 2},
}
USUAL = {"num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 50}
# name: (family, what its Transformers config says besides, their class)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("albert", {}, "AlbertForPreTraining"),
    "albert, E = H": ("albert", {"embedding_size": 24}, "AlbertForPreTraining"),
    "albert, 2 groups of 2": (
        "albert",
        {"num_hidden_groups": 2, "inner_group_num": 2, "num_hidden_layers": 4},
        "AlbertForPreTraining",
    ),
    "albert, relu": ("albert", {"hidden_act": "relu"}, "AlbertForPreTraining"),
    "albert, erf gelu": ("albert", {"hidden_act": "gelu"}, "AlbertForMaskedLM"),
    "albert, one segment": ("albert", {"type_vocab_size": 1}, "AlbertForMaskedLM"),
    "albert, bare": ("albert", {}, "AlbertModel"),
    "bert": ("bert", {}, "BertForPreTraining"),
    "bert, tanh gelu": ("bert", {"hidden_act": "gelu_new"}, "BertForMaskedLM"),
    "bert, bare": ("bert", {}, "BertModel"),
    "roberta": ("roberta", {"type_vocab_size": 1}, "RobertaForMaskedLM"),
    "roberta, relu": ("roberta", {"hidden_act": "relu"}, "RobertaForMaskedLM"),
    "distilbert": ("distilbert", {}, "DistilBertForMaskedLM"),
    "distilbert, relu": ("distilbert", {"activation": "relu"}, "DistilBertForMaskedLM"),
    "distilbert, bare": ("distilbert", {}, "DistilBertModel"),
    **{
        f"{family}, {kind}": (family, {}, f"{prefix}{suffix}")
        for family, prefix in (
            ("albert", "Albert"),
            ("bert", "Bert"),
            ("roberta", "Roberta"),
            ("distilbert", "DistilBert"),
        )
        for kind, suffix in (
            ("classes", "ForSequenceClassification"),
            ("pieces", "ForTokenClassification"),
            ("spans", "ForQuestionAnswering"),
            ("choices", "ForMultipleChoice"),
        )
    },
}


def theirs(family: str, fields: dict[str, Any], name: str) -> Any:
    """A random model of theirs, in evaluation mode."""
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 50} if family == "distilbert" else USUAL
    labels = {"num_labels": LABELS} if name.endswith("Classification") else {}
    config = model_class.config_class(
        **{**sizes, **SMALL[family], "max_position_embeddings": 40, **labels, **fields}
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def inputs(kind: str, segments: int) -> dict[str, np.ndarray]:
    """Ids (none of them padding), segments and a mask; choices have an axis more."""
    generator = np.random.default_rng(1)
    shape = (BATCH, 4, LENGTH) if kind == "multiple_choice" else (BATCH, LENGTH)
    mask = np.ones(shape, np.int32)
    mask[0, ..., 7:] = 0
    return {
        "input_ids": generator.integers(5, 50, shape, dtype=np.int32),
        "token_type_ids": generator.integers(0, max(segments, 1), shape, dtype=np.int32),
        "attention_mask": mask,
    }


def run_theirs(model: Any, given: dict[str, np.ndarray]) -> Any:
    batch = {name: torch.from_numpy(array).long() for name, array in given.items()}
    if model.config.model_type == "distilbert":
        del batch["token_type_ids"]
    with torch.no_grad():
        return model(**batch, output_hidden_states=True)


def run_ours(imported: Model, given: dict[str, np.ndarray]) -> Any:
    arrays = [jnp.asarray(given[k]) for k in ("input_ids", "token_type_ids", "attention_mask")]
    config, head = imported.config, imported.head
    variables = {"params": imported.params}
    if head.kind in finetuning.HEADS:
        model = finetuning.FinetuningModel(config, head.kind, max(len(head.labels), 1))
        return model.apply(variables, *arrays, output_hidden_states=True)
    params = imported.params
    if head.kind == "encoder":  # which has no scores to compare
        whole = tensors.shapes(config, Head())
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), whole) | params
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH), arrays[0].shape)
    return pretraining.PretrainingModel(config).apply(
        {"params": params}, *arrays, everywhere, output_hidden_states=True
    )


def outputs(ours: Any, output: Any, kind: str) -> dict[str, tuple[Any, Any]]:
    """What both computed, side by side, by name."""
    found = {}
    if kind == "pretraining":
        scores = output.get("prediction_logits", output.get("logits"))
        found["masked words"] = (ours.masked_lm_logits_BPV, scores)
        for name in ("sop_logits", "seq_relationship_logits"):
            if name in output:
                found["sentences"] = (ours.sentence_order_logits_B2, output[name])
    elif kind == "encoder":
        if output.get("pooler_output") is not None:
            found["pooled"] = (ours.pooled_BD, output["pooler_output"])
    elif kind == "question_answering":
        found["starts"] = (ours.logits[..., 0], output["start_logits"])
        found["ends"] = (ours.logits[..., 1], output["end_logits"])
    else:
        found["scores"] = (ours.logits, output["logits"])
    states_NBLD = ours.encoder.hidden_states_NBLD
    for number, state in enumerate(output["hidden_states"][-len(states_NBLD) :]):
        found[f"layer {number}"] = (states_NBLD[number], state)
    return found


@pytest.mark.parametrize("case", CASES)
def test_their_model_here_and_back(case: str, tmp_path: pathlib.Path):
    family, fields, name = CASES[case]
    model = theirs(family, fields, name)
    model.save_pretrained(tmp_path / "theirs")
    imported = huggingface.load(tmp_path / "theirs")
    assert imported.notes == ()
    kind = imported.head.kind
    given = inputs(kind, getattr(model.config, "type_vocab_size", 0))
    output = run_theirs(model, given)

    (tmp_path / "ours").mkdir()
    huggingface.save(tmp_path / "ours", imported.config, imported.head, imported.params)
    exported, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    pairs = outputs(run_ours(imported, given), output, kind)
    mask = given["attention_mask"].reshape(-1, LENGTH, 1)
    worst = 0.0
    for what, (mine, other) in pairs.items():
        mine, other = np.asarray(mine), other.numpy()
        assert mine.shape == other.shape, what
        if mine.ndim == 3 and mine.shape[1] == LENGTH:
            mine, other = mine * mask, other * mask  # padding is nobody's business
        worst = max(worst, float(np.abs(mine - other).max()))
    print(f"{case}: max |ours - theirs| {worst:.1e} over {', '.join(pairs)}")
    assert worst <= 2e-5

    # The weights come back bit for bit, and so does what the config means.
    again = huggingface.load(tmp_path / "ours")
    assert again.config == imported.config
    assert again.head == imported.head
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, imported.params))
    for key, tensor in model.state_dict().items():
        assert torch.equal(exported.state_dict()[key], tensor), key


@pytest.mark.parametrize("case", ["albert, 2 groups of 2", "bert"])
def test_gradients_of_one_step_are_theirs(case: str, tmp_path: pathlib.Path):
    family, fields, name = CASES[case]
    model = theirs(family, fields, name)
    model.save_pretrained(tmp_path)
    imported = huggingface.load(tmp_path)
    given = inputs("pretraining", 2)
    generator = np.random.default_rng(2)
    labels = generator.integers(5, 50, (BATCH, LENGTH))
    weights = (generator.random((BATCH, LENGTH)) < 0.3) * given["attention_mask"]
    sentences = np.array([0, 1, 1])
    batch = {key: torch.from_numpy(array).long() for key, array in given.items()}
    sentence_key = "sentence_order_label" if family == "albert" else "next_sentence_label"
    output = model(
        **batch,
        labels=torch.from_numpy(np.where(weights, labels, -100)),
        **{sentence_key: torch.from_numpy(sentences)},
    )
    output.loss.backward()

    arrays = [jnp.asarray(given[k]) for k in ("input_ids", "token_type_ids", "attention_mask")]
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH), arrays[0].shape)

    def loss(params: Any) -> jax.Array:
        ours: Any = pretraining.PretrainingModel(imported.config).apply(
            {"params": params}, *arrays, everywhere
        )
        words = jax.nn.log_softmax(ours.masked_lm_logits_BPV)
        picked = jnp.take_along_axis(words, jnp.asarray(labels)[..., None], axis=-1)[..., 0]
        order = jax.nn.log_softmax(ours.sentence_order_logits_B2)[jnp.arange(BATCH), sentences]
        return -jnp.sum(picked * weights) / weights.sum() - jnp.mean(order)

    value, grads = jax.value_and_grad(loss)(imported.params)
    assert float(value) == pytest.approx(output.loss.item(), rel=1e-5)
    pairs = huggingface.names_of(imported.config, imported.head)
    parameters = dict(model.named_parameters())
    mine = tensors.spread(pairs, grads)
    worst = 0.0
    for pair in pairs:
        other = parameters[pair.theirs].grad.numpy()
        # The bias of keys shifts all scores of a row alike: its gradient is rounding error.
        if not pair.theirs.endswith(("key.bias", "k_lin.bias")):
            scale = max(np.abs(other).max(), 1e-6)
            worst = max(worst, float(np.abs(mine[pair.theirs] - other).max() / scale))
    print(f"{case}: gradients' max relative difference {worst:.1e}")
    assert worst <= 1e-4


def test_halves_shared_differently_become_groups_of_their_own(tmp_path: pathlib.Path):
    config = ModelConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=40,
        attention_groups=1,
        ffn_groups=4,
        max_position_embeddings=40,
        dtype="float32",
    )
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float32) * 0.2,
        tensors.shapes(config, Head()),
    )
    huggingface.save(tmp_path, config, Head(), params)
    model = transformers.AlbertForPreTraining.from_pretrained(tmp_path).eval()
    assert model.config.num_hidden_groups == 4
    imported = Model(config, Head(), params)
    given = inputs("pretraining", 2)
    pairs = outputs(run_ours(imported, given), run_theirs(model, given), "pretraining")
    for mine, other in pairs.values():
        np.testing.assert_allclose(np.asarray(mine)[1:], other.numpy()[1:], atol=5e-5, rtol=1e-4)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    theirs(*CASES["albert"]).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_every_misfit_is_listed_at_once(folder: pathlib.Path):
    with pytest.raises(UserError) as caught:
        huggingface.load(changed(folder, hidden_size=27, num_hidden_groups=2))
    message = str(caught.value)
    assert "embeddings/projection/kernel [8, 27] wants" in message
    assert "encoder.embedding_hidden_mapping_in.weight [27, 8], which is [24, 8]" in message
    assert "has no albert.encoder.albert_layer_groups.1.albert_layers.0.ffn.weight" in message


def test_unknown_fields_are_named_and_foreign_maths_refused(folder: pathlib.Path):
    assert huggingface.load(changed(folder, rope_theta=10000)).notes == (
        f"{folder / 'config.json'} also says rope_theta=10000, which nothing here reads",
    )
    with pytest.raises(UserError, match="position_embedding_type='relative_key'"):
        huggingface.load(changed(folder, position_embedding_type="relative_key"))
    with pytest.raises(UserError, match="activation 'silu' is not one of"):
        huggingface.load(changed(folder, position_embedding_type="absolute", hidden_act="silu"))


def test_old_files_and_shards_are_read_and_code_is_not_run(tmp_path: pathlib.Path):
    model = theirs(*CASES["bert"])
    for name in ("safe", "old", "evil"):
        model.config.architectures = ["BertForPreTraining"]
        model.config.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "safe", max_shard_size="20KB")
    assert len(list((tmp_path / "safe").glob("*.safetensors"))) > 1
    # As the first published files: LayerNorm's arrays have TensorFlow's names.
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in model.state_dict().items()
    }
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    safe, oldest = huggingface.load(tmp_path / "safe"), huggingface.load(tmp_path / "old")
    assert jax.tree.all(jax.tree.map(np.array_equal, safe.params, oldest.params))

    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "evil" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a plain file of arrays"):
        huggingface.load(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pooler_that_no_head_reads_is_left_out(tmp_path: pathlib.Path):
    model = theirs(*CASES["bert, pieces"])
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "architectures": [CASES["bert, pieces"][2]]})
    )
    spare = {f"bert.pooler.dense.{name}": torch.ones(24) for name in ("weight", "bias")}
    torch.save({**model.state_dict(), **spare}, tmp_path / "pytorch_model.bin")
    imported = huggingface.load(tmp_path)
    assert "bert.pooler.dense.weight" in imported.notes[0]
    assert "pooler" not in imported.params


def test_an_untied_output_matrix_is_refused(tmp_path: pathlib.Path):
    model = theirs("bert", {"tie_word_embeddings": False}, "BertForMaskedLM")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is another matrix than"):
        huggingface.load(tmp_path)


def test_what_transformers_has_not_is_refused(tmp_path: pathlib.Path):
    config = ModelConfig(model_type="roberta", vocab_size=50, position_offset=2, pad_token_id=1)
    with pytest.raises(UserError) as caught:
        huggingface_config.to_config(dataclasses.replace(config), Head())
    assert "model.embedding_size=128 with a projection" in str(caught.value)
    assert "model.sentence_objective=sop" in str(caught.value)
