"""launch/prepare_dataflow.sh against a fake gcloud: what it asks for, what it hands to prepare, and
what it says when a call fails.
"""

import ast
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from albert_jax import prepare

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHERE = ("--project=my-project", "--region=us-central1")
PREPARE = ("--", "--input=gs://b-1/a b/*.txt", "--output=gs://b-1/store", "--tokenizer=x.model")
RUN = ("run", *WHERE, "--bucket=gs://b-1/", *PREPARE)
# All that the script finds in PATH: a real gcloud must be out of reach of every test.
TOOLS = ("bash", "cat", "dirname", "grep", "mkdir", "mktemp", "rm", "sed", "tar", "tee")
# Writes its words down, answers `jobs list`, and fails where `failures` has its verb.
GCLOUD = """
import os, sys
folder = os.environ["FAKE_CLOUD"]
open(f"{folder}/calls", "a").write(f"{['gcloud', *sys.argv[1:]]}\\n")
words = " ".join(sys.argv[1:])
if "builds submit" in words:
    os.rename(sys.argv[3], f"{folder}/sent")
    os.mkdir(sys.argv[3])
for line in open(f"{folder}/failures").read().splitlines():
    verb, _, message = line.partition(": ")
    if verb in words:
        print(message, file=sys.stderr)
        sys.exit(1)
if "jobs list" in words:
    print(open(f"{folder}/jobs").read())
"""
PYTHON = """
import os, sys
if sys.argv[1] == "-c":
    print("3.12")
    sys.exit()
folder = os.environ["FAKE_CLOUD"]
open(f"{folder}/calls", "a").write(f"{['python', *sys.argv[1:]]}\\n")
sys.exit(int(open(f"{folder}/exit").read()))
"""


class Cloud:
    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for tool in TOOLS:
            (programs / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool} here"))
        for name, text in (("gcloud", GCLOUD), ("python", PYTHON)):
            (programs / name).write_text(f"#!{sys.executable} -SE\n{text}")
            (programs / name).chmod(0o755)
        for name, content in (("failures", ""), ("jobs", ""), ("exit", "0")):
            self.set(name, content)

    def set(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content)

    def run(self, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "prepare_dataflow.sh"), *arguments],
            env={
                "PATH": str(self.folder / "bin"),
                "FAKE_CLOUD": str(self.folder),
                "PYTHON": str(self.folder / "bin" / "python"),
            },
            cwd=self.folder,
            input=answer,
            text=True,
            capture_output=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [ast.literal_eval(line) for line in lines]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    return Cloud(tmp_path)


def test_run_hands_prepare_its_arguments_unharmed_and_beam_its_own(cloud: Cloud):
    done = cloud.run("run", *WHERE, "--bucket=b-1", "--beam_options=--no_use_public_ips", *PREPARE)
    assert done.returncode == 0, done.stderr
    assert "20 x n2-standard-4; they cost until it ends" in done.stdout
    command = cloud.calls[-1]
    assert command[:3] == ["python", "-m", "albert_jax.prepare"]
    assert command[3:-2] == list(PREPARE[1:])
    # The command knows all of these flags, and splits Beam's as a shell would.
    flags = prepare._flags(command[3:])
    assert flags.runner == "DataflowRunner"
    options = shlex.split(flags.beam_options)
    assert {
        *WHERE,
        "--job_name=albert-jax-prepare",
        "--temp_location=gs://b-1/dataflow/temp",
        "--sdk_container_image=us-central1-docker.pkg.dev/my-project/albert-jax/prepare:latest",
        "--max_num_workers=20",
        "--no_use_public_ips",
    } <= set(options)


def test_beam_knows_every_option_that_it_gets(cloud: Cloud):
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    assert cloud.run(*RUN).returncode == 0
    options = shlex.split(prepare._flags(cloud.calls[-1][3:]).beam_options)
    parsed = pipeline_options.PipelineOptions(options).get_all_options()
    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        assert str(parsed[name]) == value


