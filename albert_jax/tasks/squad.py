"""Question answering by a span of a text: SQuAD 1.1, SQuAD 2.0, XQuAD, and files of their form.

In:  JSON files of questions, each with a context and answers in it.
Out: `load` makes the task: a row a window of a question's context (see `answering`).

Figures are those of the official scripts, in per cent. SQuAD 2.0's are `exact` and `f1` with
`null_score_threshold` as configured, and `best_exact` and `best_f1` with the thresholds at which
they are best on this very file: a question is answered where its null score is not above the
threshold. As in the official script, the threshold is 0 where giving no answer at all is best.

Sources: Rajpurkar et al. 2016, arXiv:1606.05250, and 2018, arXiv:1806.03822, with their scripts
evaluate-v1.1.py and evaluate-v2.0.py; Artetxe et al. 2020, arXiv:1910.11856 (XQuAD).
"""

import array
import collections
import dataclasses
import itertools
import json
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import answering
from albert_jax.tasks import task as task_lib

NOWHERE = -1  # where an answer begins that is not in its context

_VERSIONS = ("v1.1", "v2.0")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        id: its name in the file.
        question: the text of it.
        context: where the answer is looked for.
        answers: the right ones as (text, first character), NOWHERE for one that is not there; none
            where the file does not tell.
        impossible: the file says that there is none.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool

    @property
    def labelled(self) -> bool:
        """Whether the file says what is right."""
        return self.impossible or bool(self.answers)


def read(path: pathlib.Path, problems: task_lib.Problems) -> list[Question]:
    """The questions of a file, in its order.

    An answer that is not at its place is moved to the nearest place where it stands.

    Raises:
        UserError: the file cannot be read, or is not of this form; names the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; task.train, task.validation and task.test "
            "name files under data.path."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON in UTF-8: {error}") from None
    questions = []
    seen = set[str]()
    for article, in_article in _each(path, content, "", "data"):
        for paragraph, in_paragraph in _each(path, article, in_article, "paragraphs"):
            context = _field(path, paragraph, in_paragraph, "context", str)
            for entry, place in _each(path, paragraph, in_paragraph, "qas"):
                question = _question(path, entry, place, context, problems)
                if question.id in seen:
                    problems.add("id given twice", path, question.id)
                seen.add(question.id)
                questions.append(question)
    if not questions:
        raise UserError(f"{path} has no questions.")
    return questions


def _question(
    path: pathlib.Path, entry: Any, place: str, context: str, problems: task_lib.Problems
) -> Question:
    name = str(_field(path, entry, place, "id", (str, int)))
    question = _field(path, entry, place, "question", str)
    for kind, text in (("question", question), ("context", context)):
        if not text.strip():
            problems.add(f"empty {kind}, not trained on", path, name)
    answers = []
    if "answers" in entry:
        for answer, in_answer in _each(path, entry, place, "answers"):
            text = _field(path, answer, in_answer, "text", str)
            start = _field(path, answer, in_answer, "answer_start", int)
            found = _find(text, context, start)
            if found == NOWHERE:
                problems.add("answer that is not in its context, not trained on", path, name)
            elif found != start:
                problems.add("answer that is not at its place, taken at the nearest", path, name)
            answers.append((text, found))
    if "is_impossible" in entry:
        impossible = _field(path, entry, place, "is_impossible", bool)
        if impossible and answers:
            problems.add("answers to what is_impossible, passed over", path, name)
            answers = []
    else:
        impossible = False
    # As in the official script, an empty list says that there is none.
    impossible = impossible or ("answers" in entry and not answers)
    return Question(name, question, context, tuple(answers), impossible)


def _find(text: str, context: str, start: int) -> int:
    """Where `text` stands in `context`, as near to `start` as may be; NOWHERE if it does not."""
    if not text.strip():
        return NOWHERE
    if start >= 0 and context.startswith(text, start):
        return start
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    return min(places, key=lambda place: abs(place - start), default=NOWHERE)


def _field(path: pathlib.Path, holder: Any, place: str, name: str, kind: Any) -> Any:
    """A field of a JSON object, of a certain kind."""
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join({str: "text", int: "a number", list: "a list"}.get(k, "true or false")
                             for k in kinds)  # fmt: skip
        raise UserError(
            f"{path}: {f'{place}.{name}' if place else name} is "
            + ("missing" if value is None else f"{value!r:.60}")
            + f"; a file in SQuAD's form has {wanted} there."
        )
    return value


def _each(path: pathlib.Path, holder: Any, place: str, name: str) -> list[tuple[Any, str]]:
    """The elements of a list in a JSON object, and the place of each."""
    elements = _field(path, holder, place, name, list)
    before = f"{place}.{name}" if place else name
    return [(element, f"{before}[{i}]") for i, element in enumerate(elements)]


def normalize_answer(text: str) -> str:
    """Small letters, without punctuation, articles and white space beyond single spaces.

    Source: evaluate-v2.0.py, `normalize_answer`.
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str, empty_agree: bool) -> float:
    """F1 of the words that both have, each as often as it is in both.

    Args:
        prediction: what was answered.
        gold: what is right.
        empty_agree: two answers without words score 1, as for SQuAD 2.0; else 0, as for 1.1.
    """
    said, right = (normalize_answer(text).split() for text in (prediction, gold))
    if empty_agree and not (said and right):
        return float(said == right)
    same = (collections.Counter(said) & collections.Counter(right)).total()
    return 2 * same / (len(said) + len(right)) if same else 0.0


