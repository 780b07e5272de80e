"""Pretraining examples as a person reads them: what the model sees, what was there, figures and
pictures.

In:  batches as the builders make them, their tokenizer; `statistics.Statistics` of many of them.
Out: text for a terminal or a file, and PNG histograms in a folder.

Shapes: B examples, L sequence length, P masked slots, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.data.statistics import Statistics, unmasked

LEGEND = (
    "[MASK]: hidden from the model; {word}: it sees this word and is asked about it all the same;\n"
    "'a = b': it sees a, b is the truth."
)
_LABELS = {
    "sop": ("B follows A in the text", "swapped: A follows B in the text"),
    "nsp": ("B follows A in the text", "B is from another document"),
}
_RANDOM_NEXT = "swapped, or B is from another document"

_RESET, _SEGMENTS, _MASKED, _HEADING = "\x1b[0m", ("\x1b[36m", "\x1b[33m"), "\x1b[1;7m", "\x1b[1m"
_BLUE, _RED, _GREY = "#3b6ea5", "#d1603d", "#7a7a7a"  # as the pictures of a run
_LONGEST_RUN = 8  # words that have a bar of their own

# Text and the colour it has on a terminal, with nothing between one and the next.
Word = list[tuple[str, str]]


def describe_label(label: int | None, objective: str, single_sentence: str) -> str:
    """A sentence label in words; None where there is no sentence objective."""
    if label is None:
        return "no label"
    if objective == "sop" and label == 1 and single_sentence == "random_next":
        return f"label 1: {_RANDOM_NEXT}"
    return f"label {label}: {_LABELS[objective][label]}"


def example(
    batch: Mapping[str, np.ndarray],
    row: int,
    spoken: tokenizer_lib.Tokenizer,
    heading: str,
    *,
    colours: bool,
    width: int,
) -> str:
    """One row of a batch: the segments as the model sees them, and the truth of what is masked.

    Args:
        batch: as the builders make them.
        row: which.
        spoken: the tokenizer of its ids.
        heading: what the first line begins with.
        colours: for a terminal; else plain.
        width: characters in a line.
    """
    length = int(batch["attention_mask"][row].sum())
    seen, truth = batch["input_ids"][row][:length], unmasked(batch)[row][:length]
    masked = np.zeros(length + 1, bool)
    masked[batch["masked_lm_positions"][row][batch["masked_lm_weights"][row] > 0]] = True
    count = int(masked.sum())
    heading += f" ({length} tokens, {count} masked: {count / length:.1%})"
    lines = [f"{_HEADING}{heading}{_RESET}" if colours else heading]
    for number, (begin, end) in enumerate(_segments(truth, spoken)):
        places = range(begin, end)
        words = _words(seen, truth, masked, places, spoken, _SEGMENTS[number % 2])
        lines += _wrapped(words, "AB"[number] if number < 2 else "", colours, width)
    words = [
        [(text, "")] for text in _answers(seen, truth, masked, spoken) for text in text.split(" ")
    ]
    lines += _wrapped(words, "=", colours, width)
    return "\n".join(lines)


def _segments(truth: np.ndarray, spoken: tokenizer_lib.Tokenizer) -> Iterator[tuple[int, int]]:
    """Begin and end of the text between special pieces."""
    special = np.flatnonzero((truth == spoken.cls_id) | (truth == spoken.sep_id))
    for before, after in itertools.pairwise(special):
        yield int(before) + 1, int(after)


def _words(
    seen: np.ndarray,
    truth: np.ndarray,
    masked: np.ndarray,
    places: range,
    spoken: tokenizer_lib.Tokenizer,
    colour: str,
) -> list[Word]:
    """The seen pieces of a segment, those together that have no space between them."""
    words: list[Word] = []
    for place in places:
        spaced, text = _spaced(seen[place], truth[place], spoken)
        part = (_shown(text, seen[place], spoken), _MASKED) if masked[place] else (text, colour)
        if spaced or not words:
            words.append([])
        words[-1].append(part)
    return words


def _shown(text: str, token_id: int, spoken: tokenizer_lib.Tokenizer) -> str:
    return "[MASK]" if token_id == spoken.mask_id else f"{{{text}}}"


def _spaced(seen: int, truth: int, spoken: tokenizer_lib.Tokenizer) -> tuple[bool, str]:
    """Whether a space stands before a piece, and the piece as people read it. What was there has
    the space, whatever the model sees in its place.
    """
    piece = spoken.piece(truth)
    if spoken.family == "bert":
        return not piece.startswith("##"), spoken.readable(seen).removeprefix("##")
    return piece.startswith(("▁", "Ġ")), spoken.readable(seen)


def _answers(
    seen: np.ndarray, truth: np.ndarray, masked: np.ndarray, spoken: tokenizer_lib.Tokenizer
) -> Iterator[str]:
    """`seen = truth` of each run of masked pieces."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked])))
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    for number, (begin, end) in enumerate(runs):
        shown = _plain(_words(seen, truth, masked, range(begin, end), spoken, ""))
        unmasked_truth = np.zeros_like(masked)
        there = _plain(_words(truth, truth, unmasked_truth, range(begin, end), spoken, ""))
        yield f"{shown} = {there or '▁'}" + (";" if number + 1 < len(runs) else "")


