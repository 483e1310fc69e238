"""The command line: a config file or JSON, overrides over its dataclasses, errors of one line."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import tyro
from tqdm import tqdm

from research import UserError, hosts
from research import experiment as experiments
from research.experiment import Experiment

T = TypeVar("T")

Overrides = Annotated[
    Experiment,
    tyro.conf.arg(name=""),
    tyro.conf.FlagConversionOff,
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every script that takes a config has; a script adds its own fields."""

    config: tyro.conf.Positional[str]
    """A file whose config() returns an Experiment, or a run's config.json."""
    experiment: Overrides
    allow: tuple[str, ...] = ()
    """Further packages whose classes a config.json may name."""


def load(path: str | pathlib.Path, allow: Sequence[str] = ()) -> Experiment:
    """The experiment of a config file (.py) or of a config.json.

    Raises UserError for a file that is absent, broken, or not a config.
    """
    # A researcher's packages are where the command is given, and Python looks beside the script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py") if p.stem != "__init__"]
        raise UserError(f"no config at {path}{experiments.did_you_mean(str(path), near)}")
    if path.suffix == ".json":
        try:
            found = experiments.from_json(json.loads(path.read_text()), allow)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    elif path.suffix == ".py":
        try:
            module = _module(path)
            if not callable(getattr(module, "config", None)):
                raise UserError("has no function config() that returns an Experiment")
            found = module.config()
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise UserError(f"{path}: {kind}{error}") from error
    else:
        raise UserError(f"{path} is neither a .py config nor a .json")
    if not isinstance(found, Experiment):
        raise UserError(f"{path} gives a {type(found).__name__}, not an Experiment")
    return found


def name(path: str) -> str:
    """What a config's runs are called: its file's name, or its run directory's."""
    where = pathlib.Path(path)
    return where.resolve().parent.name if where.name == "config.json" else where.stem


