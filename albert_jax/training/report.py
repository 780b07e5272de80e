"""Pictures of a run, drawn from its metrics.jsonl alone.

`draw` writes one PNG a subject and `overview.png` with all of them; it can be called at any time,
also on a run that is going on.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from albert_jax.training import telemetry

Rows = Sequence[dict[str, Any]]
Charts = dict[str, Callable[[Axes], None]]

_TRAIN, _VALIDATION, _REFERENCE, _SECOND = "#3b6ea5", "#d1603d", "#7a7a7a", "#5a9367"


def draw(workdir: pathlib.Path, unigram_loss: float | None) -> pathlib.Path:
    """Draws `report/*.png` of a workdir and returns the overview's path.

    Args:
        workdir: holds metrics.jsonl and config.json.
        unigram_loss: nats a token of a model that knows only how frequent each piece is; a line in
            the loss plot.
    """
    train, validation = _rows(workdir)
    sentences = json.loads((workdir / "config.json").read_text())["model"]["sentence_objective"]
    charts: Charts = {
        "masked_lm_loss": lambda axes: _masked_lm_loss(axes, train, validation, unigram_loss),
        "accuracy": lambda axes: _accuracy(axes, train, validation, sentences != "none"),
        "learning_rate": lambda axes: _learning_rate(axes, train),
        "throughput": lambda axes: _throughput(axes, train),
    }
    if sentences != "none":
        charts["sentence_loss"] = lambda axes: _sentence_loss(axes, train, validation)
    charts["gradient_norm"] = lambda axes: _gradient_norm(axes, train)
    return _draw_all(workdir, charts)


def draw_task(workdir: pathlib.Path, figure: str) -> pathlib.Path:
    """Draws `report/*.png` of a fine-tuning and returns the overview's path.

    Args:
        workdir: holds metrics.jsonl.
        figure: the one that the task is judged by.
    """
    train, validation = _rows(workdir)
    charts: Charts = {
        "loss": lambda axes: _task_loss(axes, train),
        figure: lambda axes: _task_figure(axes, validation, figure),
        "learning_rate": lambda axes: _learning_rate(axes, train),
        "throughput": lambda axes: _throughput(axes, train),
        "gradient_norm": lambda axes: _gradient_norm(axes, train),
    }
    return _draw_all(workdir, charts)


def _rows(workdir: pathlib.Path) -> tuple[Rows, Rows]:
    """Lines of training and of validation."""
    rows = list(telemetry.read_metrics(workdir / "metrics.jsonl"))
    return (
        [row for row in rows if row.get("split", "train") == "train"],
        [row for row in rows if row.get("split") == "validation"],
    )


def _draw_all(workdir: pathlib.Path, charts: Charts) -> pathlib.Path:
    """Each chart as a picture, and all of them as `overview.png`, whose path is returned."""
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name, chart in charts.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        chart(_axes(figure, 111))
        _save(figure, folder / f"{name}.png")
    columns = 3
    lines = -(-len(charts) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * lines), layout="constrained")
    for place, chart in enumerate(charts.values(), start=1):
        chart(_axes(figure, (lines, columns, place)))
    overview = folder / "overview.png"
    _save(figure, overview)
    return overview


def _save(figure: Figure, path: pathlib.Path) -> None:
    # A reader may look while we draw: the old picture stays until the new one is whole.
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def _axes(figure: Figure, place: int | tuple[int, int, int]) -> Axes:
    axes = figure.add_subplot(*place) if isinstance(place, tuple) else figure.add_subplot(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return axes


def _both(axes: Axes, train: Rows, validation: Rows, key: str, name: str = "") -> None:
    _line(axes, train, key, _TRAIN, f"{name}train", width=1.0)
    _line(axes, validation, key, _VALIDATION, f"{name}validation", width=1.8, marker="o")


def _line(
    axes: Axes,
    rows: Rows,
    key: str,
    color: str,
    label: str,
    width: float = 1.2,
    marker: str = "",
) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, label=label, lw=width, marker=marker, ms=3)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _reference(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=_REFERENCE, ls="--", lw=1)
    axes.annotate(
        label,
        (1, value),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=_REFERENCE,
        fontsize=8,
    )


def _masked_lm_loss(axes: Axes, train: Rows, validation: Rows, unigram_loss: float | None) -> None:
    _both(axes, train, validation, "masked_lm_loss")
    if unigram_loss is not None:
        _reference(axes, unigram_loss, "unigram model")
    axes.set_title("Masked words: loss (nats)")
    _legend(axes)


def _sentence_loss(axes: Axes, train: Rows, validation: Rows) -> None:
    _both(axes, train, validation, "sentence_order_loss")
    _reference(axes, 0.6931, "chance")
    axes.set_title("Sentence objective: loss (nats)")
    _legend(axes)


def _accuracy(axes: Axes, train: Rows, validation: Rows, sentences: bool) -> None:
    _both(axes, train, validation, "masked_lm_accuracy", "words, ")
    if sentences:
        _line(axes, train, "sentence_order_accuracy", _SECOND, "sentences, train", width=0.8)
        _line(
            axes,
            validation,
            "sentence_order_accuracy",
            "#274d33",
            "sentences, validation",
            width=1.8,
            marker="o",
        )
        _reference(axes, 0.5, "sentences: chance")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy")
    _legend(axes)


def _task_loss(axes: Axes, train: Rows) -> None:
    _line(axes, train, "loss", _TRAIN, "train")
    axes.set_title("Training loss")


def _task_figure(axes: Axes, validation: Rows, figure: str) -> None:
    _line(axes, validation, figure, _VALIDATION, "validation", width=1.8, marker="o")
    best = max((row[figure] for row in validation), default=None)
    if best is not None:
        _reference(axes, best, f"best {best:.4g}")
    axes.set_title(f"Validation: {figure.replace('_', ' ')}")


def _learning_rate(axes: Axes, train: Rows) -> None:
    _line(axes, train, "learning_rate", _TRAIN, "learning rate", width=1.6)
    axes.set_title("Learning rate")


def _throughput(axes: Axes, train: Rows) -> None:
    _line(axes, train, "examples_per_second", _TRAIN, "examples a second")
    axes.set_ylim(bottom=0)
    axes.set_title("Examples a second")


def _gradient_norm(axes: Axes, train: Rows) -> None:
    _line(axes, train, "grad_norm", _TRAIN, "norm")
    axes.set_yscale("log")
    axes.set_title("Gradient norm, before clipping")
