"""A schedule is read as it is meant, and refused where it cannot be followed."""

import dataclasses
import pathlib

import pytest

from albert_jax import config, curriculum
from albert_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = str(ROOT / "configs" / "base.py")


def load(schedule: str, *overrides: str) -> config.Config:
    return config.load(BASE, ["train.steps=125000", f"data.schedule={schedule}", *overrides])


def test_without_a_schedule_all_batches_are_alike():
    cfg = load("")
    (stage,) = cfg.stages
    assert dataclasses.astuple(stage) == (0, 0, 512, 4096, 0.15, 77)
    assert cfg.at(stage) == cfg


def test_stages_follow_each_other_without_a_gap():
    stages = load("0:128:4_096:0.2, 90000:512:1024,100000:128:8:0.15").stages
    assert [dataclasses.astuple(stage) for stage in stages] == [
        # 77 of 512 at 15 % are 25.7 of 128 at 20 %, and as many at 15 %: one program a length
        (0, 0, 128, 4096, 0.2, 26),
        (90_000, 90_000 * 4096, 512, 1024, 0.15, 77),
        (100_000, 90_000 * 4096 + 10_000 * 1024, 128, 8, 0.15, 26),
    ]
    assert curriculum.stage_of(stages, 0) is stages[0]
    assert curriculum.stage_of(stages, 89_999) is stages[0]
    assert curriculum.stage_of(stages, 90_000) is stages[1]
    assert curriculum.stage_of(stages, 10**9) is stages[2]
    assert stages[1].example(90_002) == stages[1].first_example + 2048
    assert curriculum.steps(stages, 95_000) == [(stages[0], 90_000), (stages[1], 5_000)]


def test_a_stage_is_a_config_of_its_own():
    cfg = load("0:128:4096:0.2,90000:512:1024")
    short = cfg.at(cfg.stages[0])
    by_hand = config.load(
        BASE,
        [
            "train.steps=125000",
            "data.max_seq_length=128",
            "data.masked_lm_prob=0.2",
            "data.max_predictions_per_seq=26",
        ],
    )
    assert short == by_hand


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0:128", "'0:128' is not STEP:LENGTH:BATCH or STEP:LENGTH:BATCH:MASKED"),
        ("0:128:x", "'0:128:x' is not STEP"),
        ("0:128:8,", "'' is not STEP"),
        ("0:128:8:0.2:3", "is not STEP"),
        ("5:128:8", "its steps are 5; the first must be 0"),
        (
            "0:128:8,90:256:8,90:512:8",
            "its steps are 0, 90, 90; the first must be 0, and each later",
        ),
        ("0:1024:8", "the length 1024 from step 0 on is more than data.max_seq_length=512"),
        ("0:4:8", "in '0:4:8', the length 4 must be at least 8"),
        ("0:128:0", "the batch 0 must be at least 1"),
        ("0:128:8:0.95", "the masked share 0.95 must lie between 0.01 and 0.9"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(schedule: str, message: str):
    with pytest.raises(UserError) as caught:
        load(schedule)
    assert message in str(caught.value)


def test_a_fine_tuning_has_no_schedule():
    with pytest.raises(UserError, match=r"task\.name=mrpc takes its lengths from its rows"):
        load("0:128:8", "task.name=mrpc")


def test_warnings_are_of_the_batches_that_the_schedule_names():
    assert config.recipe_warnings(load("0:128:4096,90000:512:1024")) == []
    (warning,) = config.recipe_warnings(
        load("0:128:64,90000:512:4096", "optimizer.warmup_steps=49")
    )
    assert "data.schedule's first batch=64; 0.000221 fits" in warning
    (late,) = config.recipe_warnings(load("0:128:4096,125000:512:1024"))
    assert "what holds from step 125000 on is never reached in train.steps=125000" in late
