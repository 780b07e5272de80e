"""The clock's arithmetic over several lives of a run, and the watchdog."""

import time

import pytest

from albert_jax.training import goodput, hosts


def test_each_second_belongs_to_one_kind():
    began = time.monotonic()
    clock = goodput.Clock(began - 10.0)  # a start that took ten seconds
    clock.turn_to("step")
    time.sleep(0.05)
    with clock.during("evaluation"):
        time.sleep(0.1)
        with clock.during("data_wait"):
            time.sleep(0.03)
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - began + 10.0, abs=0.02)
    for kind, least in {
        "restart": 10.0,
        "step": 0.05,
        "evaluation": 0.1,
        "data_wait": 0.03,
    }.items():
        assert least <= seconds[kind] < least + 0.05
    fields = clock.fields()
    assert fields["goodput"] == pytest.approx(seconds["step"] / sum(seconds.values()), rel=0.1)
    assert goodput.read_fields(fields) == pytest.approx(seconds, abs=0.02)


def test_what_came_after_the_checkpoint_was_lost():
    clock = goodput.Clock(time.monotonic() - 3.0)
    checkpoint = {"step": 100.0, "compile": 20.0, "restart": 5.0}
    reached = {"step": 130.0, "compile": 20.0, "evaluation": 7.0, "restart": 5.0}
    clock.rewind(checkpoint, reached)
    seconds = clock.seconds()
    assert (seconds["step"], seconds["compile"], seconds["evaluation"]) == (100.0, 20.0, 0.0)
    assert seconds["restart"] == pytest.approx(5.0 + 37.0 + 3.0, abs=0.1)


def test_a_checkpoint_later_than_the_last_line_lost_nothing():
    clock = goodput.Clock()
    clock.rewind({"step": 100.0}, {"step": 90.0})
    assert clock.seconds()["step"] == 100.0
    assert clock.seconds()["restart"] < 0.1


def test_a_roll_back_in_one_life_loses_what_was_done_since():
    clock = goodput.Clock(time.monotonic() - 50.0)
    clock.turn_to("step")
    clock.rewind({"restart": 20.0, "step": 10.0})
    seconds = clock.seconds()
    assert seconds["restart"] == pytest.approx(40.0, abs=0.1)
    assert seconds["step"] == pytest.approx(10.0, abs=0.1)


def test_the_watchdog_does_not_mind_slow_progress(tmp_path):
    clock = goodput.Clock()
    with goodput.Watchdog(clock, 0.2 / 60, tmp_path, hosts.Hosts()):
        for _ in range(8):
            time.sleep(0.05)
            clock.moved()
    assert not list(tmp_path.iterdir())
