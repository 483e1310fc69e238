"""The clock on a time that the tests set, and traces by what is in them."""

import types

import jax
import jax.numpy as jnp
import pytest

from research import timing


@pytest.fixture
def passing(monkeypatch):
    """A function that lets so many seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    return wait


def test_laps_add(passing):
    clock = timing.Clock()
    assert (clock.seconds, clock.apart) == (0, {})
    for seconds, total in ((2, 2), (0.5, 2.5), (0, 2.5)):
        passing(seconds)
        clock.lap()
        assert clock.seconds == total


def test_restarting_leaves_time_out(passing):
    clock = timing.Clock()
    passing(100)
    clock.restart()
    passing(1)
    clock.lap()
    passing(100)
    clock.restart()
    passing(2)
    clock.lap()
    assert clock.seconds == 3
    assert clock.apart == {}


def test_time_aside_is_booked_under_its_name(passing):
    clock = timing.Clock()
    with clock.aside("compile"):
        passing(30)
    for _ in range(2):
        passing(1)
        clock.lap()
        with clock.aside("evaluate"):
            passing(5)
        with clock.aside("save"):
            passing(0.5)
    passing(4)
    clock.lap()
    assert clock.seconds == 6
    assert clock.apart == {"compile": 30, "evaluate": 10, "save": 1}


def traced(path, steps, of, **options):
    """The steps that a trace of a loop of `of` steps holds."""
    double = jax.jit(lambda x: 2 * x)
    x = double(jnp.ones(()))
    with timing.Trace(path, steps, **options) as trace:
        for step in range(1, of + 1):
            trace.before()
            with jax.profiler.TraceAnnotation(f"marked {step}"):
                x = double(x)
            trace.after(x)
    files = list(path.rglob("*.xplane.pb"))
    assert len(files) <= 1
    return [
        int(event.name.split()[1])
        for file in files
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("marked")
    ]


@pytest.mark.parametrize(
    ("steps", "of", "options", "expected"),
    [
        (0, 6, {}, []),
        (1, 6, {}, [3]),
        (3, 8, {}, [3, 4, 5]),
        (2, 6, {"warmup": 0}, [1, 2]),
        (9, 5, {}, [3, 4, 5]),  # the loop ends first
        (3, 2, {}, []),
    ],
)
def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path, steps, of, options, expected):
    path = tmp_path / "profile"
    assert traced(path, steps, of, **options) == expected
    assert path.exists() == bool(expected)


def test_an_error_ends_the_trace(tmp_path):
    def fail(path):
        with timing.Trace(path, 3, warmup=0) as trace:
            trace.before()
            raise RuntimeError("in a step")

    for name in ("first", "second"):
        with pytest.raises(RuntimeError, match="in a step"):
            fail(tmp_path / name)
        assert list((tmp_path / name).rglob("*.xplane.pb"))
