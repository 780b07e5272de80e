"""Served folders give our numbers to a program that has never heard of this package.

Folders are written by one process, read by two others: one that can import JAX and safetensors, and
one that can import ONNX Runtime, and neither of them anything of ours or of Flax, PyTorch,
Transformers. They run the lines of each folder's README. Compared with our own models at batches 1
and 7, lengths 16 and 512, rows with and without padding.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.core import meta

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.interop import huggingface, onnx_model, stablehlo, tensors
from albert_jax.model import finetuning, pretraining

ALBERT = ModelConfig(
    vocab_size=1009,
    embedding_size=24,
    hidden_size=42,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=100,
    dtype="float32",
)
ROBERTA = dataclasses.replace(
    ALBERT,
    model_type="roberta",
    vocab_size=211,
    embedding_size=42,
    num_hidden_layers=1,
    hidden_act="gelu",
    max_position_embeddings=514,
    position_offset=2,
    pad_token_id=1,
    type_vocab_size=1,
    sentence_objective="none",
    pooler=False,
    layer_norm_eps=1e-5,
)
# folder of Transformers: config, what stands on the encoder
MODELS = {
    "pretrained": (ALBERT, tensors.Head("pretraining")),
    "answers": (ROBERTA, tensors.Head("question_answering", ("LABEL_0", "LABEL_1"))),
    "choices": (
        dataclasses.replace(ALBERT, num_hidden_layers=1),
        tensors.Head("multiple_choice", ("LABEL_0", "LABEL_1")),
    ),
}
SHAPES = [(1, 16), (1, 512), (7, 16), (7, 512)]
# served folder: model, task, dtypes of its ONNX files, batches and lengths
SERVED = {
    "encoder": ("pretrained", "encoder", ("float32", "float16", "int8"), SHAPES),
    "fill-mask": ("pretrained", "fill-mask", ("float32",), SHAPES),
    "answers": ("answers", None, ("float32",), [(1, 16), (7, 512)]),
    "choices": ("choices", None, ("float32",), [(2, 16)]),
}

EXPORTER = """
import json, pathlib, sys
from albert_jax.interop import onnx_model
for source, folder, task, dtypes in json.loads(sys.argv[1]):
    onnx_model.export(pathlib.Path(source), pathlib.Path(folder), task, dtypes)
"""

# Runs the lines of a README for every case of inputs.npz and leaves all that they call `outputs`.
READER = """
import json, sys
allowed, hidden, jobs = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        package = name.split(".")[0]
        if package in hidden and package not in allowed:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import os
import numpy as np

for folder, lines, inputs_file, results_file in jobs:
    os.chdir(folder)
    inputs, results = np.load(inputs_file), {}
    for case in sorted({key.split("/")[0] for key in inputs}):
        variables = {key.split("/")[1]: inputs[key] for key in inputs if key.startswith(case)}
        exec(lines, variables)
        outputs = variables["outputs"]
        if isinstance(outputs, list):
            names = [output.name for output in variables["session"].get_outputs()]
            outputs = dict(zip(names, outputs, strict=True))
        results |= {f"{case}/{name}": np.asarray(array) for name, array in outputs.items()}
    np.savez(results_file, **results)
