"""Multiple choice: RACE's questions on an article, SWAG's ends of a sentence.

In:  RACE as given out, folders `train`, `dev` and `test` with `middle/*.txt` and `high/*.txt`, each
     file one article with its questions in JSON; SWAG's `train.csv`, `val.csv` and `test.csv`.
Out: a `Task` with four sequences a row, one a choice.

RACE (google-research/albert race_utils.py): each choice is [CLS] article [SEP] question and option
[SEP]. The option takes the place of each `_` in the question, or stands behind it; of both together
the last `task.max_query_length` pieces are kept (128 as published), and the article is cut at its
end. SWAG (Devlin et al. 2019, arXiv:1810.04805, section 4.4): [CLS] first sentence [SEP] begin of
the second and an ending [SEP], the longer one cut first.

Letters: R rows, C choices.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import classification, metrics, rows, task
from albert_jax.tasks.classification import Kind
from albert_jax.tasks.task import NOT_COUNTED, Features, Outputs, Problems, Split, Task

HEAD = "multiple_choice"
LABELS = ("A", "B", "C", "D")
_CHOICES = len(LABELS)
_LEVELS = ("middle", "high")
_SWAG_FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_SWAG_COLUMNS = ("sent1", "sent2", *(f"ending{choice}" for choice in range(_CHOICES)))


class Question(NamedTuple):
    """A row.

    Attributes:
        key: what it is called in files of predictions.
        level: "middle" or "high"; empty for SWAG.
        context: the article, or first sentence.
        choices: C texts that go with it: question and option, or second sentence.
        label: the place of the right one; None: not known.
    """

    key: str
    level: str
    context: str
    choices: tuple[str, ...]
    label: int | None


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """RACE or SWAG, by `config.task.name`.

    Args:
        config: the run's; `task.train`, `validation` and `test` name folders (RACE) or files
            (SWAG) under `folder`.
        tokenizer: makes the pieces.
        folder: RACE's, the one it lies in, or SWAG's.

    Raises:
        UserError: no such files or columns; a `data.max_seq_length` without room for an article.
    """
    swag = config.task.name == "swag"
    longest, query = config.data.max_seq_length, config.task.max_query_length
    if not swag and longest <= query + task.special_pieces(tokenizer, pair=True):
        raise UserError(
            f"data.max_seq_length={longest} leaves no room for an article beside "
            f"task.max_query_length={query}; raise the first or lower the second."
        )
    problems = Problems()
    kind = Kind("classification", LABELS, metrics.accuracy)
    notes: list[str] = []
    found: dict[str, tuple[list[Question], Features]] = {}
    for name in ("train", "validation", "test"):
        named = getattr(config.task, name)
        questions = (_swag if swag else _race)(folder, name, named, problems)
        if questions:
            features, cut = _featurise(questions, tokenizer, longest, None if swag else query)
            found[name] = questions, features
            notes.append(classification.note(name, features, cut, longest))
    if "train" not in found:
        raise rows.missing_train(folder, [_SWAG_FILES["train"] if swag else "RACE/train"])
    train = found.pop("train")[1]
    splits = [_split(name, *parts, kind) for name, parts in found.items()]
    return Task(
        head=HEAD,
        labels=LABELS,
        train=train,
        splits=tuple(splits),
        best_by="accuracy",
        notes=(*notes, *problems.notes()),
    )


def question_and_option(question: str, option: str) -> str:
    """The option in the question's gap, or behind it.

    Source: google-research/albert race_utils.py.
    """
    return question.replace("_", option) if "_" in question else f"{question} {option}"


def _race(folder: pathlib.Path, split: str, named: str, problems: Problems) -> list[Question]:
    """The questions of a split, files in order of their names, or of those folders named."""
    default = "dev" if split == "validation" else split
    paths = rows.files(folder, named, f"task.{split}", [f"RACE/{default}", default])
    if named and not paths:
        raise rows.empty(folder / named)
    found = []
    for path in paths:
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        before = len(found)
        for file in files:
            found += _passage(file, problems)
        if len(found) == before:
            raise rows.empty(path, problems)
    return found


def _passage(path: pathlib.Path, problems: Problems) -> Iterator[Question]:
    # Long or short, the file is one object, so its line says nothing; the question does.
    try:
        passage = json.loads(path.read_bytes())
        article: Any = passage["article"]
        every = list(zip(passage["questions"], passage["options"], strict=True))
        answers = passage.get("answers") or [None] * len(every)
        texts = [article, *(text for question, options in every for text in (question, *options))]
        if len(answers) != len(every) or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.add("passage that is no JSON object of RACE's kind, left out", path, 1)
        return
    # The folder says it, and so does the passage: "middle1011.txt".
    names = path.parent.name, str(passage.get("id", ""))
    level = next((one for one in _LEVELS if any(name.startswith(one) for name in names)), "")
    for number, ((question, options), answer) in enumerate(zip(every, answers, strict=True)):
        where = f"question {number + 1}"
        if len(options) != _CHOICES:
            problems.add(f"question without {_CHOICES} options, left out", path, where)
            continue
        if answer is not None and answer not in LABELS:
            problems.add(f"answer {answer!r} that is none of A to D, left out", path, where)
            continue
        yield Question(
            key=f"{path.parent.name}/{path.stem}-{number}",
            level=level,
            context=article,
            choices=tuple(question_and_option(question, option) for option in options),
            label=None if answer is None else LABELS.index(answer),
        )


def _swag(folder: pathlib.Path, split: str, named: str, problems: Problems) -> list[Question]:
    """The questions of a split of SWAG."""
    default = _SWAG_FILES[split]
    paths = rows.files(
        folder, named, f"task.{split}", [default, f"SWAG/{default}", f"swag/{default}"]
    )
    columns = (*_SWAG_COLUMNS, *(["label"] if split != "test" else []))
    found: list[Question] = []
    for path in paths:
        for line, row in rows.read_csv(path, problems, dict.fromkeys(columns, "of SWAG")):
            label = None
            if "label" in row:
                if row["label"] not in ("0", "1", "2", "3"):
                    kind = f"label {row['label']!r} that is none of 0 to 3, left out"
                    problems.add(kind, path, line)
                    continue
                label = int(row["label"])
            choices = tuple(f"{row['sent2']} {row[name]}".strip() for name in _SWAG_COLUMNS[2:])
            found.append(Question(str(line), "", row["sent1"], choices, label))
    if paths and not found:
        raise rows.empty(", ".join(map(str, paths)), problems)
    return found


def _featurise(
    questions: Sequence[Question], tokenizer: Tokenizer, longest: int, query: int | None
) -> tuple[Features, int]:
    """C sequences a row, and how many rows were cut.

    Args:
        questions: R rows.
        tokenizer: makes the pieces.
        longest: pieces of a sequence.
        query: pieces kept of question and option, from their end; None: what is longer is cut
            first.
    """
    room = longest - task.special_pieces(tokenizer, pair=True)
    # The questions of an article stand one behind the other: it is encoded once.
    contexts = list(dict.fromkeys(question.context for question in questions))
    context_ids, context_at = tokenizer.encode_batch(contexts)
    places = {context: place for place, context in enumerate(contexts)}
    ids, at = tokenizer.encode_batch([text for one in questions for text in one.choices])
    sequences, cut = [], 0
    for row, question in enumerate(questions):
        place = places[question.context]
        whole = context_ids[context_at[place] : context_at[place + 1]].tolist()
        cut_here = False
        for number in range(row * _CHOICES, (row + 1) * _CHOICES):
            context, choice = list(whole), ids[at[number] : at[number + 1]].tolist()
            if query is None:
                cut_here |= task.truncate_pair(context, choice, room)
            else:
                kept = choice[-query:]
                cut_here |= len(kept) < len(choice) or len(context) + len(kept) > room
                context, choice = context[: room - len(kept)], kept
            sequences.append(task.join(tokenizer, context, choice))
        cut += cut_here
    labels = [NOT_COUNTED if one.label is None else one.label for one in questions]
    targets = {"labels": np.array(labels, np.int32)}
    return task.features(sequences, choices=_CHOICES, targets=targets), cut


def _split(name: str, questions: Sequence[Question], features: Features, kind: Kind) -> Split:
    labels = _gold(questions)
    levels = np.array([question.level for question in questions])

    def score(outputs: Outputs) -> dict[str, float]:
        predictions = classification.predicted(outputs, kind)
        figures = metrics.accuracy(labels, predictions)
        for level in _LEVELS:
            of_level = levels == level
            if of_level.any():
                one = metrics.accuracy(labels[of_level], predictions[of_level])
                figures[f"accuracy_{level}"] = one["accuracy"]
        return figures

    def write(outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        path = folder / f"predictions_{name}.tsv"
        keys = [question.key for question in questions]
        classification.write_predictions(path, keys, kind, outputs, labels)
        return [path]

    return Split(name, features, None if labels is None else score, write)


def _gold(questions: Sequence[Question]) -> Any:
    labels = [question.label for question in questions]
    return None if None in labels else np.array(labels)
