"""A training step beside PyTorch Transformers doing the same work on the same machine, in turn.

Both: full sequences, masked-word scores at the masked positions only, sentence loss, backward pass,
clipping to norm 1, AdamW. On a CPU in float32, PyTorch eager as its users run it there; on a GPU in
bfloat16 (PyTorch: autocast, SDPA attention, torch.compile), with the share of the card's peak.

  python benchmarks/step_vs_pytorch.py --batch=8 --length=128
  python benchmarks/step_vs_pytorch.py --device=gpu --model=xxlarge --batch=16 --length=512 \\
      --dropout=0
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is shared with PyTorch

import jax
import numpy as np
import torch
import transformers

from albert_jax import config as config_lib
from albert_jax.config import Config
from albert_jax.training import program, sharding, telemetry

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    """Prints both medians and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--model", choices=("base", "large", "xlarge", "xxlarge"), default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=0, help="ours; 0 = the whole batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--predictions", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    cfg = config(args)
    batch = make_batch(cfg)
    steps = {
        "albert_jax": jax_step(cfg, batch),
        "pytorch": torch_step(cfg, batch, args.device),
    }
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    flops = args.batch * telemetry.model_flops_per_sequence(cfg.model, cfg.data)
    peak = telemetry.peak_flops(jax.devices()[0])
    for name, values in seconds.items():
        median = statistics.median(values)
        used = f", {flops / median / peak:.1%} of the peak" if peak else ""
        print(
            f"{name:10}  median {median:.3f} s  min {min(values):.3f}  max {max(values):.3f}  "
            f"({args.batch / median:.2f} examples/s{used})"
        )
    ratios = [t / j for j, t in zip(seconds["albert_jax"], seconds["pytorch"], strict=True)]
    print(
        f"pytorch / albert_jax: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, "
        f"max {max(ratios):.2f} ({args.model}, batch {args.batch} x {args.length}, "
        f"{args.predictions} predictions, dropout {args.dropout}, {cfg.model.dtype}, "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores)"
    )


def config(args: argparse.Namespace) -> Config:
    """The run that both do."""
    cfg = config_lib.load(str(CONFIGS / f"{args.model}.py"))
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(
            cfg.model,
            dtype="float32" if args.device == "cpu" else "bfloat16",
            hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout,
        ),
        data=dataclasses.replace(
            cfg.data, max_seq_length=args.length, max_predictions_per_seq=args.predictions
        ),
        train=dataclasses.replace(
            cfg.train, global_batch_size=args.batch, microbatch_size=args.microbatch
        ),
        optimizer=dataclasses.replace(cfg.optimizer, name="adamw", learning_rate=1e-4),
    )


def make_batch(cfg: Config) -> dict[str, np.ndarray]:
    """Random pieces in the shape of the batch contract."""
    rng = np.random.default_rng(0)
    rows, length = cfg.train.global_batch_size, cfg.data.max_seq_length
    slots, pieces = cfg.data.max_predictions_per_seq, cfg.model.vocab_size
    positions = np.sort(
        np.stack([rng.choice(np.arange(1, length), slots, replace=False) for _ in range(rows)])
    )
    return {
        "input_ids": rng.integers(5, pieces, (rows, length), dtype=np.int32),
        "token_type_ids": np.repeat(np.arange(length)[None] >= length // 2, rows, 0).astype(
            np.int32
        ),
        "attention_mask": np.ones((rows, length), np.int32),
        "masked_lm_positions": positions.astype(np.int32),
        "masked_lm_ids": rng.integers(5, pieces, (rows, slots), dtype=np.int32),
        "masked_lm_weights": np.ones((rows, slots), np.float32),
        "sentence_order_labels": rng.integers(0, 2, rows, dtype=np.int32),
    }


def jax_step(cfg: Config, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """One step of ours, waited for."""
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    state, frozen = run.init(), run.frozen()

    def step() -> float:
        nonlocal state
        rows = cfg.train.global_batch_size
        on_device = sharding.to_global(batch, run.batch_sharding, rows)
        state = run.train_step(state, on_device, *frozen)
        return float(state.window["loss"])

    return step


def torch_step(cfg: Config, batch: dict[str, np.ndarray], device: str) -> Callable[[], float]:
    """One step of PyTorch Transformers' model."""
    torch.manual_seed(0)
    where = torch.device("cuda" if device == "gpu" else "cpu")
    size = cfg.model
    model = transformers.AlbertForPreTraining(
        transformers.AlbertConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=size.num_attention_heads,
            intermediate_size=size.intermediate_size,
            hidden_dropout_prob=size.hidden_dropout_prob,
            attention_probs_dropout_prob=size.attention_probs_dropout_prob,
            classifier_dropout_prob=size.hidden_dropout_prob,
        )
    )
    model: Any = model.train()
    model.to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    tensors = {name: torch.from_numpy(array).long().to(where) for name, array in batch.items()}
    cross_entropy = torch.nn.functional.cross_entropy

    def loss_of() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "gpu"):
            encoded = model.albert(
                tensors["input_ids"],
                attention_mask=tensors["attention_mask"],
                token_type_ids=tensors["token_type_ids"],
            )
            slots = tensors["masked_lm_positions"][..., None].expand(-1, -1, size.hidden_size)
            scores = model.predictions(torch.gather(encoded.last_hidden_state, 1, slots))
            order = model.sop_classifier(encoded.pooler_output)
            return cross_entropy(
                scores.flatten(0, 1).float(), tensors["masked_lm_ids"].flatten()
            ) + cross_entropy(order.float(), tensors["sentence_order_labels"])

    forward: Callable[[], torch.Tensor] = torch.compile(loss_of) if device == "gpu" else loss_of

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
