"""Answers one question by a span of a text.

In:  a question and a context, `windows` of which the model reads.
Out: what the model says of the windows, weighed to `best_answers`.

A context that is longer than the model's room is cut into windows that overlap; of a piece that is
in several, the window where it has most context on both sides counts. Answers are given as they
stand in the context, by the characters that the pieces came from.

Source: google-research/albert squad_utils.py (windows, weighing of answers).
Letters: L pieces of a window, C of them of the context, A ends for each start.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from albert_jax.config import TaskConfig
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import task as task_lib

_OUT = -1e30  # below every score


@dataclasses.dataclass(frozen=True)
class Window:
    """What the model reads at once.

    Attributes:
        ids: [L], special pieces included.
        types: [L], the segment of each piece.
        spans: [L], the characters of the context that a piece is of; None where it is not of it.
        is_max_context: [L], whether no other window shows this piece with more around it.
        first: the place in `ids` of the first piece of the context.
        begin: which of the context's pieces that is.
        count: how many of them there are.
    """

    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int] | None]
    is_max_context: list[bool]
    first: int
    begin: int
    count: int


class Answer(NamedTuple):
    """A part of a context, and how sure it is among those weighed; text "" is no answer."""

    text: str
    probability: float
    start: int
    end: int


class Decoded(NamedTuple):
    """The answers of one question, best first; at least one, though it may be "".

    Attributes:
        answers: none of them "" unless nothing else is left.
        no_answer: the probability of no answer among them; 0 where that was not weighed.
        null_odds: how much better no answer is than the best one.
    """

    answers: list[Answer]
    no_answer: float
    null_odds: float


def windows(
    tokenizer: Tokenizer,
    question: str,
    context: str,
    max_seq_length: int,
    max_query_length: int,
    doc_stride: int,
) -> list[Window]:
    """The windows of a question and its context, at least one.

    Args:
        tokenizer: of the model.
        question: of it, the first pieces are kept.
        context: none of it is lost.
        max_seq_length: pieces of a window, special ones included.
        max_query_length: pieces of the question that are kept.
        doc_stride: pieces from the begin of one window to that of the next.

    Raises:
        UserError: the question leaves no room for the context.
    """
    asked = tokenizer.encode(question)[:max_query_length]
    return cut(tokenizer, asked, *tokenizer.encode_with_spans(context), max_seq_length, doc_stride)


def cut(
    tokenizer: Tokenizer,
    asked: list[int],
    ids: list[int],
    spans: list[tuple[int, int]],
    max_seq_length: int,
    doc_stride: int,
) -> list[Window]:
    """`windows` of pieces.

    Source: google-research/albert squad_utils.py, `convert_examples_to_features`.
    """
    room = max_seq_length - len(asked) - task_lib.special_pieces(tokenizer, pair=True)
    if room < 1:
        raise UserError(
            f"data.max_seq_length={max_seq_length} leaves no room for a context beside a question "
            f"of {len(asked)} pieces; raise it, or lower task.max_query_length."
        )
    step = min(room, doc_stride)
    begins = [0]
    while begins[-1] + room < len(ids):
        begins.append(begins[-1] + step)
    best = _best_windows(begins, room, len(ids))
    first = task_lib.special_pieces(tokenizer, pair=True) - 1 + len(asked)
    found = []
    for number, begin in enumerate(begins):
        count = min(room, len(ids) - begin)
        joined, types = task_lib.join(tokenizer, asked, ids[begin : begin + count])
        after = len(joined) - first - count
        found.append(
            Window(
                ids=joined,
                types=types,
                spans=[*[None] * first, *spans[begin : begin + count], *[None] * after],
                is_max_context=[
                    *[False] * first,
                    *(best[begin : begin + count] == number).tolist(),
                    *[False] * after,
                ],
                first=first,
                begin=begin,
                count=count,
            )
        )
    return found


def _best_windows(begins: list[int], room: int, count: int) -> np.ndarray:
    """For each of the context's pieces the number of the window that shows most around it.

    That is the lesser of what is left and right of it, and a little for a longer window; of equal
    ones the first.

    Source: google-research/albert squad_utils.py, `_check_is_max_context`.
    """
    piece = np.arange(count)
    begin = np.asarray(begins)[:, None]
    end = np.minimum(begin + room, count)
    around = np.minimum(piece - begin, end - 1 - piece) + 0.01 * (end - begin)
    return np.where((begin <= piece) & (piece < end), around, _OUT).argmax(0)


def answer_pieces(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """The first and last piece that hold a part of the characters [start, end); None if none do."""
    inside = [i for i, (begin, stop) in enumerate(spans) if begin < end and start < stop > begin]
    return (inside[0], inside[-1]) if inside else None


def windows_features(windows: Iterable[Window]) -> task_lib.Features:
    """A row a window, as a question answering head reads it to predict."""
    shown = list(windows)
    return task_lib.features(
        [(window.ids, window.types) for window in shown],
        token_targets={"answerable": [answerable(window).tolist() for window in shown]},
    )


def answerable(window: Window) -> np.ndarray:
    """1 where an answer may begin or end: in the context, and at [CLS], which is none. int8 [L]."""
    allowed = np.zeros(len(window.ids), np.int8)
    allowed[window.first : window.first + window.count] = 1
    allowed[0] = 1
    return allowed


def best_answers(
    shown: Sequence[Window],
    outputs: task_lib.Outputs,
    context: str,
    options: TaskConfig,
    can_be_impossible: bool = False,
) -> list[Answer]:
    """The answers of one question, best first; never empty.

    Args:
        shown: the windows of the question.
        outputs: of the model, a row a window.
        context: what the windows are of.
        options: `max_answer_length`, `n_best`, `answer_head` and `null_score_threshold`.
        can_be_impossible: the model learned of questions without an answer; "" stands first where
            that is best.
    """
    decoded = decode(shown, outputs, context, options, can_be_impossible)
    if not can_be_impossible:
        return decoded.answers
    none = Answer("", decoded.no_answer, 0, 0)
    if not decoded.answers[0].text:
        return decoded.answers
    if decoded.null_odds > options.null_score_threshold:
        return [none, *decoded.answers]
    return [decoded.answers[0], none, *decoded.answers[1:]]


def decode(
    shown: Sequence[Window],
    outputs: task_lib.Outputs,
    context: str,
    options: TaskConfig,
    can_be_impossible: bool,
) -> Decoded:
    """Weighs the answers of one question against each other and against none.

    Args: as `best_answers`.

    Plain head: an answer's score is that of its start and that of its end; of no answer the least
    over the windows of both at [CLS]. Conditional head: log probabilities, and the least of the
    windows' scores for no answer.

    Source: google-research/albert squad_utils.py, `get_predictions_v1`, `write_predictions_v2`.
    """
    conditional = options.answer_head == "conditional"
    found: list[tuple[float, int, int]] = []  # score, first and last character
    for number, window in enumerate(shown):
        row = {name: values[number] for name, values in outputs.items()}
        starts, ends, scores = (_conditional_spans if conditional else _plain_spans)(
            window, row, options
        )
        best = np.argsort(-scores, kind="stable")[: options.n_best]
        for i in best[scores[best] > _OUT].tolist():
            start, end = window.spans[int(starts[i])], window.spans[int(ends[i])]
            assert start is not None
            assert end is not None
            found.append((float(scores[i]), start[0], end[1]))
    found.sort(key=lambda one: -one[0])
    by_text: dict[str, tuple[float, int, int]] = {}
    for one in found:
        text = context[one[1] : one[2]].strip()
        if text:
            by_text.setdefault(text, one)
    chosen = list(by_text.items())[: options.n_best]
    if conditional:
        null = min(float(value) for value in outputs["answer_logit"])
        odds = null
    else:
        null = min(float(logits[0, 0]) + float(logits[0, 1]) for logits in outputs["logits"])
        odds = null - chosen[0][1][0] if chosen else 0.0
    if not chosen:
        return Decoded([Answer("", 1.0, 0, 0)], 1.0, odds)
    scores = np.asarray([one[0] for _, one in chosen])
    if can_be_impossible and not conditional:
        scores = np.append(scores, null)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    no_answer = 0.0
    if can_be_impossible:
        # The conditional head has a classifier for it, beside the answers' probabilities.
        no_answer = (1 + np.tanh(odds / 2)) / 2 if conditional else probabilities[-1]
    answers = [
        Answer(text, float(probability), one[1], one[2])
        for (text, one), probability in zip(chosen, probabilities, strict=False)
    ]
    return Decoded(answers, float(no_answer), odds)


def _plain_spans(
    window: Window, row: dict[str, np.ndarray], options: TaskConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All spans of a window: starts, ends and scores, each [spans]; score _OUT: not allowed."""
    inside = slice(window.first, window.first + window.count)
    start_C, end_C = row["logits"][inside].astype(np.float64).T
    start_C = np.where(window.is_max_context[inside], start_C, _OUT)
    longest = min(options.max_answer_length, window.count)
    start = np.arange(window.count)[:, None]
    end = start + np.arange(longest)
    ends_CA = np.append(end_C, np.full(longest, _OUT))[end]
    allowed = (start_C[:, None] > _OUT) & (ends_CA > _OUT)
    scores = np.where(allowed, start_C[:, None] + ends_CA, _OUT).ravel()
    starts = np.broadcast_to(start, end.shape).ravel() + window.first
    # Most are far from the best, and sorting them takes longest.
    kept = np.arange(len(scores))
    if len(scores) > options.n_best:
        kept = np.sort(np.argpartition(-scores, options.n_best)[: options.n_best])
    return starts[kept], (end.ravel() + window.first)[kept], scores[kept]


def _conditional_spans(
    window: Window, row: dict[str, np.ndarray], options: TaskConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans that the head proposes for a window, as `_plain_spans`."""
    ends = row["end_index"].astype(int)
    starts = np.broadcast_to(row["start_index"].astype(int)[:, None], ends.shape)
    scores = row["start_log_probs"].astype(np.float64)[:, None] + row["end_log_probs"]
    after = window.first + window.count
    best = np.append(window.is_max_context, False)
    allowed = (
        best[np.clip(starts, 0, len(best) - 1)]
        & (starts <= ends)
        & (ends < after)
        & (ends - starts < options.max_answer_length)
    )
    return starts.ravel(), ends.ravel(), np.where(allowed, scores, _OUT).ravel()
