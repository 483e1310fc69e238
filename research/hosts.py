"""Several processes, one on a host: how they start, wait for one another, fail and stop together.

`session` is around the whole of scripts/train.py and scripts/evaluate.py. train.train decides by
`decided` what a run directory asks for, has all processes `meet` before it creates anything and
before it leaves, and asks an `Agreement` whether one of them is to stop. `failed` is where
command.one_line_errors ends a process, and with it all others. Of one process all this is nothing.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed

from research import UserError, cluster

SECONDS = float(os.environ.get("ERGON_HOSTS_SECONDS", "300"))
"""How long processes wait for one another; then they say which is absent, and end."""
_GRACE = 2.0
"""Seconds for a process to fail by itself, as all do of a mistake that they all see."""
_LEAVE = min(10.0, SECONDS)
"""Seconds that the first process stays for the others to learn of a failure: they learn it from
a service within it."""

_numbers = itertools.count()
_failed = threading.Event()
_gone: list[int] = []
"""Processes that will not leave any more, as far as is known."""


def _client() -> Any:
    """Of the service by which processes find one another: keys with values, and barriers. None:
    there is but one process."""
    return distributed.global_state.client


def me() -> int:
    """This process's number; unlike jax.process_index() it does not start the accelerator, for
    which all processes wait."""
    return int(distributed.global_state.process_id)


def count() -> int:
    return int(distributed.global_state.num_processes)


def start() -> None:
    """Joins the other processes, where there are any; in time before jax starts a backend.

    Raises UserError, naming those that are absent, where not all have come in time.
    """
    found = cluster.found(os.environ, SECONDS)
    if found is None or jax.distributed.is_initialized():
        return
    # jax's own start ends the process, and does not say who is absent.
    cluster.gather(found, SECONDS)
    jax.distributed.initialize(
        found.address,
        found.processes,
        found.process,
        found.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(SECONDS),
    )
    # jax now takes SIGTERM as a notice, which only its own way of stopping would read.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Waiting for one another.


def meet(what: str) -> None:
    """Returns when all processes are here. Raises UserError, naming those that do not come."""
    if _client() is None:
        return
    if absent := _absent(f"ergon/meet/{next(_numbers)}", SECONDS):
        raise UserError(cluster.absence(absent, count(), what, SECONDS))


def _absent(key: str, seconds: float) -> list[int]:
    """Which processes do not call this with the same key within so many seconds."""
    client = _client()
    client.key_value_set(f"{key}/{me()}", "")
    try:
        client.wait_at_barrier(key, int(seconds * 1000))
        return []
    except jax.errors.JaxRuntimeError:
        came = {int(name.rpartition("/")[2]) for name, _ in client.key_value_dir_get(f"{key}/")}
        if came == set(range(count())):  # at last, or the barrier has failed otherwise
            raise
        return sorted(set(range(count())) - came)


def gone() -> str | None:
    """Which processes are no more, where a collective has failed; None: all are here."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _gone.extend(_absent("ergon/gone", _LEAVE))
    if not _gone:
        return None
    return f"{cluster.named(_gone, count())} {'are' if len(_gone) > 1 else 'is'} no more"


