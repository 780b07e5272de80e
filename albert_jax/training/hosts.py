"""Many processes, one run: they agree on what to do next, and they end together.

JAX's coordination service, which lives in process 0 (the leader), keeps a small table of keys and
texts that all processes read and write, apart from the devices. Through it

- the leader's orders (go on, save, stop) reach every process at the same tick of its loop;
- a signal to any process becomes the leader's order to stop;
- whatever ends one process ends all, with the cause and the number of that process in every log.

A process that dies without a word is missed by its heartbeat. Whoever has to leave meanwhile does
so by os._exit: threads may hang in a collective whose other side is gone.

On a plain single machine all of this is there and does nothing.

Sources: jax.distributed (joining, clusters known to JAX), and its client's key-value store,
barriers and `get_live_nodes`, which Orbax uses in the same way.
"""

import contextlib
import ctypes
import enum
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

import jax
from jax._src import clusters, distributed  # no public door to the key-value store

from albert_jax.errors import UserError
from albert_jax.training import run_folder

Shared = TypeVar("Shared")

HEARTBEAT_SECS = 20  # without a sign of life, and a process counts as dead
_JOIN_SECS = 300  # for all processes to be there
_FAREWELL_SECS = 10  # for the others to read why one of them leaves
_LOOK_SECS = 1.0  # between two looks at the news
_ORDER_SECS = 1.0  # between two orders of the leader, about
_MOST_TICKS = 64  # between two orders: should ticks suddenly take long, one is not far
_FOREVER_MS = 7 * 24 * 3600 * 1000  # a leader that died is noticed otherwise

_NEWS, _SHARED, _ORDERS = "albert_jax/news/", "albert_jax/shared/", "albert_jax/orders/"


class Order(enum.StrEnum):
    """What the leader wants of everybody at a tick."""

    GO = "go"
    SAVE = "save"
    STOP = "stop"


