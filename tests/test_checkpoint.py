"""Checkpoints bit by bit, and stop signals."""

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from research import UserError, parallel
from research.checkpoint import Checkpoints, read, stop_requested

KEEP = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any


def numbers(seed: int) -> State:
    """Arrays of several types, in dicts with more than ten int keys, and fields without arrays."""
    rng = np.random.default_rng(seed)

    def kernel():
        return rng.normal(size=(16, 8)).astype(np.float32)

    params = {
        "layers": {i: {"kernel": kernel()} for i in range(12)},
        "half": rng.normal(size=(16,)).astype(ml_dtypes.bfloat16),
        "counts": rng.integers(2**31, size=(5,), dtype=np.int32),
        "flags": np.array([True, False]),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    }
    return State(
        step=np.int32(seed),
        params=params,
        model_state={},
        opt_state=optax.adam(1e-3).init(jnp.asarray(params["half"])),
        ema=None,
    )


def mesh(fsdp=8, devices=8):
    return parallel.Parallel(fsdp=fsdp).mesh(8, jax.devices()[:devices])


def placed(state, mesh):
    return jax.device_put(state, parallel.place(state, mesh))


def restored(path, step, like, mesh):
    abstract = jax.eval_shape(lambda: like)
    with Checkpoints(path, KEEP) as checkpoints:
        return checkpoints.restore(step, abstract, parallel.place(abstract, mesh))


def bits(tree):
    """Each leaf by its path: dtype, shape and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]
    return {path: (str(leaf.dtype), leaf.shape, leaf.tobytes()) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (mesh(8), mesh(8)),
        (mesh(8), mesh(1)),
        (mesh(1), mesh(8)),
        (mesh(4), mesh(1, devices=1)),
        (mesh(1, devices=1), mesh(2)),
    ],
    ids=["same", "gather", "split", "fewer", "more"],
)
def test_what_is_restored_is_what_was_saved(tmp_path, before, after):
    state = placed(numbers(3), before)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(3, state, 12.5)
    found, seconds = restored(tmp_path, 3, state, after)
    assert seconds == 12.5
    assert bits(found) == bits(numbers(3))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert (found.model_state, found.ema) == ({}, None)
    assert list(found.params["layers"]) == list(range(12))
    for part in (f.name for f in dataclasses.fields(found)):
        leaves = jax.tree.leaves(getattr(found, part))
        places = jax.tree.leaves(parallel.place(getattr(found, part), after))
        for leaf, place in zip(leaves, places, strict=True):
            assert leaf.sharding.mesh == after
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


MASK = {"layers": True, "half": False, "counts": False, "flags": False, "odd": False}


@pytest.mark.parametrize(
    "transformation", [optax.sgd(0.1), optax.identity(), optax.masked(optax.adam(0.1), MASK)]
)
def test_optimizer_states_with_nothing_in_places(tmp_path, transformation):
    state = numbers(1)
    state = dataclasses.replace(
        state, opt_state=transformation.init(state.params), ema=state.params
    )
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, placed(state, mesh()), 0.0)
    found, _ = restored(tmp_path, 1, state, mesh())
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert bits(found) == bits(state)


def test_a_save_keeps_what_the_next_step_overwrites(tmp_path):
    forget = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    state = placed(numbers(1), mesh())
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, state, 0.0)
        zeros = forget(state)
        zeros = forget(zeros)
    found, _ = restored(tmp_path, 1, zeros, mesh())
    assert bits(found) == bits(numbers(1))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.steps() == []
        for step in (8, 9, 10, 30):
            checkpoints.save(step, numbers(step), float(step))
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.steps() == [10, 30]
        assert checkpoints.latest() == 30
        checkpoints.save(30, numbers(31), 31.0)  # there already
    for step in (10, 30):
        found, seconds = restored(tmp_path, step, numbers(0), mesh())
        assert seconds == step
        assert bits(found) == bits(numbers(step))


def test_the_best_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step, best in ((1, None), (2, 2), (3, 2)):
            checkpoints.save(step, numbers(step), 0.0, best)
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        checkpoints.save(4, numbers(4), 0.0, 2)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        checkpoints.save(5, numbers(5), 0.0, 5)
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.steps() == [5]


def test_an_interrupted_save_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, numbers(1), 1.0)
    for name in (f"2{ocp.utils.TMP_DIR_SUFFIX}", f"3{ocp.utils.TMP_DIR_SUFFIX}-1700000000"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.latest() == 1
        checkpoints.save(2, numbers(2), 2.0)
    found, _ = restored(tmp_path, 2, numbers(0), mesh())
    assert bits(found) == bits(numbers(2))


def test_the_process_died_while_saving(tmp_path, monkeypatch):
    """Orbax gives a save its name at the very end: without that there is none."""

    class Died(Exception):
        pass

    def die(*_, **__):
        raise Died

    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, numbers(1), 1.0, 1)
    with monkeypatch.context() as patch:
        for module, name in [(os, "rename"), (os, "replace"), (shutil, "move")]:
            patch.setattr(module, name, die)
        with pytest.raises(Died), Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(2, numbers(2), 2.0, 2)
    assert any(ocp.utils.TMP_DIR_SUFFIX in p.name for p in tmp_path.iterdir())
    with Checkpoints(tmp_path, KEEP) as again:
        assert again.latest() == 1


def test_reading_changes_nothing(tmp_path):
    """Evaluation may read what a training run is just writing."""
    path = tmp_path / "checkpoints"
    with Checkpoints(path, keep=3) as checkpoints:
        for step in (9, 10, 30):
            checkpoints.save(step, numbers(step), 0.0)
    (path / f"40{ocp.utils.TMP_DIR_SUFFIX}" / "state").mkdir(parents=True)
    files = sorted(path.rglob("*"))
    abstract = jax.eval_shape(lambda: numbers(0))
    shardings = parallel.place(abstract, mesh())
    for asked, step in ((None, 30), (30, 30), (9, 9), (10, 10)):
        found, state = read(path, asked, abstract, shardings)
        assert found == step
        assert bits(state) == bits(numbers(step))
    with pytest.raises(UserError, match="no checkpoint of step 11; there are: 9, 10, 30"):
        read(path, 11, abstract, shardings)
    assert sorted(path.rglob("*")) == files


def test_nothing_to_read(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=f"{path.parent} has no checkpoints yet"):
            read(path, None, None, None)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def usual():
    """Handlers that count, in place of the usual ones."""
    seen = []
    previous = {
        n: signal.signal(n, lambda number, _: seen.append(number))
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    yield seen
    for number, handler in previous.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_flag_and_the_second_acts(usual, first, second):
    before = handlers()
    with stop_requested() as stop:
        assert not stop.signal
        os.kill(os.getpid(), first)
        assert stop.signal == first
        assert usual == []
        os.kill(os.getpid(), second)
        assert usual == [second]
        assert stop.signal == first
    assert handlers() == before
    with stop_requested() as stop:
        assert not stop.signal


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_handlers_come_back(usual, error):
    before = handlers()
    with contextlib.suppress(RuntimeError), stop_requested():
        assert not set(handlers()) & set(before)
        if error:
            raise error
    assert handlers() == before


def test_control_c_twice_interrupts(usual):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT


def test_signals_are_left_alone_outside_the_main_thread(usual):
    before, found = handlers(), []

    def work():
        with stop_requested() as stop:
            found.append((stop.signal, handlers() == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, True)]
    assert handlers() == before
