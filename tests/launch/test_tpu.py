"""launch/tpu.sh against a fake gcloud: what it asks for, what it says, and what it does when a call
fails. Time is a file that the fake `sleep` moves on, so that hours of waiting cost nothing.
"""

import ast
import dataclasses
import marshal
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHERE = ("--name=albert", "--zone=us-west4-a", "--project=my-project")
TRAIN = ("--", "--config=configs/xxlarge.py", "--workdir=/bucket/runs/a b", "--config.x=$HOME;'q'")
CREATE = ("create", *WHERE, "--type=v5litepod-256")
HEAL = ("heal", *WHERE, "--type=v5litepod-256", "--spot", "--bucket=b-1", "--yes")
# All that the scripts find in PATH: a real gcloud must be out of reach of every test.
TOOLS = ["awk", "bash", "cat", "dirname", "grep", "gzip", "head", "mkdir", "mktemp", "mv", "rm"]
TOOLS += ["sed", "sort", "tail", "tar", "tee"]
COMMANDS = {
    "create": CREATE,
    "setup": ("setup", *WHERE, "--bucket=b-1"),
    "run": ("run", *WHERE, *TRAIN),
    "status": ("status", *WHERE),
    "logs": ("logs", *WHERE, "--worker=3"),
    "ssh": ("ssh", *WHERE, "--worker=3"),
    "stop": ("stop", *WHERE),
    "delete": ("delete", *WHERE, "--yes"),
    "heal": (*HEAL, "--budget_hours=5", *TRAIN),
}
SSH_LOST = "ERROR: (gcloud.compute.tpus) [/usr/bin/ssh] exited with return code [255]."
UP: dict[str, Any] = {"type": "v5litepod-256", "slices": "", "created": 0, "setup": True}


