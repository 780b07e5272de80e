"""From one format to another through the command: an exported folder answers as `predict` does, and
a training goes on as if nothing had happened.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_store
import torch
import transformers

import albert_jax
from albert_jax import convert
from albert_jax.config import ModelConfig
from albert_jax.data import store as store_lib
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.interop import google, models, tensors
from albert_jax.interop.tensors import Head, Model
from albert_jax.model import finetuning, pretraining

pytestmark = pytest.mark.usefixtures("compiles_fast")
TEXTS = ["The cat sees the [MASK] in the morning.", "The doctor [MASK] the river by the sea."]
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "embedding_size": 16,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "dtype": "float32",
}
TRAIN = (
    f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'}",
    "--config.train.steps=4",
    "--config.train.global_batch_size=8",
    "--config.optimizer.warmup_steps=2",
    "--config.optimizer.learning_rate=0.01",
    "--config.model.hidden_dropout_prob=0.1",
    "--config.data.max_seq_length=16",
    "--config.data.max_predictions_per_seq=3",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2",
    *(f"--config.model.{name}={value}" for name, value in SMALL.items()),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def spoken(store: pathlib.Path) -> Tokenizer:
    return store_lib.open_store(store).tokenizer()


def random_model(vocab_size: int, head: Head, **fields: Any) -> Model:
    config = ModelConfig(vocab_size=vocab_size, **{**SMALL, **fields})
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (generator.normal(size=leaf.shape) * 0.3).astype(np.float32),
        tensors.shapes(config, head),
    )
    return Model(config, head, params)


def written(folder: pathlib.Path, model: Model, spoken: Tokenizer) -> pathlib.Path:
    folder.mkdir()
    models.write_run(folder, model, spoken)
    return folder


def run(source: pathlib.Path, form: str, output: pathlib.Path, *more: str) -> pathlib.Path:
    assert convert.main([f"--model={source}", f"--to={form}", f"--output={output}", *more]) == 0
    return output


def test_pipelines_of_an_exported_folder_say_what_predict_says(spoken, tmp_path):
    source = written(tmp_path / "run", random_model(spoken.vocab_size, Head()), spoken)
    folder = run(source, "huggingface", tmp_path / "out")
    done = small_store.run_here(
        "predict", "fill-mask", f"--model={source}", "--json", "--top_k=3", *TEXTS
    )
    ours = [json.loads(line)["masks"][0] for line in done.stdout.splitlines()]
    fill = transformers.pipeline("fill-mask", model=str(folder), top_k=3)
    for text, mine in zip(TEXTS, ours, strict=True):
        theirs = fill(text)
        assert [row["score"] for row in theirs] == pytest.approx(
            [guess["probability"] for guess in mine], abs=1e-5
        )
        assert [row["token_str"].strip() for row in theirs] == [guess["piece"] for guess in mine]

    features = transformers.pipeline("feature-extraction", model=str(folder))(TEXTS[0])
    model = models.read(source)
    batch = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="np")
    output: Any = pretraining.PretrainingModel(model.config).apply(
        {"params": model.params},
        *(jnp.asarray(batch[k]) for k in ("input_ids", "token_type_ids", "attention_mask")),
        jnp.zeros((1, 1), jnp.int32),
    )
    np.testing.assert_allclose(features, output.encoder.sequence_BLD, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card

    # And the folder is a model of ours again, tokenizer and all.
    again = run(folder, "albert_jax", tmp_path / "again")
    assert models.read_tokenizer(again, model).sha256 == spoken.sha256
    assert models.read(again).config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, models.read(again).params, model.params))


OURS_ALONE = ("question_answering_conditional", "embedding")


def test_a_retrieval_model_is_an_encoder_there_and_a_conditional_head_is_refused(spoken, tmp_path):
    models_of = {
        kind: random_model(spoken.vocab_size, Head(kind), sentence_objective="none")
        for kind in OURS_ALONE
    }
    source = written(tmp_path / "vectors", models_of["embedding"], spoken)
    folder = run(source, "huggingface", tmp_path / "out")
    texts = [text.replace("[MASK]", "dog") for text in TEXTS]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    summed = (hidden * batch["attention_mask"][..., None]).sum(dim=1)
    theirs = torch.nn.functional.normalize(summed).numpy()
    np.testing.assert_allclose(albert_jax.load(source).embed(texts), theirs, atol=1e-5)

    conditional = models_of["question_answering_conditional"]
    source = written(tmp_path / "spans", conditional, spoken)
    done = small_store.run_here(
        "convert", f"--model={source}", "--to=huggingface", f"--output={tmp_path / 'no'}", expect=1
    )
    assert "task.answer_head=plain" in done.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", [kind for kind in finetuning.HEADS if kind not in OURS_ALONE])
def test_a_fine_tuned_model_answers_there_as_here(kind, spoken, tmp_path):
    labels = ("bad", "so-so", "good") if kind.endswith("classification") else ()
    source_model = random_model(spoken.vocab_size, Head(kind, labels), sentence_objective="none")
    source = written(tmp_path / "run", source_model, spoken)
    folder = run(source, "huggingface", tmp_path / "out")
    model = models.read(source)
    assert model.head == Head(kind, labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text.replace("[MASK]", "dog") for text in TEXTS]
    batch = tokenizer(texts, return_tensors="np", padding=True)
    arrays = [batch[k] for k in ("input_ids", "token_type_ids", "attention_mask")]
    if kind == "multiple_choice":
        arrays = [array[None] for array in arrays]
    ours: Any = finetuning.FinetuningModel(model.config, kind, max(len(labels), 1)).apply(
        {"params": model.params}, *map(jnp.asarray, arrays)
    )
    if labels:
        names = {"sequence_classification": "text-classification"}
        pipeline = transformers.pipeline(names.get(kind, "token-classification"), model=str(folder))
        shares = np.asarray(jax.nn.softmax(ours.logits))
        if kind == "sequence_classification":
            for row, answer in zip(shares, pipeline(texts), strict=True):
                assert answer["label"] == labels[row.argmax()]
                assert answer["score"] == pytest.approx(row.max(), abs=1e-5)
        else:
            for row, answer in zip(shares, pipeline(texts), strict=True):
                for piece in answer:
                    assert piece["entity"] == labels[row[piece["index"]].argmax()]
                    assert piece["score"] == pytest.approx(row[piece["index"]].max(), abs=1e-5)
        return
    auto = {
        "question_answering": transformers.AutoModelForQuestionAnswering,
        "multiple_choice": transformers.AutoModelForMultipleChoice,
    }[kind]
    given = dict(zip(("input_ids", "token_type_ids", "attention_mask"), arrays, strict=True))
    with torch.no_grad():
        output = auto.from_pretrained(folder)(
            **{name: torch.from_numpy(array) for name, array in given.items()}
        )
    if kind == "question_answering":
        theirs = np.stack([output.start_logits, output.end_logits], axis=-1)
        mask = arrays[2][..., None]
        np.testing.assert_allclose(ours.logits * mask, theirs * mask, atol=1e-5)
    else:
        np.testing.assert_allclose(ours.logits, output.logits, atol=1e-5)


def test_a_training_goes_on_from_googles_format_as_if_nothing_had_happened(store, tmp_path):
    data = f"--config.data.path={store}"
    small_store.run_here("train", *TRAIN, data, f"--workdir={tmp_path / 'whole'}")
    half = run(tmp_path / "whole", "google", tmp_path / "half", "--step=2", "--slots")
    assert google.load(half).step == 2
    small_store.run_here(
        "train", *TRAIN, data, f"--workdir={tmp_path / 'rest'}", f"--init={half}", "--slots"
    )
    whole, rest = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "rest")
    )
    whole = [row for row in whole if row["step"] > 2]
    assert [row["step"] for row in rest] == [row["step"] for row in whole]
    for mine, other in zip(rest, whole, strict=True):
        for name in ("loss", "masked_lm_accuracy", "grad_norm"):
            assert mine.get(name) == other.get(name)
    ends = [models.read(tmp_path / name).params for name in ("whole", "rest")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *ends))

    # A folder of Transformers gives its parameters alone.
    folder = run(half, "huggingface", tmp_path / "hf", f"--tokenizer={store / 'tokenizer.model'}")
    done = small_store.run_here(
        "train",
        *TRAIN,
        data,
        "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.learning_rate=1e-12",
        f"--workdir={tmp_path / 'from_hf'}",
        f"--init={folder}",
    )
    assert f"starts from {folder}" in done.stdout
    started, origin = models.read(tmp_path / "from_hf").params, google.load(half).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), started, origin)
    refused = small_store.run_here(
        "train",
        *TRAIN,
        data,
        "--config.model.hidden_act=relu",
        f"--workdir={tmp_path / 'no'}",
        f"--init={folder}",
        expect=1,
    )
    assert "model.hidden_act: 'gelu_new' there, 'relu' in the config" in refused.stderr


def test_what_does_not_fit_is_refused_and_nothing_written(spoken, tmp_path):
    model = random_model(spoken.vocab_size - 1, Head())
    source = written(tmp_path / "run", model, spoken)
    with pytest.raises(UserError, match="they do not belong together"):
        run(source, "huggingface", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(UserError, match="is a file or not empty"):
            run(source, "huggingface", taken)
    with pytest.raises(UserError, match="is no model"):
        run(tmp_path / "full", "huggingface", tmp_path / "out")
    erf = random_model(spoken.vocab_size, Head(), hidden_act="gelu")
    with pytest.raises(UserError, match=r"model\.hidden_act=gelu"):
        run(written(tmp_path / "erf", erf, spoken), "google", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".unfinished*"))


def test_served_without_this_package_it_answers_alike(spoken, tmp_path):
    source = written(tmp_path / "run", random_model(spoken.vocab_size, Head()), spoken)
    folder = run(source, "stablehlo", tmp_path / "out", "--task=fill-mask")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    program = jax.export.deserialize((folder / "model.stablehlo").read_bytes())
    ids = np.array([[2, 20, 4, 21, 3]], np.int32)
    arrays = (ids, np.zeros_like(ids), np.ones_like(ids))
    outputs = program.call(weights, *arrays)
    model = models.read(source)
    ours: Any = pretraining.PretrainingModel(model.config).apply(
        {"params": model.params}, *map(jnp.asarray, arrays), jnp.arange(5)[None]
    )
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    np.testing.assert_allclose(logits, ours.masked_lm_logits_BPV, atol=1e-4)
