"""Optimizers: all through one table, some against formulas in NumPy; groups, masks, penalties."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from annotated_types import Ge, Interval

from research import checkpoint, compute, experiment, parallel, train
from research.models.mlp import MLPConfig
from research.optim import Group, Optax, Optimizer, Rate, decay_mask, path_of, schedule
from research.setup import prepare

LINEAR = Optax("linear_schedule", {"init_value": 0.1, "end_value": 0.0, "transition_steps": 2})


def sgd(p, grads, rates, momentum=0.0, nesterov=False):
    trace = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        trace = momentum * trace + g
        p = p - rate * (g + momentum * trace if nesterov else trace)
    return p


def adagrad(p, grads, rates):
    total = np.full_like(p, 0.1)
    for g, rate in zip(grads, rates, strict=True):
        total = total + g**2
        p = p - rate * g / np.sqrt(total + 1e-7)
    return p


def rmsprop(p, grads, rates):
    nu = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        nu = 0.9 * nu + 0.1 * g**2
        p = p - rate * g / np.sqrt(nu + 1e-8)
    return p


def adam(p, grads, rates, decay=0.0):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        step = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        p = p - rate * (step + decay * p)
    return p


class Traces(NamedTuple):
    count: jax.Array
    trace: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """SGD with momentum and decoupled decay, its state its own."""

    learning_rate: Rate
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    inner: Optax | None = None

    def make(self, mask, multiplier):
        def init(params):
            return Traces(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

        def update(grads, state, params=None):
            trace = jax.tree.map(lambda g, t: g + self.momentum * t, grads, state.trace)
            return trace, Traces(state.count + 1, trace)

        return optax.chain(
            optax.GradientTransformation(init, update),
            optax.add_decayed_weights(self.weight_decay, mask),
            optax.scale_by_learning_rate(schedule(self.learning_rate, multiplier)),
        )

    def rate(self, step):
        return schedule(self.learning_rate)(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipped(Own):
    learning_rate: Rate = 0.1
    clip_norm: float


def own(rate, **fields):
    return Optimizer(update=Own(learning_rate=rate, momentum=0.9, **fields))


# Name, arguments, the formula for a kernel and for a bias.
TABLE: list[Any] = [
    ("sgd", {}, sgd, sgd),
    ("sgd", {"momentum": 0.9}, *[lambda *a: sgd(*a, momentum=0.9)] * 2),
    ("sgd", {"momentum": 0.9, "nesterov": True}, *[lambda *a: sgd(*a, 0.9, True)] * 2),
    ("adagrad", {}, adagrad, adagrad),
    ("rmsprop", {}, rmsprop, rmsprop),
    ("adam", {}, adam, adam),
    ("adamw", {"weight_decay": 0.3}, lambda *a: adam(*a, decay=0.3), adam),
]
CASES = pytest.mark.parametrize(
    ("name", "kwargs", "kernel", "bias"), TABLE, ids=[f"{n}-{'-'.join(k)}" for n, k, *_ in TABLE]
)
START = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([0.3, -0.7])}
GRADS = [
    {"kernel": np.array([[0.2, -1.0], [0.0, 4.0]]), "bias": np.array([-0.5, 2.0])},
    {"kernel": np.array([[-0.3, 1.5], [0.7, 0.1]]), "bias": np.array([1.0, 0.4])},
    {"kernel": np.array([[0.9, 0.6], [-2.0, 0.3]]), "bias": np.array([0.2, -3.0])},
]


def arrays(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def run(config, grads, params):
    """The parameters after each gradient, and how often the step was traced."""
    tx, traces = config.make(), []

    @jax.jit
    def step(params, state, grad):
        traces.append(1)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    for grad in grads:
        params, state = step(params, state, grad)
        path.append(params)
    return path, len(traces)


def step_of(config, grad, params):
    tx = config.make()
    return tx.update(grad, tx.init(params), params)[0]


def optimizer(name, rate: Any = 0.1, /, **kwargs):
    return Optimizer(update=Optax(name, {"learning_rate": rate, **kwargs}))


@CASES
@pytest.mark.parametrize("rate", [0.1, LINEAR], ids=["constant", "schedule"])
def test_steps_are_the_formula(name, kwargs, kernel, bias, rate):
    rates = [0.1, 0.1, 0.1] if rate == 0.1 else [0.1, 0.05, 0.0]
    config = optimizer(name, rate, **kwargs)
    path, traces = run(config, arrays(GRADS), arrays(START))
    for count, params in enumerate(path, start=1):
        for leaf, formula in (("kernel", kernel), ("bias", bias)):
            want = formula(START[leaf], [g[leaf] for g in GRADS[:count]], rates[:count])
            np.testing.assert_allclose(params[leaf], want, rtol=2e-5, atol=1e-6)
    assert traces == 1
    assert [config.learning_rate(s) for s in range(3)] == pytest.approx(rates)
    traced = jax.jit(config.learning_rate)(jnp.ones((), jnp.int32))
    assert (traced.dtype, traced.shape) == (jnp.float32, ())
    assert float(traced) == pytest.approx(rates[1])


# ---- every optimizer, through research.train


def named(name, /, **kwargs):
    return lambda rate: optimizer(name, rate, **kwargs)


BASE = Optax("adamw", {"learning_rate": 0.1})
MUON = Optax("contrib.muon", {"learning_rate": 0.1})
# What is trained: the optimizer at a rate, its rate, and the batch.
NAMED: dict[str, Any] = {
    "sgd, full batch": (named("sgd"), 0.3, None),
    "sgd, mini-batch": (named("sgd"), 0.3, 16),
    "sgd, single example": (named("sgd"), 0.05, 1),
    "momentum": (named("sgd", momentum=0.9), 0.1, 16),
    "nesterov": (named("sgd", momentum=0.9, nesterov=True), 0.1, 16),
    "adagrad": (named("adagrad"), 0.5, 16),
    "rmsprop": (named("rmsprop"), 0.05, 16),
    "adam": (named("adam"), 0.1, 16),
    "adamw": (named("adamw", weight_decay=1e-3), 0.1, 16),
    "lamb": (named("lamb"), 0.1, 16),
    "lars": (named("lars"), 10.0, 16),
    "lion": (named("lion"), 0.05, 16),
    "adafactor": (named("adafactor", min_dim_size_to_factor=2), 0.3, 16),
    "muon": (named("contrib.muon"), 0.1, 16),
    "muon and adamw": (
        lambda rate: Optimizer(update=BASE, groups=(Group(match="kernel", update=at(MUON, rate)),)),
        0.1,
        16,
    ),
    "schedule-free sgd": (named("contrib.schedule_free_sgd"), 0.5, 16),
    "schedule-free adamw": (named("contrib.schedule_free_adamw"), 0.1, 16),
    "schedule-free, any": (named("contrib.schedule_free", base_optimizer=BASE), 0.1, 16),
    "one's own": (lambda rate: own(rate), 0.1, 16),
    "sam": (lambda rate: dataclasses.replace(optimizer("sgd", rate), sam_rho=0.05), 0.3, 16),
}
EVERY = pytest.mark.parametrize("name", NAMED)
STEPS = 150


def at(update, rate):
    return Optax(update.name, update.kwargs | {"learning_rate": rate})


def warm(rate, steps):
    """From 0 up to a rate in two steps, and down to 0."""
    kwargs = {"init_value": 0.0, "peak_value": rate, "warmup_steps": 2, "decay_steps": steps}
    return Optax("warmup_cosine_decay_schedule", kwargs)


def batch(setup, step):
    size, seed = setup.batch_size, setup.experiment.seed
    return parallel.put(setup.splits["train"].batch(step, size, seed), setup.mesh)


def after(setup, state, steps, step=None):
    """The state after further steps, and the metrics of each."""
    step, rows = step or setup.step(), []
    for i in range(int(state.step), int(state.step) + steps):
        state, metrics = step(state, batch(setup, i), setup.root)
        rows.append(metrics)
    return state, rows


def bits(tree):
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@EVERY
def test_every_optimizer_learns_a_convex_problem_by_its_schedule(name):
    make, peak, size = NAMED[name]
    config = make(warm(peak, STEPS))
    if name == "muon and adamw":  # whose base has a rate of its own
        config = dataclasses.replace(config, update=at(BASE, warm(peak, STEPS)))
    if name == "schedule-free, any":
        base = at(BASE, warm(peak, STEPS))
        config = optimizer("contrib.schedule_free", warm(peak, STEPS), base_optimizer=base)
    setup = prepare(tiny.lines(optimizer=config, batch_size=size), tiny.ONE)
    assert setup.batch_size == (size or 64)
    state, step = setup.initial(), setup.step()
    first = setup.evaluate(state, "validation")["validation"]["loss"]
    before = jax.device_get(state.params)
    state, _ = after(setup, state, 1, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, state.params)
    state, rows = after(setup, state, STEPS - 1, step)
    assert setup.evaluate(state, "validation")["validation"]["loss"] < 0.05 * first
    rates = [float(row["learning_rate"].total) for row in rows]
    want = [float(warm(peak, STEPS).make()(i)) for i in range(1, STEPS)]
    assert rates == pytest.approx(want, rel=1e-4)
    assert step._cache_size() == 1, "compiled again"


@EVERY
def test_every_optimizer_trains_a_network_and_is_restored_bit_for_bit(name, tmp_path):
    make, peak, size = NAMED[name]
    model = MLPConfig(features=5, sizes=(8, 3))
    e = tiny.mlp(model=model, optimizer=make(peak), batch_size=size, steps=40, save_every=20)
    setup = prepare(e, tiny.ONE)
    first = setup.evaluate(setup.initial(), "validation")["validation"]["loss"]
    summary = train.train(setup, tmp_path, quiet=True)
    assert summary.metrics["validation"]["loss"] < first - 0.5
    half, end = (
        checkpoint.read(tmp_path / "checkpoints", i, setup.abstract, setup.shardings)[1]
        for i in (20, 40)
    )
    assert jax.tree.structure(half) == jax.tree.structure(setup.abstract)
    again, _ = after(setup, half, 20)
    assert bits(again) == bits(end)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_optimizer_keeps_the_dtype(name, dtype):
    make, peak, size = NAMED[name]
    for rate in (peak, np.float64(peak), warm(peak, 9)):
        config = dataclasses.replace(make(rate), clip_norm=1.0, clip_value=1.0)
        if name == "adamw":  # a scheduled decay is what optax itself would promote
            config = optimizer(name, rate, weight_decay=LINEAR)
        setup = prepare(tiny.lines(optimizer=config, batch_size=size), tiny.ONE)
        state = setup.initial()
        params = arrays(state.params, dtype)
        state = dataclasses.replace(state, params=params, opt_state=setup.optimizer.init(params))
        new, _ = jax.eval_shape(
            functools.partial(train.train_step, setup), state, batch(setup, 0), setup.root
        )
        kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (state, new)]
        assert kinds[0] == kinds[1]
        found = config.eval_params(state.opt_state, state.params)
        assert {x.dtype for x in jax.tree.leaves((new.params, found))} == {jnp.dtype(dtype)}


# ---- dtypes, masks, clips and penalties by themselves


def test_state_keeps_its_dtype_and_grads_that_of_params():
    config = optimizer("lars", 0.1, weight_decay=LINEAR)  # decay enters the momentum
    params, tx = arrays(START, jnp.bfloat16), config.make()
    state = tx.init(params)
    updates, after = tx.update(arrays(GRADS[0]), state, params)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (state, after)]
    assert kinds[0] == kinds[1]
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


# One list of layers, and one stack of three for a scan.
MODEL = {
    "layers": {
        0: {"kernel": np.full((2, 3), 2.0), "bias": np.full(3, 2.0)},
        1: {"norm": {"scale": np.full(3, 2.0)}},
    },
    "stack": {
        "attention": {"kernel": np.full((3, 2, 2), -2.0), "bias": np.full((3, 2), 2.0)},
        "ffn_norm": {"scale": np.full((3, 2), 2.0)},
    },
    "embed": {"embedding": np.full((4, 2), 2.0)},
}
DECAYED = {"layers/0/kernel", "stack/attention/kernel", "embed/embedding"}


def by_path(tree):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_mask_goes_by_path():
    mask = decay_mask(MODEL, optimizer("sgd").no_decay)
    assert {path for path, decayed in by_path(mask).items() if decayed} == DECAYED
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))
    assert by_path(decay_mask(MODEL, "^embed/")) == {p: p[:6] != "embed/" for p in by_path(MODEL)}
    assert not any(jax.tree.leaves(decay_mask({"a": {"layer_norm_1": {"w": 1}}}, ".*norm.*")))
    assert path_of(jax.tree_util.tree_leaves_with_path({"a": [0, {3: 1}]})[1][0]) == "a/1/3"


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adamaxw", "adan", "lion", "contrib.muon"])
def test_weight_decay_shrinks_only_kernels(name):
    params = arrays(MODEL)
    config = optimizer(name, 0.5, weight_decay=0.25)
    after = step_of(config, jax.tree.map(jnp.zeros_like, params), params)
    for path, update in by_path(after).items():
        want = -0.5 * 0.25 * by_path(params)[path] if path in DECAYED else jnp.zeros_like(update)
        np.testing.assert_array_equal(update, want, err_msg=path)


@pytest.mark.parametrize("name", ["lars", "lamb", "adadelta", "adafactor"])
def test_coupled_weight_decay_is_masked(name):
    decay = {"adafactor": "weight_decay_rate"}.get(name, "weight_decay")
    params, draw = arrays(MODEL), np.random.default_rng(0).normal
    grads = arrays(jax.tree.map(lambda p: draw(size=p.shape), MODEL))
    decayed = step_of(optimizer(name, 0.5, **{decay: 0.25}), grads, params)
    plain = step_of(optimizer(name, 0.5), grads, params)
    differ = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), decayed, plain)
    assert {path for path, moves in by_path(differ).items() if moves} == DECAYED


def test_mask_of_the_user_and_of_a_nested_optimizer():
    params = arrays(MODEL)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates = step_of(optimizer("adamw", 0.5, weight_decay=0.25, mask=None), grads, params)
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -0.125 * p), updates, params)
    inner = Optax("adamw", {"learning_rate": 0.5, "weight_decay": 0.25})
    config = optimizer("contrib.schedule_free", 0.5, base_optimizer=inner)
    moved = {p for p, u in by_path(step_of(config, grads, params)).items() if jnp.any(u)}
    assert moved == DECAYED


def test_clips_values_then_norm():
    grads = arrays({"a": np.array([3.0, -40.0]), "b": np.array([0.5])})
    sgd = Optax("sgd", {"learning_rate": 1.0})
    value = step_of(Optimizer(update=sgd, clip_value=4.0), grads, grads)
    np.testing.assert_allclose(value["a"], [-3.0, 4.0])
    np.testing.assert_allclose(value["b"], [-0.5])
    # Norm of (3, 4, 0.5) is 5.0249; norm first would leave (0.075, -1, 0.0125).
    both = step_of(Optimizer(update=sgd, clip_value=4.0, clip_norm=1.0), grads, grads)
    want = np.array([-3.0, 4.0, -0.5]) / np.sqrt(25.25)
    np.testing.assert_allclose(np.concatenate([both["a"], both["b"]]), want, rtol=1e-6)
    # The clip comes before the update, or momentum would see the raw gradient.
    path, _ = run(
        Optimizer(update=Optax("sgd", {"learning_rate": 1.0, "momentum": 0.5}), clip_norm=1.0),
        [grads, grads],
        jax.tree.map(jnp.zeros_like, grads),
    )
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(path[1])))
    assert norm == pytest.approx(1 + 1.5, rel=1e-6)
    small = arrays({"a": np.array([0.3, -0.4])})
    unclipped = step_of(Optimizer(update=sgd, clip_norm=1.0), small, small)
    np.testing.assert_array_equal(unclipped["a"], -small["a"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_penalty(dtype):
    params = arrays(MODEL, dtype)
    params["embed"]["embedding"] = jnp.zeros((4, 2), dtype).at[0, 0].set(-3)
    config = dataclasses.replace(optimizer("sgd"), l1=0.5, l2=0.25)
    value, grads = jax.jit(jax.value_and_grad(config.penalty))(params)
    # Decayed: 6 elements of 2, 12 of -2, one of -3 and seven zeros.
    assert (value.dtype, value.shape) == (jnp.float32, ())
    assert float(value) == pytest.approx(0.5 * (12 + 24 + 3) + 0.125 * (24 + 48 + 9))
    for path, grad in by_path(grads).items():
        p = np.asarray(by_path(params)[path], np.float32)
        want = 0.5 * np.sign(p) + 0.25 * p if path in DECAYED else np.zeros_like(p)
        assert grad.dtype == dtype
        np.testing.assert_array_equal(np.asarray(grad, np.float32), want, err_msg=path)


def test_penalty_sums_in_fp32_and_is_zero_without_weights():
    ones = {"kernel": jnp.full((100, 100), 1.0, jnp.bfloat16)}  # a bf16 sum of 10001 rounds
    ones["kernel2"] = jnp.ones((1,), jnp.bfloat16)
    assert float(dataclasses.replace(optimizer("sgd"), l1=1.0).penalty(ones)) == 10001
    assert float(dataclasses.replace(optimizer("sgd"), l2=2.0).penalty(ones)) == 10001
    bad = {"kernel": jnp.full((2,), jnp.nan)}
    zero = optimizer("sgd").penalty(bad)
    assert (zero.dtype, zero.shape, float(zero)) == (jnp.float32, (), 0.0)
    assert float(dataclasses.replace(optimizer("sgd"), l1=1.0).penalty({})) == 0.0


def test_learning_rates():
    cosine = {"init_value": 0.0, "peak_value": 0.4, "warmup_steps": 4, "decay_steps": 12}
    config = optimizer("adam", Optax("warmup_cosine_decay_schedule", cosine))
    rates = [config.learning_rate(step) for step in (0, 2, 4, 8, 12, 100)]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0, 0.0], abs=1e-7)
    assert Optimizer(update=Optax("adafactor")).learning_rate(3) is None
    assert Optimizer(update=Optax("contrib.dog")).learning_rate(3) == 1.0
    pieces = {"init_value": 1.0, "boundaries_and_scales": {10: 0.5}}
    config = optimizer("sgd", Optax("piecewise_constant_schedule", pieces))
    assert [config.learning_rate(s) for s in (9, 11)] == [1.0, 0.5]
    parts = [Optax("constant_schedule", {"value": v}) for v in (1.0, 0.25)]
    joined = Optax("join_schedules", {"schedules": parts, "boundaries": [5]})
    assert [optimizer("sgd", joined).learning_rate(s) for s in (4, 5)] == [1.0, 0.25]


def test_json_round_trip():
    rate = Optax("cosine_decay_schedule", {"init_value": np.float32(0.5), "decay_steps": 10})
    update = Optax("contrib.prodigy", {"learning_rate": rate, "betas": (0.9, 0.99)})
    config = Optimizer(update=update, clip_norm=1.0, l2=1e-4)
    loaded = json.loads(json.dumps(dataclasses.asdict(config)))
    again = Optimizer(**loaded | {"update": Optax(**loaded["update"])})
    assert again == config
    assert hash(again) == hash(config)
    assert again.learning_rate(5) == pytest.approx(0.25)
    arguments = {"learning_rate": 0.1}
    frozen = Optax("sgd", arguments)
    arguments["learning_rate"] = -1.0
    assert frozen.kwargs == {"learning_rate": 0.1}


def test_configuration_opens_no_device():
    code = (
        "from research.optim import Optax, Optimizer\n"
        "rate = Optax('linear_onecycle_schedule', {'transition_steps': 9, 'peak_value': 0.1})\n"
        "Optimizer(update=Optax('contrib.muon', {'learning_rate': rate}), clip_norm=1.0)\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "none_such", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


SGD = Optax("sgd", {"learning_rate": 0.1})
NUMBER = "must be a number or a schedule"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("adagard", {}, "optax has no optimizer or schedule 'adagard'; did you mean 'adagrad'?"),
        ("muon", {}, "optax has no optimizer or schedule 'muon'; did you mean 'contrib.muon'?"),
        ("qqq", {}, "optax has no optimizer or schedule 'qqq'"),
        (
            "adagrad",
            {"lr": 0.1},
            "adagrad takes no argument 'lr'; did you mean 'learning_rate'? "
            "It takes: learning_rate, initial_accumulator_value, eps",
        ),
        ("sign_sgd", {"qqq": 1}, "sign_sgd takes no argument 'qqq'. It takes: learning_rate"),
        ("lion", {"beta1": 1}, "lion takes no argument 'beta1'; did you mean 'b1'? It takes: lear"),
        ("adagrad", {}, "adagrad needs 'learning_rate'"),
        ("adadelta", {}, "adadelta needs 'learning_rate'"),
        ("adam", {"learning_rate": None}, "adam needs 'learning_rate'"),
        ("linear_schedule", {"init_value": 1}, "linear_schedule needs 'end_value', 'tr"),
        ("adam", {"learning_rate": "fast"}, f"adam: learning_rate {NUMBER}, got 'fast'"),
        ("adam", {"learning_rate": True}, f"adam: learning_rate {NUMBER}, got True"),
        ("adam", {"learning_rate": -0.1}, "adam: learning_rate must not be negative, got -0.1"),
        ("adam", {"learning_rate": float("nan")}, "adam: learning_rate must be finite, got nan"),
        ("adam", {"learning_rate": SGD}, f"adam: learning_rate {NUMBER}; 'sgd' is an optimizer"),
        ("adam", {"learning_rate": len}, "adam: learning_rate must be a number, string, bool, No"),
        ("adam", {"learning_rate": 1, "b1": "x"}, f"adam: b1 {NUMBER}, got 'x'"),
        ("adam", {"learning_rate": 1, "nesterov": "no"}, "adam: nesterov must be true or false"),
        ("adam", {"learning_rate": 1, "mu_dtype": "f23"}, "adam: optax says: data type 'f23'"),
        ("sgd", 0.1, "sgd: kwargs must be a dict, got 0.1"),
        ("constant_schedule", {"value": -1}, "constant_schedule: value must not be negative"),
        ("constant_schedule", {"value": "x"}, f"constant_schedule: value {NUMBER}, got 'x'"),
        (
            "cosine_decay_schedule",
            {"init_value": 1.0, "decay_steps": 0},
            "cosine_decay_schedule: optax says: The cosine_decay_schedule requires positive decay_",
        ),
        (
            "contrib.schedule_free",
            {"learning_rate": 1.0, "base_optimizer": LINEAR},
            "contrib.schedule_free: base_optimizer must be an optimizer; 'linear_schedule' is a sc",
        ),
        ("adamw", {"learning_rate": 1, "mask": {"a": True}}, "adamw: optax says: pytree structure"),
        ("rprop", {"learning_rate": LINEAR}, "rprop: optax says: "),
        ("lbfgs", {"learning_rate": 1.0}, "lbfgs: optax says: scale_by_zoom_linesearch"),
        *(
            ("contrib.muon", {"learning_rate": 1.0, "muon_weight_dimension_numbers": axes}, message)
            for axes, message in [
                ({"(": None}, "contrib.muon: muon_weight_dimension_numbers is not a regular expre"),
                *(
                    (a, "contrib.muon: muon_weight_dimension_numbers must be {regex: [reduction ax")
                    for a in ([-2, -1], {"a": -1}, {"a": [-1]}, {"a": [0, 1.5]}, {"a": [[], 1]})
                ),
            ]
        ),
        pytest.param(
            "contrib.dpsgd",
            {"learning_rate": 1.0, "l2_norm_clip": 1.0, "noise_multiplier": 1.0, "seed": 0},
            "contrib.dpsgd: optax says: Unlike other transforms",
            marks=pytest.mark.filterwarnings("ignore:.seed. is deprecated:DeprecationWarning"),
        ),
        *(
            (name, {}, f"optax.{name} is neither an optimizer with a learning rate nor a schedule")
            for name in ("apply_updates", "clip_by_global_norm", "scale_by_rprop", "chain")
        ),
    ],
)
def test_optax_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}.*\Z"):
        Optax(name, kwargs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"update": LINEAR}, "update must be an optimizer; 'linear_schedule' is a schedule"),
        *(
            ({"update": update}, "update must be an Optax, or a frozen dataclass with make(mask, m")
            for update in (0.1, optax.sgd(0.1), Optax, MLPConfig(features=1, sizes=(1,)))
        ),
        (
            {"update": Clipped(clip_norm=1)},
            "update: Clipped has a field 'clip_norm', as Optimizer h",
        ),
        ({"update": Own(learning_rate="x")}, "a rate must be a number or a schedule, got 'x'"),
        ({"update": Own(learning_rate=SGD)}, "a rate must be a number or a schedule, 'sgd' is an"),
        ({"clip_norm": -1.0}, "clip_norm must be finite and positive, got -1.0"),
        ({"clip_norm": 0}, "clip_norm must be finite and positive, got 0"),
        ({"clip_value": float("nan")}, "clip_value must be finite and positive, got nan"),
        ({"l1": -1e-4}, "l1 must be finite and not negative, got -0.0001"),
        ({"l2": float("nan")}, "l2 must be finite and not negative, got nan"),
        ({"l2": "1"}, "l2 must be a number, got '1'"),
        ({"l2": True}, "l2 must be a number, got True"),
        ({"l1": None}, "l1 must be a number, got None"),
        ({"sam_rho": 0.0}, "sam_rho must be finite and positive, got 0.0"),
        ({"groups": ("head",)}, "groups must be of Group, got 'head'"),
        ({"no_decay": "("}, "no_decay is not a regular expression: missing ), unterminated"),
        (
            {"update": Optax("novograd", {"learning_rate": 0.1, "weight_decay": 0.1})},
            "novograd: weight_decay would decay every parameter",
        ),
        (
            {"update": Optax("contrib.muon", {"learning_rate": 0.1, "adam_weight_decay": 0.1})},
            "contrib.muon: adam_weight_decay would decay every parameter",
        ),
    ],
)
def test_optimizer_refuses(fields, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}.*\Z"):
        Optimizer(**{"update": SGD} | fields)


# ---- groups


def test_the_first_group_that_matches_multiplies_the_rate():
    params, grads = arrays(MODEL), arrays(jax.tree.map(np.ones_like, MODEL))
    groups = (
        Group(match="bias", multiplier=3.0),
        Group(match="^layers/", multiplier=0.5),
        Group(match="^stack/", update=Optax("sgd", {"learning_rate": LINEAR}), multiplier=2.0),
    )
    config = dataclasses.replace(optimizer("sgd", 0.1), groups=groups)
    want = {
        "layers/0/kernel": 0.05,
        "layers/0/bias": 0.3,
        "layers/1/norm/scale": 0.05,
        "stack/attention/kernel": 0.2,
        "stack/attention/bias": 0.3,
        "stack/ffn_norm/scale": 0.2,
        "embed/embedding": 0.1,
    }
    path, traces = run(config, [grads, grads], params)
    moved = by_path(jax.tree.map(lambda p, q: p - q, params, path[0]))
    for name, step in want.items():
        np.testing.assert_allclose(moved[name], step, rtol=1e-5, err_msg=name)
    # The schedule of the third group has come to half of its rate.
    moved = by_path(jax.tree.map(lambda p, q: p - q, *path))
    np.testing.assert_allclose(moved["stack/attention/kernel"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(moved["embed/embedding"], 0.1, rtol=1e-5)
    assert traces == 1
    assert config.learning_rate(0) == pytest.approx(0.1)


@pytest.mark.parametrize("name", [*(n for n in NAMED if n != "muon and adamw"), "no rate"])
def test_a_multiplier_is_another_learning_rate(name):
    """Schedule-free steps, which are averages, and the adaptive rates are no exception."""
    draw = np.random.default_rng(0).normal
    params = arrays({"kernel": draw(size=(4, 3)), "bias": draw(size=3)})
    grads = [arrays(jax.tree.map(lambda p: draw(size=p.shape), params)) for _ in range(3)]
    make = NAMED[name][0] if name in NAMED else lambda rate: Optimizer(update=Optax("adafactor"))
    for rate in (0.1, LINEAR):
        double = Group(match="", multiplier=2.0, update=make(rate).update)
        path, _ = run(Optimizer(update=SGD, groups=(double,)), grads, params)
        if name not in NAMED:
            (first,), _ = run(make(rate), grads[:1], params)
            want = jax.tree.map(lambda p, q: p + 2 * (q - p), params, first)
            jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5), path[0], want)
            continue
        twice = (
            2 * rate
            if rate == 0.1
            else dataclasses.replace(LINEAR, kwargs=LINEAR.kwargs | {"init_value": 0.2})
        )
        update = make(twice).update
        if name == "schedule-free, any":
            base = Optax("adamw", {"learning_rate": 0.2})
            update = Optax(update.name, update.kwargs | {"base_optimizer": base})
        want, _ = run(Optimizer(update=update), grads, params)
        jax.tree.map(
            lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6), path, want
        )


def test_a_group_with_its_own_optimizer_is_that_optimizer_alone():
    params = arrays(MODEL)
    draw = np.random.default_rng(0).normal
    grads = [arrays(jax.tree.map(lambda p: draw(size=p.shape), MODEL)) for _ in range(3)]
    adamw = Optax("adamw", {"learning_rate": 0.1, "weight_decay": 0.3})
    config = Optimizer(update=adamw, groups=(Group(match="kernel", update=MUON),))
    path, traces = run(config, grads, params)
    alone = {
        name: run(Optimizer(update=u), grads, params)[0] for name, u in [("m", MUON), ("a", adamw)]
    }
    for step in range(3):
        for name, value in by_path(path[step]).items():
            which = "m" if "kernel" in name else "a"
            np.testing.assert_array_equal(value, by_path(alone[which][step])[name], err_msg=name)
    assert traces == 1


def test_what_is_frozen_stays_and_has_no_state():
    params, grads = arrays(MODEL), arrays(MODEL)
    adam = optimizer("adamw", 0.1, weight_decay=0.3)
    config = dataclasses.replace(adam, groups=(Group(match="^(stack|embed)/", frozen=True),))
    path, _ = run(config, [grads], params)
    for name, value in by_path(path[0]).items():
        held = name.startswith(("stack", "embed"))
        assert bool(jnp.all(value == by_path(params)[name])) is held, name
    state = jax.eval_shape(config.make().init, params)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sorted(moments) == sorted([(2, 3), (3,), (3,)] * 2)


def flops(e, phase="backward"):
    """By module."""
    setup = prepare(e, tiny.ONE)
    found = compute.count(setup.step().trace(*setup.abstract_example()))
    assert found.exact
    return {m: n for (p, m, *_), n in found.matmul.items() if p == phase}


@pytest.mark.parametrize(
    ("match", "products"),
    [(None, (1, 2)), ("layers/0", (0, 1)), ("layers/1", (1, 1)), ("layers/[01]/bias", (1, 2))],
)
def test_the_backward_pass_of_what_is_frozen_is_not_computed(match, products):
    """The first layer has the product for its kernel's gradient, the second that for its inputs'
    too. Nothing is behind the first, and the second passes on what the first needs alone."""
    groups = () if match is None else (Group(match=match, frozen=True),)
    e = tiny.mlp(optimizer=dataclasses.replace(tiny.ADAMW, groups=groups))
    forward, backward = flops(e, "forward"), flops(e)
    sizes = [2 * 16 * 5 * 8, 2 * 16 * 8 * 3]
    assert list(forward.values()) == sizes
    assert sum(backward.values()) == sum(n * size for n, size in zip(products, sizes, strict=True))


@pytest.mark.parametrize("scan", [True, False])
def test_frozen_layers_of_a_transformer_only_pass_gradients_on(scan):
    model = dataclasses.replace(tiny.transformer().model, scan=scan)
    group = Group(match="^layers/", frozen=True)
    frozen = dataclasses.replace(tiny.ADAMW, groups=(group,))
    whole, less = (tiny.transformer(model=model, optimizer=o) for o in (tiny.ADAMW, frozen))
    forward, before, now = flops(whole, "forward"), flops(whole), flops(less)
    kernels = [m for m in forward if m.endswith(("qkv", "out", "up", "down"))]
    assert len(kernels) == 4
    for module in kernels:
        assert before[module] == 2 * forward[module]
        assert now[module] == forward[module]
    rest = set(before) - set(kernels)
    assert {m: now[m] for m in rest} == {m: before[m] for m in rest}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [Group(match="haed", multiplier=2.0)],
            "optimizer: groups: 'haed' matches no parameter of layers/0/bias, layers/0/kernel, ",
        ),
        (
            [Group(match="layers/1"), Group(match="1/bias", frozen=True)],
            "optimizer: groups: '1/bias' matches no parameter that an earlier group leaves",
        ),
        ([Group(match="", frozen=True)], "optimizer: groups: every parameter is frozen"),
        (
            [
                Group(
                    match="bias",
                    update=Optax(
                        MUON.name,
                        MUON.kwargs | {"muon_weight_dimension_numbers": {"bias": [0, 1]}},
                    ),
                )
            ],
            "optimizer: muon_weight_dimension_numbers: layers/0/bias has 1 axes, and [0, 1] names",
        ),
    ],
)
def test_groups_that_do_not_fit_the_model(groups, message):
    e = tiny.mlp(optimizer=dataclasses.replace(tiny.ADAMW, groups=tuple(groups)))
    with pytest.raises(experiment.UserError, match=rf"\A{re.escape(message)}[^\n]*\Z"):
        prepare(e, tiny.ONE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "("}, "match is not a regular expression: missing )"),
        ({"match": None}, "match is not a regular expression: "),
        (
            {"multiplier": 0},
            "group 'a': multiplier must be finite and positive, got 0 (frozen=True",
        ),
        ({"multiplier": "2"}, "group 'a': multiplier must be a number, got '2'"),
        ({"frozen": 1}, "group 'a': frozen must be true or false, got 1"),
        ({"update": LINEAR}, "group 'a': update must be an optimizer; 'linear_schedule' is a sche"),
        (
            {"frozen": True, "multiplier": 2.0},
            "group 'a': what is frozen takes no update and no mu",
        ),
        ({"frozen": True, "update": SGD}, "group 'a': what is frozen takes no update and no mu"),
    ],
)
def test_group_refuses(fields, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}.*\Z"):
        Group(**{"match": "a"} | fields)


def test_groups_survive_json():
    axes = {"qkv": [-4, [-3, -2, -1]], "embed": None, "kernel": [-2, -1]}
    muon = Optax(MUON.name, MUON.kwargs | {"muon_weight_dimension_numbers": axes})
    groups = (Group(match="^embed", multiplier=2.0), Group(match="kernel", update=muon))
    config = tiny.transformer(optimizer=Optimizer(update=SGD, groups=groups, sam_rho=0.1))
    text = experiment.dumps(config)
    assert experiment.from_json(json.loads(text), allow=["tiny"]) == config


# ---- matrices of Muon


def layer(stack, i):
    return jax.tree.map(lambda x: x[i], stack)


def same(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_a_stack_of_layers_is_a_matrix_a_layer():
    draw = np.random.default_rng(0).normal
    params = {"kernel": draw(size=(3, 4, 2)), "bias": draw(size=(3, 2)), "norm": draw(size=(3, 4))}
    grads = jax.tree.map(lambda p: draw(size=p.shape), params)
    config = Optimizer(update=Optax(MUON.name, MUON.kwargs | {"weight_decay": 0.1}))
    stacked = step_of(config, arrays(grads), arrays(params))
    for i in range(3):
        grad, param = arrays(layer(grads, i)), arrays(layer(params, i))
        same(layer(stacked, i), step_of(config, grad, param))
        # Newton and Schulz bring the singular values near 1; the rate and the decay are 0.1.
        step = (stacked["kernel"][i] + 0.01 * param["kernel"]) / 0.1
        assert np.all(np.abs(np.linalg.svd(step, compute_uv=False) - 0.95) < 0.35)


def test_axes_are_given_by_path():
    draw = np.random.default_rng(0).normal
    kernel = draw(size=(2, 6, 3, 2, 2)).astype(np.float32)  # layers, inputs, and three of outputs
    axes = {"qkv": [-4, [-3, -2, -1]], "kernel": None}
    config = Optimizer(
        update=Optax(MUON.name, MUON.kwargs | {"muon_weight_dimension_numbers": axes})
    )
    params = arrays({"qkv": {"kernel": kernel}, "out": {"kernel": kernel[0, :, 0, 0]}})
    step = step_of(config, params, params)
    flat = {"kernel": arrays(kernel[1].reshape(6, 12))}
    alone = step_of(Optimizer(update=MUON), flat, flat)["kernel"]
    np.testing.assert_allclose(step["qkv"]["kernel"][1].reshape(6, 12), alone, rtol=1e-4, atol=1e-6)
    adam = step_of(optimizer("adam", 0.1, nesterov=True), params["out"], params["out"])
    np.testing.assert_allclose(step["out"]["kernel"], adam["kernel"], rtol=1e-5)


def test_a_scanned_transformer_is_trained_as_one_that_is_not():
    axes = {"qkv/kernel": [-4, [-3, -2, -1]], "mlp/(up|down)/kernel": [-2, -1]}
    muon = Optax(MUON.name, {"learning_rate": 0.02, "muon_weight_dimension_numbers": axes})
    draw = np.random.default_rng(0).normal
    setup = prepare(tiny.transformer(), tiny.ONE)  # its layers are scanned
    stack = jax.tree.map(lambda p: draw(size=p.shape), setup.abstract.params["layers"])
    config = Optimizer(update=SGD, groups=(Group(match="kernel", update=muon),))
    stacked = arrays({"layers": stack})
    apart = arrays({"layers": {0: layer(stack, 0), 1: layer(stack, 1)}})
    stacked, apart = (jax.jit(functools.partial(step_of, config))(p, p) for p in (stacked, apart))
    for i in range(2):
        same(layer(stacked["layers"], i), apart["layers"][i])


AXES = "muon_weight_dimension_numbers"


def muon(rate=0.1, **axes):
    return Optax(MUON.name, {"learning_rate": rate, AXES: axes})


def test_a_regex_of_matrices_that_matches_nothing_is_refused():
    def checked(**fields):
        Optimizer(**{"update": SGD} | fields).check({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})

    def refused(message, **fields):
        with pytest.raises(ValueError, match=rf"\A{re.escape(f'{AXES}: {message}')}\Z"):
            checked(**fields)

    checked(update=muon(a=[0, 1], b=None))
    refused("'c' matches no parameter of a, b", update=muon(a=[0, 1], c=None))
    refused("'c' matches no parameter of a, b", update=muon(c=[0, 1], a=[0, 1]))
    nested = {"learning_rate": 0.1, "base_optimizer": muon(a=[0, 1], c=[0, 1])}
    refused("'c' matches no parameter of a, b", update=Optax("contrib.schedule_free", nested))
    refused("'c' matches no parameter of a, b", update=Own(learning_rate=0.1, inner=muon(c=None)))
    # A group's need only be in the group, and those of all where no group has its own.
    checked(groups=(Group(match="a", update=muon(a=[0, 1])),))
    refused(
        "'b' matches no parameter of a", groups=(Group(match="a", update=muon(b=[0, 1], a=None)),)
    )
    checked(update=muon(b=[0, 1]), groups=(Group(match="a", update=SGD),))
    refused(
        "'a' matches no parameter of b",
        update=muon(a=[0, 1]),
        groups=(Group(match="a", update=SGD),),
    )
    refused(
        "'a' matches no parameter of b",
        update=muon(a=[0, 1]),
        groups=(Group(match="a", frozen=True),),
    )
    checked(update=muon(a=[0, 1], b=[0, 1]), groups=(Group(match="a", multiplier=2.0),))
    # Two groups may share one, equal but not the same object, as JSON gives it.
    both = {"a": [0, 1], "b": [0, 1]}
    checked(groups=tuple(Group(match=match, update=muon(**both)) for match in "ab"))
    # An optimizer that is given no parameter has nothing to match.
    checked(update=muon(c=[0, 1]), groups=(Group(match="", update=SGD),))


# ---- an optimizer of one's own


@pytest.mark.parametrize("rate", [0.1, LINEAR], ids=["constant", "schedule"])
def test_an_optimizer_of_ones_own_decays_multiplies_and_tells_its_rate(rate):
    """All as optax's own does: SGD, whose decay is added to what momentum makes."""
    groups = (Group(match="^embed", multiplier=2.0), Group(match="^stack", frozen=True))
    config = dataclasses.replace(own(rate, weight_decay=0.3), groups=groups)
    path, traces = run(config, [arrays(MODEL)] * 3, arrays(MODEL))
    assert traces == 1
    rates = [0.1, 0.1, 0.1] if rate == 0.1 else [0.1, 0.05, 0.0]
    want, trace = by_path(MODEL), by_path(jax.tree.map(np.zeros_like, MODEL))
    for params, now in zip(path, rates, strict=True):
        for name, value in by_path(params).items():
            g = by_path(MODEL)[name]
            trace[name] = g + 0.9 * trace[name]
            decay = 0.3 * want[name] if name in DECAYED else 0.0
            times = {"embed": 2.0, "stack": 0.0}.get(name.split("/")[0], 1.0)
            want[name] = want[name] - times * now * (trace[name] + decay)
            np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)
    assert [config.learning_rate(s) for s in range(3)] == pytest.approx(rates)
    assert config.learning_rate(0).dtype == jnp.float32