@dataclasses.dataclass
class Cloud:
    """A machine with the fake gcloud, and what happens in its cloud.

    `lives`: what becomes of each resource created, in turn: `wait` seconds in the queue,
    `preempted_after` seconds up, `training` = [seconds, exit code].
    `failures`: calls that fail: `verb`, `match` (in the ssh command), `times`, `stderr`.
    """

    folder: pathlib.Path
    environment: dict[str, str]

    def world(self, now: dict | None = None, lives: Sequence = (), failures: Sequence = ()) -> None:
        if now is not None:
            now = {"kind": "queued-resources", "started": None, **UP, **now}
        world = {"now": now, "lives": list(lives), "failures": list(failures)}
        (self.folder / "world").write_bytes(marshal.dumps(world))

    def run(self, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "tpu.sh"), *arguments],
            env=self.environment,
            cwd=self.folder,
            input=answer,
            text=True,
            capture_output=True,
            timeout=300,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [ast.literal_eval(line) for line in lines]

    def verbs(self, *wanted: str) -> list[str]:
        """What was called, in order: all but looking, or only `wanted`."""
        return [
            verb
            for verb in self.every_verb()
            if (verb in wanted if wanted else verb not in ("describe", "status"))
        ]

    def every_verb(self) -> list[str]:
        """The verb of each call, for ssh that of the worker's script."""
        words = []
        for call in self.calls:
            verb = call[3]
            if verb == "ssh":
                command = next(word for word in call if word.startswith("--command="))
                found = [w for w in ("setup", "start", "status", "stop") if f"sh {w}" in command]
                verb = found[0] if found else "tail"
            words.append(verb)
        return words

    @property
    def clock(self) -> int:
        return int((self.folder / "clock").read_text())


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(
            shutil.which(tool) or pytest.fail(f"no {tool} on this machine")
        )
    fake = (ROOT / "tests" / "launch" / "fake_gcloud.py").read_text()
    scripts = {
        "gcloud": f"#!{sys.executable} -SE\n{fake}",
        "sleep": '#!/bin/sh\necho $(($(cat "$FAKE_CLOUD/clock") + $1)) >"$FAKE_CLOUD/clock"\n',
        "date": '#!/bin/sh\ncat "$FAKE_CLOUD/clock"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "clock").write_text("1000000")
    environment = {
        "PATH": str(programs),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "FAKE_CLOUD": str(tmp_path),
    }
    made = Cloud(tmp_path, environment)
    made.world()
    return made


def printed_commands(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    lines = [line for line in done.stdout.splitlines() if not line.startswith("tpu.sh: ")]
    return [shlex.split(line) for line in lines]


# --- dry runs and checks ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_prints_commands_that_name_the_resource_and_runs_none(cloud: Cloud, command: str):
    before = sorted(cloud.folder.rglob("*"))
    dry = [word for word in COMMANDS[command] if word != "--yes"]
    done = cloud.run(dry[0], "--dry_run", *dry[1:])
    assert done.returncode == 0, done.stderr
    assert cloud.calls == []
    assert sorted(cloud.folder.rglob("*")) == before
    gcloud = [words for words in printed_commands(done) if words[0] == "gcloud"]
    assert gcloud
    for words in gcloud:
        assert words[1:3] == ["compute", "tpus"]
        assert any(word.split(":")[0] == "albert" for word in words[5:7])
        assert {"--zone=us-west4-a", "--project=my-project"} <= set(words)


@pytest.mark.parametrize("command", ["create", "status", "stop", "delete", "logs"])
def test_dry_run_prints_what_is_run(cloud: Cloud, command: str):
    cloud.world(now={"started": 999_000} if command != "create" else None, lives=[{}])
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 0, done.stderr
    dry = cloud.run(command, "--dry_run", *COMMANDS[command][1:])
    assert [words[1:] for words in printed_commands(dry)] == cloud.calls


WRONG = {
    "a capital in the name": ("create", "--name=Albert", "--zone=us-west4-a", "--type=v4-8"),
    "a name that ends in -": ("create", "--name=a-", "--zone=us-west4-a", "--type=v4-8"),
    "no name": ("delete", "--zone=us-west4-a"),
    "a name like an option": ("delete", "--name=--force", "--zone=us-west4-a"),
    "a region as zone": ("create", "--name=a", "--zone=us-west4", "--type=v4-8"),
    "no zone": ("status", "--name=a"),
    "no type": ("create", *WHERE),
    "an unknown type": ("create", *WHERE, "--type=v9-8"),
    "a GPU": ("create", *WHERE, "--type=a100-8"),
    "a size that no v5e has": ("create", *WHERE, "--type=v5litepod-48"),
    "a size beyond v4": ("create", *WHERE, "--type=v4-16384"),
    "a size between": ("create", *WHERE, "--type=v5p-96"),
    "something after the size": ("create", *WHERE, "--type=v4-8-8"),
    "no slices": ("create", *WHERE, "--type=v4-8", "--slices=0"),
    "two plain slices": ("create", *WHERE, "--type=v4-8", "--slices=2", "--plain"),
    "a bucket with a folder": ("setup", *WHERE, "--bucket=gs://b-1/runs"),
    "nothing to run": ("run", *WHERE),
    "training arguments for stop": ("stop", *WHERE, *TRAIN),
    "an unknown option": ("create", *WHERE, "--type=v4-8", "--sopt"),
    "an unknown command": ("destroy", *WHERE),
    "heal without a budget": (*HEAL, *TRAIN),
    "heal with no budget at all": (*HEAL, "--budget_hours=0.0", *TRAIN),
    "heal without a bucket": ("heal", *WHERE, "--type=v4-8", "--budget_hours=1", *TRAIN),
    "heal with a workdir on the disk": (*HEAL, "--budget_hours=1", "--", "--workdir=runs/a"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_called(cloud: Cloud, arguments: tuple[str, ...]):
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert cloud.calls == []


# --- create -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "chips", "kind", "asked"),
    [
        (["--type=v5litepod-256"], 256, "queued-resources", ["--node-id=albert"]),
        (["--type=v4-1024", "--spot"], 512, "queued-resources", ["--spot", "--node-id=albert"]),
        (
            ["--type=v5p-1024", "--slices=3"],
            1536,
            "queued-resources",
            ["--node-count=3", "--node-prefix=albert", "--runtime-version=v2-alpha-tpuv5"],
        ),
        (["--type=v6e-8", "--plain"], 8, "tpu-vm", ["--version=v2-alpha-tpuv6e"]),
        (["--type=v6e-8", "--plain", "--spot"], 8, "tpu-vm", ["--spot"]),
        (["--type=v4-8", "--version=mine"], 4, "queued-resources", ["--runtime-version=mine"]),
    ],
)
def test_create_shows_what_will_cost_then_asks_for_it(
    cloud: Cloud, options: list[str], chips: int, kind: str, asked: list[str]
):
    cloud.world(lives=[{"wait": 95}])
    done = cloud.run("create", *WHERE, *options)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "albert in us-west4-a (project my-project)" in first
    assert f"= {chips} chips" in first
    assert ("spot" in first) == ("--spot" in options)
    call = cloud.calls[0]
    assert call[:5] == ["compute", "tpus", kind, "create", "albert"]
    assert {*asked, options[0].replace("--type", "--accelerator-type")} <= set(call)
    assert ("--spot" in call) == ("--spot" in options)
    assert "setup --name=albert" in done.stdout.splitlines()[-1]


def test_create_waits_in_the_queue_until_the_slice_is_up(cloud: Cloud):
    cloud.world(lives=[{"wait": 200}])
    done = cloud.run(*CREATE)
    assert done.returncode == 0
    assert "WAITING_FOR_RESOURCES" in done.stdout
    assert cloud.clock >= 1_000_200


FAILURES = {
    "quota": (
        "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
        "'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone.",
        ["TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI", "--zone", "--spot", "Quotas"],
    ),
    "capacity": (
        '{"code": 8, "message": "There is no more capacity in the zone \\"us-west4-a\\""}',
        ["queue", "--zone", "later"],
    ),
    "exists": ("ALREADY_EXISTS: Resource 'albert' already exists", ["--name", "status", "delete"]),
    "login": (
        "ERROR: You do not currently have an active account selected. Please run:\n"
        "  $ gcloud auth login",
        ["gcloud auth login"],
    ),
    "API off": (
        "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.",
        ["gcloud services enable tpu.googleapis.com"],
    ),
    "rights": (
        "PERMISSION_DENIED: Permission denied on 'locations/us-west4-a' (or it may not exist).",
        ["us-west4-a", "TPU Admin"],
    ),
    "type": (
        "ERROR: INVALID_ARGUMENT: Accelerator type v5litepod-256 is not found in the zone.",
        ["accelerator-types list --zone=us-west4-a"],
    ),
    "version": ("Runtime version 'x' does not exist", ["versions list --zone=us-west4-a"]),
}


@pytest.mark.parametrize(("stderr", "advice"), FAILURES.values(), ids=FAILURES)
def test_each_failure_of_create_ends_with_what_to_do(cloud: Cloud, stderr: str, advice: list[str]):
    cloud.world(failures=[{"verb": "create", "match": "", "times": 1, "stderr": stderr}])
    done = cloud.run(*CREATE)
    assert done.returncode == 1
    assert stderr.splitlines()[-1] in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for words in advice:
        assert words in last
    assert cloud.verbs() == ["create"]


@pytest.mark.parametrize("kind", ["queued", "plain"])
def test_preempted_while_it_is_created(cloud: Cloud, kind: str):
    cloud.world(lives=[{"wait": 300, "preempted_after": 0, "ends_as": "PREEMPTED"}])
    done = cloud.run(*CREATE, *(["--plain"] if kind == "plain" else []))
    assert done.returncode == 1
    assert "preempted" in done.stderr
    assert "delete --name=albert --zone=us-west4-a" in done.stderr


def test_gcloud_missing(cloud: Cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    done = cloud.run(*CREATE)
    assert done.returncode == 1
    assert "Install the Google Cloud CLI" in done.stderr


# --- setup, run and the rest --------------------------------------------------------------------


def test_setup_sends_the_package_to_all_workers_and_mounts_the_bucket(cloud: Cloud):
    cloud.world(now={"setup": False})
    done = cloud.run("setup", *WHERE, "--bucket=gs://b-1/")
    assert done.returncode == 0, done.stderr
    assert "= 256 chips" in done.stdout.splitlines()[0]
    with tarfile.open(cloud.folder / "sent-albert.tgz") as archive:
        sent = set(archive.getnames())
    assert {"albert_jax/train.py", "configs/xxlarge.py", "launch/worker.sh"} <= sent
    assert {"pyproject.toml", "requirements.txt", "README.md"} <= sent
    assert not any("__pycache__" in name or name.startswith((".", "runs")) for name in sent)
    scp, ssh = cloud.calls[-2:]
    for call in (scp, ssh):
        assert "--worker=all" in call
    assert "albert:albert_jax.tgz" in scp
    assert ssh[:5] == ["compute", "tpus", "tpu-vm", "ssh", "albert"]
    assert any(word.endswith("worker.sh setup b-1") for word in ssh)


def test_what_was_created_plainly_is_found_without_saying_so(cloud: Cloud):
    cloud.world(now={"kind": "tpu-vm"})
    assert cloud.run(*COMMANDS["setup"]).returncode == 0
    assert [call[2] for call in cloud.calls] == ["queued-resources", *["tpu-vm"] * 3]


def test_every_slice_is_set_up_and_started(cloud: Cloud):
    cloud.world(now={"slices": "3"})
    for command in ("setup", "run"):
        done = cloud.run(*COMMANDS[command])
        assert done.returncode == 0, done.stderr
        assert "3 x v5litepod-256 = 768 chips" in done.stdout.splitlines()[0]
    for what in ("scp", "setup", "start"):
        calls = [
            call for call, verb in zip(cloud.calls, cloud.every_verb(), strict=True) if verb == what
        ]
        assert sorted(call[5 if what == "scp" else 4] for call in calls) == [
            f"albert-{slice}" + ":albert_jax.tgz" * (what == "scp") for slice in range(3)
        ]


def test_a_slice_that_cannot_be_reached_fails_the_command(cloud: Cloud):
    lost = {"verb": "ssh", "match": "sh stop", "times": 1, "stderr": "Could not do it"}
    cloud.world(now={"slices": "3", "started": 1}, failures=[lost])
    assert cloud.run(*COMMANDS["stop"]).returncode == 1


@pytest.mark.parametrize(("command", "match"), [("setup", "sh setup"), ("run", "sh start")])
def test_ssh_that_comes_back_is_tried_again(cloud: Cloud, command: str, match: str):
    lost = {"verb": "ssh", "match": match, "times": 2, "stderr": SSH_LOST}
    cloud.world(now={}, failures=[lost])
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 0, done.stderr
    tried = [call for call in cloud.calls if any(match in word for word in call)]
    assert len(tried) == 3
    # The same run id each time: a worker that has started already is not asked for another run.
    assert tried[0] == tried[1] == tried[2]
    assert cloud.clock > 1_000_000


@pytest.mark.parametrize(("command", "match"), [("setup", "sh setup"), ("run", "sh start")])
def test_ssh_that_stays_lost_ends_with_what_to_do(cloud: Cloud, command: str, match: str):
    lost = {"verb": "ssh", "match": match, "times": 99, "stderr": SSH_LOST}
    cloud.world(now={}, failures=[lost])
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 1
    assert "status --name=albert" in done.stderr
    assert "tcp:22" in done.stderr
    assert len([c for c in cloud.calls if any(match in word for word in c)]) == 5


def test_run_passes_the_arguments_through_two_shells_unharmed(cloud: Cloud):
    cloud.world(now={})
    assert cloud.run(*COMMANDS["run"]).returncode == 0
    command = cloud.calls[-1][-4]
    assert command.startswith("--command=albert_jax/launch/worker.sh start ")
    assert shlex.split(command)[3:] == list(TRAIN[1:])
    assert "--worker=all" in cloud.calls[-1]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"started": 999_999}, "runs on albert already"),
        ({"setup": False}, "tpu.sh setup --name=albert"),
        ({"created": 999_999, "wait": 100}, "WAITING_FOR_RESOURCES"),
        ({"preempted_after": 10}, "is SUSPENDED: taken away or never made. Delete it"),
        (None, "no albert in us-west4-a"),
    ],
)
def test_run_refuses(cloud: Cloud, now: dict | None, words: str):
    cloud.world(now=now)
    done = cloud.run(*COMMANDS["run"])
    assert done.returncode == 1
    assert words in done.stderr
    assert "start" not in cloud.verbs()