def _plain(words: list[Word]) -> str:
    return " ".join("".join(text for text, _ in word) for word in words)


def _wrapped(words: list[Word], name: str, colours: bool, width: int) -> list[str]:
    """The words in lines, indented behind the name."""
    lines, line, used = [], [], 0
    for word in words:
        length = sum(len(text) for text, _ in word)
        if line and used + 1 + length > width - 4:
            lines.append(" ".join(line))
            line, used = [], 0
        parts = (f"{colour}{text}{_RESET}" if colours and colour else text for text, colour in word)
        line.append("".join(parts))
        used += length + (used > 0)
    lines.append(" ".join(line))
    return [f"{name if not i else '':>2}  {text}" for i, text in enumerate(lines)]


def summary(found: Statistics, spoken: tokenizer_lib.Tokenizer) -> str:
    """The statistics as a person reads them."""
    figures = found.figures()
    L = len(found.lengths_L) - 1
    runs = [figures[f"masked runs of {n} words"] for n in range(1, 4)]
    text = max(int(found.pieces_V.sum()), 1)
    occurring = int(np.count_nonzero(found.pieces_V))
    frequent = np.argsort(-found.pieces_V, kind="stable")[:12]
    words = " ".join(spoken.readable(int(piece)) or "▁" for piece in frequent)
    rows = [
        (
            "length",
            f"{figures['mean_length']:.1f} of {L} tokens in the mean, "
            f"{figures['full_length_share']:.1%} are full, "
            f"{1 - figures['mean_length'] / L:.1%} of all places are padding",
        ),
        (
            "masked",
            f"{figures['predictions_per_token']:.2%} of all tokens: "
            f"{figures['masked_to_MASK']:.1%} hidden, {figures['random']:.1%} another piece, "
            f"{figures['kept']:.1%} as they were",
        ),
        (
            "masked side by side",
            f"1 word {runs[0]:.1%}, 2 words {runs[1]:.1%}, 3 words {runs[2]:.1%}, "
            f"more {max(0.0, 1 - sum(runs) - figures['masked runs of 0 words']):.1%}",
        ),
    ]
    if "label_1_share" in figures:
        rows += [
            ("label 1", f"{figures['label_1_share']:.1%}"),
            ("segment B", f"{figures['segment_B_share_of_tokens']:.1%} of an example's tokens"),
        ]
    rows += [
        (
            "pieces",
            f"{text / max(found.word_begins, 1):.2f} a word; {occurring:,} of "
            f"{len(found.pieces_V):,} occur; {found.pieces_V[spoken.unk_id] / text:.2%} unknown",
        ),
        ("most frequent", words),
    ]
    return "\n".join(f"{name:<20} {text}" for name, text in rows)