def test_an_optimizer_of_ones_own_is_checked_and_survives_json():
    groups = (Group(match="bias", update=Own(learning_rate=LINEAR)),)
    e = tiny.mlp(optimizer=dataclasses.replace(own(0.1), groups=groups))
    tree = json.loads(experiment.dumps(e))
    assert tree["optimizer"]["update"]["class"] == "test_optim:Own"
    assert experiment.from_json(tree, allow=["tiny", "test_optim"]) == e
    tree["optimizer"]["update"]["momentum"] = 2.0
    with pytest.raises(experiment.UserError, match=r"\Aoptimizer.momentum must be >= 0 and < 1, n"):
        experiment.from_json(tree, allow=["tiny", "test_optim"])
    with pytest.raises(experiment.UserError, match=r"\Aoptimizer.update names the class test_opt"):
        experiment.from_json(tree, allow=["tiny"])
    for fields, message in [
        ({"update": Own(learning_rate=-0.1)}, "learning_rate must be >= 0, not -0.1"),
        ({"update": Own(learning_rate=0.1, momentum="x")}, "momentum must be float, not 'x'"),
        (
            {"update": SGD, "groups": (Group(match="a", update=Own(learning_rate=-1.0)),)},
            "groups.0.learning_rate must be >= 0, not -1.0",
        ),
    ]:
        with pytest.raises(experiment.UserError, match=rf"\A{re.escape(f'optimizer.{message}')}\Z"):
            tiny.mlp(optimizer=Optimizer(**fields))


