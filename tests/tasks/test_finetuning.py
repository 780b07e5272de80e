"""Fine-tuning through the commands: what a run leaves, that a kill changes nothing, several seeds,
early stopping, and that an exported model answers as ours does.
"""

import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest
import small_store

from albert_jax import config
from albert_jax.tasks import course, finetuning

pytestmark = pytest.mark.usefixtures("compiles_fast")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SIZES = (
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.data.max_seq_length=32",
    "--config.data.max_predictions_per_seq=5",
)
TIMED = ("_seconds", "goodput", "examples_per_second")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a pretrained run and a table of two classes that their signs tell apart."""
    folder = tmp_path_factory.mktemp("finetuning")
    store = small_store.make(folder)
    small_store.run_here(
        "train",
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        *SIZES,
        "--config.train.steps=20",
        f"--config.data.path={store}",
        f"--workdir={folder / 'base'}",
    )
    rng = random.Random(1)
    for name, rows in (("train.csv", 240), ("dev.csv", 61)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for sentence in small_store.sentences(rng.randrange(10**6), rows):
                # Of some rows more than one sentence, so that there are several lengths.
                text = " ".join([sentence, *["It is so."] * rng.randrange(4)])
                loud = rng.random() < 0.5
                writer.writerow([f"! {text}" if loud else text, "loud" if loud else "low"])
    return folder


def arguments(place: pathlib.Path, workdir: pathlib.Path, *more: str) -> tuple[str, ...]:
    return (
        f"--config={ROOT / 'configs' / 'table.py'}",
        f"--init={place / 'base'}",
        f"--data={place}",
        "--config.task.train=train.csv",
        "--config.task.validation=dev.csv",
        f"--workdir={workdir}",
        "--config.model.dtype=float32",
        "--config.model.hidden_dropout_prob=0.1",
        "--config.optimizer.learning_rate=1e-3",
        "--config.train.epochs=6",
        "--config.log.every_steps=1",
        "--config.checkpoint.every_steps=3",
        "--config.eval.every_steps=5",
        *more,
    )


@pytest.fixture(scope="module")
def tuned(place: pathlib.Path) -> pathlib.Path:
    small_store.run_here("finetune", *arguments(place, place / "tuned"))
    return place / "tuned"


def numbers(workdir: pathlib.Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(TIMED)}
        for line in lines
    ]


def test_a_run_learns_and_leaves_figures_predictions_and_pictures(place, tuned):
    record = json.loads((tuned / "evaluation.json").read_text())
    assert record["splits"]["validation"]["accuracy"] > 0.85
    judged = [row for row in numbers(tuned) if row.get("split") == "validation"]
    best = max(judged, key=lambda row: row["score"])
    assert record["step"] == best["step"]
    assert record["splits"]["validation"]["accuracy"] == best["accuracy"]
    with (place / "dev.csv").open(newline="") as file:
        gold = [row["label"] for row in csv.DictReader(file)]
    with (tuned / "predictions" / "predictions_validation.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    hits = [row["prediction"] == label for row, label in zip(rows, gold, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(best["accuracy"])
    for name in ("overview", "confusion", "loss"):
        assert (tuned / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    again = small_store.run_here("finetune", *arguments(place, tuned))
    assert "is trained already" in again.stderr + again.stdout


def test_a_kill_in_the_middle_changes_no_number(place, tuned, tmp_path):
    workdir = tmp_path / "killed"
    for after in (4, 13):
        process = subprocess.Popen(
            small_store.command("finetune", *arguments(place, workdir)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            lines = (workdir / "metrics.jsonl").exists() and numbers(workdir)
            if lines and lines[-1]["step"] >= after:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        assert process.wait() == -signal.SIGKILL
    small_store.run_here("finetune", *arguments(place, workdir))
    assert numbers(workdir) == numbers(tuned)
    assert (workdir / "evaluation.json").read_text() == (tuned / "evaluation.json").read_text()
    other = small_store.run_here(
        "finetune", *arguments(place, workdir, "--config.train.epochs=7"), expect=1
    )
    assert "train.steps" in other.stderr


def test_seeds_and_a_grid_make_a_run_each_and_a_summary(place, tmp_path):
    done = small_store.run_here(
        "finetune",
        *arguments(place, tmp_path, "--seeds=2", "--config.sweep.learning_rate=1e-4,1e-3"),
        "--config.train.epochs=1",
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["summary"]) == {"learning_rate=0.0001", "learning_rate=0.001"}
    for name, row in summary["summary"].items():
        values = [
            json.loads((tmp_path / name / f"seed_{seed}" / "evaluation.json").read_text())
            for seed in range(2)
        ]
        scores = [value["splits"]["validation"][summary["judged_by"]] for value in values]
        assert row["mean"] == pytest.approx(sum(scores) / 2)
        assert row["best"] == max(scores)
        assert name in done.stdout
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")

    # Seeds share what is compiled, and nothing else: a run by itself has the same numbers.
    alone, series = tmp_path / "alone", tmp_path / "learning_rate=0.0001"
    small_store.run_here(
        "finetune",
        *arguments(place, alone, "--config.train.seed=1", "--config.data.seed=1"),
        *("--config.optimizer.learning_rate=1e-4", "--config.train.epochs=1"),
    )
    assert numbers(alone) == numbers(series / "seed_1") != numbers(series / "seed_0")


def test_patience_ends_a_run_that_gets_no_better(place, tmp_path):
    more = ("--config.eval.patience=2", "--config.optimizer.learning_rate=1e-9")
    small_store.run_here("finetune", *arguments(place, tmp_path, *more))
    judged = [row for row in numbers(tmp_path) if row.get("split") == "validation"]
    assert len(judged) == 3  # one that was best, and two that were no better
    again = small_store.run_here("finetune", *arguments(place, tmp_path, *more))
    assert "is trained already" in again.stderr + again.stdout
    assert len([row for row in numbers(tmp_path) if "split" in row]) == 3


def test_an_exported_model_classifies_as_predict_does(place, tuned, tmp_path):
    import transformers

    texts = [small_store.sentences(seed, 1)[0] for seed in range(4)] + ["! It is so."]
    ours = [
        json.loads(line)
        for line in small_store.run_here(
            "predict", "classify", f"--model={tuned}", "--json", *texts
        ).stdout.splitlines()
    ]
    folder = tmp_path / "exported"
    small_store.run_here("convert", f"--model={tuned}", "--to=huggingface", f"--output={folder}")
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    for text, answer, theirs in zip(texts, ours, pipeline(texts), strict=True):
        assert answer["text"] == text
        for one in theirs:
            assert answer["probabilities"][one["label"]] == pytest.approx(one["score"], abs=1e-5)


def test_a_head_of_other_labels_starts_anew_and_the_encoder_does_not(place, tuned, tmp_path):
    table = tmp_path / "many.csv"
    rows = [
        f"{sentence},class {number % 40}"
        for number, sentence in enumerate(small_store.sentences(5, 200))
    ]
    table.write_text("\n".join(["text,label", *rows, '"never\nclosed,class 1', ""]))
    base = (f"--config={ROOT / 'configs' / 'table.py'}", f"--data={table}", f"--init={tuned}")
    broken = small_store.run_here("finetune", *base, f"--workdir={tmp_path / 'b'}", expect=1)
    assert "many.csv" in broken.stderr
    assert "202" in broken.stderr  # the line on which the quote was opened
    assert "Traceback" not in broken.stderr
    table.write_text("\n".join(["text,label", *rows, '"two\nlines",class 1', ",class 2", ""]))
    done = small_store.run_here(
        "finetune",
        *base,
        f"--workdir={tmp_path / 'many'}",
        "--config.train.epochs=1",
        "--config.model.dtype=float32",
    )
    assert "from nothing: classifier" in done.stdout
    assert "row without a text, left out" in done.stderr
    labels = config.read_workdir(tmp_path / "many").task.label_names
    assert len(labels) == 40


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--config.task.label=topic",), "topic"),
        (("--config.task.train=none.csv",), "none.csv"),
        (("--config.task.name=mood",), "mood"),
        (("--init=nowhere",), "nowhere"),
        (("--seeds=0",), "--seeds=0"),
        (("--config.sweep.epochs=a,b",), "sweep.epochs"),
    ],
)
def test_a_mistake_is_one_message(place, tmp_path, flags, said):
    done = small_store.run_here("finetune", *arguments(place, tmp_path / "run"), *flags, expect=1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_grid_is_every_combination():
    cfg = config.Config(sweep=config.SweepConfig("1e-5,2e-5", "8", "2,3"))
    made = dict(finetuning.variants(cfg, 2))
    assert len(made) == 8
    one = made["learning_rate=2e-05,global_batch_size=8,epochs=3/seed_1"]
    assert (one.optimizer.learning_rate, one.train.global_batch_size) == (2e-5, 8)
    assert (one.train.epochs, one.train.seed, one.data.seed) == (3, 1, 1)
    assert [name for name, _ in finetuning.variants(config.Config(), 1)] == [""]


def test_every_task_has_a_module_and_a_recipe():
    for name, module in course.MODULES.items():
        assert (ROOT / "albert_jax" / "tasks" / f"{module}.py").exists(), name


def questions(path: pathlib.Path, seed: int) -> None:
    """A file of SQuAD 2.0: what is seen in each sentence, and what nobody sees."""
    paragraphs = []
    for number, text in enumerate(small_store.sentences(seed, 24)):
        words = text.split()
        answer = {"text": words[4], "answer_start": len(" ".join(words[:4])) + 1}
        shown = {
            "context": text,
            "qas": [
                {
                    "id": f"{seed}-{number}",
                    "question": f"What {words[2]} the {words[1]}?",
                    "answers": [answer],
                    "is_impossible": False,
                },
                {
                    "id": f"{seed}-{number}-none",
                    "question": "What is it?",
                    "answers": [],
                    "is_impossible": True,
                },
            ],
        }
        paragraphs.append(shown)
    content = {"version": "v2.0", "data": [{"title": "It", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("head", ["conditional", "plain"])
def test_unanswerable_questions_are_learnt_judged_and_answered(
    place: pathlib.Path, tmp_path: pathlib.Path, head: str
):
    questions(tmp_path / "train-v2.0.json", 1)
    questions(tmp_path / "dev-v2.0.json", 2)
    workdir = tmp_path / "run"
    small_store.run_here(
        "finetune",
        f"--config={ROOT / 'configs' / 'squad.py'}:v2",
        f"--init={place / 'base'}",
        f"--data={tmp_path}",
        f"--workdir={workdir}",
        f"--config.task.answer_head={head}",
        "--config.task.max_query_length=8",
        "--config.data.max_seq_length=32",
        "--config.train.epochs=1",
        "--config.train.global_batch_size=8",
    )
    found = json.loads((workdir / "evaluation.json").read_text())["splits"]["validation"]
    assert {"exact", "f1", "best_exact", "best_f1"} <= set(found)
    told = small_store.run_here("evaluate", f"--workdir={workdir}", "--json=-").stdout
    assert json.loads(told)["splits"]["validation"] == pytest.approx(found)
    said = small_store.run_here(
        "predict",
        "answer",
        f"--model={workdir}",
        "--context=The cat sees the dog near the bridge.",
        "--json",
        "What sees the cat?",
    ).stdout
    assert {"answer", "probability"} <= set(json.loads(said))
