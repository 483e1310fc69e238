"""Arrays of a notebook: what is refused, what they become, and runs that go on with them."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny

from research import UserError, command, experiment
from research.data.arrays import Arrays
from research.models.mlp import MLPConfig
from research.setup import prepare
from research.train import train

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 5)), RNG.integers(0, 3, 64)


def rows(n=64, **others):
    return {"inputs": X[:n], "targets": Y[:n]} | others


def run_of(**fields):
    data = Arrays(train=rows(), validation=rows(21))
    return tiny.mlp(**{"data": data, "steps": 4} | fields)


def test_they_become_rows_of_32_bits():
    data = Arrays(train=rows(), validation=rows(9), test=rows(7)).load()
    assert [(name, len(split)) for name, split in data.items()] == [
        ("train", 64),
        ("validation", 9),
        ("test", 7),
    ]
    for split in data.values():
        n = len(split)
        assert split.rows["inputs"].dtype == np.float32
        assert split.rows["targets"].dtype == np.int32
        np.testing.assert_array_equal(split.rows["inputs"], X[:n].astype(np.float32))
        np.testing.assert_array_equal(split.rows["targets"], Y[:n])
    assert list(Arrays(train=rows()).load()) == ["train"]


@pytest.mark.parametrize(
    ("given", "key", "dtype"),
    [
        (np.zeros((4, 2), np.float16), "inputs", np.float32),
        (np.zeros((4, 2), np.uint8), "inputs", np.uint8),
        (np.zeros((4, 2), np.uint32), "inputs", np.int32),
        (np.zeros((4, 2), bool), "inputs", bool),
        (np.zeros(4, bool), "targets", np.int32),
        (np.zeros(4, np.uint8), "targets", np.int32),
        (np.zeros(4), "targets", np.float32),
        ([1, 2, 3, 4], "targets", np.int32),
    ],
)
def test_types(given, key, dtype):
    data = Arrays(train=rows(4) | {key: given})
    assert data.load()["train"].rows[key].dtype == dtype


def test_they_are_copied():
    x = X.astype(np.float32)
    data = Arrays(train=rows(inputs=x))
    x[:] = 7
    held = data.load()["train"].rows["inputs"]
    np.testing.assert_array_equal(held, X.astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        held[0, 0] = 1


BIG, NAN, INF = X.copy(), X.copy(), X.copy()
BIG[3, 2], NAN[5, 1], INF[6, 4] = 1e39, np.nan, np.inf
LARGE = Y.copy()
LARGE[9] = 2**31


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"train": X}, "train must be arrays by name, such as inputs and targets, not ndarray"),
        ({"train": {"inputs": X}}, "train has no targets; it has inputs"),
        ({"train": {"x": X, "y": Y}}, "train has no inputs; it has x, y"),
        ({"train": rows(targets=Y[:60])}, "train has 60 rows of targets, and 64 of inputs"),
        ({"train": rows(0)}, "train has no rows"),
        ({"train": rows(inputs=NAN)}, "train: inputs, row 5: nan is not finite"),
        ({"train": rows(inputs=INF)}, "train: inputs, row 6: inf is not finite"),
        ({"train": rows(inputs=BIG)}, "train: inputs, row 3: 1e+39 is too large for float32"),
        (
            {"train": rows(targets=LARGE)},
            "train: targets, row 9: 2147483648 is too large for int32",
        ),
        (
            {"train": rows(targets=["a"] * 64)},
            "train: targets are <U1, which is neither a number nor a truth value",
        ),
        ({"train": rows(inputs=3.0)}, "train: inputs must be an array of rows, not 3.0"),
        ({"train": rows(weights=Y)}, "train has weights, which rows of arrays cannot be given"),
        (
            {"train": rows(), "validation": rows(lengths=Y)},
            "validation has inputs, targets, lengths, and train inputs, targets",
        ),
        (
            {"train": rows(), "test": rows(inputs=X[:, :4])},
            "test: inputs are float32[64, 4], and train's float32[64, 5]",
        ),
    ],
)
def test_what_is_refused(given, line):
    with pytest.raises(UserError) as refused:
        Arrays(**given)
    assert str(refused.value) == line


def test_ragged_lists_are_no_array():
    with pytest.raises(UserError, match="train: inputs are no array") as refused:
        Arrays(train=rows(2, inputs=[[1.0], [1.0, 2.0]]))
    assert "\n" not in str(refused.value)


def test_they_are_values():
    same, again, other = (Arrays(train=rows(n)) for n in (64, 64, 63))
    assert same == again != other
    assert hash(same) == hash(again)
    assert dataclasses.replace(same, validation=rows(5)).train is same.train
    assert len({run_of(), run_of(), run_of(steps=5)}) == 2
    assert repr(other) == (
        "Arrays(train={inputs: float32[63, 5], targets: int32[63]}, validation=None, test=None)"
    )


def test_a_run_on_them_goes_on_and_is_not_read_back(tmp_path):
    whole = tiny.final_state(run_of(), tmp_path / "whole")
    train(prepare(run_of(steps=2), tiny.ONE), tmp_path / "run", quiet=True)
    resumed = tiny.final_state(run_of(), tmp_path / "run")  # of equal arrays, made anew
    assert whole.step == resumed.step == 4
    for a, b in zip(*map(_leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)

    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    array = stored["data"]["train"]["inputs"]["array"]
    assert array["dtype"] == "float32"
    assert array["shape"] == [64, 5]
    assert (
        array["sha256"]
        == experiment.to_json(run_of())["data"]["train"]["inputs"]["array"]["sha256"]
    )
    with pytest.raises(UserError, match=r"data\.train\.inputs was an array in memory") as refused:
        command.load(tmp_path / "run")
    assert "\n" not in str(refused.value)

    others = dataclasses.replace(run_of(steps=5), data=Arrays(train=rows(60), validation=rows(21)))
    with pytest.raises(UserError, match=r"was trained with data\.train\."):
        train(prepare(others, tiny.ONE), tmp_path / "run", quiet=True)


def _leaves(state):
    import jax

    return jax.tree.leaves((state.params, state.opt_state))


def test_a_config_file_may_hold_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # into which a config's folder goes
    (tmp_path / "held.py").write_text(
        "import numpy as np\nimport tiny\nfrom research.data.arrays import Arrays\n"
        "def config():\n"
        "    rows = {'inputs': np.ones((32, 5)), 'targets': np.arange(32) % 3}\n"
        "    return tiny.mlp(data=Arrays(train=rows, validation=rows))\n"
    )
    options = command.parse(command.Options, "CONFIG", ["held.py", "--steps", "3"])
    assert options.experiment.steps == 3
    assert options.experiment.data.load()["train"].rows["inputs"].shape == (32, 5)
    sys.modules.pop("held", None)


def test_the_model_is_checked_against_them():
    with pytest.raises(UserError, match="the model does not take the data's inputs"):
        prepare(run_of(model=MLPConfig(features=4, sizes=(3,))), tiny.ONE)
