"""Where a run's time goes: steps apart from everything else, and traces of steps."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class Clock:
    """Seconds spent in steps; compiling, evaluating and saving are timed apart."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.apart: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last lap."""
        self._mark = time.perf_counter()

    @property
    def since_lap(self) -> float:
        return time.perf_counter() - self._mark

    def lap(self) -> None:
        """Adds the time since the last lap; the caller has waited for its step to end."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.apart[what] = self.apart.get(what, 0.0) + time.perf_counter() - start
        self.restart()


class Trace:
    """Writes an xprof trace of `steps` steps, the first `warmup` left out; a context manager."""

    def __init__(self, path: pathlib.Path, steps: int, warmup: int = 2) -> None:
        self._path, self._first, self._last = path, warmup + 1, warmup + steps
        self._seen, self._open = 0, False

    def __enter__(self) -> "Trace":
        return self

    def before(self) -> None:
        """Call before each step."""
        self._seen += 1
        if self._first <= self._seen <= self._last and not self._open:
            jax.profiler.start_trace(str(self._path))
            self._open = True

    def after(self, results: Any) -> None:
        """Call after each step with what it gives; waits for it only at the end of the trace."""
        if self._open and self._seen == self._last:
            jax.block_until_ready(results)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
