"""Starting from another run or from a safetensors file: real runs, real files, and what is said."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import save_file

from research import UserError, init_from
from research.experiment import EarlyStop
from research.init_from import InitFrom, Name, flat
from research.models.mlp import MLPConfig
from research.optim import Group, Optax, Optimizer
from research.setup import prepare
from research.train import train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run with running statistics and a moving average, and its last state."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    early = EarlyStop(keep_best=True, goal="max")  # so that the best is not the newest
    e = tiny.resnet(ema=0.5, steps=6, eval_every=2, save_every=2, keep=9, early_stop=early)
    return workdir, tiny.final_state(e, workdir)


def start(e):
    """The state before the first step, and what was loaded into it."""
    setup = prepare(e, tiny.ONE)
    loaded = setup.load()
    return jax.device_get(setup.initial(loaded)), loaded


def from_(path, **fields):
    return InitFrom(path=str(path), **fields)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    assert not any(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_a_run_starts_at_the_parameters_and_statistics_of_another(source):
    path, last = source
    state, loaded = start(tiny.resnet(ema=0.5, seed=3, init_from=from_(path)))
    same((state.params, state.model_state), (last.params, last.model_state))
    same(state.ema, last.params)
    assert (state.step, loaded.step, loaded.unused) == (0, 6, ())
    assert all(row.source == row.name for row in loaded.rows)


def test_its_moving_average_an_earlier_step_or_the_best(source):
    path, last = source
    state, _ = start(tiny.resnet(init_from=from_(path, ema=True)))
    same(state.params, last.ema)
    early, loaded = start(tiny.resnet(init_from=from_(path, step=2)))
    assert loaded.step == 2
    differ(early.params["head"], last.params["head"])
    best = json.loads((path / "summary.json").read_text())["best"]
    assert start(tiny.resnet(init_from=from_(path, best=True)))[1].step == best != 6


def test_what_is_fresh_keeps_its_initial_value(source):
    path, last = source
    e = tiny.resnet(seed=3)
    own, nothing = start(e)
    state, loaded = start(dataclasses.replace(e, init_from=from_(path, fresh="^head")))
    assert nothing is None
    same(state.params["head"], own.params["head"])
    same(state.params["blocks"], last.params["blocks"])
    assert [row.name for row in loaded.rows if row.source is None] == ["head/bias", "head/kernel"]
    assert loaded.unused == ("head/bias", "head/kernel")
    count = len(loaded.rows)
    assert f"at step 6: {count - 2} of {count} arrays" in loaded.line()
    assert "fresh: head/bias, head/kernel; not used: head/bias, head/kernel" in loaded.line()


def test_a_schedule_free_run_gives_the_average_that_it_is_judged_by(tmp_path):
    update = Optax("contrib.schedule_free_adamw", {"learning_rate": 0.05})
    e = tiny.mlp(optimizer=Optimizer(update=update), steps=8)
    last = tiny.final_state(e, tmp_path / "run")
    judged = e.optimizer.eval_params(last.opt_state, last.params)
    state, _ = start(dataclasses.replace(e, init_from=from_(tmp_path / "run")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, judged)
    differ(state.params, last.params)
    # The optimizer's own point of departure is there, too.
    found = [x for x in jax.tree.leaves(state.opt_state) if getattr(x, "shape", ()) == (5, 8)]
    assert any(np.array_equal(x, state.params["layers"][0]["kernel"]) for x in found)


def test_a_run_reports_array_by_array_and_goes_on_without_the_source(source, tmp_path):
    path, last = source
    e = tiny.resnet(steps=3, save_every=1, init_from=from_(path, fresh="^head"))
    workdir = tmp_path / "run"
    train(prepare(e, tiny.ONE), workdir, quiet=True)
    report = json.loads((workdir / "init_from.json").read_text())
    arrays = {row["name"]: row for row in report["arrays"]}
    assert report["step"] == 6
    assert arrays["head/kernel"]["source"] is None
    assert (arrays["stem/kernel"]["shape"], arrays["stem/kernel"]["source"]) == (
        [3, 3, 1, 4],
        "stem/kernel",
    )
    assert set(arrays) == set(flat(last.params)) | set(flat(last.model_state))
    assert f"init_from {path} at step 6" in (workdir / "log.txt").read_text()
    path.rename(moved := path.with_name("moved"))
    try:
        train(prepare(dataclasses.replace(e, steps=5), tiny.ONE), workdir, quiet=True)
        with pytest.raises(UserError, match="neither a run directory nor a file"):
            train(prepare(e, tiny.ONE), tmp_path / "new", quiet=True)
    finally:
        moved.rename(path)
    assert not (tmp_path / "new").exists()


def test_the_hash_is_of_what_was_read(source):
    path, _ = source
    first, again, other = (
        start(tiny.resnet(init_from=from_(path, step=step)))[1].json()["sha256"]
        for step in (6, 6, 2)
    )
    assert first == again != other


# ---- files


def torch_like(params):
    """An MLP's parameters under PyTorch's names, in its layout."""
    layers = params["layers"]
    found = {}
    for i in sorted(layers):
        found[f"net.{i}.weight"] = np.ascontiguousarray(np.asarray(layers[i]["kernel"]).T)
        found[f"net.{i}.bias"] = np.asarray(layers[i]["bias"])
    return found


TORCH = (
    Name(match=r"^net/(\d)/weight", to=r"layers/\1/kernel", axes="o i -> i o"),
    Name(match="^net/", to="layers/"),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
def test_a_file_by_a_map_of_names(tmp_path, dtype):
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    given, _ = start(tiny.mlp(seed=3))
    file = tmp_path / "model.safetensors"
    save_file({k: v.astype(dtype) for k, v in torch_like(given.params).items()}, file)
    state, loaded = start(tiny.mlp(init_from=from_(file, names=TORCH)))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), given.params)
    same(state.params, expected)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    assert {row.name: row.source for row in loaded.rows}["layers/0/kernel"] == "net/0/weight"


def test_axes_that_are_held_in_one_are_taken_apart(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)  # c n h d
    save_file({"qkv": x.reshape(24, 5)}, tmp_path / "a.safetensors")
    model = {"attention": jax.ShapeDtypeStruct((5, 3, 2, 4), np.float32)}
    names = (Name(match="qkv", to="attention", axes="(c n h) d -> d n c h"),)
    config = from_(tmp_path / "a.safetensors", names=names)
    found = init_from.load(config, model, {}).arrays["attention"]
    np.testing.assert_array_equal(found, x.transpose(3, 1, 0, 2))


BAD = [
    ({}, "has no layers/0/bias, layers/0/kernel, .*; it has net/0/bias"),
    ({"names": TORCH, "fresh": "^haed"}, "fresh: '.haed' matches nothing of layers/0/bias"),
    ({"names": (*TORCH, Name(match="foo", to="bar"))}, "names: 'foo' is found in none of layers"),
    (
        {"names": (Name(match="net/(0|1)", to="net"),)},
        "names: net/0/.* and net/1/.* both become net/",
    ),
    (
        {"names": (Name(match=r"^net/(\d)/weight", to=r"layers/\1/kernel"), TORCH[1])},
        r"layers/0/kernel is \[5, 8\], and net/0/weight of .* is \[8, 5\]; .*fresh leaves",
    ),
    (
        {"names": (dataclasses.replace(TORCH[0], axes="o i k -> i o k"), TORCH[1])},
        r"is \[8, 5\] turned by 'o i k -> i o k'",
    ),
    ({"names": (TORCH[0], dataclasses.replace(TORCH[0], match="kernel", to="kernel"))}, "two turn"),
    ({"names": TORCH, "ema": True}, "is a file: step, best and ema are of runs"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_file_that_does_not_fit(tmp_path, fields, message):
    given, _ = start(tiny.mlp())
    save_file(torch_like(given.params), tmp_path / "model.safetensors")
    e = tiny.mlp(init_from=from_(tmp_path / "model.safetensors", **fields))
    with pytest.raises(UserError, match=message) as raised:
        train(prepare(e, tiny.ONE), tmp_path / "run", quiet=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_none_or_not_finite(tmp_path):
    setup = prepare(tiny.mlp(), tiny.ONE)

    def load(name, **fields):
        config = from_(tmp_path / name, **fields)
        return init_from.load(config, setup.abstract.params, setup.abstract.model_state)

    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in ("a.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            load(name)
    arrays = torch_like(jax.device_get(setup.initial()).params)
    arrays["net.1.bias"] = np.full_like(arrays["net.1.bias"], np.nan)
    save_file(arrays, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"net/1/bias of .* holds a number that is not finite"):
        load("nan.safetensors", names=TORCH)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 5}, "has no checkpoint of step 5; there are: 2, 4, 6"),
        ({"step": 2, "best": True}, "two checkpoints: give one"),
    ],
)
def test_a_run_that_does_not_fit(source, fields, message):
    with pytest.raises(UserError, match=message):
        start(tiny.resnet(init_from=from_(source[0], **fields)))


def test_a_run_without_average_best_or_checkpoint(tmp_path):
    tiny.final_state(tiny.mlp(steps=1), tmp_path / "run")
    for field, message in (("ema", "kept no moving average"), ("best", "no best checkpoint")):
        with pytest.raises(UserError, match=message):
            start(tiny.mlp(init_from=from_(tmp_path / "run", **{field: True})))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="empty has no checkpoints yet"):
        start(tiny.mlp(init_from=from_(tmp_path / "empty")))


def test_another_size_of_the_model_is_refused_by_name(tmp_path):
    tiny.final_state(tiny.mlp(steps=1), tmp_path / "run")
    wide = MLPConfig(features=5, sizes=(9, 3))
    with pytest.raises(UserError, match=r"layers/0/bias is \[9\], and layers/0/bias of .* \[8\]"):
        start(tiny.mlp(model=wide, init_from=from_(tmp_path / "run")))


@pytest.mark.parametrize("fields", [{"match": "("}, {"to": r"\1"}, {"axes": "a b"}])
def test_names_that_are_none(fields):
    with pytest.raises(ValueError, match=r"is no replacement|axes must be as"):
        Name(**{"match": "a", "to": "b"} | fields)


def test_eight_devices_start_as_one_does(source):
    from research.parallel import Parallel

    path, last = source
    e = tiny.resnet(parallel=Parallel(fsdp=8), init_from=from_(path))
    setup = prepare(e)
    state = setup.initial(setup.load())
    same(jax.device_get(state.params), last.params)
    trees = (state.params, setup.shardings.params)
    found, wanted = (tree["blocks"][1]["convs"][1]["kernel"] for tree in trees)
    assert found.sharding == wanted
    assert "fsdp" in wanted.spec


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_numbers_that_are_no_weights_are_refused(tmp_path, dtype):
    given, _ = start(tiny.mlp())
    arrays = torch_like(given.params)
    arrays["net.1.bias"] = arrays["net.1.bias"].astype(dtype)
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"net/1/bias of .* is .*, and layers/1/bias is float32"):
        start(tiny.mlp(init_from=from_(tmp_path / "a.safetensors", names=TORCH)))


def test_names_that_differ_in_dots_alone_are_refused(tmp_path):
    save_file({"a.b": np.ones(1), "a/b": np.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="dots and slashes"):
        start(tiny.mlp(init_from=from_(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("field", [{"step": 1}, {"best": True}, {"ema": True}, {"fresh": "head"}])
def test_what_acts_on_a_source_needs_one(field):
    with pytest.raises(ValueError, match=rf"init_from.{next(iter(field))} does nothing without"):
        InitFrom(**field)


# Where Orbax cannot read one array, its reads of the others end after their event loop has.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None")
def test_damaged_runs_are_one_line(tmp_path):
    tiny.final_state(tiny.mlp(steps=1), tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"best"')
    with pytest.raises(UserError, match="cannot read"):
        start(tiny.mlp(init_from=from_(tmp_path / "run", best=True)))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        start(tiny.mlp(init_from=from_(tmp_path / "run", best=True)))
    for file in (tmp_path / "run" / "checkpoints" / "1" / "state").rglob("d/*"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read") as raised:
        start(tiny.mlp(init_from=from_(tmp_path / "run")))
    assert "\n" not in str(raised.value)
    time.sleep(1)  # until they have, lest the next test be told


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnKeysConfig:
    """A model in bfloat16 with a random stream of its own."""

    def make(self, rngs):
        return OwnKeys(rngs)


class OwnKeys(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(5, 3, param_dtype=jnp.bfloat16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, x, rngs=None):
        return self.head(x)


def test_bfloat16_parameters_and_keys_of_the_models_own(tmp_path):
    e = tiny.mlp(model=OwnKeysConfig(), steps=2)
    last = tiny.final_state(e, tmp_path / "run")
    again = dataclasses.replace(e, init_from=from_(tmp_path / "run"))
    state, loaded = start(again)
    same(state.params, last.params)
    assert len(loaded.json()["sha256"]) == 64
    fresh = [row.name for row in loaded.rows if row.source is None]
    assert fresh
    assert all(name.startswith("dropout/rngs") for name in fresh)


def test_the_report_of_a_run_that_saved_nothing_does_not_outlive_it(source, tmp_path):
    setup = prepare(tiny.mlp(steps=1), tiny.ONE)
    (tmp_path / "run").mkdir()
    for name in ("init_from.json", "config.json"):
        (tmp_path / "run" / name).write_text("{}")
    train(setup, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "init_from.json").exists()


# ---- a frozen backbone


def test_a_linear_probe_trains_its_head_and_leaves_the_function_before_it(source, tmp_path):
    path, last = source
    probe = dataclasses.replace(
        tiny.ADAMW, groups=(Group(match="^(?!head)", frozen=True),), no_decay="(?!)"
    )
    e = tiny.resnet(optimizer=probe, steps=3, init_from=from_(path, fresh="^head"))
    after = tiny.final_state(e, tmp_path / "run")
    differ(after.params["head"], start(e)[0].params["head"])
    for part in ("stem", "stem_norm", "blocks"):
        same(after.params[part], last.params[part])
    same(after.model_state, last.model_state)  # norms that are frozen normalise by them, too


def test_only_norms_that_are_frozen_whole_keep_their_statistics(source, tmp_path):
    path, last = source
    group = Group(match="^stem|^blocks/0/norms/0/bias", frozen=True)
    some = dataclasses.replace(tiny.ADAMW, groups=(group,), no_decay="(?!)")
    e = tiny.resnet(optimizer=some, steps=2, init_from=from_(path))
    after = tiny.final_state(e, tmp_path / "run")
    same(after.model_state["stem_norm"], last.model_state["stem_norm"])
    differ(after.model_state["blocks"], last.model_state["blocks"])