def decided(decide: Callable[[], Any]) -> Any:
    """What the first process finds, as JSON keeps it, or the UserError that it raises, in all."""
    if (client := _client()) is None:
        return decide()
    key = f"ergon/decided/{next(_numbers)}"
    if me() > 0:
        try:
            found = json.loads(client.blocking_key_value_get(key, int(SECONDS * 1000)))
        except jax.errors.JaxRuntimeError:
            raise UserError(cluster.absence([0], count(), "a decision", SECONDS)) from None
        if "error" in found:
            raise UserError(found["error"])
        return found["value"]
    try:
        value = decide()
    except UserError as error:
        client.key_value_set(key, json.dumps({"error": str(error)}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def check_alike(first: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError where this process was given something else than the first one."""
    for name, value in here.items():
        if first[name] != value:
            raise UserError(f"process {me()} was given another {name} than process 0")


class Watch:
    """Waits in a thread for a key to be set, by whichever process is first to set it."""

    def __init__(self, key: str, act: Callable[[str], None]) -> None:
        self.key, self.act = key, act
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended
            if value := _client().blocking_key_value_get(self.key, 2**31 - 1):
                self.act(value)

    def set(self, value: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is set
            _client().key_value_set(self.key, value)

    def end(self) -> None:
        """In every process, once none sets it any more."""
        self.set("")
        self.thread.join()


# Stopping at one step.


class Agreement:
    """At which step all processes stop when one was asked to.

    One that is asked sets a key, for which the others wait in a thread, so that a step costs
    nothing. Then each holds its loop and says how far it is; all stop after the step that follows
    the furthest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step, self._last, self._signal = -1, -1, 0
        self._key = f"ergon/stop/{next(_numbers)}"
        self._asked = False
        self._watch = Watch(self._key, self._agree)

    def reached(self, step: int, signal: int) -> int:
        """The signal by which all stop after this step, or 0. signal: this process's own, or 0."""
        with self._lock:
            self._step = step
        if signal and not self._asked:
            self._asked = True
            self._watch.set(str(signal))
        return self._signal if step == self._last else 0

    def _agree(self, signal: str) -> None:
        client = _client()
        with self._lock:
            client.key_value_set(f"{self._key}/{me()}", str(self._step))
            client.wait_at_barrier(self._key, int(SECONDS * 1000))
            steps = [int(value) for _, value in client.key_value_dir_get(f"{self._key}/")]
            self._signal, self._last = int(signal), max(steps) + 1

    def end(self) -> None:
        meet("the end of training")  # none is in the loop any more, to ask
        self._watch.end()


@contextlib.contextmanager
def agreement() -> Iterator[Callable[[int, int], int]]:
    """`Agreement.reached`; of one process, the signal that it was asked by."""
    if _client() is None:
        yield lambda step, signal: signal
        return
    found = Agreement()
    yield found.reached
    found.end()  # not after an error, which ends all processes, nor after a stop


# Failing.


@contextlib.contextmanager
def session() -> Iterator[None]:
    """All that a process does as one of several, from its start to its orderly end.

    Only the first process prints. When another fails this one ends: see `failed`.
    """
    start()
    if _client() is None:
        yield
        return
    watch = Watch("ergon/failed", _end_after)
    if me() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Gloo, which is no Python, prints too
    try:
        yield
    except SystemExit:  # as all do, after a signal or for a target that was missed
        _finish(watch)
        raise
    _finish(watch)


def _finish(watch: Watch) -> None:
    meet("the end")
    watch.end()


def failed(message: str, code: int, text: str | None = None) -> NoReturn:
    """Ends this process by a failure, and with it all others, wherever they are.

    What all raise alike is printed by the first process alone. text: to print, if not `message`.
    """
    client = _client()
    said = False
    if client is not None:
        _failed.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"ergon/error/{me()}", message)
            client.key_value_set("ergon/failed", json.dumps([me(), message]), True)
            said = me() > 0 and message == _first_error(client)
    if not said:
        print((text or f"error: {message}").rstrip(), file=sys.stderr)
    if client is None:
        sys.exit(code)
    _leave(code)


def _first_error(client: Any) -> str | None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return str(client.blocking_key_value_get("ergon/error/0", int(_GRACE * 1000)))
    return None


def _end_after(failure: str) -> None:
    """Another process has failed: this one may wait for it in a collective for ever."""
    time.sleep(_GRACE)
    if not _failed.is_set():
        process, message = json.loads(failure)
        print(f"error: process {process} of {count()} has failed: {message}", file=sys.stderr)
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Not by way of jax's own end, at which all processes wait for one another."""
    client = _client()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"ergon/left/{me()}", "")
        deadline = time.monotonic() + _LEAVE
        # The last to leave is the first process, which serves the others.
        while me() == 0 and time.monotonic() < deadline:
            if len(client.key_value_dir_get("ergon/left/")) + len(_gone) == count():
                break
            time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