# ---- schedule-free methods, and SAM


def test_a_schedule_free_method_is_judged_by_its_average():
    free = Optax("contrib.schedule_free_sgd", {"learning_rate": 0.5, "warmup_steps": 4})
    whole = Optimizer(update=free)
    group = Optimizer(update=SGD, groups=(Group(match="kernel", update=free),))
    for config in (whole, group):
        setup = prepare(tiny.lines(optimizer=config), tiny.ONE)
        state, rows = after(setup, setup.initial(), 8)
        judged = setup.judged(state)
        inner = [
            leaf
            for leaf in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "weight_sum"))
            if hasattr(leaf, "weight_sum")
        ]
        z, y = (by_path(t) for t in (inner[0].z, state.params))
        for path, x in by_path(judged).items():
            want = (y[path] - 0.1 * z[path]) / 0.9 if path in z else y[path]
            np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-6)
        assert set(z) == {p for p in y if config is whole or "kernel" in p}
        there = dataclasses.replace(state, params=judged, opt_state=())
        plain = prepare(tiny.lines(), tiny.ONE)
        assert setup.evaluate(state, "validation") == plain.evaluate(there, "validation")
        if config is whole:
            rates = [float(row["learning_rate"].total) for row in rows]
            assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5])


def test_sam_steps_by_the_gradient_uphill(tmp_path):
    config = tiny.sgd(0.1, sam_rho=0.2)
    state = tiny.final_state(tiny.scale(steps=1, optimizer=config), tmp_path)
    x = tiny.Identity().load()["train"].rows["inputs"]

    def gradient(w):
        return (2 * (w * x - 2 * x) * x).mean(0) / 5

    first = gradient(0.5)
    second = gradient(0.5 + 0.2 * first / np.linalg.norm(first))
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * second, rtol=1e-5)
    row = tiny.rows(tmp_path)[0]
    np.testing.assert_allclose(row["loss"], ((1.5 * x) ** 2).mean(), rtol=1e-6)
    np.testing.assert_allclose(row["grad_norm"], np.linalg.norm(second), rtol=1e-5)
    zeros = {"w": jnp.zeros(5)}
    np.testing.assert_array_equal(config.perturbed(zeros, zeros)["w"], 0)


@pytest.mark.parametrize("family", [tiny.mlp, tiny.lstm, tiny.transformer])
def test_sam_costs_two_steps(family):
    for phase in ("forward", "backward"):
        once, twice = (
            flops(family(optimizer=tiny.sgd(0.1, sam_rho=r)), phase) for r in (None, 1.0)
        )
        assert twice == {module: 2 * n for module, n in once.items()}


def test_sam_leaves_running_statistics_and_the_carry_as_one_step_does():
    model = dataclasses.replace(tiny.lstm().model, layers=1)
    for family in (tiny.norm, functools.partial(tiny.lstm, model=model)):
        states = []
        for rho in (None, 0.5):
            setup = prepare(family(optimizer=tiny.sgd(0.1, sam_rho=rho)), tiny.ONE)
            states.append(after(setup, setup.initial(), 1)[0])
        a, b = states
        assert bits((a.model_state, a.carry)) == bits((b.model_state, b.carry))
        assert bits(a.params) != bits(b.params)
