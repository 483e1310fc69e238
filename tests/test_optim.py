"""Optimizers against formulas written here in NumPy, masks and penalties against closed forms."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.optim import Optax, Optimizer, decay_mask, path_of

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


@CASES
def test_minimises_a_quadratic(name, kwargs, kernel, bias):
    target = arrays(START)
    kwargs = kwargs | ({"weight_decay": 1e-3} if name == "adamw" else {})
    grads = lambda p: jax.tree.map(lambda x, t: x - t, p, target)  # noqa: E731
    rate = Optax("cosine_decay_schedule", {"init_value": 0.1, "decay_steps": 300})
    tx = optimizer(name, 0.5 if name == "adagrad" else rate, **kwargs).make()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    zero = jax.tree.map(jnp.zeros_like, target)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=300))((zero, tx.init(zero)))
    for leaf in target:
        np.testing.assert_allclose(params[leaf], target[leaf], rtol=1e-2, atol=1e-2)


@CASES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_keeps_the_dtype(name, kwargs, kernel, bias, dtype):
    if name == "adamw":  # a scheduled decay is what optax itself would promote
        kwargs = {"weight_decay": LINEAR}
    for rate in (0.1, np.float64(0.1), LINEAR):
        config = dataclasses.replace(optimizer(name, rate, **kwargs), clip_norm=1.0, clip_value=1.0)
        params = arrays(START, dtype)
        updates = step_of(config, arrays(GRADS[0], dtype), params)
        path, traces = run(config, arrays(GRADS, dtype), params)
        assert {x.dtype for x in jax.tree.leaves((updates, path))} == {jnp.dtype(dtype)}
        assert traces == 1


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
        # Muon's part of optax leaves what is not a matrix to an Adam without decay.
        decayed = path in DECAYED and not (name == "contrib.muon" and update.ndim == 3)
        want = -0.5 * 0.25 * by_path(params)[path] if decayed else jnp.zeros_like(update)
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
        ({"update": 0.1}, "update must be an Optax, got 0.1"),
        ({"clip_norm": -1.0}, "clip_norm must be finite and positive, got -1.0"),
        ({"clip_norm": 0}, "clip_norm must be finite and positive, got 0"),
        ({"clip_value": float("nan")}, "clip_value must be finite and positive, got nan"),
        ({"l1": -1e-4}, "l1 must be finite and not negative, got -0.0001"),
        ({"l2": float("nan")}, "l2 must be finite and not negative, got nan"),
        ({"l2": "1"}, "l2 must be a number, got '1'"),
        ({"l2": True}, "l2 must be a number, got True"),
        ({"l1": None}, "l1 must be a number, got None"),
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
