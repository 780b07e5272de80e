"""Served forms of one model beside PyTorch eager and ours: size, CPU latency, and what is lost.

  python benchmarks/serving.py
  python benchmarks/serving.py --model=FOLDER --text=FILE --task=fill-mask

By default ALBERT base with fresh weights, over random pieces; `--model` takes a folder of
Transformers (`albert_jax.convert` writes them), and `--text` what its tokenizer is to read, a line
a row. All forms take turns, so that a busy machine is unfair to none of them.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import onnxruntime
import torch
import transformers
from flax.core import meta
from jax import export as jax_export
from safetensors import numpy as safetensors

from albert_jax import config as config_lib
from albert_jax.interop import huggingface, onnx_model, stablehlo, tensors
from albert_jax.model import pretraining

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
OUTPUT = {"encoder": "last_hidden_state", "fill-mask": "logits"}

Batch = Mapping[str, np.ndarray]
Form = Callable[[Batch], np.ndarray]


def main() -> None:
    """Prints a row for each form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, help="a folder of Transformers")
    parser.add_argument("--text", type=pathlib.Path, help="lines for the model's tokenizer")
    parser.add_argument("--task", choices=tuple(OUTPUT), default="encoder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or fresh_base(pathlib.Path(scratch) / "fresh")
        forms, sizes = make_forms(folder, pathlib.Path(scratch), args.task)
        batches = make_batches(folder, args)
        losses = {
            name: lost(form, forms["albert_jax, jit"], batches) for name, form in forms.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(args.rounds):
            for name, form in forms.items():
                time.sleep(0.3)  # the threads of the last one spin a while
                began = time.perf_counter()
                form(batches[0])
                seconds[name].append(time.perf_counter() - began)
    print(
        f"{folder.name}, {args.task}, batch {args.batch} x {args.length}, {os.cpu_count()} cores; "
        f"milliseconds over {args.rounds} rounds; differences over {len(batches)} batches"
    )
    heading = "   same first guess" if args.task == "fill-mask" else ""
    print(f"{'':18} {'MB':>6} {'median':>8} {'min':>8}   {'max diff':>8}{heading}")
    for name, values in seconds.items():
        difference, same = losses[name]
        agreement = f"   {same:.2%}" if heading else ""
        print(
            f"{name:18} {sizes[name] / 1e6:6.1f} {1e3 * statistics.median(values):8.1f} "
            f"{1e3 * min(values):8.1f}   {difference:8.1e}{agreement}"
        )


def fresh_base(folder: pathlib.Path) -> pathlib.Path:
    """ALBERT base as training would start with it."""
    cfg = config_lib.load(str(CONFIGS / "base.py")).model
    ids = np.zeros((1, 8), np.int32)
    model = pretraining.PretrainingModel(dataclasses.replace(cfg, dtype="float32"))
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))["params"]
    folder.mkdir()
    huggingface.save(folder, cfg, tensors.Head(), params)
    return folder


def make_forms(
    folder: pathlib.Path, scratch: pathlib.Path, task: str
) -> tuple[dict[str, Form], dict[str, int]]:
    """Each form as a function of a batch, and the bytes that it is stored in."""
    imported = huggingface.load(folder)
    make = {"encoder": stablehlo.encoder, "fill-mask": stablehlo.fill_mask}[task]
    served = make(imported.config, imported.params)
    stablehlo.export(served, scratch / "stablehlo", {})
    written = onnx_model.export(folder, scratch / "onnx", task, tuple(onnx_model.FILES))

    weights = jax.device_put(safetensors.load_file(scratch / "stablehlo" / stablehlo.WEIGHTS))
    program = bytearray((scratch / "stablehlo" / stablehlo.PROGRAM).read_bytes())
    forms: dict[str, Form] = {
        "PyTorch eager": torch_form(folder, task),
        "albert_jax, jit": jax_form(jax.jit(served.function), jax.device_put(served.params), task),
        "StableHLO": jax_form(jax.jit(jax_export.deserialize(program).call), weights, task),
    }
    source = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    stored = sum(
        (scratch / "stablehlo" / name).stat().st_size
        for name in (stablehlo.PROGRAM, stablehlo.WEIGHTS)
    )
    sizes = {"PyTorch eager": source, "albert_jax, jit": source, "StableHLO": stored}
    for each in written:
        name = f"ONNX {each.dtype}"
        forms[name] = onnx_form(each.file, task)
        sizes[name] = each.bytes
    return forms, sizes


def torch_form(folder: pathlib.Path, task: str) -> Form:
    """PyTorch Transformers, as its users run it."""
    kinds: dict[str, Any] = {
        "encoder": transformers.AutoModel,
        "fill-mask": transformers.AutoModelForMaskedLM,
    }
    model = kinds[task].from_pretrained(folder).eval()

    def run(batch: Batch) -> np.ndarray:
        tensors = {name: torch.from_numpy(array).long() for name, array in batch.items()}
        if getattr(model.config, "type_vocab_size", 0) < 2:
            del tensors["token_type_ids"]
        with torch.inference_mode():
            return model(**tensors)[OUTPUT[task]].numpy()

    return run


def jax_form(function: Callable[..., Any], weights: Any, task: str) -> Form:
    """A function of JAX, waited for."""

    def run(batch: Batch) -> np.ndarray:
        inputs = (batch[name] for name in stablehlo.INPUTS)
        return np.asarray(function(weights, *inputs)[OUTPUT[task]])

    return run


def onnx_form(file: pathlib.Path, task: str) -> Form:
    """A file in ONNX Runtime with its settings as they come."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(batch: Batch) -> np.ndarray:
        feed = {name: batch[name].astype(np.int64) for name in names}
        return np.asarray(session.run([OUTPUT[task]], feed)[0])

    return run


def make_batches(folder: pathlib.Path, args: argparse.Namespace) -> list[Batch]:
    """Rows of text, or one batch of random pieces."""
    rows, length = args.batch, args.length
    if args.text is None:
        pieces = huggingface.load(folder).config.vocab_size
        ids = np.random.default_rng(0).integers(5, pieces, (rows, length), dtype=np.int32)
        return [batch_of(ids, np.ones_like(ids))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    batches = []
    for start in range(0, len(lines) - rows + 1, rows):
        encoded = tokenizer(
            lines[start : start + rows],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        batches.append(
            batch_of(
                encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)
            )
        )
    return batches


def batch_of(ids: np.ndarray, mask: np.ndarray) -> Batch:
    return {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": mask}


def lost(form: Form, exact: Form, batches: list[Batch]) -> tuple[float, float]:
    """The greatest difference at a real piece, and the share of them with the same argmax."""
    differences, same = [], []
    for batch in batches:
        real = batch["attention_mask"] == 1
        got, wanted = form(batch)[real], exact(batch)[real]
        differences.append(np.abs(got - wanted).max())
        same.append(got.argmax(-1) == wanted.argmax(-1))
    return float(max(differences)), float(np.concatenate(same).mean())


if __name__ == "__main__":
    main()
