"""What launch/gke/jobset.yaml and launch/Dockerfile say, read as Kubernetes and Docker read it."""

import fnmatch
import json
import math
import pathlib
import re
import string

import pytest

yaml = pytest.importorskip("yaml")
ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATE = (ROOT / "launch/gke/jobset.yaml").read_text()


def documented_example() -> dict[str, str]:
    """The values of the `export` line in the manifest's header."""
    header = TEMPLATE.split("#   envsubst")[0]
    return dict(re.findall(r"([A-Z_]+)=(\S+)", header))


def render(**values: str) -> dict:
    """What envsubst and then kubectl make of the template."""
    return yaml.safe_load(string.Template(TEMPLATE).substitute(documented_example() | values))


def test_the_documented_values_are_all_that_the_template_needs():
    placeholders = set(re.findall(r"\$\{(\w+)\}", TEMPLATE))
    assert placeholders == set(documented_example())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ACCELERATOR": "tpu-v4-podslice", "TOPOLOGY": "8x8x8", "WORKERS": "128", "SLICES": "2"},
        {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "2x4", "WORKERS": "1", "CHIPS": "8"},
    ],
)
def test_a_jobset_covers_the_slices_that_it_asks_for(values: dict[str, str]):
    jobset = render(**values)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == int(values.get("SLICES", 1))
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (train,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    assert job["parallelism"] * train["resources"]["limits"]["google.com/tpu"] == chips


def test_a_lost_worker_restarts_all_and_a_wrong_command_line_nothing():
    spec = render()["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes no podFailurePolicy without it
    (policy,) = job["podFailurePolicy"]["rules"]
    assert policy["action"] == "FailJob"
    assert policy["onExitCodes"]["values"] == [2]
    assert policy["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_store_and_workdir_lie_in_the_bucket_that_is_mounted():
    template = render(BUCKET="b-1", NAME="run-7")["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    pod = template["spec"]
    (volume,) = pod["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "b-1"
    (train,) = pod["containers"]
    (mount,) = train["volumeMounts"]
    assert mount["name"] == volume["name"]
    flags = dict(word[2:].split("=", 1) for word in train["args"])
    assert flags["workdir"] == f"{mount['mountPath']}/runs/run-7"
    assert flags["config.data.path"].startswith(f"{mount['mountPath']}/")
    assert (ROOT / flags["config"]).exists()


def test_the_bucket_is_mounted_as_on_tpu_vms():
    attributes = render()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "volumes"
    ][0]["csi"]["volumeAttributes"]
    options = [option.split(":") for option in attributes["mountOptions"].split(",")]
    worker = (ROOT / "launch/worker.sh").read_text()
    for group, *rest in options:
        flag = group if not rest else rest[0] if group != "metadata-cache" else f"{group}-{rest[0]}"
        value = f"={rest[1]}" if rest else ""
        assert f"--{flag}{value} " in worker
    assert f"--metadata-cache-ttl-secs={attributes['metadataCacheTTLSeconds']} " in worker


def test_the_image_copies_what_is_sent_to_the_builder_and_does_not_run_as_root():
    lines = (ROOT / "launch/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    ignore = (ROOT / "launch/Dockerfile.dockerignore").read_text().split("\n")
    sent = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert set(copied) == set(sent)
    for source in copied:
        assert (ROOT / source).exists()
        assert not any(fnmatch.fnmatch(source, line) for line in ignore[2:] if line[:1] != "!")
    names = [name for name, _ in steps]
    assert names.index("USER") > names.index("COPY")
    assert dict(steps)["USER"] not in ("root", "0")
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["python", "-m", "albert_jax.train"]