class Hosts:
    """The processes of a run, seen from one of them; a context that is left together.

    An error that leaves the context is told to the others; without one they wait for each other.

    Attributes:
        index: the number of this process.
        count: how many there are.
        leader: whether this is process 0, which logs, writes files and gives orders.
        stopping: whether the order to stop was given.
        outlook: says what was reached and what to do next, for the last line of a log.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index, self.count, self.leader = index, count, index == 0
        self.stopping = False
        self.outlook: Callable[[], str] = lambda: "start all processes again to go on"
        self._client = client
        self._signal: str | None = None  # that this process got
        self._news: dict[str, str] = {}  # of all processes: stop/3, failed/2
        self._leaving = threading.Event()
        self._exit_code = 1
        self._tick = self._next_order = self._last_order = self._era = self._uses = 0
        self._last_order_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._client is not None:
            for work in (self._read_news, self._miss_heartbeats):
                threading.Thread(target=work, name=work.__name__, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._client is None:
            return
        if error is None:
            self._end_together()
        elif isinstance(error, UserError):
            self.leave(run_folder.spoken(str(error)))
        elif isinstance(error, OSError):  # of this machine's own disk
            self.leave(f"{error.filename or 'writing'}: {error.strerror}")
        elif isinstance(error, KeyboardInterrupt):
            self.leave("interrupted")
        else:
            # A collective fails where the other side has died; what then ends us says it better.
            time.sleep(HEARTBEAT_SECS + _FAREWELL_SECS)
            traceback.print_exception(error)
            self.leave(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def share(self, name: str, make: Callable[[], Shared]) -> Shared:
        """What `make()` returns on the leader, on every process. JSON carries it.

        The others wait for the leader. All have to share the same things in the same order.
        """
        if self._client is None:
            return make()
        key = f"{_SHARED}{self._nth()}/{name}"
        if self.leader:
            value = make()
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._client.blocking_key_value_get(key, _FOREVER_MS))

    def order(self, save_due: Callable[[], bool] = lambda: False) -> Order:
        """The leader's order for this tick. Every process has to call this equally often.

        About once a second the leader looks around and says so; in between it is GO. Its message
        also says at which tick the next one comes, so that most ticks cost nothing.

        Args:
            save_due: whether it is time to save; the leader's is asked.
        """
        self._tick += 1
        if self.stopping:
            return Order.STOP
        if self._client is None:
            order = self._decide(save_due)
        elif self._tick < self._next_order:
            return Order.GO
        else:
            key = f"{_ORDERS}{self._era}/{self._tick}"
            if self.leader:
                order = self._decide(save_due)
                self._next_order = self._tick + self._ticks_to_next_order()
                self._client.key_value_set(key, f"{order} {self._next_order}")
            else:
                text, tick = self._client.blocking_key_value_get(key, _FOREVER_MS).split()
                order, self._next_order = Order(text), int(tick)
        self.stopping = order is Order.STOP
        return order

    def meet(self, place: str) -> None:
        """Waits until all processes are at this place, to which all come in the same order.

        Before a collective that some of them would reach much later: Gloo gives up after 30 s.
        """
        if self._client is not None:
            self._client.wait_at_barrier(f"albert_jax/{self._nth()}/{place}", _FOREVER_MS)

    def _nth(self) -> int:
        """A new number at each call: a name can be used once, and several runs may share us."""
        self._uses += 1
        return self._uses

    def change_pace(self) -> None:
        """Says that ticks will take another time from here; the next one brings an order.

        To be called by all processes alike.
        """
        self._next_order = self._last_order = self._tick
        self._last_order_at = time.monotonic()

    def settled(self) -> None:
        """Says that all processes are known to be in the same step; old orders can go.

        To be called by all alike. Only those before the last such point are dropped: another
        process may be in this step and yet before the order that we have had in it.
        """
        if self._client is not None and self.leader and self._era:
            self._client.key_value_delete(f"{_ORDERS}{self._era - 1}/")
        self._era += 1

    @property
    def stop_asked(self) -> str | None:
        """The signal that wants the run to stop, and which process got it; None without one."""
        if self._client is None:
            return self._signal
        asked = [(key, text) for key, text in self._news.items() if key.startswith("stop/")]
        if not asked:
            return None
        key, text = min(asked)
        return f"{text} to process {key.removeprefix('stop/')}"

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[None]:
        """A context in which SIGTERM and Ctrl-C ask to stop instead of killing.

        A second Ctrl-C kills. To be entered by the main thread.
        """
        # The handlers run only between two steps of Python; the pipe tells a thread at once, even
        # if the main one waits for a compiler or a device.
        end, beginning = os.pipe()
        os.set_blocking(beginning, False)
        numbers = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.signal(number, _ignore) for number in numbers]
        previous = signal.set_wakeup_fd(beginning, warn_on_full_buffer=False)
        threading.Thread(target=self._read_signals, args=(end,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
            os.close(beginning)  # ends the thread

    def leave(
        self, cause: str | None = None, code: int = 1, missing: Sequence[int] = ()
    ) -> NoReturn:
        """Ends this process whatever its threads do.

        Args:
            cause: printed here, and sent to the others, who print it and leave too; None where they
                know already.
            code: the exit code.
            missing: processes that will not answer.
        """
        self._exit_code = code
        self._leaving.set()
        if cause is not None:
            _say(cause)
            self._tell(f"failed/{self.index}", cause)
        self._tell(f"bye/{self.index}", "")
        if self.leader and self.count > 1:
            # The service ends with us: until the others have read why, and left.
            self._outlive(set(range(1, self.count)) - set(missing))
        _exit(code)

    def _decide(self, save_due: Callable[[], bool]) -> Order:
        if self.stop_asked:
            return Order.STOP
        return Order.SAVE if save_due() else Order.GO

    def _ticks_to_next_order(self) -> int:
        now = time.monotonic()
        each = (now - self._last_order_at) / max(self._tick - self._last_order, 1)
        self._last_order, self._last_order_at = self._tick, now
        return max(1, min(_MOST_TICKS, int(_ORDER_SECS / max(each, 1e-6))))

    def _read_signals(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as signals:
            while number := signals.read(1):
                name = "Ctrl-C" if number[0] == signal.SIGINT else signal.Signals(number[0]).name
                if self._signal == name == "Ctrl-C":
                    _say("interrupted", prefix="")
                    _exit(1)
                self._signal = self._signal or name

    def _read_news(self) -> None:
        """Until the end: passes on our signal, and takes in what the others say."""
        told = False
        while not self._leaving.wait(_LOOK_SECS):
            if self._signal and not told:
                told = self._tell(f"stop/{self.index}", self._signal)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # see _on_abort
                rows = self._client.key_value_dir_get(_NEWS)
                self._news = {key.removeprefix(_NEWS): text for key, text in rows}
            failed = min((key for key in self._news if key.startswith("failed/")), default=None)
            if failed and not self._leaving.is_set():
                number = failed.removeprefix("failed/")
                _say(f"process {number} of {self.count} stopped: {self._news[failed]}")
                self.leave()

    def _miss_heartbeats(self) -> None:
        """Until the end: leaves when a process has died. All of them ask together."""
        everyone = list(range(self.count))
        while not self._leaving.wait(_LOOK_SECS):
            try:
                alive = self._client.get_live_nodes(everyone)
            except jax.errors.JaxRuntimeError:  # see _on_abort
                continue
            dead = sorted(set(everyone) - set(alive))
            if not dead or self._leaving.is_set():
                continue
            if self.index in dead:
                cause = f"process {self.index} of {self.count} was cut off from the others"
            else:
                cause = f"{_processes(dead)} of {self.count} died"
            _say(f"{cause} (no heartbeat for {HEARTBEAT_SECS} s); {self.outlook()}")
            self.leave(missing=dead)

    def _tell(self, key: str, text: str) -> bool:
        if self._client is None:
            return True
        try:
            self._client.key_value_set(f"{_NEWS}{key}", text, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _outlive(self, others: set[int]) -> None:
        deadline = time.monotonic() + _FAREWELL_SECS
        while time.monotonic() < deadline and not others <= self._said_bye():
            time.sleep(0.2)

    def _said_bye(self) -> set[int]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            rows = self._client.key_value_dir_get(f"{_NEWS}bye/")
            return {int(key.rpartition("/")[2]) for key, _ in rows}
        return set()

    def _end_together(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier("albert_jax/end", _JOIN_SECS * 1000)
        self._exit_code = 0
        self._leaving.set()
        if self.leader:
            self._outlive(set(range(1, self.count)))
            time.sleep(0.2)
        else:
            self._tell(f"bye/{self.index}", "")
        jax.distributed.shutdown()

    def watch_for_abort(self, coordinator: str) -> None:
        """Gives the one death that the C++ client answers with an abort a clear last line: that of
        the leader, and with it of the service.
        """

        def on_abort(number: int) -> None:
            del number
            if self._leaving.is_set():
                _exit(self._exit_code)
            host, _, port = coordinator.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
                cause = f"process {self.index} of {self.count} was aborted by a library (see above)"
            except OSError:
                cause = (
                    f"process 0 of {self.count}, the coordinator, died (its connection to process "
                    f"{self.index} is gone)"
                )
            _say(f"{cause}; {self.outlook()}")
            _exit(1)

        # A handler of Python's own would only be run by the main thread, after the abort.
        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._abort_handler)


def join(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Hosts:
    """The processes of this run, all of them there: as the arguments say, or as the cluster does.

    JAX knows Cloud TPU, GKE, Slurm and Open MPI. Must come before anything touches a device.

    Args:
        coordinator: HOST:PORT of process 0, the port being free there.
        count: how many processes there are.
        index: the number of this one, from 0. All three are given, or none.

    Raises:
        UserError: arguments that do not fit together; the others could not be reached.
    """
    given = (coordinator, count, index)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none (then JAX asks the cluster)."
        )
    if coordinator is not None and count is not None and index is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator_address={coordinator} is not HOST:PORT.")
        if count < 1 or not 0 <= index < count:
            raise UserError(
                f"--process_id={index} of --num_processes={count}: they count from 0 to "
                f"{max(count, 1) - 1}."
            )
    elif (count := _cluster_size()) == 1:
        return Hosts()
    # Without this the service ends every process, and says no more than that, when one has died.
    jax.config.update("jax_enable_recoverability", True)
    # Signals are ours (`stop_signals`); the service would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # All devices of this process, where we say which it is.
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=_JOIN_SECS,
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"this process could not meet the others within {_JOIN_SECS} s: "
            f"{str(error).partition(chr(10))[0]} Are all of them started, with the same "
            "--coordinator_address, and does its port let them in?"
        ) from None
    state = distributed.global_state
    hosts = Hosts(state.process_id, state.num_processes, state.client)
    hosts.watch_for_abort(state.coordinator_address or "")
    _only_the_leader_talks(hosts)
    return hosts


def _cluster_size() -> int:
    """How many processes the cluster around us runs; 1 where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Kubernetes' client package, which TPUs do not need
        for cluster in clusters.ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
    return 1


def _only_the_leader_talks(hosts: Hosts) -> None:
    """Standard output is the leader's own; Gloo, which greets there on a CPU, loses it too."""
    sys.stdout.flush()
    if hosts.leader:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _processes(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"process {listed}" if len(numbers) == 1 else f"processes {listed}"


def _ignore(number: int, frame: FrameType | None) -> None:
    """Kept from killing us; `_read_signals` has seen it."""


def _say(line: str, prefix: str = "error: ") -> None:
    print(f"{prefix}{line}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
