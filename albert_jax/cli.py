"""What every command shares: a quiet environment, `--help` with examples, errors as one line, exit
codes.

Exit codes: 0 done; 1 the work could not be done or was interrupted; 2 the command line was wrong.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from albert_jax import storage
from albert_jax.errors import UserError
from albert_jax.training import run_folder

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def parser(module_doc: str, prog: str) -> argparse.ArgumentParser:
    """An argument parser whose `--help` shows the command's docstring, examples included."""
    return argparse.ArgumentParser(
        prog=f"python -m albert_jax.{prog}",
        description=module_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that trains."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="START:END",
        help="trace these steps, the first being 1, for TensorBoard's profiler",
    )
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num_processes", type=int, metavar="N", help="of the whole run")
    parser.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses `argv`; `--config.section.field=value` come back apart, as `section.field=value`."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word.removeprefix("--config."))
        else:
            overrides.append(f"{word.removeprefix('--config.')}={next(words, '')}")
    return parser.parse_args(rest), overrides


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(argv)` and exits: `UserError` becomes one message and exit code 1."""
    quiet_environment()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {run_folder.spoken(str(error))}", file=sys.stderr)
        if storage.in_use():  # threads of libraries may wait for a bucket that has gone away
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(1)
    except BrokenPipeError:
        # A reader that went away (`| head`) ends us silently, as it does other tools.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # The disk and its rights are the user's; what else the system refuses is a fault of ours.
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)


def quiet_environment() -> None:
    """Keeps libraries from talking to the user; set before they are imported. The user's own values
    win.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if "JAX_PLATFORMS" not in os.environ and not _has_accelerator():
        # libtpu may be installed for ahead-of-time compilation alone; without this JAX would
        # load it, look for a TPU for a while and say so.
        os.environ["JAX_PLATFORMS"] = "cpu"


def _has_accelerator() -> bool:
    devices = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    on_tpu_pod = "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_NAME" in os.environ
    return on_tpu_pod or any(Path(device).exists() for device in devices)


def _steps(text: str) -> tuple[int, int]:
    """START:END as numbers, 1 <= START <= END."""
    start, _, end = text.partition(":")
    if not (start.isdigit() and end.isdigit() and 1 <= int(start) <= int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:END with 1 <= START <= END")
    return int(start), int(end)
