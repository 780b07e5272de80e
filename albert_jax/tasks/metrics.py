"""Figures of predictions, and pictures of them.

In:  labels and predictions, one beside the other.
Out: figures by name; a perfect prediction has 1.0 in all but `mae`, where it has 0.

The formulas are scikit-learn's, SciPy's and seqeval's; where those have no value and warn (a
constant prediction has no correlation, a class nobody predicted no precision) the figure is 0.

Letters: R rows, K classes.
"""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from seqeval import scheme as schemes
from seqeval.metrics import v1 as seqeval
from sklearn import metrics as sklearn

_COLOUR, _MAP = "#3b6ea5", "Blues"
SCHEMES: dict[str, Any] = {"IOB2": schemes.IOB2, "IOBES": schemes.IOBES}


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Share of rows [R] that are right."""
    return {"accuracy": float(np.mean(labels == predictions))}


def accuracy_and_f1(
    labels: np.ndarray, predictions: np.ndarray, positive: int = 1
) -> dict[str, float]:
    """Accuracy, and F1 of one of two classes; MRPC's and QQP's."""
    f1 = _f1(labels == positive, predictions == positive)
    return accuracy(labels, predictions) | {"f1": f1}


def accuracy_and_macro_f1(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean F1 of all classes that are there or predicted."""
    f1 = _f1(labels, predictions, average="macro")
    return accuracy(labels, predictions) | {"f1_macro": f1}


def accuracy_and_matthews(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Accuracy, and Matthews' correlation; CoLA's and AX's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matthews = float(sklearn.matthews_corrcoef(labels, predictions))
    return accuracy(labels, predictions) | {"matthews": matthews}


def multi_label(labels_RK: np.ndarray, predictions_RK: np.ndarray) -> dict[str, float]:
    """F1 over all decisions, its mean over the classes that are there or predicted, and the share
    of rows with every class right. Both are bool.
    """
    occurring = labels_RK.any(axis=0) | predictions_RK.any(axis=0)
    figures = {"exact": float(np.mean((labels_RK == predictions_RK).all(axis=1)))}
    for average in ("micro", "macro"):
        figures[f"f1_{average}"] = (
            _f1(labels_RK[:, occurring], predictions_RK[:, occurring], average=average)
            if occurring.any()
            else 1.0  # no label anywhere, and none predicted
        )
    return figures


def correlations(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's; STS-B's. 0 where labels or predictions are constant."""
    if len(labels) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants; they give NaN
        found = {
            "pearson": stats.pearsonr(labels, predictions),
            "spearman": stats.spearmanr(labels, predictions),
        }
    values: dict[str, Any] = {name: result.statistic for name, result in found.items()}
    return {name: float(np.nan_to_num(value)) for name, value in values.items()}


def regression(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """R2, the share of the variance that is explained, and the mean absolute error."""
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    r2 = sklearn.r2_score(labels, predictions) if len(labels) > 1 else 0.0
    return {"r2": float(r2), "mae": float(sklearn.mean_absolute_error(labels, predictions))}


def entities(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: str = "IOB2"
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities: both ends and the type have to be right.

    Args:
        labels: tags of each sentence.
        predictions: as many.
        scheme: a key of SCHEMES. What it does not allow makes no entity (seqeval's strict mode).
    """
    count: Any = seqeval.precision_recall_fscore_support
    precision, recall, f1, _ = count(
        [list(sentence) for sentence in labels],
        [list(sentence) for sentence in predictions],
        average="micro",
        scheme=SCHEMES[scheme],
        zero_division=0,
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def draw_confusion(
    path: pathlib.Path, labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]
) -> None:
    """Draws how often each of the K classes (rows) was taken for each (columns) as a PNG.

    Args:
        path: the file to write; its folder is made.
        labels, predictions: int [R], places in `names`.
        names: of the classes; up to some 40 stay readable.
    """
    count = len(names)
    counts_KK = sklearn.confusion_matrix(labels, predictions, labels=range(count))
    share_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    # 0.42 inches hold a figure of three digits at seven points.
    side = max(4.0, 0.42 * count + 2.2)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot(111)
    image = axes.imshow(share_KK, cmap=_MAP, vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    shown = [name if len(name) <= 24 else f"{name[:23]}\u2026" for name in names]
    # A dollar sign would begin a formula.
    shown = [name.replace("$", r"\$") for name in shown]
    axes.set_xticks(range(count), shown, rotation=0 if count < 4 else 90, fontsize=8)
    axes.set_yticks(range(count), shown, fontsize=8)
    for row, column in zip(*np.nonzero(counts_KK), strict=True):
        axes.text(
            column,
            row,
            f"{counts_KK[row, column]:d}",
            ha="center",
            va="center",
            fontsize=9 if count <= 10 else 7 if counts_KK.max() < 1000 else 5,
            color="white" if share_KK[row, column] > 0.5 else "black",
        )
    _labelled(axes, "predicted class", "true class")
    _save(figure, path)


def draw_scatter(path: pathlib.Path, labels: np.ndarray, predictions: np.ndarray) -> None:
    """Draws predicted over true numbers, float [R], as a PNG; the line is where both are equal."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.add_subplot(111)
    axes.plot(labels, predictions, ".", color=_COLOUR, alpha=0.4, markersize=5)
    if len(labels):
        axes.axline((float(np.mean(labels)), float(np.mean(labels))), slope=1, color="#7a7a7a")
    axes.grid(alpha=0.3)
    _labelled(axes, "true value", "predicted value")
    _save(figure, path)


def _f1(labels: np.ndarray, predictions: np.ndarray, **options: Any) -> float:
    return float(sklearn.f1_score(labels, predictions, zero_division=cast(Any, 0.0), **options))


def _labelled(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel(beside)


def _save(figure: Figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
