"""Measured peaks: that what is timed is what is credited, and that no other machine's are used."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from research.bench import commands
from research.compute import chips, count, peaks
from research.compute.peaks import Loop, Peaks
from research.compute.program import program

ROOT = pathlib.Path(__file__).parents[1]
CPU = jax.local_devices()[0]
HERE = [name for name in peaks.DTYPES if name != "float64"]
SMALL = {
    "dtypes": ("float32", "int8"),
    "sizes": (32, 64),
    "working_sets": (2**16, 2**18),
    "seconds": 2e-3,
    "repeats": 2,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path / "cache"))


def some(**changes):
    """Peaks of this CPU, not measured."""
    found = Peaks(
        device=peaks.name_of(CPU),
        platform="cpu",
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        date="2026-01-02",
        matmul={"float32": 4.5e11, "float32:HIGHEST": 4.4e11},
        bandwidth=((2**18, 3e11), (2**20, 4e11), (2**24, 2e11), (2**28, 5e10)),
    )
    return dataclasses.replace(found, **changes)


# What is timed.


@pytest.mark.parametrize("name", HERE)
def test_products_are_executed_and_named_as_credited(name):
    loop = peaks.products(name, 64, CPU)
    assert loop.work == 2 * 2 * 64**3
    found = program(loop.compile(7))
    assert found.exact
    assert found.matmul_flops == 7 * loop.work
    with jax.default_matmul_precision("highest"):
        traced = count(loop.jitted(7).trace(loop.x, loop.a))
    flops = {dtype: n for (_, _, dtype, _), n in traced.matmul.items()}
    assert flops == {name: 7 * loop.work}


def test_products_copy_nothing():
    loop = peaks.products("float32", 64, CPU)
    found = program(loop.compile(7))
    assert found.bytes == pytest.approx(7 * 2 * 3 * 4 * 64**2, rel=1e-2)


@pytest.mark.parametrize("size", [2**16, 2**20])
def test_the_triad_moves_what_it_is_credited_within_its_working_set(size):
    loop = peaks.triad(size, CPU)
    assert loop.work == size // 2 * 3
    found = program(loop.compile(7))
    assert found.bytes == pytest.approx(7 * loop.work, rel=1e-3)
    assert found.memory.total == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_other_compilers_leave_nothing_out(target):
    place = SingleDeviceSharding(ahead.devices(target)[0])

    def compiled(loop, shape):
        like = jax.ShapeDtypeStruct(shape, loop.x.dtype, sharding=place)
        traced = loop.jitted(7).trace(like, like)
        return program(traced.lower(lowering_platforms=(target,)).compile())

    for name in HERE:
        found = compiled(peaks.products(name, 8, CPU), (512, 512))
        assert found.exact
        assert found.matmul_flops == 7 * 2 * 2 * 512**3
    found = compiled(peaks.triad(64, CPU), (2**20,))
    assert found.bytes == pytest.approx(7 * 3 * 4 * 2**20, rel=1e-3)


def test_a_product_that_is_the_same_every_trip_would_be_seen():
    """The compiler does hoist: without x in it, the product is executed once."""
    x = jnp.ones((64, 64))
    loop = Loop(lambda x, a: x + a @ a, x, x + 1, work=2 * 64**3)
    assert program(loop.compile(7)).matmul_flops < 7 * loop.work


@pytest.mark.parametrize("name", HERE)
def test_numbers_stay_ordinary(name):
    loop = peaks.products(name, 128, CPU)
    start = np.std(np.asarray(loop.x, np.float64))
    x = np.asarray(loop.compile(2000)(loop.x, loop.a), np.float64)
    assert np.isfinite(x).all()
    # bfloat16 rounds the matrix to one that grows by 0.15% a product.
    assert 0.9 < x.std() / start < (1000 if name == "bfloat16" else 2)
    assert len(np.unique(x)) > 100


def test_half_of_x_is_added_on_every_trip():
    loop = peaks.triad(64, CPU)
    x = loop.compile(3)(loop.x, loop.a)
    np.testing.assert_array_equal(x, np.full(8, 1.75, np.float32))


# How it is timed.


@pytest.fixture
def even_machine(monkeypatch):
    """A call takes a nanosecond a FLOP or byte of its program, every other one twice as long."""
    noise = itertools.cycle([2, 1])

    def seconds(loop, compiled):
        found = program(compiled)
        return next(noise) * (found.matmul_flops or found.bytes) / 1e9

    monkeypatch.setattr(Loop, "seconds", seconds)


@pytest.mark.usefixtures("even_machine")
def test_a_machine_of_known_speed_is_measured_as_such():
    said = []
    found = peaks.measure(CPU, said.append, **SMALL)
    assert found.matmul == pytest.approx({"float32": 1e9, "int8": 1e9})
    assert [size for size, _ in found.bandwidth] == [2**16, 2**18]
    assert [rate for _, rate in found.bandwidth] == pytest.approx([1e9] * 2, rel=2e-3)
    assert "float32 32: 1.0 GFLOP/s" in said


def test_a_peak_is_the_best_of_the_sizes(monkeypatch):
    monkeypatch.setattr(Loop, "rate", lambda loop, *_: 7e9 if loop.work == 4 * 32**3 else 5e9)
    said = []
    assert peaks.measure(CPU, said.append, **SMALL).matmul == {"float32": 7e9, "int8": 7e9}
    assert {"int8 32: 7.0 GFLOP/s", "int8 64: 5.0 GFLOP/s"} <= set(said)


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (64.0 * (os.cpu_count() or 1), True)])
def test_a_busy_machine_is_said_to_be_one(load, busy, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(Loop, "rate", lambda *_: 1e9)
    said = []
    peaks.measure(CPU, said.append, **SMALL)
    assert any("too low" in line for line in said) == busy


def test_calls_last_as_long_as_asked(monkeypatch):
    trips = []
    original = Loop.compile
    monkeypatch.setattr(Loop, "compile", lambda *args: trips.append(args[1]) or original(*args))
    monkeypatch.setattr(Loop, "seconds", lambda *_: 3e-6 + trips[-1] * 1e-6)
    rate = peaks.triad(2**16, CPU).rate(seconds=0.01, repeats=1)
    assert trips[-1] >= 8000
    assert len(trips) <= 5
    assert rate == pytest.approx(1.5 * 2**16 * 1e6, rel=1e-3)


def test_work_that_takes_no_time_is_not_done(monkeypatch):
    monkeypatch.setattr(Loop, "seconds", lambda *_: 0.0)
    with pytest.raises(RuntimeError, match="not done"):
        peaks.triad(64, CPU).rate(seconds=0.01, repeats=1)


@pytest.mark.usefixtures("even_machine")
def test_sizes_end_where_a_product_takes_too_long():
    said = []
    options = SMALL | {"sizes": (512, 32, 256), "dtypes": ("float32",)}
    peaks.measure(CPU, said.append, **options)
    # 4 n^3 ns are 0.1 ms, 67 ms, 537 ms; a call is to last 2 ms, a product at most 8.
    measured = [line.split(":")[0] for line in said if line.startswith("float32")]
    assert measured == ["float32 32"]


def test_measured(strict_dtypes):
    found = peaks.measure(**SMALL | {"dtypes": peaks.DTYPES, "sizes": (32,)})
    assert found.device == peaks.name_of(CPU)
    assert found.platform == "cpu"
    assert found.versions["jax"] == jax.__version__
    assert list(found.matmul) == HERE
    assert 0 < found.memory_bandwidth == found.bandwidth[-1][1]


def test_another_device_of_this_process_is_measured_on_itself():
    other = jax.local_devices()[-1]
    assert other != CPU
    loop = peaks.products("float32", 8, other)
    assert loop.seconds(loop.compile(2)) > 0
    assert loop.compile(2)(loop.x, loop.a).devices() == {other}


def test_float64_only_where_enabled():
    small = SMALL | {"dtypes": ("float32", "float64"), "sizes": (32,)}
    said = []
    assert list(peaks.measure(CPU, said.append, **small).matmul) == ["float32"]
    assert "float64 32: none (needs jax_enable_x64)" in said
    with jax.enable_x64(True):
        assert list(peaks.measure(CPU, **small).matmul) == ["float32", "float64"]
        loop = peaks.products("float64", 64, CPU)
        assert loop.x.dtype == np.float64
        assert program(loop.compile(7)).matmul_flops == 7 * loop.work


def test_what_a_device_cannot_do_is_left_out():
    said = []
    options = SMALL | {"dtypes": ("float31", "float32", "float32:SOMEHOW")}
    assert list(peaks.measure(CPU, said.append, **options).matmul) == ["float32"]
    assert any(line.startswith("float31 32: none (") for line in said)
    with pytest.raises(TypeError, match="float31"):
        peaks.measure(CPU, **SMALL | {"dtypes": ("float31",)})


def test_sizes_beyond_memory_are_left_out(monkeypatch):
    def within(make, limit):
        def made(*args):
            if args[-2] > limit:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore lines")
            return make(*args)

        return made

    monkeypatch.setattr(peaks, "products", within(peaks.products, 32))
    monkeypatch.setattr(peaks, "triad", within(peaks.triad, 2**16))
    said = []
    found = peaks.measure(CPU, said.append, **SMALL | {"dtypes": ("float32",)})
    assert found.matmul["float32"] > 0
    assert [size for size, _ in found.bandwidth] == [2**16]
    assert "float32 64: none (RESOURCE_EXHAUSTED: out of memory)" in said
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        peaks.measure(CPU, **SMALL | {"working_sets": (2**18,), "sizes": (32,)})


# What is told.


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        (0, 4e11),
        (2**17, 4e11),
        (2**18, 4e11),  # the next larger one is faster: 2**18 is mostly the start of a call
        (2**20, 4e11),
        (2**22, 4e11),
        (2**24, 2e11),
        (2**28 - 1, 2e11),
        (2**28, 5e10),
        (2**40, 5e10),
    ],
)
def test_bandwidth_at(size, rate):
    assert some().bandwidth_at(size) == rate


def test_memory_bandwidth():
    assert some().memory_bandwidth == 5e10


@pytest.mark.parametrize(
    "changes",
    [
        {"matmul": {}},
        {"matmul": {"float32": math.nan}},
        {"matmul": {"float32": math.inf}},
        {"matmul": {"float32": -1.0}},
        {"bandwidth": ()},
        {"bandwidth": ((2**20, 0.0),)},
        {"bandwidth": ((2**20, 1e9), (2**18, 2e9))},
        {"bandwidth": ((2**20, 1e9), (2**20, 2e9))},
    ],
    ids=str,
)
def test_no_peaks_without_rates(changes):
    with pytest.raises(ValueError, match="peaks"):
        some(**changes)


def test_name_of():
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert peaks.name_of(gpu) == "NVIDIA H100 80GB HBM3"
    assert peaks.name_of(CPU) != CPU.device_kind


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_cpu_with_fewer_cores_is_another_device():
    peaks.save(some())
    cores = os.sched_getaffinity(0)
    assert peaks.name_of(CPU).endswith(f", {len(cores)} core{'s' * (len(cores) > 1)}")
    if len(cores) == 1:
        pytest.skip("one core only")
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert peaks.name_of(CPU).endswith(", 1 core")
        assert peaks.load() is None
    finally:
        os.sched_setaffinity(0, cores)
    assert peaks.load() is not None


# What is kept.


def test_round_trip(tmp_path):
    assert peaks.load() is None
    found = peaks.measure(**SMALL)
    path = peaks.save(found)
    assert path.parent == tmp_path / "cache"
    assert peaks.load() == peaks.load(CPU) == found
    again = dataclasses.replace(found, matmul={"float32": 1.5})
    assert peaks.save(again) == path
    assert peaks.load() == again
    assert list(path.parent.iterdir()) == [path]


def test_json_round_trip():
    assert peaks.from_json(json.loads(json.dumps(peaks.to_json(some())))) == some()


def test_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("ERGON_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert peaks.save(some()).parent == tmp_path / "home/.cache/ergon"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert peaks.load() is None
    path = peaks.save(some())
    assert path.parent == tmp_path / "xdg/ergon"
    assert path.name.startswith("peaks-")
    assert " " not in path.name


OTHERS = [
    {"device": "NVIDIA H100 80GB HBM3"},
    {"platform": "gpu"},
    {"versions": {**some().versions, "jax": "0.9.0"}},
    {"versions": {**some().versions, "jaxlib": "0.9.0"}},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_devices_or_versions_are_not_used(other):
    path = peaks.save(some(**other))
    assert peaks.load() is None
    mine = peaks.save(some())
    assert mine != path
    assert peaks.load() == some()
    # Even under this one's name.
    path.replace(mine)
    assert peaks.load() is None


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_an_upgrade_makes_them_stale(package, monkeypatch):
    peaks.save(some())
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99" if name == package else version(name)
    )
    assert peaks.load() is None


def broken(**changes):
    return json.dumps({**peaks.to_json(some()), **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe\x00",
        broken()[:-20],
        broken(matmul={}),
        broken(matmul={"float32": math.nan}),
        broken(matmul={"float32": "fast"}),
        broken(matmul=[1]),
        broken(bandwidth=[]),
        broken(bandwidth=[[1, 2, 3]]),
        broken(bandwidth=[[math.inf, 2]]),
        broken(bandwidth=[[1, -2]]),
        broken(versions=None),
        broken(date="yesterday"),
    ],
)
def test_a_broken_file_is_none(content):
    path = peaks.save(some())
    path.write_bytes(content)
    assert peaks.load() is None
    peaks.save(some())
    assert peaks.load() == some()


def test_a_file_that_cannot_be_read_is_none():
    path = peaks.save(some())
    path.unlink()
    path.mkdir()
    assert peaks.load() is None


def test_the_file_is_put_in_place_whole(monkeypatch):
    written, write = [], pathlib.Path.write_text

    def spy(self, *args, **options):
        written.append(self)
        return write(self, *args, **options)

    monkeypatch.setattr(pathlib.Path, "write_text", spy)
    path = peaks.save(some())
    assert len(written) == 1
    assert written[0] != path
    assert written[0].parent == path.parent


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    path = peaks.save(some())

    def fails(self, text, **_):
        self.write_bytes(text.encode()[:9])
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_text", fails)
    with pytest.raises(OSError, match="disk full"):
        peaks.save(some(date="2026-02-03"))
    assert peaks.load() == some()
    assert list(path.parent.iterdir()) == [path]


# The script.

SCRIPT = f"""
import functools, runpy, sys
from research.compute import peaks
peaks.measure = functools.partial(peaks.measure, **{SMALL})
runpy.run_path("scripts/benchmark.py", run_name="__main__")
"""


def script(*args):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, "peaks", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_script_prints_writes_and_keeps(tmp_path):
    result = script("--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert "float32 64: " in result.stderr
    kept = peaks.load()
    assert kept == peaks.from_json(json.loads((tmp_path / "out.json").read_text()))
    first, *lines = result.stdout.splitlines()
    assert first == ", ".join(
        [kept.device, "cpu", *(f"{k} {v}" for k, v in kept.versions.items()), kept.date]
    )
    rows = {line[:24].rstrip(): line[24:].split() for line in lines if line}
    for name, rate in kept.matmul.items():
        assert rows[name] == [f"{rate / 1e9:,.1f}"]
    for size, rate in kept.bandwidth:
        assert rows[f"{size / 2**20:g} MiB"] == [f"{rate / 1e9:,.1f}"]
    assert lines[-1].removeprefix("kept in ") == str(next((tmp_path / "cache").iterdir()))


def test_the_script_prints_the_datasheet_beside(monkeypatch, capsys):
    rates = {"float32": 4e14, "float32:HIGHEST": 5e13, "bfloat16": 7.9e14, "float31": 1.0}
    bandwidth = ((2**20, 9e12), (2**30, 3e12))
    monkeypatch.setattr(peaks, "measure", lambda *_, **__: some(matmul=rates, bandwidth=bandwidth))
    h100 = chips.chips()["h100-sxm"]
    monkeypatch.setattr(chips, "match", lambda *_: h100)
    commands.the_peaks([])
    rows = {line[:24].rstrip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["products of"] == ["TFLOP/s", "datasheet", "ratio"]
    assert rows["float32"] == ["400.0", "494.7", "0.81"]
    assert rows["float32:HIGHEST"] == ["50.0", "66.9", "0.75"]
    assert rows["bfloat16"] == ["790.0", "989.4", "0.80"]
    assert rows["float31"] == ["0.0"]
    assert rows["1 MiB"] == ["9,000.0"]
    assert rows["1024 MiB"] == ["3,000.0", f"{h100.memory_bandwidth / 1e9:,.1f}", "0.90"]


def test_what_is_kept_is_not_measured_again_unless_asked():
    first = script("--if_missing")
    assert "float32 64: " in first.stderr
    kept = peaks.load()
    again = script("--if_missing")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == first.stdout
    assert peaks.load() == kept


def test_a_mistake_is_one_line():
    result = script("--jason", "x")
    assert result.returncode == 2
    assert result.stderr == "error: unknown field --jason; did you mean --json?\n"
    assert peaks.load() is None
