"""A fine-tuning from a model to figures and predictions; or many of them, over seeds and a grid.

In:  a config with a task, and a model of any kind (`interop.models`).
Out: a run's folder with the best checkpoint, `evaluation.json` and `predictions/`; of several, a
     folder each and `summary.json` and `summary.png` above them.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

from albert_jax.config import Config, ModelConfig
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.interop import initial, models, tensors
from albert_jax.tasks import course as course_lib
from albert_jax.tasks.task import Task
from albert_jax.training import checkpoint, hosts, loop, program, sharding, step

# Of a config's model, what a fine-tuning may say; the rest is the model's that it starts from.
_OWN = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "dtype",
    "remat",
    "attention",
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a fine-tuning starts from.

    Attributes:
        path: where it lies.
        model: read from there.
        tokenizer: its own.
        fresh: take its shape and tokenizer alone, with random weights.
    """

    path: pathlib.Path
    model: tensors.Model
    tokenizer: Tokenizer
    fresh: bool = False


def origin(path: pathlib.Path, given: str | None = None, fresh: bool = False) -> Origin:
    """The model at `path`.

    Raises:
        UserError: none there, or one without a tokenizer where none is `given`.
    """
    model = models.read(path)
    tokenizer = models.read_tokenizer(path, model, given)
    if tokenizer is None:
        raise UserError(f"--init={path} has no tokenizer; name its file with --tokenizer.")
    return Origin(path, model, tokenizer, fresh)


def adapted(config: Config, start: Origin) -> tuple[Config, list[str]]:
    """The config with the model that it starts from, and notes of what had to change for it."""
    theirs, notes = start.model.config, []
    own = {name: getattr(config.model, name) for name in _OWN}
    model: ModelConfig = dataclasses.replace(theirs, **own, sentence_objective="none")
    data = config.data
    longest = theirs.max_position_embeddings - theirs.position_offset
    if data.max_seq_length > longest:
        notes.append(
            f"data.max_seq_length={data.max_seq_length} becomes {longest}, the most that "
            f"{start.path} reads"
        )
        data = dataclasses.replace(data, max_seq_length=longest, max_predictions_per_seq=1)
    return dataclasses.replace(config, model=model, data=data), notes


def run(
    config: Config,
    start: Origin,
    workdir: pathlib.Path,
    processes: hosts.Hosts,
    say: Callable[[str], None],
    task: Task,
    fixed: Collection[str] = (),
    profile: tuple[int, int] | None = None,
    started: float | None = None,
) -> dict[str, dict[str, float]] | None:
    """One fine-tuning, from wherever it stands.

    Args:
        config: adapted.
        start: the model.
        workdir: the run's folder.
        processes: that make the run together.
        say: prints on the leader.
        task: read with the model's tokenizer.
        fixed: fields that the person has set, as `course.resolve` wants them.
        profile, started: as in `loop.train`.

    Returns:
        The best checkpoint's figures by split; None where a signal stopped the run.

    Raises:
        UserError: as `loop.train`.
    """
    config = course_lib.resolve(config, task, start.tokenizer, fixed)
    made = program.build(config, sharding.make_mesh(config, jax.devices()))
    say(program.describe(made))
    taught = course_lib.Course(made, task, start.tokenizer)

    def begin(state: step.TrainState) -> step.TrainState:
        if start.fresh:
            return state
        fitting = _fitting(start.model, state)
        anew = ", ".join(initial.fresh(fitting, state))
        say(f"starts from {start.path}" + (f"; from nothing: {anew}" if anew else ""))
        return initial.started(state, fitting, slots=False)

    if not loop.train(made, taught, workdir, processes, profile, started, begin):
        return None
    params, number = checkpoint.read_params(workdir, made.abstract_state.params, best=True)
    folder = workdir / "predictions" if processes.leader else None
    found = course_lib.judge(made, params, task, start.tokenizer, folder)
    if processes.leader:
        record = {"step": number, "judged_by": task.best_by, "splits": found}
        text = json.dumps(record, indent=2) + "\n"
        (workdir / "evaluation.json").write_text(text, encoding="utf-8")
    for name, figures in found.items():
        say(f"best checkpoint, step {number}, {name}: {course_lib.described(figures)}")
    return found


