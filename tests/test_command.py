import dataclasses
import json

import pytest

from configs import mlp_cancer
from research import UserError, command, experiment

CONFIG = "configs/mlp_cancer.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    flag: bool = False
    """A flag of the script's."""


def parse(*argv):
    return command.parse(Options, "script CONFIG [--field value ...]", argv)


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def test_without_overrides_the_config_is_unchanged():
    options = parse(CONFIG)
    assert options.experiment == mlp_cancer.config()
    assert options.flag is False


def test_overrides_reach_every_depth():
    options = parse(
        *(CONFIG, "--steps", "7", "--model.sizes", "8", "1", "--flag", "--ema", "0.9"),
        *("--optimizer.learning_rate", "0.5", "--target.value", "0.5", "--batch-size", "None"),
    )
    e = options.experiment
    assert (e.steps, e.model.sizes, e.ema, e.batch_size) == (7, (8, 1), 0.9, None)
    assert e.optimizer.update.kwargs == {"learning_rate": 0.5, "weight_decay": 0.1}
    assert e.target.value == 0.5
    assert options.flag is True
    assert e.model.features == mlp_cancer.config().model.features


def test_a_schedule_is_overridden_by_its_own_arguments():
    rate = parse("configs/lstm_text.py", "--optimizer.learning_rate.peak_value", "0.25").experiment
    assert rate.optimizer.update.kwargs["learning_rate"].kwargs["peak_value"] == 0.25


def test_a_group_is_overridden_by_its_place(tmp_path, capsys):
    update = 'Optax("sgd", {"learning_rate": 0.1})'
    groups = f'(Group(match="layers", update={update}), Group(match="", frozen=True))'
    (tmp_path / "g.py").write_text(
        "import dataclasses\n"
        "from configs import mlp_cancer\n"
        "from research.optim import Group, Optax, Optimizer\n"
        "def config():\n"
        f"    optimizer = Optimizer(update={update}, groups={groups})\n"
        "    return dataclasses.replace(mlp_cancer.config(), optimizer=optimizer)\n"
    )
    config = str(tmp_path / "g.py")
    first, second = parse(
        *(config, "--optimizer.groups.0.multiplier", "3", "--optimizer.groups.1.match", "bias"),
        *("--optimizer.groups.0.learning_rate", "0.5"),
    ).experiment.optimizer.groups
    assert (first.multiplier, second.match) == (3.0, "bias")
    assert first.update.kwargs == {"learning_rate": 0.5}
    message = error_of(capsys, config, "--optimizer.groups.0.multiplier", "0")
    assert "group 'layers': multiplier must be finite and positive" in message