"""
PACKAGES = ("albert_jax", "flax", "jax", "onnx", "onnxruntime", "torch", "transformers")


@pytest.fixture(scope="module")
def params() -> dict:
    """Random parameters of every model, biases and scales included."""
    rng, drawn = np.random.default_rng(0), {}
    for name, (config, head) in MODELS.items():
        drawn[name] = jax.tree.map(
            lambda shape: 0.2 * rng.standard_normal(shape.shape, np.float32),
            meta.unbox(tensors.shapes(config, head)),
        )
    return drawn


@pytest.fixture(scope="module")
def inputs() -> dict:
    """For each served folder, for each shape, its three inputs."""
    rng = np.random.default_rng(0)

    def draw(name: str, rows: int, length: int) -> dict[str, np.ndarray]:
        config, head = MODELS[SERVED[name][0]]
        shape = (rows, 3, length) if head.kind == "multiple_choice" else (rows, length)
        mask = np.ones(shape, np.int32)
        mask[-1, ..., length - length // 3 :] = 0
        ids = rng.integers(5, config.vocab_size, shape)
        return {
            "input_ids": np.where(mask == 1, ids, config.pad_token_id).astype(np.int32),
            "token_type_ids": rng.integers(0, config.type_vocab_size, shape).astype(np.int32),
            "attention_mask": mask,
        }

    return {
        name: {f"{rows}x{length}": draw(name, rows, length) for rows, length in shapes}
        for name, (*_, shapes) in SERVED.items()
    }


@pytest.fixture(scope="module")
def ours(params: dict, inputs: dict) -> dict:
    """What our models say, by the names that Transformers has for it."""

    runs = {
        name: jax.jit(
            pretraining.PretrainingModel(config).apply
            if name == "pretrained"
            else finetuning.FinetuningModel(config, head.kind, 2).apply
        )
        for name, (config, head) in MODELS.items()
    }

    def outputs(name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        model, ids = SERVED[name][0], batch["input_ids"]
        variables = {"params": params[model]}
        if model != "pretrained":
            logits = runs[model](variables, *batch.values()).logits
            if model == "answers":
                return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
            return {"logits": logits}
        everywhere = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        got = runs[model](variables, *batch.values(), everywhere)
        if name == "fill-mask":
            return {"logits": got.masked_lm_logits_BPV}
        return {"last_hidden_state": got.encoder.sequence_BLD, "pooler_output": got.pooled_BD}

    return {
        name: {case: jax.device_get(outputs(name, batch)) for case, batch in cases.items()}
        for name, cases in inputs.items()
    }


@pytest.fixture(scope="module")
def transformers_folders(params: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("transformers")
    for name, (config, head) in MODELS.items():
        (root / name).mkdir()
        huggingface.save(root / name, config, head, params[name])
    return root


@pytest.fixture(scope="module")
def onnx_folders(transformers_folders: pathlib.Path, tmp_path_factory) -> tuple:
    """The root of the folders, and what their writing said at the terminal."""
    root = tmp_path_factory.mktemp("onnx")
    jobs = [
        (str(transformers_folders / model), str(root / name), task, dtypes)
        for name, (model, task, dtypes, _) in SERVED.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", EXPORTER, json.dumps(jobs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stablehlo_folders(params: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("stablehlo")
    for name, (model, *_) in SERVED.items():
        config, head = MODELS[model]
        if name == "encoder":
            served = stablehlo.encoder(config, params[model])
        elif name == "fill-mask":
            served = stablehlo.fill_mask(config, params[model])
        else:
            served = stablehlo.finetuned(config, params[model], head.kind, 2)
        stablehlo.export(served, root / name, dataclasses.asdict(config))
    return root


def read(
    root: pathlib.Path, inputs: dict, allowed: tuple[str, ...], dtype: type, file: str
) -> dict:
    """What another process reads out of served folders by the lines of their READMEs."""
    jobs = []
    for name, cases in inputs.items():
        folder = root / name
        lines = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        flat = {
            f"{case}/{field}": array.astype(dtype)
            for case, batch in cases.items()
            for field, array in batch.items()
        }
        np.savez(folder / "inputs.npz", **flat)
        code = lines[1].replace("model.onnx", file)
        jobs.append((str(folder), code, str(folder / "inputs.npz"), str(folder / "results.npz")))
    command = [sys.executable, "-I", "-c", READER, json.dumps((allowed, PACKAGES, jobs))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict = {}
    for name in inputs:
        for key, array in np.load(root / name / "results.npz").items():
            case, output = key.split("/")
            results.setdefault(name, {}).setdefault(case, {})[output] = array
    return results


def assert_near(got: dict, wanted: dict, inputs: dict, tolerance: float, only_real: bool) -> None:
    for name, cases in wanted.items():
        for case, outputs in cases.items():
            assert sorted(got[name][case]) == sorted(outputs), name
            mask = inputs[name][case]["attention_mask"] == 1
            for output, expected in outputs.items():
                array = got[name][case][output]
                assert array.dtype == np.float32
                assert array.shape == expected.shape
                if only_real and array.shape[: mask.ndim] == mask.shape:
                    array, expected = array[mask], expected[mask]
                difference = np.abs(array - expected).max()
                print(f"{name:10} {case:6} {output:18} {difference:.1e}")
                assert difference <= tolerance, (name, case, output)


def test_stablehlo_runs_in_plain_jax_with_our_numbers(stablehlo_folders, inputs, ours):
    got = read(stablehlo_folders, inputs, ("jax",), np.int32, "")
    assert_near(got, ours, inputs, 1e-4, only_real=False)


def test_onnx_runs_in_onnx_runtime_with_our_numbers(onnx_folders, inputs, ours):
    got = read(onnx_folders[0], inputs, ("onnxruntime",), np.int64, "model.onnx")
    # Transformers' RoBERTa gives padding a position of its own; nobody reads what comes out there.
    assert_near(got, ours, inputs, 1e-4, only_real=True)


@pytest.mark.parametrize(("file", "tolerance"), [("float16", 2e-2), ("int8", 0.5)])
def test_small_variants_stay_near(onnx_folders, inputs, ours, file, tolerance):
    one = {"encoder": {"7x16": inputs["encoder"]["7x16"]}}
    got = read(onnx_folders[0], one, ("onnxruntime",), np.int64, f"model_{file}.onnx")
    wanted = {"encoder": {"7x16": ours["encoder"]["7x16"]}}
    assert_near(got, wanted, one, tolerance, only_real=True)
    hidden = got["encoder"]["7x16"]["last_hidden_state"].ravel()
    expected = wanted["encoder"]["7x16"]["last_hidden_state"].ravel()
    assert np.corrcoef(hidden, expected)[0, 1] > 0.99


def test_exporting_to_onnx_says_nothing_at_the_terminal(onnx_folders):
    assert onnx_folders[1] == ""


def test_a_shared_layer_is_in_the_files_once(
    onnx_folders, stablehlo_folders, transformers_folders, params
):
    import onnx

    folder = onnx_folders[0] / "fill-mask"
    graph = onnx.load(folder / "model.onnx").graph
    stored = sum(int(np.prod(weight.dims)) for weight in graph.initializer)
    unused = ("pooler", "sentence_order")
    of_model = sum(
        leaf.size
        for name, part in params["pretrained"].items()
        if name not in unused
        for leaf in jax.tree.leaves(part)
    )
    assert of_model <= stored < 1.01 * of_model  # and some constants

    program = stablehlo_folders / "fill-mask" / "model.stablehlo"
    deeper = dataclasses.replace(ALBERT, num_hidden_layers=30)
    served = stablehlo.fill_mask(deeper, params["pretrained"])
    stablehlo.export(served, transformers_folders / "deeper", {})
    size = (transformers_folders / "deeper" / "model.stablehlo").stat().st_size
    assert abs(size - program.stat().st_size) < 100


def test_variants_are_as_small_as_their_dtype(onnx_folders):
    import onnx

    folder = onnx_folders[0] / "encoder"
    full, half, eighth = (
        (folder / name).stat().st_size
        for name in ("model.onnx", "model_float16.onnx", "model_int8.onnx")
    )
    assert half < 0.7 * full
    assert eighth < 0.6 * full
    graph = onnx.load(folder / "model_int8.onnx").graph
    weights = {weight.name for weight in graph.initializer}
    left = [
        node.name for node in graph.node if node.op_type == "MatMul" and weights & {*node.input}
    ]
    assert left == []  # every product with a weight is one of integers


def test_no_path_of_this_machine_is_in_a_file(onnx_folders, stablehlo_folders):
    places = [sys.prefix, str(pathlib.Path(onnx_model.__file__).parents[2])]
    for file in (
        onnx_folders[0] / "encoder" / "model.onnx",
        stablehlo_folders / "encoder" / "model.stablehlo",
    ):
        content = file.read_bytes()
        assert not [place for place in places if place.encode() in content], file


def test_stablehlo_holds_a_program_for_each_platform(stablehlo_folders):
    signature = json.loads((stablehlo_folders / "encoder" / "signature.json").read_text())
    exported = jax.export.deserialize(
        bytearray((stablehlo_folders / "encoder" / "model.stablehlo").read_bytes())
    )
    assert exported.platforms == ("cpu", "tpu", "cuda") == tuple(signature["platforms"])
    program = exported.mlir_module()
    assert program.count("stablehlo.while") == 1  # the depths are one loop
    # The only calls out of the program are checks of shapes, which JAX does before it compiles.
    assert set(re.findall(r"custom_call @(\w+)", program)) <= {"shape_assertion"}
    assert signature["inputs"]["input_ids"] == {"dtype": "int32", "shape": ["b", "l"]}
    assert signature["outputs"]["last_hidden_state"]["shape"] == ["b", "l", 42]
    assert signature["max_length"] == 512


def test_what_cannot_be_exported_to_onnx_is_told_and_nothing_written(
    transformers_folders, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no weights for RobertaForMaskedLM.*lm_head\.dense"):
        onnx_model.export(transformers_folders / "answers", out, "fill-mask")
    with pytest.raises(UserError, match="--dtype=int4 is none of: float32, float16, int8"):
        onnx_model.export(transformers_folders / "answers", out, dtypes=("int4",))
    with pytest.raises(UserError, match=r"no folder of Transformers.*config\.json"):
        onnx_model.export(tmp_path, out)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(UserError, match=r"needs onnxscript.*albert-jax\[serving\]"):
        onnx_model.export(transformers_folders / "answers", out)
    assert not out.exists()