def test_the_image_is_made_of_this_checkout_and_of_the_python_at_hand(cloud: Cloud):
    cloud.set("failures", "repositories describe: ERROR: NOT_FOUND: no such repository")
    done = cloud.run("image", *WHERE)
    assert done.returncode == 0, done.stderr
    assert [call[2:4] for call in cloud.calls] == [
        ["repositories", "describe"],
        ["repositories", "create"],
        ["submit", cloud.calls[-1][3]],
    ]
    sent = cloud.folder / "sent"
    for name in ("albert_jax/prepare.py", "albert_jax/data/beam.py", "pyproject.toml"):
        assert (sent / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(sent.rglob("__pycache__"))
    file = (sent / "Dockerfile").read_text()
    assert "FROM apache/beam_python3.12_sdk:" in file


def test_the_image_has_the_beam_that_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = extras["optional-dependencies"]["beam"][0].partition("==")[2]
    file = (ROOT / "launch" / "Dockerfile.prepare").read_text()
    assert re.search(r"^FROM apache/beam_python3\.11_sdk:(.*)$", file, re.MULTILINE)[1] == pinned


def test_a_job_that_runs_is_not_started_again(cloud: Cloud):
    cloud.set("jobs", "2026-11-25_job")
    done = cloud.run(*RUN)
    assert done.returncode == 1
    assert "runs already (2026-11-25_job)" in done.stderr
    assert [call[0] for call in cloud.calls] == ["gcloud"]


def test_a_job_that_goes_on_after_its_command_is_told_of(cloud: Cloud):
    cloud.set("exit", "1")
    assert cloud.run(*RUN).returncode == 1
    calls = len(cloud.calls)
    assert [call[0] for call in cloud.calls] == ["gcloud", "python", "gcloud"]
    (cloud.folder / "bin" / "python").write_text(
        f"#!{sys.executable} -SE\nimport os, sys\n"
        "open(os.environ['FAKE_CLOUD'] + '/jobs', 'w').write('id-7')\nsys.exit(1)\n"
    )
    done = cloud.run(*RUN)
    assert done.returncode == 1
    assert "STILL RUNS AND COSTS (id-7)" in done.stdout
    assert len(cloud.calls) == calls + 2


@pytest.mark.parametrize(("answer", "cancelled"), [("y\n", True), ("n\n", False), ("", False)])
def test_cancel_asks_first(answer, cancelled, cloud: Cloud):
    cloud.set("jobs", "id-7")
    done = cloud.run("cancel", *WHERE, answer=answer)
    assert "Cancel albert-jax-prepare (id-7) in us-central1?" in done.stdout
    assert done.returncode == (0 if cancelled else 1)
    assert any("cancel" in call for call in cloud.calls) == cancelled


def test_status_and_cancel_of_what_is_not_there(cloud: Cloud):
    assert cloud.run("status", *WHERE).returncode == 0
    done = cloud.run("cancel", *WHERE, "--yes")
    assert done.returncode == 1
    assert "no job albert-jax-prepare runs in us-central1" in done.stderr


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("ERROR: Reauthentication required.", "gcloud auth login"),
        ("ERROR: SERVICE_DISABLED", "gcloud services enable"),
        ("ERROR: PERMISSION_DENIED", "Dataflow Admin"),
        ("ERROR: Quota 'CPUS' exceeded", "quota is too small"),
        ("ERROR: something else", "its own message stands above"),
    ],
)
@pytest.mark.parametrize("command", ["image", "run", "status", "cancel"])
def test_what_gcloud_says_becomes_what_to_do(command, failure, words, cloud: Cloud):
    cloud.set("failures", f": {failure}".removeprefix(": ").join(["jobs: ", "\n"]))
    if command == "image":
        cloud.set("failures", f"artifacts: {failure}\n")
    arguments = RUN if command == "run" else (command, *WHERE)
    done = cloud.run(*arguments)
    assert done.returncode == 1
    assert failure in done.stderr
    assert words in done.stderr
    assert len(cloud.calls) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no command ''"),
        (("run", "--region=us-central1", *PREPARE), "--project='' is no project id"),
        (("run", "--project=my-project", "--region=us", *PREPARE), "is no region"),
        (("run", *WHERE, *PREPARE), "is no bucket name"),
        (("run", *WHERE, "--bucket=b-1"), "nothing to prepare"),
        (("run", *WHERE, "--bucket=b-1", "--", "--input=a.txt"), "on this machine"),
        (("run", *WHERE, "--bucket=b-1", "--", "--runner=X"), "is this script's to say"),
        (("run", *WHERE, "--bucket=b-1", "--max_workers=0", *PREPARE), "a whole number from 1"),
        (("status", *WHERE, "--", "x"), "takes nothing after --"),
        (("status", *WHERE, "--colour=red"), "unknown argument --colour=red"),
    ],
)
def test_a_wrong_command_line_is_found_before_anything_is_asked(arguments, words, cloud: Cloud):
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("command", ["image", "run", "status", "cancel"])
def test_a_dry_run_prints_and_does_nothing(command, cloud: Cloud):
    arguments = RUN if command == "run" else (command, *WHERE)
    done = cloud.run(
        *arguments[:-4] if command == "run" else arguments,
        "--dry_run",
        *(PREPARE if command == "run" else ()),
    )
    assert done.returncode == 0, done.stderr
    assert "gcloud " in done.stdout
    assert cloud.calls == []


def test_help_is_the_header(cloud: Cloud):
    done = cloud.run("--help")
    assert done.returncode == 0
    assert "MONEY: every worker costs" in done.stdout