def _module(path: pathlib.Path) -> Any:
    """Imports a config under its dotted name below the current folder, so that JSON can name it."""
    with contextlib.suppress(ValueError):
        parts = path.resolve().relative_to(pathlib.Path.cwd()).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            return importlib.import_module(".".join(parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def parse(options: type[T], usage: str, argv: Sequence[str] | None = None) -> T:
    """Parses a command line into `options`, a dataclass.

    A subclass of `Options` takes `CONFIG [--field value ...]`, its defaults being the config's. A
    mistake of the user's ends the process with one line on stderr and status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default: Any = tyro.MISSING_NONPROP
    if issubclass(options, Options):
        if not argv or argv[0].startswith("-"):
            if argv[:1] not in (["-h"], ["--help"]):
                fail(f"the first argument must be a config: {usage}")
            print(f"usage: {usage}\nCONFIG --help lists its fields and their defaults")
            sys.exit(0)
        with one_line_errors():
            experiment = load(argv[0], _values_of("--allow", argv))
        given: dict[str, Any] = {"config": argv[0], "experiment": experiment}
        default = options(**given)
    flags = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                options,
                args=argv,
                default=default,
                description=usage,
                config=flags,
                registry=_narrowed(typing.get_type_hints(options)),
                use_underscores=True,
            )
    except SystemExit as error:
        if error.code == 0:
            raise
        fail(_one_line(stderr.getvalue()))
    except ValueError as error:
        fail(" ".join(str(error).split()))


def _narrowed(taken: Collection[str]) -> tyro.constructors.ConstructorRegistry:
    """Has tyro read a field that may be of several classes as of the one that the config has.

    Itself it makes subcommands of `float | Optax`, and knows only the classes that are named.
    taken: options of a script, by whose names an experiment's fields cannot be set.
    """
    registry = tyro.constructors.ConstructorRegistry()
    asking: list[Any] = []

    @registry.struct_rule
    def rule(info: tyro.constructors.StructTypeInfo) -> Any:
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking.append(info)
        try:
            spec = registry.get_struct_spec(info)  # that of tyro's own rules
        finally:
            asking.pop()
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return spec
        fields = [dataclasses.replace(f, type=_of(f.type, f.default)) for f in spec.fields]
        if info.type is Experiment:
            hidden: Any = tyro.conf.Suppress
            fields = [
                dataclasses.replace(f, type=hidden[f.type]) if f.name in taken else f
                for f in fields
            ]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _of(hint: Any, default: Any) -> Any:
    """A union as the class of a field's default; without the classes, where that is a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return Annotated[(_of(args[0], default), *args[1:])]
    if origin not in (typing.Union, types.UnionType):
        return hint
    if dataclasses.is_dataclass(default):
        return type(default)
    simple = [arg for arg in args if not dataclasses.is_dataclass(arg)]
    narrow = isinstance(default, int | float | str) and 0 < len(simple) < len(args)
    return typing.Union[tuple(simple)] if narrow else hint  # noqa: UP007


def _values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """The values after a flag, read before the real parse because loading a JSON needs them."""
    values: list[str] = []
    for i, arg in enumerate(argv):
        if arg == flag:
            values += itertools.takewhile(lambda v: not v.startswith("-"), argv[i + 1 :])
    return values


def _one_line(box: str) -> str:
    """tyro's boxed error as one line: its message, and the nearest option it knows."""
    lines = [line.strip("│|╭╮╰╯ ") for line in box.splitlines()[1:]]
    parts = itertools.groupby(lines, key=lambda line: set(line) <= set("─-"))
    message, *rest = (" ".join(lines) for border, lines in parts if not border)
    unknown = re.match(r"Unrecognized options: (\S+?)(,|$)", message)
    if unknown:
        name = unknown[1]
        known = re.findall(r"--[\w.-]+", " ".join(rest[:-1]))
        return f"unknown field {name}{_nearest(name, known)}"
    message = re.sub(r"^Error parsing( experiment)?:? ", "", message)
    message = experiments.plain(re.sub(r"\bexperiment\.", "", message))
    return re.sub(r"\s+", " ", message)


def _nearest(name: str, known: Sequence[str]) -> str:
    def leaf(option: str) -> str:
        return option.lstrip("-").split(".")[-1]

    # Only the last name is compared: what stands before it is alike among all fields of a part.
    leaves = {leaf(option): option for option in reversed(known)}
    close = difflib.get_close_matches(leaf(name), leaves, n=1, cutoff=0.6)
    return f"; did you mean {leaves[close[0]]}?" if close else "; --help lists them"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line where the block raises what a user can mend.

    Any other error keeps its traceback: it is a defect, here or in the researcher's own model.
    ERGON_TRACEBACK=1 shows the traceback of these, too.
    """
    try:
        yield
    except KeyboardInterrupt:
        hosts.failed("interrupted", 130, "interrupted")
    except Exception as error:
        mendable = isinstance(error, UserError | FloatingPointError | OSError)
        if mendable and not os.environ.get("ERGON_TRACEBACK"):
            fail(" ".join(str(error).split()))
        if hosts.count() == 1:
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and (absent := hosts.gone()):
            fail(f"{absent}: {first}")
        hosts.failed(first, 1, traceback.format_exc())


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[tuple[tqdm, Callable[[str], None]]]:
    """A bar on a terminal, and what says beside it, or in lines elsewhere, what is at work."""
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit=unit) as bar:

        def say(line: str) -> None:
            if bar.disable:
                print(line, file=sys.stderr, flush=True)
            else:
                bar.set_postfix_str(line)

        yield bar, say


def check_writable(*paths: pathlib.Path | None) -> None:
    """Ends the process with one line, before long work, where its results could not be written."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            fail(f"cannot write {path}: there is no folder {path.parent}")
        if path.is_dir():
            fail(f"cannot write {path}: it is a folder")


def write_json(path: pathlib.Path | None, value: Any) -> None:
    """What --json asks for, as strict JSON, from the first process; nothing without a path."""
    if path is None or hosts.me() > 0:
        return
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def fail(message: str) -> NoReturn:
    hosts.failed(message, 2)