def test_status_shows_state_workers_and_metrics(cloud: Cloud):
    cloud.world(now={"started": 999_000, "training": [500, 3]})
    done = cloud.run(*COMMANDS["status"])
    assert done.returncode == 0
    assert done.stdout.count("state=exited code=3") == 4
    assert done.stdout.count('metrics={"step": 7') == 1
    assert done.stdout.splitlines()[-1].endswith("failed 3")
    assert "albert in us-west4-a (project my-project): 1 x v5litepod-256" in done.stdout


def test_status_of_what_is_queued_asks_no_worker(cloud: Cloud):
    cloud.world(now={"created": 999_999, "wait": 100})
    done = cloud.run(*COMMANDS["status"])
    assert done.returncode == 0
    assert "WAITING_FOR_RESOURCES" in done.stdout
    assert len(cloud.calls) == 1


@pytest.mark.parametrize("command", ["setup", "run", "status", "logs", "ssh", "stop", "delete"])
def test_what_is_not_there_is_said(cloud: Cloud, command: str):
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 1
    assert "no albert in us-west4-a" in done.stderr
    assert {call[3] for call in cloud.calls} == {"describe"}


@pytest.mark.parametrize("command", ["setup", "run", "status", "logs", "stop", "delete"])
def test_not_logged_in(cloud: Cloud, command: str):
    stderr = "ERROR: There was a problem refreshing auth tokens: Reauthentication required."
    cloud.world(failures=[{"verb": "describe", "match": "", "times": 9, "stderr": stderr}])
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 1
    assert "gcloud auth login" in done.stderr.splitlines()[-1]
    assert len(cloud.calls) == 1


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_ssh_lost(cloud: Cloud, command: str):
    cloud.world(now={}, failures=[{"verb": "ssh", "match": "", "times": 99, "stderr": SSH_LOST}])
    done = cloud.run(*COMMANDS[command])
    assert done.returncode == 1
    assert "does not answer ssh" in done.stderr.splitlines()[-1]


