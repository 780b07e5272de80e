"""Fine-tuning on MRPC beside PyTorch Transformers on the same machine, in turn.

Both: the same random ALBERT, batches of 32 rows in random order, dropout 0.1, AdamW, clipping to
norm 1, float32. PyTorch as Transformers' Trainer runs it, in a process of its own: eager, each
batch padded to its longest row. Ours: batches of few lengths, each compiled once; what the compiler
took is printed apart, and after how many steps it has paid.

  python benchmarks/finetuning_vs_pytorch.py --data=glue --tokenizer=spiece.model \\
      --layers=4 --width=256
"""

import argparse
import multiprocessing
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import torch
import transformers

from albert_jax import config as config_lib
from albert_jax.interop import initial
from albert_jax.tasks import course as course_lib
from albert_jax.tasks import finetuning
from albert_jax.training import cpu_memory, program, sharding

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
BATCH = 32


def main() -> None:
    """Prints both rates and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="GLUE's TSV folders")
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path, metavar="spiece.model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=24, help="of each, in three parts")
    args = parser.parse_args()
    cpu_memory.keep_freed()  # as the command does
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        random_model(args, folder)
        start = finetuning.origin(folder)
    overrides = [
        f"data.path={args.data}",
        "data.max_seq_length=128",
        f"train.global_batch_size={BATCH}",
        "model.dtype=float32",
        "model.hidden_dropout_prob=0.1",
        "model.attention_probs_dropout_prob=0.1",
        "mesh.data=1",
        "model.remat=none",  # what auto, the config's, comes to here
    ]
    cfg, _ = finetuning.adapted(config_lib.load(f"{CONFIGS / 'glue.py'}:mrpc", overrides), start)
    task = course_lib.read(cfg, start.tokenizer)
    cfg = course_lib.resolve(cfg, task, start.tokenizer)
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    rows = course_lib.Course(run, task, start.tokenizer).builder(run.config.stages[0])
    state: Any = initial.started(run.init(), start.model, slots=False)
    frozen = run.frozen()

    compile_seconds, seen = 0.0, set()
    for number in range(rows.examples_per_epoch // BATCH):
        batch = ours(rows, number, run)
        if (shape := batch["input_ids"].shape) not in seen:
            began = time.perf_counter()
            run.train_step.lower(state, batch, *frozen).compile()
            compile_seconds += time.perf_counter() - began
            seen.add(shape)
            state = run.train_step(state, batch, *frozen)  # compiled once more, as jit does
            jax.block_until_ready(state)
    lengths = sorted(shape[1] for shape in seen)
    print(f"lengths {lengths}: compiled in {compile_seconds:.1f} s, once each")

    features = task.train
    order = np.random.default_rng(0).permutation(len(features))
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    chosen = order[: BATCH * args.steps].reshape(-1, BATCH)
    batches = [padded(features, rows_B, start.tokenizer.pad_id) for rows_B in chosen]
    context.Process(target=theirs, args=(end, args, batches), daemon=True).start()
    pipe.recv()  # it is ready
    part = args.steps // 3
    rates: dict[str, list[float]] = {"albert_jax": [], "pytorch": []}
    for turn in range(3):
        steps = range(turn * part, (turn + 1) * part)
        began = time.perf_counter()
        for number in steps:
            state = run.train_step(state, ours(rows, number, run), *frozen)
        jax.block_until_ready(state)
        rates["albert_jax"].append(part * BATCH / (time.perf_counter() - began))
        pipe.send(steps)
        rates["pytorch"].append(part * BATCH / pipe.recv())
    pipe.send(None)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        listed = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:10}  {medians[name]:.1f} examples/s (parts: {listed})")
    saved = BATCH / medians["pytorch"] - BATCH / medians["albert_jax"]
    paid = f"; the compiler is paid after {compile_seconds / saved:.0f} steps" if saved > 0 else ""
    print(f"albert_jax / pytorch: {medians['albert_jax'] / medians['pytorch']:.2f}{paid}")


def random_model(args: argparse.Namespace, folder: pathlib.Path) -> Any:
    """Transformers' model, written to `folder` with its tokenizer."""
    model = transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(args.width // 64, 1),
            intermediate_size=4 * args.width,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )
    model.save_pretrained(folder)
    shutil.copy(args.tokenizer, folder / "spiece.model")
    return model.train()


def theirs(pipe: Any, args: argparse.Namespace, batches: list[dict[str, np.ndarray]]) -> None:
    """Makes the steps that it is told, and tells how many seconds they took."""
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(args, pathlib.Path(scratch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    their_step(model, optimizer, batches[0])
    pipe.send(0.0)
    while steps := pipe.recv():
        began = time.perf_counter()
        for number in steps:
            their_step(model, optimizer, batches[number])
        pipe.send(time.perf_counter() - began)


def ours(rows: Any, number: int, run: program.Program) -> dict[str, jax.Array]:
    """A batch of ours on the device."""
    batch = rows.rows(np.arange(number * BATCH, (number + 1) * BATCH))
    return sharding.to_global(batch, run.batch_sharding, BATCH)


def padded(features: Any, chosen: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
    """The same rows as Transformers' collator pads them."""
    each = [np.arange(features.offsets[row], features.offsets[row + 1]) for row in chosen]
    longest = max(map(len, each))
    arrays = {
        name: np.full((len(chosen), longest), fill, np.int64)
        for name, fill in (("input_ids", pad_id), ("token_type_ids", 0), ("attention_mask", 0))
    }
    for row, places in enumerate(each):
        arrays["input_ids"][row, : len(places)] = features.ids[places]
        arrays["token_type_ids"][row, : len(places)] = features.types[places]
        arrays["attention_mask"][row, : len(places)] = 1
    arrays["labels"] = features.targets["labels"][chosen].astype(np.int64)
    return arrays


def their_step(model: Any, optimizer: Any, batch: dict[str, np.ndarray]) -> None:
    """One update, as the Trainer makes it."""
    loss = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


if __name__ == "__main__":
    main()
