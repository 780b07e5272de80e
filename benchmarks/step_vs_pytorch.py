"""A training step beside PyTorch Transformers doing the same work on the same machine, in turn.

Both: ALBERT base, float32, dropout 0.1 everywhere, full sequences, masked-word scores at the masked
    positions only,
sentence loss, backward pass, clipping to norm 1, AdamW. PyTorch runs eagerly, as its users do.

  python benchmarks/step_vs_pytorch.py --batch=8 --length=128
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers

from albert_jax import config as config_lib
from albert_jax.training import program, sharding


def main() -> None:
    """Prints both medians and their ratio, and how the losses compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--predictions", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    batch = make_batch(args.batch, args.length, args.predictions)
    steps = {
        "albert_jax": jax_step(batch, args.dropout),
        "pytorch": torch_step(batch, args.dropout),
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
    for name, values in seconds.items():
        print(
            f"{name:10}  median {statistics.median(values):.3f} s  min {min(values):.3f}  max "
            f"{max(values):.3f}"
            f"  ({args.batch / statistics.median(values):.2f} examples/s)"
        )
    ratios = [t / j for j, t in zip(seconds["albert_jax"], seconds["pytorch"], strict=True)]
    print(
        f"pytorch / albert_jax: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, "
        f"max {max(ratios):.2f} "
        f"(base, batch {args.batch} x {args.length}, {args.predictions} predictions, dropout "
        f"{args.dropout}, float32, "
        f"{os.cpu_count()} cores)"
    )


def make_batch(rows: int, length: int, slots: int) -> dict[str, np.ndarray]:
    """Random pieces in the shape of the batch contract."""
    rng = np.random.default_rng(0)
    positions = np.sort(
        np.stack([rng.choice(np.arange(1, length), slots, replace=False) for _ in range(rows)])
    )
    return {
        "input_ids": rng.integers(5, 30_000, (rows, length), dtype=np.int32),
        "token_type_ids": np.repeat(np.arange(length)[None] >= length // 2, rows, 0).astype(
            np.int32
        ),
        "attention_mask": np.ones((rows, length), np.int32),
        "masked_lm_positions": positions.astype(np.int32),
        "masked_lm_ids": rng.integers(5, 30_000, (rows, slots), dtype=np.int32),
        "masked_lm_weights": np.ones((rows, slots), np.float32),
        "sentence_order_labels": rng.integers(0, 2, rows, dtype=np.int32),
    }


def jax_step(batch: dict[str, np.ndarray], dropout: float) -> Callable[[], float]:
    """One step of ours, waited for."""
    rows, length = batch["input_ids"].shape
    base = config_lib.Config()
    cfg = dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            dtype="float32",
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ),
        data=dataclasses.replace(
            base.data,
            max_seq_length=length,
            max_predictions_per_seq=batch["masked_lm_ids"].shape[1],
        ),
        train=dataclasses.replace(base.train, global_batch_size=rows),
        optimizer=dataclasses.replace(base.optimizer, name="adamw", learning_rate=1e-4),
    )
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    state = run.init()

    def step() -> float:
        nonlocal state
        state = run.train_step(state, sharding.to_global(batch, run.batch_sharding, rows))
        return float(state.window["loss"])

    return step


def torch_step(batch: dict[str, np.ndarray], dropout: float) -> Callable[[], float]:
    """One step of PyTorch Transformers' model."""
    torch.manual_seed(0)
    model = transformers.AlbertForPreTraining(
        transformers.AlbertConfig(
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=3072,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            classifier_dropout_prob=dropout,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    tensors = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    cross_entropy = torch.nn.functional.cross_entropy

    def step() -> float:
        optimizer.zero_grad()
        encoded = model.albert(
            tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            token_type_ids=tensors["token_type_ids"],
        )
        slots = tensors["masked_lm_positions"][..., None].expand(-1, -1, 768)
        scores = model.predictions(torch.gather(encoded.last_hidden_state, 1, slots))
        order = model.sop_classifier(encoded.pooler_output)
        loss = cross_entropy(
            scores.flatten(0, 1), tensors["masked_lm_ids"].flatten()
        ) + cross_entropy(order, tensors["sentence_order_labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
