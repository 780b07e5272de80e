"""GLUE: nine tasks on sentences and pairs, and the diagnostic set AX.

In:  the TSV files GLUE gives out (`GLUE/MRPC/train.tsv`, or the task's folder itself), or TFDS
     (`data.path=tfds:` or `tfds:glue/mrpc`).
Out: a `Task`; for files without labels the file that the leaderboard takes, `MRPC.tsv` and so on.

Classes stand in the order of TFDS and of Hugging Face's `glue`, MNLI's as entailment, neutral,
contradiction; `task.labels` gives another order, as for a head trained by Google's code
(contradiction, entailment, neutral). The leaderboard's file has the values of the TSV files: 0 and
1, or names, and STS-B's numbers between 0 and 5.

Figures are those of the benchmark (Wang et al. 2019, arXiv:1804.07461): CoLA Matthews' correlation,
MRPC and QQP accuracy and F1, STS-B Pearson's and Spearman's correlation, all others accuracy.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import classification, metrics, rows
from albert_jax.tasks.classification import Example, Figures, Kind
from albert_jax.tasks.task import Outputs, Problems, Task

_TFDS = "tfds:"
_AX = "ax_"  # before the names of its splits in a run of MNLI
_NLI = {name: name for name in ("entailment", "neutral", "contradiction")}
_RTE = {name: name for name in ("entailment", "not_entailment")}
_Files = Mapping[str, Sequence[str]]
_ONE_FILE: tuple[_Files, _Files] = ({"validation": ["dev.tsv"]}, {"test": ["test.tsv"]})
_MATCHED = (
    {f"validation_{kind}": [f"dev_{kind}.tsv"] for kind in ("matched", "mismatched")},
    {f"test_{kind}": [f"test_{kind}.tsv"] for kind in ("matched", "mismatched")},
)


@dataclass(frozen=True)
class GlueTask:
    """One task as GLUE gives it out.

    Attributes:
        folder: where its files lie.
        texts: columns of the one or two texts.
        label: column of the label.
        classes: a class's value in the files and its name, in the order of the scores; empty for a
            number.
        best_by: the figure that decides.
        tfds: its name in TFDS, and `tfds_texts` the columns there.
        figures: how it is scored.
        files: name of each split to be evaluated and what its file may be called, with labels and
            without.
        submission: of each split without labels, the leaderboard's file.
        no_header: columns of a file whose first line is no header.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: Mapping[str, str]
    best_by: str
    tfds: str
    tfds_texts: tuple[str, ...]
    figures: Figures = metrics.accuracy
    files: tuple[_Files, _Files] = _ONE_FILE
    submission: Mapping[str, str] = field(default_factory=dict)
    no_header: tuple[str, ...] = ()