def test_logs_and_ssh_go_to_the_worker_asked_for(cloud: Cloud):
    cloud.world(now={"started": 1, "slices": "2"})
    logs = cloud.run("logs", *WHERE, "--worker=3", "--slice=1")
    assert "step 7, loss 9.5" in logs.stdout
    assert {"albert-1", "--worker=3"} <= set(cloud.calls[-1])
    assert cloud.run(*COMMANDS["ssh"]).returncode == 0
    assert {"albert-0", "--worker=3"} <= set(cloud.calls[-1])
    assert not any(word.startswith("--command") for word in cloud.calls[-1])
    assert cloud.run("logs", *WHERE, "--slice=2").returncode == 2


def test_stop_gives_all_workers_time_to_save_and_says_that_the_slice_still_costs(cloud: Cloud):
    cloud.world(now={"started": 1})
    done = cloud.run(*COMMANDS["stop"], "--grace_seconds=77")
    assert done.returncode == 0
    assert any(word.endswith("worker.sh stop 77") for word in cloud.calls[-1])
    assert "still up and costs" in done.stdout
    assert "256 chips" in done.stdout


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_delete_asks_with_name_zone_and_state_and_takes_no_for_an_answer(cloud: Cloud, answer: str):
    cloud.world(now={})
    done = cloud.run("delete", *WHERE, answer=answer)
    assert done.returncode == 1
    assert "albert in us-west4-a (project my-project): 1 x v5litepod-256 = 256 chips" in done.stdout
    assert "ACTIVE" in done.stdout
    assert cloud.verbs() == []


