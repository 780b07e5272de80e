"""The door to gs://, against a bucket on loopback that fails when it is told to."""

import hashlib
import os
import pathlib
import subprocess
import sys
import threading
import time

import bucket as bucket_lib
import pytest

from albert_jax import storage
from albert_jax.errors import UserError

FOLDER = f"gs://{bucket_lib.NAME}"


@pytest.fixture(scope="module")
def bucket():
    with bucket_lib.served() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        storage._files.cache_clear()
        yield served
        storage._files.cache_clear()


@pytest.fixture(autouse=True)
def sound(bucket):
    yield
    bucket.fault = lambda method, path: None


def test_what_is_written_is_read_and_listed(bucket, tmp_path):
    place = f"{FOLDER}/a/b.txt"
    with pytest.raises(FileNotFoundError):
        storage.read(place)
    assert not storage.exists(place)
    storage.write(place, b"first")
    storage.write(place, b"second")
    storage.write(f"{FOLDER}/a/c/d.txt", b"")
    assert storage.read(pathlib.Path(place)) == b"second"  # which makes gs:/ of it
    assert storage.listing(f"{FOLDER}/a") == {"b.txt": 6, "c/d.txt": 0}
    assert storage.listing(f"{FOLDER}/none") == {}
    assert storage.glob(f"{FOLDER}/a/*.txt") == [place]
    assert storage.glob(f"{FOLDER}/a/**/*.txt") == [place, f"{FOLDER}/a/c/d.txt"]
    big = bytes(range(256)) * (40 << 10)  # several parts
    (tmp_path / "big").write_bytes(big)
    storage.upload(tmp_path / "big", f"{FOLDER}/big")
    assert bucket.read("big") == big
    came = []
    found = storage.download(f"{FOLDER}/big", tmp_path / "again", came.append)
    assert found == hashlib.sha256(big).hexdigest()
    assert sum(came) == len(big)
    with storage.opened(f"{FOLDER}/big") as file:
        file.seek(1_000_001)
        assert file.read(70_000) == big[1_000_001:1_070_001]
    storage.delete_folder(f"{FOLDER}/a")
    assert storage.listing(FOLDER) == {"big": len(big)}


@pytest.mark.parametrize("fault", [503, 429, "cut", 1.5])
def test_a_request_that_fails_for_a_while_is_sent_again(bucket, capfd, monkeypatch, fault):
    monkeypatch.setenv(storage.PATIENCE, "20")
    until = time.monotonic() + 2.0
    bucket.fault = lambda method, path: fault if time.monotonic() < until else None
    storage.write(f"{FOLDER}/x", b"there")
    assert bucket.read("x") == b"there"
    printed = capfd.readouterr().err
    assert printed.count("does not answer") == printed.count("answers again") == 1


def test_a_bucket_that_stays_away_is_named(bucket, monkeypatch):
    monkeypatch.setenv(storage.PATIENCE, "1.5")
    bucket.fault = lambda method, path: 503
    with pytest.raises(storage.LostError, match=f"gs://{bucket_lib.NAME} could not be reached for"):
        storage.read(f"{FOLDER}/x")


def test_what_cannot_pass_is_not_tried_again(bucket):
    bucket.fault = lambda method, path: 403
    began = time.monotonic()
    with pytest.raises(UserError, match="may not be reached with the account"):
        storage.write(f"{FOLDER}/x", b"")
    bucket.fault = lambda method, path: None
    with pytest.raises(FileNotFoundError):
        storage.listing("gs://no-such-bucket/x")
    assert time.monotonic() - began < 2


def test_other_schemes_are_refused_and_local_paths_are_not_remote():
    with pytest.raises(UserError, match="only gs:// is known"):
        storage.is_remote("s3://bucket/x")
    assert not any(map(storage.is_remote, ("runs/x", "/bucket/x", "gs/x", "C:x", "a:b")))
    assert storage.is_remote(pathlib.Path("gs://bucket/x"))


def test_a_claim_keeps_others_out_and_outlives_nobody(bucket, monkeypatch):
    monkeypatch.setattr(storage.Claim, "BEAT", 0.2)
    monkeypatch.setattr(storage.Claim, "STALE", 1.5)
    place = f"{FOLDER}/run/.lock"
    other = dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).parent.parent))
    code = (
        "from albert_jax import storage; import sys, time\n"
        "storage.Claim.BEAT = 0.2\n"
        f"claim = storage.Claim('{place}', 'busy: {{}}')\n"
        "print('mine', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=other, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=rf"busy: process {process.pid} of .*, since 20"):
        storage.Claim(place, "busy: {}")
    process.kill()
    process.wait()
    began = time.monotonic()
    with storage.Claim(place, "busy: {}") as claim:
        assert time.monotonic() - began < 1.0  # known to have died
        time.sleep(0.5)  # renewed meanwhile
        claim.check()
        # What another machine's process left is waited for, and taken over.
        storage.write(place, b'{"host": "other", "machine": "other", "process": 7}')
        with storage.Claim(place, "busy: {}") as second:
            assert time.monotonic() - began > 1.5
            second.check()
            with pytest.raises(UserError, match="busy: process 7 of other"):
                claim.check()
    assert not storage.exists(place)


def test_of_many_that_claim_at_once_one_has_it(bucket, monkeypatch):
    monkeypatch.setattr(storage.Claim, "BEAT", 0.1)
    place, found = f"{FOLDER}/many/.lock", []

    def claim() -> None:
        try:
            found.append(storage.Claim(place, "busy: {}"))
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (mine,) = [one for one in found if isinstance(one, storage.Claim)]
    mine.__exit__(None, None, None)


def test_local_work_imports_nothing_remote():
    code = (
        "import sys\n"
        "import albert_jax.storage, albert_jax.data.store, albert_jax.prepare, albert_jax.train\n"
        "print(sorted({'gcsfs', 'fsspec', 'aiohttp', 'google.cloud'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
