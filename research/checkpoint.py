"""Checkpoints by Orbax: asynchronous, atomic, restored onto any placement; and stop signals."""

import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from research import UserError


@dataclasses.dataclass
class _Kept:
    """Orbax's policy: the newest checkpoints, and the best one. It asks as it saves."""

    newest: int | None
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        old = 0 if self.newest is None else len(checkpoints) - self.newest
        return [i >= old or info.step == self.best for i, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of a run, numbered by step. A context manager: leaving it waits for saves."""

    def __init__(self, path: pathlib.Path, keep: int | None) -> None:
        self._kept = _Kept(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, create=True)
        self._manager = ocp.CheckpointManager(path.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, seconds: float, best: int | None = None) -> None:
        """Copies the arrays to the host, and returns while they are written.

        state: a dataclass of pytrees; seconds: what the run has spent in steps; best: a step whose
        checkpoint stays although it is not among the newest.
        """
        self._kept.best = best
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_fields(state)),
            progress=ocp.args.JsonSave({"seconds": seconds}),
        )
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when all saves are on the disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, abstract: Any, shardings: Any) -> tuple[Any, float]:
        """The state saved at a step, each array placed by its sharding, and its seconds."""
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_fields(target)), progress=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        return dataclasses.replace(abstract, **found.state), found.progress["seconds"]


def read(path: pathlib.Path, step: int | None, abstract: Any, shardings: Any) -> tuple[int, Any]:
    """The step and the state of a run's checkpoint, the newest by default.

    Raises UserError where there is none, naming those there are.
    """
    step = find(path, step)
    with Checkpoints(path, keep=None) as saved:
        return step, saved.restore(step, abstract, shardings)[0]


def steps(path: pathlib.Path) -> list[int]:
    """The steps that checkpoints are there of; opens nothing."""
    return sorted(int(folder.name) for folder in path.glob("*") if folder.name.isdigit())


def find(path: pathlib.Path, step: int | None) -> int:
    """The step itself, or the newest. Raises UserError where there is no checkpoint of it."""
    there = steps(path)
    if not there:
        raise UserError(f"{path.parent} has no checkpoints yet")
    if step is not None and step not in there:
        known = ", ".join(map(str, there))
        raise UserError(f"{path.parent} has no checkpoint of step {step}; there are: {known}")
    return there[-1] if step is None else step


def outline(path: pathlib.Path, step: int) -> Any:
    """A checkpoint's state as Orbax stores it, dictionaries and lists, with each array's shape."""
    return ocp.PyTreeCheckpointHandler().metadata(_state(path, step)).tree


def arrays(path: pathlib.Path, step: int, part: Any) -> Any:
    """The arrays, in NumPy, of a part of what `outline` gave; nothing else is read."""
    kind = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    args = ocp.args.PyTreeRestore(item=part, restore_args=kind, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(_state(path, step), args=args)


def _state(path: pathlib.Path, step: int) -> pathlib.Path:
    return path.resolve() / str(step) / "state"


def _fields(state: Any) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


class Stop:
    """Whether the process was asked to stop; `signal` is the signal's number, or 0."""

    signal: int = 0


@contextlib.contextmanager
def stop_requested() -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT (a preempted machine, Ctrl-C) into a flag.

    The loop can then save and leave between two steps; a second signal acts as usual.
    """
    stop = Stop()
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for n, handler in previous.items():
            signal.signal(n, handler)

    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours to take
        for caught in (signal.SIGTERM, signal.SIGINT):
            previous[caught] = signal.signal(caught, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