_PAIR = ("sentence1", "sentence2")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        texts=("sentence",),
        label="label",
        classes={"0": "unacceptable", "1": "acceptable"},
        best_by="matthews",
        tfds="cola",
        tfds_texts=("sentence",),
        figures=metrics.accuracy_and_matthews,
        submission={"test": "CoLA.tsv"},
        no_header=("source", "label", "mark", "sentence"),
    ),
    "sst-2": GlueTask(
        folder="SST-2",
        texts=("sentence",),
        label="label",
        classes={"0": "negative", "1": "positive"},
        best_by="accuracy",
        tfds="sst2",
        tfds_texts=("sentence",),
        submission={"test": "SST-2.tsv"},
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        texts=("#1 String", "#2 String"),
        label="Quality",
        classes={"0": "not_equivalent", "1": "equivalent"},
        best_by="accuracy",
        tfds="mrpc",
        tfds_texts=_PAIR,
        figures=metrics.accuracy_and_f1,
        submission={"test": "MRPC.tsv"},
    ),
    "sts-b": GlueTask(
        folder="STS-B",
        texts=_PAIR,
        label="score",
        classes={},
        best_by="pearson",
        tfds="stsb",
        tfds_texts=_PAIR,
        figures=metrics.correlations,
        submission={"test": "STS-B.tsv"},
    ),
    "qqp": GlueTask(
        folder="QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        classes={"0": "not_duplicate", "1": "duplicate"},
        best_by="accuracy",
        tfds="qqp",
        tfds_texts=("question1", "question2"),
        figures=metrics.accuracy_and_f1,
        submission={"test": "QQP.tsv"},
    ),
    "mnli": GlueTask(
        folder="MNLI",
        texts=_PAIR,
        label="gold_label",
        classes=_NLI,
        best_by="accuracy",
        tfds="mnli",
        tfds_texts=("premise", "hypothesis"),
        files=_MATCHED,
        submission={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    ),
    "qnli": GlueTask(
        folder="QNLI",
        texts=("question", "sentence"),
        label="label",
        classes=_RTE,
        best_by="accuracy",
        tfds="qnli",
        tfds_texts=("question", "sentence"),
        submission={"test": "QNLI.tsv"},
    ),
    "rte": GlueTask(
        folder="RTE",
        texts=_PAIR,
        label="label",
        classes=_RTE,
        best_by="accuracy",
        tfds="rte",
        tfds_texts=_PAIR,
        submission={"test": "RTE.tsv"},
    ),
    "wnli": GlueTask(
        folder="WNLI",
        texts=_PAIR,
        label="label",
        classes={"0": "not_entailment", "1": "entailment"},
        best_by="accuracy",
        tfds="wnli",
        tfds_texts=_PAIR,
        submission={"test": "WNLI.tsv"},
    ),
    # Nothing to learn from: MNLI's runs are evaluated on it, where it lies beside MNLI.
    "ax": GlueTask(
        folder="AX",
        texts=_PAIR,
        label="gold_label",
        classes=_NLI,
        best_by="matthews",
        tfds="ax",
        tfds_texts=("premise", "hypothesis"),
        figures=metrics.accuracy_and_matthews,
        files=({}, {"test": ["AX.tsv", "diagnostic.tsv", "diagnostic/diagnostic.tsv"]}),
        submission={"test": "AX.tsv"},
    ),
}


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """A task of GLUE, `config.task.name` of TASKS.

    Args:
        config: the run's; files under `folder` are named by `task.train`, `validation` and `test`
            where they are not called as GLUE calls them.
        tokenizer: makes the pieces.
        folder: GLUE's, the task's own, or `tfds:...`.

    Raises:
        UserError: no such task, files or columns; a data set that TFDS has not downloaded.
    """
    glue = TASKS.get(config.task.name)
    if glue is None:
        raise UserError(f"task.name={config.task.name!r} is none of GLUE's: {', '.join(TASKS)}.")
    kind, values = _kind(glue, config.task.label_names)
    problems = Problems()
    train, evaluated = _read_task(glue, kind, values, config, folder, problems)
    of_splits = dict.fromkeys(evaluated, (glue, kind, values))
    if config.task.name == "mnli" and _has_diagnostic(folder):
        its = (TASKS["ax"], *_kind(TASKS["ax"], config.task.label_names))
        usual = dataclasses.replace(config, task=dataclasses.replace(config.task, test=""))
        diagnostic = _read_task(*its, usual, folder, problems)[1]
        evaluated |= {f"{_AX}{name}": examples for name, examples in diagnostic.items()}
        of_splits |= {f"{_AX}{name}": its for name in diagnostic}
    longest = config.data.max_seq_length
    train_features, cut = classification.featurise(
        train, kind, tokenizer, longest, config.augmentation
    )
    notes = [classification.note("train", train_features, cut, longest)] if train else []
    splits = []
    for name, examples in evaluated.items():
        of_glue, of_kind, of_values = of_splits[name]
        features, cut = classification.featurise(examples, of_kind, tokenizer, longest)
        notes.append(classification.note(name, features, cut, longest))
        write = _submission(of_glue, of_kind, of_values, name.removeprefix(_AX), examples)
        splits.append(classification.split(name, examples, of_kind, features, write))
    first = next(iter(evaluated.values()), [])
    return Task(
        head=classification.HEAD,
        labels=kind.labels,
        train=train_features,
        splits=tuple(splits),
        best_by=glue.best_by,
        notes=(*notes, *problems.notes()),
        draw=(
            classification.drawing(first, kind)
            if first and classification.gold(first) is not None
            else None
        ),
    )