def draw(found: Statistics, folder: Path, masked_lm_prob: float, ngram: int) -> Path:
    """Draws `lengths.png`, `masked_share.png`, `ngram_lengths.png`, `piece_frequencies.png` and all
    of them as `overview.png`, whose path is returned.

    Args:
        found: of some thousand examples.
        folder: is made if it is not there.
        masked_lm_prob: the share that was asked for; a line in its picture.
        ngram: longest run of words that is masked together; their law is drawn beside the bars.
    """
    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[str, Callable[[Axes], None]] = {
        "lengths": lambda axes: _lengths(axes, found),
        "masked_share": lambda axes: _masked_share(axes, found, masked_lm_prob),
        "ngram_lengths": lambda axes: _ngram_lengths(axes, found, ngram),
        "piece_frequencies": lambda axes: _piece_frequencies(axes, found),
    }
    for name, chart in charts.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        chart(_axes(figure, 1, 1, 1))
        figure.savefig(folder / f"{name}.png", dpi=110)
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    for place, chart in enumerate(charts.values(), start=1):
        chart(_axes(figure, 2, 2, place))
    figure.savefig(folder / "overview.png", dpi=110)
    return folder / "overview.png"


def _axes(figure: Figure, rows: int, columns: int, place: int) -> Axes:
    axes = figure.add_subplot(rows, columns, place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def _lengths(axes: Axes, found: Statistics) -> None:
    L = len(found.lengths_L) - 1
    edges = np.unique(np.linspace(0, L, min(L, 32) + 1).round().astype(int))
    counts = np.add.reduceat(found.lengths_L[1:], edges[:-1])
    axes.bar(edges[:-1] + 0.5, counts / found.examples, np.diff(edges), align="edge", color=_BLUE,
             edgecolor="white", linewidth=0.5)  # fmt: skip
    mean = found.tokens / found.examples
    _line(axes, mean, f"mean {mean:.0f}")
    axes.set_xlim(0, L + 1)
    axes.set_title("Sequence lengths")
    axes.set_xlabel("tokens, special ones included")
    _shares(axes)


def _masked_share(axes: Axes, found: Statistics, masked_lm_prob: float) -> None:
    used = np.flatnonzero(found.masked_share_100)
    shares = np.arange(used[0], used[-1] + 1)
    axes.bar(shares, found.masked_share_100[shares] / found.examples, 0.9, color=_BLUE)
    _line(axes, 100 * masked_lm_prob, f"asked for {masked_lm_prob:.0%}")
    axes.set_xlim(0, max(1.5 * 100 * masked_lm_prob, used[-1] + 1))
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.set_title("Masked share of an example")
    axes.set_xlabel("masked pieces / tokens, rounded to 1 %")
    _shares(axes)


def _ngram_lengths(axes: Axes, found: Statistics, ngram: int) -> None:
    runs_G = found.run_words_G / max(found.run_words_G.sum(), 1)
    counts = np.append(runs_G[1:_LONGEST_RUN], runs_G[_LONGEST_RUN:].sum())
    words = np.arange(1, len(counts) + 1)
    bars = axes.bar(words - 0.2, counts, 0.4, color=_BLUE, label="masked side by side")
    axes.bar_label(bars, [f"{count:.1%}" for count in counts], fontsize=7, color=_GREY, padding=1)
    law = 1 / np.arange(1, ngram + 1)
    axes.bar(np.arange(1, ngram + 1) + 0.2, law / law.sum(), 0.4, color=_RED, alpha=0.6,
             label="law of one n-gram: 1/n")  # fmt: skip
    axes.set_xticks(words, [*map(str, words[:-1]), f"{_LONGEST_RUN}+"])
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Words masked side by side (n-grams that touch are one)")
    axes.set_xlabel("words")
    _shares(axes, "share of runs")


def _piece_frequencies(axes: Axes, found: Statistics) -> None:
    counts = np.sort(found.pieces_V[found.pieces_V > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)
    shares = counts / counts.sum()
    axes.loglog(ranks, shares, color=_BLUE, lw=1.8, label="pieces")
    zipf = 1 / ranks
    axes.loglog(ranks, zipf / zipf.sum(), color=_GREY, ls="--", lw=1, label="Zipf: 1/rank")
    axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(f"Piece frequencies ({len(counts):,} of {len(found.pieces_V):,} occur)")
    axes.set_xlabel("rank")
    axes.set_ylabel("share of the text")


def _line(axes: Axes, at: float, label: str) -> None:
    axes.axvline(at, color=_RED, ls="--", lw=1)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(
        label, (at, 1), xytext=(-4, -4), ha="right", va="top", color=_RED, fontsize=8, **place
    )


def _shares(axes: Axes, label: str = "share of examples") -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label)