def test_an_optimizer_of_ones_own_is_overridden_by_its_fields(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import dataclasses\n"
        "from typing import Annotated\n"
        "import optax\n"
        "from annotated_types import Ge\n"
        "from configs import mlp_cancer\n"
        "from research.optim import Group, Optax, Optimizer, Rate, schedule\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Own:\n"
        "    learning_rate: Rate\n"
        "    nesterov: bool = False\n"
        "    momentum: Annotated[float, Ge(0)] | None = 0.5\n"
        "    def make(self, mask, multiplier):\n"
        "        rate = schedule(self.learning_rate, multiplier)\n"
        "        return optax.sgd(rate, self.momentum, self.nesterov)\n"
        "    def rate(self, step):\n"
        "        return schedule(self.learning_rate)(step)\n"
        "def config():\n"
        "    rate = Optax('exponential_decay', {\n"
        "        'init_value': 0.1, 'transition_steps': 9, 'decay_rate': 0.5})\n"
        "    groups = (Group(match='0', update=Own(learning_rate=rate)),)\n"
        "    optimizer = Optimizer(update=Own(learning_rate=1), groups=groups)\n"
        "    return dataclasses.replace(mlp_cancer.config(), optimizer=optimizer)\n"
    )
    config = str(tmp_path / "own.py")
    found = parse(
        *(config, "--optimizer.learning_rate", "0.5", "--optimizer.momentum", "None"),
        *("--optimizer.groups.0.learning_rate.init_value", "0.2", "--optimizer.nesterov", "True"),
        *("--optimizer.groups.0.momentum", "0.25"),
    ).experiment.optimizer
    update, group = found.update, found.groups[0].update
    assert (update.learning_rate, update.momentum, update.nesterov) == (0.5, None, True)
    assert group.learning_rate.kwargs["init_value"] == 0.2
    assert (group.momentum, group.nesterov) == (0.25, False)
    for argv, message in [
        (["--optimizer.learning_rate", "-1"], "optimizer.learning_rate must be >= 0, not -1.0"),
        (["--optimizer.groups.0.momentum", "-1"], "optimizer.groups.0.momentum must be >= 0, not"),
        (["--optimizer.learning_rate", "x"], "--optimizer.learning_rate: could not convert"),
    ]:
        assert error_of(capsys, config, *argv).startswith(message)
    with pytest.raises(SystemExit):
        parse(config, "--help")
    out = capsys.readouterr().out
    for field in ("learning_rate FLOAT", "momentum {None}|FLOAT", "groups.0.momentum"):
        assert f"--optimizer.{field}" in out
    assert "learning rate, and so" in " ".join(out.split())  # the fields' docstrings are kept


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.dropuot", "0.1"], ["unknown field --model.dropuot", "mean --model.dropout?"]),
        (["--batchsize", "3"], ["unknown field --batchsize", "did you mean --batch_size?"]),
        (["--flagg"], ["unknown field --flagg", "did you mean --flag?"]),
        (["--zzzzzzzzzzzz", "3"], ["unknown field --zzzzzzzzzzzz", "--help lists them"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps"], ["--steps"]),
        (["--steps", "0"], ["steps must be >= 1, not 0"]),
        (["--model.dropout", "1.5"], ["model.dropout must be >= 0 and < 1, not 1.5"]),
        (["--model.activation", "rely"], ["--model.activation", "rely", "relu"]),
        (["--optimizer.name", "adagrad"], ["adagrad", "weight_decay"]),
        (["--optimizer.learning_rate", "-1"], ["learning_rate", "-1"]),
        (["stray"], ["stray"]),
        (["--optimizer.lr", "3"], ["unknown field --optimizer.lr; --help lists them"]),
        (["--target.value", "nan"], ["target.value must be finite"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_what_would_be_right(capsys, argv, words):
    message = error_of(capsys, CONFIG, *argv)
    assert all(word in message for word in words), message


def test_no_config_absent_config_and_files_that_are_not_configs(capsys, tmp_path):
    assert "first argument" in error_of(capsys)
    assert "did you mean configs/mlp_cancer.py?" in error_of(capsys, "configs/mlp_canser.py")
    for name, text, words in [
        ("a.txt", "", "neither a .py config nor a .json"),
        ("b.py", "x = 1", "has no function config()"),
        ("c.py", "def config(): return 3", "gives a int, not an Experiment"),
        ("c2.py", "def config(: pass", "SyntaxError"),
        ("c3.py", "def config(): return dict(one=1)['two']", "KeyError: 'two'"),
        ("d.json", "{", "is not JSON"),
        ("e.json", "[]", "gives a"),
        ("f.json", '{"class": "os:system"}', "only research, configs may be imported"),
    ]:
        (tmp_path / name).write_text(text)
        assert words in error_of(capsys, str(tmp_path / name))


def test_an_override_in_a_python_config_that_cannot_be_made_is_one_line(capsys, tmp_path):
    text = (command.pathlib.Path(CONFIG)).read_text()
    (tmp_path / "g.py").write_text(text.replace("steps=", "steps=-").replace("dropout=0.2", ""))
    assert "steps must be >= 1" in error_of(capsys, str(tmp_path / "g.py"))


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(CONFIG, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for words in ["--steps INT", "--model.dropout FLOAT", "--optimizer.learning_rate", "--flag"]:
        assert words in text
    assert text.count("(default:") >= 30


def test_a_runs_json_is_a_config_again(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(experiment.dumps(mlp_cancer.config()))
    assert parse(str(path), "--steps", "9").experiment == dataclasses.replace(
        mlp_cancer.config(), steps=9
    )
    assert command.load(tmp_path) == mlp_cancer.config()


def test_json_may_name_a_class_of_an_allowed_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "paper.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Net:\n"
        "    width: int = 3\n"
        "    def make(self, rngs): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = experiment.dumps(mlp_cancer.config())
    tree = command.json.loads(text) | {"model": {"class": "paper:Net", "width": 5}}
    (tmp_path / "config.json").write_text(command.json.dumps(tree))
    assert "--allow paper" in error_of(capsys, str(tmp_path / "config.json"))
    options = parse(str(tmp_path / "config.json"), "--allow", "paper", "--model.width", "6")
    assert options.experiment.model.width == 6


def test_user_errors_end_in_one_line_and_other_errors_keep_their_traceback(capsys, monkeypatch):
    with pytest.raises(SystemExit), command.one_line_errors():
        raise UserError("two\nlines")
    assert capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(ValueError, match="a defect"), command.one_line_errors():
        raise ValueError("a defect")
    monkeypatch.setenv("ERGON_TRACEBACK", "1")
    with pytest.raises(UserError), command.one_line_errors():
        raise UserError("shown whole")


@pytest.mark.parametrize("value", [True, False])
def test_a_field_that_is_true_or_false_takes_the_word(value):
    options = parse("configs/transformer_text.py", "--model.bias", str(value), "--flag")
    assert options.experiment.model.bias is value
    assert options.flag is True


def test_json_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    command.write_json(None, {})
    command.write_json(tmp_path / "a.json", {"a": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
    with pytest.raises(SystemExit, match="2"):
        command.write_json(tmp_path / "missing" / "a.json", {})
    expected = f"error: cannot write {tmp_path}/missing/a.json: No such file or directory\n"
    assert capsys.readouterr().err == expected