def _has_diagnostic(folder: pathlib.Path) -> bool:
    """Whether AX lies in a folder of GLUE's, or has been downloaded with TFDS' MNLI."""
    ax = TASKS["ax"]
    if not str(folder).startswith(_TFDS):
        names = (folder / ax.folder / name for name in ax.files[1]["test"])
        return any(path.exists() for path in names)
    if str(folder) != _TFDS:
        return False
    try:
        _builder(ax, folder)
    except UserError:
        return False
    return True


def _kind(glue: GlueTask, wanted: Sequence[str]) -> tuple[Kind, dict[str, int]]:
    """What is predicted, and the place of each value in the files."""
    if not glue.classes:
        return Kind("regression", (glue.label,), glue.figures), {}
    names = tuple(wanted) or tuple(glue.classes.values())
    # Either way of writing will do.
    by_value = tuple(glue.classes.get(name, name) for name in names)
    if sorted(by_value) != sorted(glue.classes.values()):
        raise UserError(
            f"task.labels={','.join(names)}: {glue.folder} has the classes "
            f"{', '.join(glue.classes.values())}; give these in the order of the scores."
        )
    figures: Any = glue.figures
    if figures is metrics.accuracy_and_f1:
        # F1 is that of "1", wherever it stands.
        figures = functools.partial(figures, positive=by_value.index(glue.classes["1"]))
    values = {value: by_value.index(name) for value, name in glue.classes.items()}
    return Kind("classification", by_value, figures), values


