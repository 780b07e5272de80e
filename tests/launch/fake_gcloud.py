"""A stand-in for `gcloud compute tpus`: one TPU resource in a file, time by a clock in a file.

The folder named by FAKE_CLOUD holds `world`, see `Cloud` in test_tpu.py; every call is added to
`calls`, a list of words a line. Run as a script of its own, without site-packages and with as good
as no imports (marshal instead of json halves its time): the tests call it hundreds of times.
"""

import fcntl
import marshal
import os
import sys

FOLDER = os.environ["FAKE_CLOUD"]
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/x' was not found"


def main() -> None:
    """Answers one call."""
    words = sys.argv[1:]
    lock = open(f"{FOLDER}/calls", "a")  # noqa: SIM115, PTH123  held to the end
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(f"{words}\n")
    world = marshal.loads(read("world"))
    kind, verb = words[2], words[3]
    command = next((word for word in words if word.startswith("--command=")), "")
    for failure in world["failures"]:
        if failure["verb"] == verb and failure["match"] in command and failure["times"] > 0:
            failure["times"] -= 1
            leave(world, failure["stderr"], 1)
    now = int(read("clock"))
    if verb == "create":
        if not world["lives"]:
            leave(world, "RESOURCE_EXHAUSTED: There is no more capacity in the zone", 1)
        flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
        world["now"] = {
            "kind": kind,
            "type": flags["accelerator-type"],
            "slices": flags.get("node-count", ""),
            "created": now,
            "started": None,
            "setup": False,
            **world["lives"].pop(0),
        }
        leave(world)
    node = world["now"]
    if node is None or (verb in ("describe", "delete") and node["kind"] != kind):
        leave(world, NOT_FOUND, 1)
    if verb == "describe":
        print(f"{state(node, now)},{node['type']}" + f",1,{node['slices']}" * (kind != "tpu-vm"))
    elif verb == "delete":
        world["now"] = None
    elif verb == "scp":
        sent = f"{FOLDER}/sent-{words[5].split(':')[0]}.tgz"
        if not os.path.exists(sent):  # noqa: PTH110
            os.link(words[4], sent)
    elif verb == "ssh":
        if state(node, now) not in ("ACTIVE", "READY"):
            leave(world, 'This TPU has terminal state "PREEMPTED", so it cannot be used', 1)
        remote(node, now, command)
    leave(world)


def read(name: str) -> bytes:
    """A file of the world."""
    with open(f"{FOLDER}/{name}", "rb") as file:  # noqa: PTH123
        return file.read()


def state(node: dict, now: int) -> str:
    """What the life of this resource says about the present."""
    up = node["created"] + node.get("wait", 0)
    if now < up:
        return "WAITING_FOR_RESOURCES"
    if now >= up + node.get("preempted_after", 10**9):
        return node.get("ends_as", "SUSPENDED")
    return "READY" if node["kind"] == "tpu-vm" else "ACTIVE"


def remote(node: dict, now: int, command: str) -> None:
    """What four workers would do; `training` of a life is how long it takes and how it ends."""
    seconds, code = node.get("training", [10**9, 0])
    running = node["started"] is not None and now < node["started"] + seconds
    if "worker.sh setup" in command:
        node["setup"] = True
    elif "worker.sh start" in command:
        node["started"] = now
    elif "worker.sh stop" in command:
        node["training"] = [now - (node["started"] or 0), 1]
    elif "worker.sh status" in command:
        for worker in range(4):
            if not node["setup"]:
                print(f"worker=w-{worker} state=bare")
            elif running:
                print(f"worker=w-{worker} state=running")
            elif node["started"] is not None:
                print(f"worker=w-{worker} state=exited code={code}")
            else:
                print(f"worker=w-{worker} state=none")
        if node["started"] is not None:
            print('metrics={"step": 7, "loss": 9.5}')
    elif "worker.sh logs" in command or "tail " in command:
        print("step 7, loss 9.5")


def leave(world: dict, stderr: str = "", code: int = 0) -> None:
    """Writes the world down and exits."""
    with open(f"{FOLDER}/world", "wb") as file:  # noqa: PTH123
        marshal.dump(world, file)
    if stderr:
        print(stderr, file=sys.stderr)
    sys.exit(code)


main()