def variants(config: Config, seeds: int) -> Iterator[tuple[str, Config]]:
    """A name and a config for every combination of the sweep's values, and every seed.

    The only one's name is empty.
    """
    grid = []
    for field in dataclasses.fields(config.sweep):
        values = config.sweep.values(field.name)
        grid.append([(field.name, value) for value in values] or [(field.name, None)])
    for chosen in itertools.product(*grid):
        asked = {name: value for name, value in chosen if value is not None}
        train, optimizer = config.train, config.optimizer
        if "learning_rate" in asked:
            optimizer = dataclasses.replace(optimizer, learning_rate=asked["learning_rate"])
        if "global_batch_size" in asked:
            size = int(asked["global_batch_size"])
            train = dataclasses.replace(train, global_batch_size=size)
        if "epochs" in asked:
            train = dataclasses.replace(train, epochs=asked["epochs"])
        name = ",".join(f"{field}={value:g}" for field, value in asked.items())
        chosen_config = dataclasses.replace(config, train=train, optimizer=optimizer)
        for seed in range(seeds):
            folders = [name, f"seed_{seed}" if seeds > 1 else ""]
            seeded = chosen_config.with_seeds(train.seed + seed, config.data.seed + seed)
            yield "/".join(filter(None, folders)), seeded


def summarise(
    workdir: pathlib.Path, figure: str, found: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> str:
    """Writes `summary.json` and `summary.png` of several runs; returns the table.

    Args:
        workdir: above the runs.
        figure: the one that they are judged by, of their first split.
        found: by run, its figures by split.
    """
    groups: dict[str, list[float]] = {}
    for name, splits in found.items():
        group = name.rpartition("seed_")[0].rstrip("/") or "all seeds"
        if "seed_" not in name:
            group = name
        groups.setdefault(group, []).append(next(iter(splits.values()))[figure])
    rows = {
        name: {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "best": max(values),
            "runs": len(values),
        }
        for name, values in groups.items()
    }
    record = {"judged_by": figure, "summary": rows, "runs": found}
    text = json.dumps(record, indent=2) + "\n"
    (workdir / "summary.json").write_text(text, encoding="utf-8")
    _draw(workdir / "summary.png", figure, groups)
    width = max(len(name) for name in rows)
    lines = [f"{figure:{width}}      mean  deviation      best  runs"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        lines.append(
            f"{name:{width}}  {row['mean']:8.4f}   {row['deviation']:8.4f}  {row['best']:8.4f}"
            f"  {row['runs']:4}"
        )
    return "\n".join(lines)


def _draw(path: pathlib.Path, figure: str, groups: Mapping[str, Sequence[float]]) -> None:
    """Every run as a dot, the mean of a group as a line."""
    canvas = Figure(figsize=(7, 1.2 + 0.4 * len(groups)), layout="constrained")
    axes = canvas.add_subplot()
    for place, values in enumerate(groups.values()):
        axes.plot(values, [place] * len(values), "o", color="#3b6ea5", alpha=0.6)
        axes.plot([statistics.fmean(values)] * 2, [place - 0.25, place + 0.25], color="#d1603d")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xlabel(f"{figure.replace('_', ' ')}; every run, and the mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    canvas.savefig(path, dpi=110)


def _fitting(model: tensors.Model, state: step.TrainState) -> tensors.Model:
    """The model without the parts that have other shapes in `state`: a head of other labels."""

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    fits = {
        name: part
        for name, part in model.params.items()
        if name in state.params and shapes(part) == shapes(state.params[name])
    }
    return dataclasses.replace(model, params=fits)