def test_delete_takes_the_nodes_with_it(cloud: Cloud):
    cloud.world(now={})
    assert cloud.run("delete", *WHERE, answer="y\n").returncode == 0
    assert cloud.calls[-1][3:5] == ["delete", "albert"]
    assert "--force" in cloud.calls[-1]


def test_a_delete_that_fails_says_that_it_may_cost(cloud: Cloud):
    failure = {"verb": "delete", "match": "", "times": 1, "stderr": "INTERNAL: try again"}
    cloud.world(now={}, failures=[failure])
    done = cloud.run(*COMMANDS["delete"])
    assert done.returncode == 1
    assert "albert is still there, and costs money" in done.stderr


# --- heal ---------------------------------------------------------------------------------------

BUDGET = "--budget_hours=5"


def test_heal_sees_a_training_through_two_preemptions(cloud: Cloud):
    cloud.world(
        lives=[
            {"wait": 120, "preempted_after": 300},
            {"wait": 60, "preempted_after": 0, "ends_as": "SUSPENDED"},  # while it is created
            {"training": [200, 0]},
        ]
    )
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "setup", "start"]
    assert cloud.verbs() == [*once, "delete", "create", "delete", *once, "delete"]
    starts = [call[-4].split(" ", 3)[3] for call in cloud.calls if "sh start" in call[-4]]
    assert starts[0] == starts[1]
    assert "training is done" in done.stdout


