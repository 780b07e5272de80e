"""XNLI: does one sentence follow from another, in fifteen languages.

In:  `dev-XX.tsv` and `test-XX.tsv` (premise, hypothesis, label; no header), or the official
     `xnli.dev.tsv` and `xnli.test.tsv` with all languages in one file of 19 columns; to learn from,
     MultiNLI's `train.tsv` or a translated `multinli.train.XX.tsv`, named by `task.train`.
Out: a `Task` with a split a language: English first, as the one that decides, if it is there.

Training on English and evaluating all is zero-shot transfer; on a translated file translate-train;
on several, with commas, translate-train-all. The last language's figures have `accuracy_mean`, over
all languages of that set, beside its own accuracy.

Source: Conneau et al. 2018, arXiv:1809.05053.
"""

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import classification, metrics, rows
from albert_jax.tasks.classification import Example, Figures, Kind
from albert_jax.tasks.task import Problems, Task

LABELS = ("entailment", "neutral", "contradiction")  # as in glue's MNLI
_TRAIN = ("multinli.train.en.tsv", "multinli/multinli.train.en.tsv", "train.tsv", "MNLI/train.tsv")
# Translated MultiNLI says it another way.
_SYNONYMS = {"contradictory": "contradiction"}
_COLUMNS = ("premise", "hypothesis", "label")
_FIRST_LANGUAGE = "en"

# Columns of language (or none), premise, hypothesis and label, by what the header has.
_LAYOUTS = (
    ("language", "sentence1", "sentence2", "gold_label"),
    ("", "sentence1", "sentence2", "gold_label"),
    ("", "premise", "hypo", "label"),
)


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """XNLI, with a split a language.

    Args:
        config: the run's; `task.train`, `validation` and `test` name files under `folder`.
        tokenizer: makes the pieces.
        folder: where the files are.

    Raises:
        UserError: no such files or columns; labels that are not XNLI's.
    """
    labels = config.task.label_names or LABELS
    if sorted(labels) != sorted(LABELS):
        raise UserError(
            f"task.labels={','.join(labels)}: XNLI has the classes {', '.join(LABELS)}; give these "
            "in the order of the scores."
        )
    places = {label: place for place, label in enumerate(labels)}
    places |= {other: places[label] for other, label in _SYNONYMS.items()}
    problems = Problems()
    paths = rows.files(folder, config.task.train, "task.train", _TRAIN)
    if not paths:
        raise rows.missing_train(folder, _TRAIN)
    train = [ex for path in paths for _, ex in _read(path, places, problems, needs_label=True)]
    if not train:
        raise rows.empty(", ".join(map(str, paths)), problems)

    kind = Kind("classification", labels, metrics.accuracy)
    longest = config.data.max_seq_length
    train_features, cut = classification.featurise(
        train, kind, tokenizer, longest, config.augmentation
    )
    notes = [classification.note("train", train_features, cut, longest)]
    splits, first = [], None
    for split, stem, named in (
        ("validation", "dev", config.task.validation),
        ("test", "test", config.task.test),
    ):
        languages = _languages(_files(folder, stem, named, split), places, problems)
        means = _with_mean(len(languages))
        for language, examples in languages.items():
            of_language = kind._replace(figures=means)
            features, cut = classification.featurise(examples, kind, tokenizer, longest)
            name = f"{split}_{language}"
            notes.append(classification.note(name, features, cut, longest))
            splits.append(classification.split(name, examples, of_language, features))
            first = first or examples
    labelled = first is not None and classification.gold(first) is not None
    return Task(
        head=classification.HEAD,
        labels=labels,
        train=train_features,
        splits=tuple(splits),
        best_by="accuracy",
        notes=(*notes, *problems.notes()),
        draw=classification.drawing(first, kind) if first and labelled else None,
    )


def _files(folder: pathlib.Path, stem: str, named: str, split: str) -> list[pathlib.Path]:
    if named:
        return rows.files(folder, named, f"task.{split}", [])
    return sorted(folder.glob(f"{stem}-*.tsv")) or rows.files(folder, "", "", [f"xnli.{stem}.tsv"])


def _languages(
    paths: Sequence[pathlib.Path], places: Mapping[str, int], problems: Problems
) -> dict[str, list[Example]]:
    """Rows of each language, English first, the others by their codes."""
    found: dict[str, list[Example]] = collections.defaultdict(list)
    for path in paths:
        for language, example in _read(path, places, problems, needs_label=False):
            found[language].append(example)
    order = sorted(found, key=lambda language: (language != _FIRST_LANGUAGE, language))
    return {language: found[language] for language in order}


def _read(
    path: pathlib.Path, places: Mapping[str, int], problems: Problems, needs_label: bool
) -> Iterator[tuple[str, Example]]:
    """(language, row) of a file in any of the layouts."""
    header = next(rows.lines(path), (1, ""))[1].split("\t")
    of_file = path.stem.replace("-", ".").rpartition(".")[2]
    names: Sequence[str] | None = None
    for layout in _LAYOUTS:
        if set(filter(None, layout[:3])) <= set(header):
            language, premise, hypothesis, label = layout
            break
    else:
        if len(header) not in (2, 3):
            raise UserError(
                f"{path}, line 1: neither XNLI's columns (language, gold_label, sentence1, "
                f"sentence2), nor MultiNLI's, nor two or three without a header; there are "
                f"{len(header)}: {', '.join(header)[:120]}."
            )
        names = _COLUMNS[: len(header)]
        language, (premise, hypothesis, label) = "", _COLUMNS
    needed = {premise: "of XNLI", hypothesis: "of XNLI"} | (
        {label: "of XNLI"} if needs_label else {}
    )
    if needs_label and names is not None and len(names) < len(_COLUMNS):
        raise UserError(f"{path}, line 1: a file to learn from needs a third column, the label.")
    for line, row in rows.read_tsv(path, problems, needed, names):
        place = None
        if label in row:
            place = classification.class_of(row[label].strip(), places, problems, path, line)
            if place is None:
                continue
        if not (row[premise].strip() and row[hypothesis].strip()):
            problems.add("empty text, kept", path, line)
        yield (
            row[language] if language else of_file,
            Example(str(line), row[premise], row[hypothesis], place),
        )


def _with_mean(languages: int) -> Figures:
    """Accuracy, and for the last of so many languages their mean as well.

    A split sees no outputs but its own, so the accuracies before it are remembered here; splits are
    scored in order.
    """
    seen: list[float] = []

    def figures(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
        found = metrics.accuracy(labels, predictions)
        seen.append(found["accuracy"])
        if len(seen) == languages:
            if languages > 1:
                found["accuracy_mean"] = float(np.mean(seen))
            seen.clear()
        return found

    return figures