def figures(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Official figures of SQuAD 1.1, in per cent; questions without labels are left out.

    Args:
        questions: what was asked.
        predictions: a text for each of them.
    """
    scores = [
        _scores(question, prediction, empty_agree=False)
        for question, prediction in zip(questions, predictions, strict=True)
        if question.labelled
    ]
    return {"exact": _per_cent([s[0] for s in scores]), "f1": _per_cent([s[1] for s in scores])}


def figures_with_impossible(
    questions: Sequence[Question],
    predictions: Sequence[str],
    best_texts: Sequence[str],
    null_odds: Sequence[float],
) -> dict[str, float]:
    """Official figures of SQuAD 2.0, in per cent; questions without labels are left out.

    Args:
        questions: what was asked.
        predictions: a text for each of them, "" for no answer.
        best_texts: the best answers, were there one for each.
        null_odds: how much better no answer is.
    """
    rows = [
        (question, prediction, best, odds)
        for question, prediction, best, odds in zip(
            questions, predictions, best_texts, null_odds, strict=True
        )
        if question.labelled
    ]
    answerable = [not question.impossible for question, *_ in rows]
    scored = [_scores(q, prediction, empty_agree=True) for q, prediction, _, _ in rows]
    unthresholded = [_scores(q, best, empty_agree=True) for q, _, best, _ in rows]
    found = {}
    for place, name in enumerate(("exact", "f1")):
        scores = [score[place] for score in scored]
        found[name] = _per_cent(scores)
        for side, kind in ((True, "has_answer"), (False, "no_answer")):
            part = [s for s, can in zip(scores, answerable, strict=True) if can == side]
            if part:
                found[f"{kind}_{name}"] = _per_cent(part)
        found[f"best_{name}"], found[f"best_{name}_threshold"] = best_threshold(
            [score[place] for score in unthresholded],
            answerable,
            [bool(best) for _, _, best, _ in rows],
            [odds for *_, odds in rows],
        )
    return found


def best_threshold(
    scores: Sequence[float],
    answerable: Sequence[bool],
    answered: Sequence[bool],
    null_odds: Sequence[float],
) -> tuple[float, float]:
    """The best mean score in per cent, and the highest null odds that are still answered for it.

    Args:
        scores: of each question, if it is answered.
        answerable: whether it has an answer.
        answered: whether the text that would be given is not empty.
        null_odds: how much better no answer is.

    Source: evaluate-v2.0.py, `find_best_thresh`.
    """
    current = best = float(len(answerable) - sum(answerable))
    threshold = 0.0
    for i in sorted(range(len(null_odds)), key=null_odds.__getitem__):
        current += scores[i] if answerable[i] else -float(answered[i])
        if current > best:
            best, threshold = current, null_odds[i]
    return 100.0 * best / len(scores), threshold


def _scores(question: Question, prediction: str, empty_agree: bool) -> tuple[float, float]:
    """Exact match and F1, each with the right answer that fits best."""
    golds = [text for text, _ in question.answers]
    if empty_agree:
        golds = [text for text in golds if normalize_answer(text)]
    # No answer is right where there is none.
    golds = golds or [""]
    return (
        max(exact_match(prediction, gold) for gold in golds),
        max(f1(prediction, gold, empty_agree) for gold in golds),
    )


def _per_cent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> task_lib.Task:
    """The task of a folder with SQuAD's files.

    Args:
        config: `task` names the files, or else they have the official names, train-v1.1.json and
            dev-v1.1.json or those of v2.0; several files of a split are evaluated one by one.
        tokenizer: of the model.
        folder: where the files lie.

    Raises:
        UserError: a file is missing or not of this form, two official versions lie side by side and
            none is named, nothing can be learned from the training files, or the window is too
            small.
    """
    options = config.task
    problems = task_lib.Problems()
    training = [
        (path, read(path, problems)) for path in _files(folder, "train", options.train, "train")
    ]
    evaluated = [
        (split if len(paths) == 1 else f"{split}-{path.stem}", read(path, problems))
        for split, paths in (
            ("validation", _files(folder, "validation", options.validation, "dev")),
            ("test", _files(folder, "test", options.test, "") if options.test else []),
        )
        for path in paths
    ]
    can_be_impossible = any(
        question.impossible
        for questions in [*(q for _, q in training), *(q for _, q in evaluated)]
        for question in questions
    )
    reader = _Reader(tokenizer, config)
    train = _training_features(reader, training, problems)
    splits = [_split(reader, name, qs, can_be_impossible) for name, qs in evaluated]
    asked = sum(len(questions) for _, questions in training)
    return task_lib.Task(
        head="question_answering"
        + ("_conditional" if options.answer_head == "conditional" else ""),
        labels=(),
        train=train,
        splits=tuple(splits),
        best_by="best_f1" if can_be_impossible else "f1",
        settings={"can_be_impossible": can_be_impossible},
        notes=(
            f"train: {asked:,} questions, {len(train):,} windows",
            *(
                f"{split.name}: {len(questions):,} questions, {len(split.features):,} windows"
                for split, (_, questions) in zip(splits, evaluated, strict=True)
            ),
            *problems.notes(),
        ),
    )


def _files(folder: pathlib.Path, field: str, named: str, official: str) -> list[pathlib.Path]:
    """The files that the config names, or the official one that is there."""
    if named:
        return [folder / name.strip() for name in named.split(",") if name.strip()]
    there = [
        path
        for path in (folder / f"{official}-{version}.json" for version in _VERSIONS)
        if path.is_file()
    ]
    if len(there) == 1:
        return there
    names = " and ".join(f"{official}-{version}.json" for version in _VERSIONS)
    raise UserError(
        f"{folder} has both {names}; name one each in task.train and task.validation."
        if there
        else f"{folder} has neither {names}; put one there, or name files in task.{field}."
    )


class _Reader:
    """Cuts questions into windows; the context of one after the other is often the same."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.options = config.task
        self._context: str | None = None
        self._encoded: tuple[list[int], list[tuple[int, int]]] = [], []

    def spans(self, context: str) -> list[tuple[int, int]]:
        return self._encode(context)[1]

    def asked(self, questions: Sequence[Question]) -> list[list[int]]:
        """The pieces of each question that are kept; many at once, which is much faster."""
        ids, offsets = self._tokenizer.encode_batch([question.question for question in questions])
        return [
            ids[begin:end][: self.options.max_query_length].tolist()
            for begin, end in itertools.pairwise(offsets.tolist())
        ]

    def windows(self, question: Question, asked: list[int]) -> list[answering.Window]:
        return answering.cut(
            self._tokenizer,
            asked,
            *self._encode(question.context),
            self._config.data.max_seq_length,
            self.options.doc_stride,
        )

    def _encode(self, context: str) -> tuple[list[int], list[tuple[int, int]]]:
        if context != self._context:
            self._context, self._encoded = context, self._tokenizer.encode_with_spans(context)
        return self._encoded


def _training_features(
    reader: _Reader,
    files: Sequence[tuple[pathlib.Path, Sequence[Question]]],
    problems: task_lib.Problems,
) -> task_lib.Features:
    """A row a window. One without the whole answer has none."""
    # Arrays: a list would take eight times the room, and a training file has 130,000 questions.
    sequences: list[tuple[Sequence[int], Sequence[int]]] = []
    allowed: list[Sequence[int]] = []
    positions: list[tuple[int, int]] = []
    for path, questions in files:
        for question, asked in zip(questions, reader.asked(questions), strict=True):
            located = _locate(reader, question, path, problems)
            if located is None:
                continue
            for window in reader.windows(question, asked):
                sequences.append((array.array("i", window.ids), array.array("b", window.types)))
                allowed.append(array.array("b", answering.answerable(window).tobytes()))
                first, last = located
                whole = window.begin <= first <= last < window.begin + window.count
                shift = window.first - window.begin
                positions.append((first + shift, last + shift) if whole else (0, 0))
    if not sequences:
        raise UserError(
            f"{', '.join(str(path) for path, _ in files)}: no question can be learned from: "
            + ("; ".join(problems.notes()) or "none has an answer")
        )
    starts, ends = np.asarray(positions, np.int32).T
    return task_lib.features(
        sequences,
        targets={
            "start_positions": starts,
            "end_positions": ends,
            # A context's piece never stands first.
            "is_impossible": (starts == 0).astype(np.float32),
        },
        token_targets={"answerable": allowed},
    )


def _locate(
    reader: _Reader, question: Question, path: pathlib.Path, problems: task_lib.Problems
) -> tuple[int, int] | None:
    """The first and last of the context's pieces that are the first answer; (-1, -1) where there is
    none; None where nothing can be learned from the question.
    """
    if not (question.question.strip() and question.context.strip()):
        return None
    if question.impossible:
        return NOWHERE, NOWHERE
    if not question.answers:
        problems.add("question without labels, not trained on", path, question.id)
        return None
    text, start = question.answers[0]
    if start == NOWHERE:
        return None
    spans = reader.spans(question.context)
    pieces = answering.answer_pieces(spans, start, start + len(text))
    if pieces is None:
        problems.add("answer that no piece stands for, not trained on", path, question.id)
        return None
    if question.context[spans[pieces[0]][0] : spans[pieces[1]][1]] != text.strip():
        problems.add("answer that begins or ends within a piece, made longer", path, question.id)
    return pieces


def _split(
    reader: _Reader, name: str, questions: Sequence[Question], can_be_impossible: bool
) -> task_lib.Split:
    shown = list(map(reader.windows, questions, reader.asked(questions)))
    begins = np.cumsum([0, *map(len, shown)]).tolist()
    options = reader.options

    def decoded(outputs: task_lib.Outputs) -> list[answering.Decoded]:
        return [
            answering.decode(
                shown[i],
                {key: values[begins[i] : begins[i + 1]] for key, values in outputs.items()},
                question.context,
                options,
                can_be_impossible,
            )
            for i, question in enumerate(questions)
        ]

    def text(one: answering.Decoded) -> str:
        none = can_be_impossible and one.null_odds > options.null_score_threshold
        return "" if none else one.answers[0].text

    def score(outputs: task_lib.Outputs) -> dict[str, float]:
        found = decoded(outputs)
        predictions = [text(one) for one in found]
        if not can_be_impossible:
            return figures(questions, predictions)
        return figures_with_impossible(
            questions,
            predictions,
            [one.answers[0].text for one in found],
            [one.null_odds for one in found],
        )

    def write(outputs: task_lib.Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        found = decoded(outputs)
        ids = [question.id for question in questions]
        contents: dict[str, dict[str, Any]] = {
            "predictions.json": dict(zip(ids, map(text, found), strict=True)),
            "nbest_predictions.json": {
                key: [answer._asdict() for answer in one.answers]
                for key, one in zip(ids, found, strict=True)
            },
        }
        if can_be_impossible:
            odds = [one.null_odds for one in found]
            contents["null_odds.json"] = dict(zip(ids, odds, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            written = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (folder / file).write_text(written, encoding="utf-8")
        return [folder / file for file in contents]

    return task_lib.Split(
        name=name,
        features=answering.windows_features(window for windows in shown for window in windows),
        score=score if any(question.labelled for question in questions) else None,
        write=write,
    )