def _read_task(
    glue: GlueTask,
    kind: Kind,
    values: Mapping[str, int],
    config: Config,
    folder: pathlib.Path,
    problems: Problems,
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Rows to learn from, and of each split to be evaluated."""
    if str(folder).startswith(_TFDS):
        return _tfds(glue, kind, folder)
    prefix = f"{glue.folder}/" if (folder / glue.folder).is_dir() else ""
    train: list[Example] = []
    with_labels, without = glue.files
    if with_labels:
        paths = rows.files(folder, config.task.train, "task.train", [f"{prefix}train.tsv"])
        if not paths:
            raise rows.missing_train(folder, [f"{glue.folder}/train.tsv", "train.tsv"])
        train = _read_all(paths, glue, kind, values, problems, needs_label=True)
    evaluated: dict[str, list[Example]] = {}
    for default, given, name in (
        (with_labels, config.task.validation, "task.validation"),
        (without, config.task.test, "task.test"),
    ):
        for split, paths in _split_files(folder, prefix, default, given, name).items():
            needs_label = default is with_labels
            evaluated[split] = _read_all(paths, glue, kind, values, problems, needs_label)
    if not with_labels and not evaluated:
        raise UserError(
            f"data.path={folder} holds no {' or '.join(glue.files[1]['test'])}; name the file with "
            "task.test."
        )
    return train, evaluated


def _split_files(
    folder: pathlib.Path, prefix: str, default: _Files, given: str, field_name: str
) -> dict[str, list[pathlib.Path]]:
    """Files of each split: those given, the first for the first split where there are several."""
    if not given:
        found = {
            split: rows.files(folder, "", field_name, [f"{prefix}{name}" for name in names])
            for split, names in default.items()
        }
        return {split: paths for split, paths in found.items() if paths}
    paths = rows.files(folder, given, field_name, [])
    if len(default) == 1:
        return {split: paths for split in default}
    if len(paths) > len(default):
        raise UserError(
            f"{field_name}={given}: give {len(default)} files at most, {' and '.join(default)}."
        )
    return {split: [path] for split, path in zip(default, paths, strict=False)}


def _read_all(
    paths: Sequence[pathlib.Path],
    glue: GlueTask,
    kind: Kind,
    values: Mapping[str, int],
    problems: Problems,
    needs_label: bool,
) -> list[Example]:
    examples = [
        example
        for path in paths
        for example in _read(path, glue, kind, values, problems, needs_label)
    ]
    if not examples:
        raise rows.empty(", ".join(map(str, paths)), problems)
    return examples


def _read(
    path: pathlib.Path,
    glue: GlueTask,
    kind: Kind,
    values: Mapping[str, int],
    problems: Problems,
    needs_label: bool,
) -> Iterator[Example]:
    names: Sequence[str] | None = None
    if glue.no_header:
        first = next(rows.lines(path), (1, ""))[1].split("\t")
        # CoLA's files for training have no header, its test has one.
        names = None if set(glue.texts) <= set(first) else glue.no_header
    columns = (*glue.texts, *([glue.label] if needs_label else []))
    needed = dict.fromkeys(columns, f"of {glue.folder}")
    for line, row in rows.read_tsv(path, problems, needed, names):
        texts = [row[column] for column in glue.texts]
        label = None
        if glue.label in row:
            label = _label(row[glue.label].strip(), kind, values, problems, path, line)
            if label is None:
                continue
        if not all(text.strip() for text in texts):
            # Left out, the figures could not be compared with anybody's.
            problems.add("empty text, kept", path, line)
        key = row.get("index", row.get("id", str(line)))
        yield Example(key, texts[0], texts[1] if len(texts) > 1 else None, label)


def _label(
    text: str,
    kind: Kind,
    values: Mapping[str, int],
    problems: Problems,
    path: pathlib.Path,
    line: int,
) -> int | float | None:
    if kind.name == "classification":
        return classification.class_of(text, values, problems, path, line)
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if np.isfinite(number):
        return number
    problems.add(f"{kind.labels[0]} that is no number, left out", path, line)
    return None


def _tfds(
    glue: GlueTask, kind: Kind, folder: pathlib.Path
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Rows to learn from, and of each split to be evaluated, out of what TFDS has downloaded."""
    import tensorflow_datasets as tfds

    builder = _builder(glue, folder)
    name = builder.info.full_name.rpartition("/")[0]
    columns: Any = builder.info.features or {}
    missing = [column for column in glue.tfds_texts if column not in columns]
    if missing:
        raise UserError(
            f"data.path={folder}: {name} has no column {missing[0]!r}; it is not the data of "
            f"task {glue.folder}, which is glue/{glue.tfds}."
        )
    # TFDS knows classes by their place in its own order, which is that of our table.
    by_place = [kind.labels.index(label) for label in glue.classes.values()]
    found: dict[str, list[Example]] = {}
    read: Any = builder.as_dataset
    for split in builder.info.splits:
        examples: list[tuple[int, Example]] = []
        for row in tfds.as_numpy(read(split=split)):
            texts = [row[column].decode() for column in glue.tfds_texts]
            label = None
            if not split.startswith("test"):
                label = by_place[row["label"]] if by_place else float(row["label"])
            place = int(row["idx"])
            second = texts[1] if len(texts) > 1 else None
            examples.append((place, Example(str(place), texts[0], second, label)))
        # TFDS shuffles as it writes.
        found[split] = [example for _, example in sorted(examples, key=lambda pair: pair[0])]
    return found.pop("train", []), found


def _builder(glue: GlueTask, folder: pathlib.Path) -> Any:
    """What TFDS has downloaded, by the name behind `tfds:`; the task's own where there is none."""
    # Takes seconds to import, and most runs read files.
    import tensorflow_datasets as tfds

    name = str(folder).removeprefix(_TFDS) or f"glue/{glue.tfds}"
    where = os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=where)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"data.path={folder}: TFDS has no {name} ({first}); this task is glue/{glue.tfds}."
        ) from None
    if not builder.is_prepared():
        raise UserError(
            f"data.path={folder}: {name} is not in {builder.data_dir}. Download it once with "
            f"`tfds build {name}`, or say with TFDS_DATA_DIR where it is."
        )
    return builder


def _submission(
    glue: GlueTask,
    kind: Kind,
    values: Mapping[str, int],
    split: str,
    examples: Sequence[Example],
) -> Any:
    """What writes the leaderboard's file; None for a split that the leaderboard does not take."""
    if split not in glue.submission:
        return None
    by_place = {place: value for value, place in values.items()}

    def said(prediction: Any) -> str:
        if kind.name == "regression":
            return f"{min(max(float(prediction), 0.0), 5.0):.3f}"
        return by_place[int(prediction)]

    def write(outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        path = folder / glue.submission[split]
        predictions = classification.predicted(outputs, kind)
        table = [
            ["index", "prediction"],
            *([ex.key, said(one)] for ex, one in zip(examples, predictions, strict=True)),
        ]
        classification.write_tsv(path, table)
        return [path]

    return write
