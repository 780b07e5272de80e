"""What a run writes down about itself: metrics.jsonl, TensorBoard, and the model's floating-point
work.

metrics.jsonl has one object a logged step; evaluations carry `split: "validation"`. It is only ever
appended to, but for a restart, which first takes back the lines of steps that will be made again.
"""

import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from albert_jax.config import DataConfig, ModelConfig

# Dense bf16 peak of one device in FLOP/s, by the beginning of its device_kind; makers' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


class MetricsLog:
    """metrics.jsonl and tensorboard/ of a workdir.

    Args:
        workdir: the run's folder.
        resumed_step: lines after this step are taken back, and a line cut off by a kill with them.
    """

    def __init__(self, workdir: pathlib.Path, resumed_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= resumed_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        logging.getLogger("absl").setLevel(logging.ERROR)
        from clu import metric_writers  # imports TensorFlow

        self._tensorboard = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        )

    def write(self, step: int, values: Mapping[str, float | None], split: str = "train") -> None:
        """Appends one line, whole or not at all as far as a reader can see."""
        row: dict[str, Any] = {"step": step}
        if split != "train":
            row["split"] = split
        self._file.write(json.dumps({**row, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a mounted bucket keeps only what was asked for
        scalars = {f"{split}/{name}": value for name, value in values.items() if value is not None}
        self._tensorboard.write_scalars(step, scalars)

    def close(self) -> None:
        """Writes out what is waiting."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; none if there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            # A kill may cut the last line off.
            if line.endswith("\n"):
                yield json.loads(line)


def model_flops_per_sequence(
    model: ModelConfig,
    data: DataConfig,
    teacher: ModelConfig | None = None,
    attended: float | None = None,
) -> float:
    """Floating-point operations of the matrix products in one training step on one sequence.

    Forward once, backward twice, recomputation not counted; every depth counts, shared or not; of
    a teacher, forward alone. A product of [m,k] and [k,n] is 2 m k n operations; look-ups are none.

    Args:
        model, data: of the run.
        teacher: of the run, if there is one.
        attended: how many pairs of places of a row see each other, on average; length squared by
            default. Packed rows have fewer, and what a program computes beyond them is no work of
            the model's.
    """
    taught = model_flops_per_sequence(teacher, data, None, attended) / 3.0 if teacher else 0.0
    hidden, slots = model.hidden_size, data.max_predictions_per_seq
    masked_lm = 2 * slots * model.embedding_size * (hidden + model.vocab_size)
    pooler = 2 * hidden * hidden if model.pooler else 0
    encoder = encoder_flops_per_sequence(model, data.max_seq_length, attended)
    return encoder + 3.0 * (masked_lm + pooler) + taught


def encoder_flops_per_sequence(
    model: ModelConfig, length: int, attended: float | None = None
) -> float:
    """The part of that which does not depend on what stands on the encoder."""
    attended = length**2 if attended is None else attended
    hidden, ffn = model.hidden_size, model.intermediate_size
    projections = 4 * hidden * hidden + 2 * hidden * ffn
    blocks = model.num_hidden_layers * model.inner_group_num
    encoder = blocks * (2 * projections * length + 2 * 2 * attended * hidden)
    if model.embedding_size != hidden or model.project_embeddings:
        encoder += 2 * length * model.embedding_size * hidden
    return 3.0 * encoder


def peak_flops(device: Any) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known (a CPU, say)."""
    kinds = [kind for kind in _PEAK_FLOPS if device.device_kind.startswith(kind)]
    return _PEAK_FLOPS[max(kinds, key=len)] if kinds else None