def test_heal_makes_a_failed_training_anew(cloud: Cloud):
    cloud.world(lives=[{"training": [200, 1]}, {"training": [100, 0]}])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 0
    assert cloud.verbs("create", "start", "delete", "tail") == [
        *["create", "start", "tail", "delete"],
        *["create", "start", "delete"],
    ]


def test_heal_stops_within_its_budget_counted_over_its_own_restarts(cloud: Cloud):
    cloud.world(lives=[{"wait": 400}, {}])
    first = cloud.run(*HEAL, "--budget_hours=0.1", *TRAIN)
    assert first.returncode == 1
    assert "budget of 0.1 h is used up" in first.stdout
    assert cloud.verbs()[-2:] == ["stop", "delete"]
    assert 360 <= cloud.clock - 1_000_400 <= 500  # the queue does not count

    called = len(cloud.calls)
    again = cloud.run(*HEAL, "--budget_hours=0.1", *TRAIN)
    assert again.returncode == 1
    assert "create" not in [call[3] for call in cloud.calls[called:]]

    before = cloud.clock
    more = cloud.run(*HEAL, "--budget_hours=0.15", *TRAIN)
    assert "budget of 0.15 h is used up" in more.stdout
    assert 60 <= cloud.clock - before <= 300


def test_heal_counts_the_time_while_it_was_away_and_the_slice_was_up(cloud: Cloud):
    ledger = cloud.folder / ".local/state/albert_jax/heal-my-project-us-west4-a-albert"
    ledger.parent.mkdir(parents=True)
    ledger.write_text("600 995000\n")
    cloud.world(now={"started": 995_000})
    done = cloud.run(*HEAL, "--budget_hours=1.5", *TRAIN)
    assert done.returncode == 1
    assert "1.56 h in all" in done.stdout
    assert cloud.verbs() == ["stop", "delete"]


def test_heal_takes_up_a_training_that_runs(cloud: Cloud):
    cloud.world(now={"started": 999_000, "training": [1200, 0]})
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 0
    assert cloud.verbs() == ["delete"]


def test_heal_does_not_repeat_a_wrong_command_line(cloud: Cloud):
    cloud.world(lives=[{"training": [5, 2]}, {}])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs("create", "delete") == ["create", "delete"]
    assert "step 7, loss 9.5" in done.stdout  # the log, before it is gone


def test_heal_gives_up_when_the_same_fails_at_once_three_times(cloud: Cloud):
    cloud.world(lives=[{"training": [50, 1]}] * 4)
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs("create", "delete") == ["create", "delete"] * 3
    assert "exit code 1" in done.stdout


def test_heal_goes_on_when_failures_are_far_apart_or_differ(cloud: Cloud):
    ends = [[50, 1], [50, 3], [50, 1], [601, 1], [50, 1], [50, 0]]
    cloud.world(lives=[{"training": end} for end in ends])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs("create") == ["create"] * 6


def test_heal_waits_for_capacity_ever_longer_but_not_for_quota(cloud: Cloud):
    full = {"verb": "create", "match": "", "stderr": "There is no more capacity in the zone"}
    cloud.world(lives=[{"training": [60, 0]}], failures=[{**full, "times": 6}])
    assert cloud.run(*HEAL, BUDGET, *TRAIN).returncode == 0
    assert cloud.verbs("create") == ["create"] * 7
    assert cloud.clock - 1_000_000 > 30 + 60 + 120 + 240 + 480 + 600

    called = len(cloud.calls)
    cloud.world(failures=[{**full, "stderr": FAILURES["quota"][0], "times": 99}])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 1
    assert [call[3] for call in cloud.calls[called:]].count("create") == 3

    called = len(cloud.calls)
    cloud.world(failures=[{**full, "stderr": FAILURES["login"][0], "times": 99}])
    assert cloud.run(*HEAL, BUDGET, *TRAIN).returncode == 1
    assert [call[3] for call in cloud.calls[called:]].count("create") == 1


def test_heal_replaces_workers_that_do_not_answer_for_long(cloud: Cloud):
    lost = {"verb": "ssh", "match": "sh status", "times": 10, "stderr": SSH_LOST}
    cloud.world(now={"started": 1}, lives=[{"training": [100, 0]}], failures=[lost])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs("create", "delete") == ["delete", "create", "delete"]


def test_heal_outlasts_a_login_that_has_run_out(cloud: Cloud):
    failure = {"verb": "describe", "match": "", "times": 12, "stderr": FAILURES["login"][0]}
    cloud.world(now={"started": 999_000, "training": [100, 0]}, failures=[failure])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert "IT MAY BE UP AND COST MONEY" in done.stdout
    assert "gcloud auth login" in done.stderr
    assert cloud.verbs("setup", "start", "delete") == ["setup", "start", "delete"]


def test_heal_sees_nodes_taken_from_a_resource_that_is_still_called_active(cloud: Cloud):
    taken = {"verb": "ssh", "match": "sh status", "times": 1}
    taken["stderr"] = 'This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'
    cloud.world(now={"started": 1}, lives=[{"training": [100, 0]}], failures=[taken])
    assert cloud.run(*HEAL, BUDGET, *TRAIN).returncode == 0
    assert cloud.verbs("create", "delete") == ["delete", "create", "delete"]
    assert cloud.clock < 1_000_600


def test_heal_says_so_when_the_slice_cannot_be_deleted(cloud: Cloud):
    failure = {"verb": "delete", "match": "", "times": 99, "stderr": "INTERNAL"}
    cloud.world(lives=[{"training": [60, 0]}], failures=[failure])
    done = cloud.run(*HEAL, BUDGET, *TRAIN)
    assert done.returncode == 1
    assert "albert in us-west4-a cannot be deleted; IT MAY BE UP AND COST MONEY" in done.stderr


def test_heal_asks_before_it_starts(cloud: Cloud):
    arguments = [word for word in HEAL if word != "--yes"]
    done = cloud.run(*arguments, BUDGET, *TRAIN, answer="n\n")
    assert done.returncode == 1
    assert "albert in us-west4-a" in done.stdout
    assert cloud.calls == []
