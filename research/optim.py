"""Optimizers and schedules of optax as frozen, JSON-able configuration."""

import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import optax.schedules
import tyro
from annotated_types import Ge

__all__ = [
    "Group",
    "Mask",
    "Optax",
    "Optimizer",
    "Rate",
    "Update",
    "decay_mask",
    "path_of",
    "schedule",
    "some",
]

VECTORS = r"(^|/)(bias|scale|.*norm.*)(/|$)"
"""Paths of biases and norms, which are vectors even where a scan's layers are stacked."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """The path of a leaf as "layers/0/kernel", from the keys that jax.tree_util gives it."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def some(paths: Iterable[str]) -> str:
    """The first eight, for a message, and how many more there are."""
    paths = list(paths)
    shown = ", ".join(paths[:8]) or "nothing"
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def decay_mask(params: Any, no_decay: str) -> Any:
    """A tree like `params`, True where the regex `no_decay` is found nowhere in the leaf's path."""
    search = re.compile(no_decay).search
    return jax.tree_util.tree_map_with_path(lambda path, _: not search(path_of(path)), params)


Mask = Callable[[Any], Any]
"""Parameters -> a tree like them, True for those that weight decay shrinks."""


@runtime_checkable
class Update(Protocol):
    """A frozen dataclass that makes an optimizer: `Optax`, or one of your own.

    Its fields are checked against their annotations, changed from the command line and stored in
    JSON as those of every config are. A learning rate is a field of type `Rate`.
    """

    def make(self, mask: Mask | None, multiplier: float) -> optax.GradientTransformation:
        """The optimizer: updates are added to the parameters, so they point downhill.

        mask: what weight decay shrinks; None: everything. multiplier: of the learning rate, and so
        of decoupled weight decay; a group's.
        """
        ...

    def rate(self, step: Any) -> Any:
        """The learning rate of update number `step` (from 0, may be traced), which is logged; None:
        there is none."""
        ...


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optimizer or schedule of optax, by name and with its own arguments; checked when made.

    Optimizers are the functions of optax and optax.contrib ("contrib.muon") that take a
    `learning_rate` and need only gradients and parameters; schedules those of optax.schedules.
    `kwargs` holds numbers, strings, bools, None, lists, dicts of these, and further Optax, which
    `dataclasses.asdict` and JSON keep: tuples become lists, and {"name", "kwargs"} an Optax.

    Muon's `muon_weight_dimension_numbers` is {regex on the path: [reduction axes, output axes]}, or
    None in place of the axes for Adam; the first match wins, further axes are of separate matrices,
    and what nothing matches is Adam's. Count axes from the end, so that a scan's stack of layers is
    one matrix a layer. Without it every kernel or embedding of two axes is a matrix, and one of
    three a stack of them.

    Raises:
        ValueError: on an unknown name or argument, a missing argument, or a value that is of the
            wrong type, out of range or refused by optax. The message is one line.
    """

    name: str
    # The command line says --optimizer.learning_rate, without the names of the two fields between.
    kwargs: Annotated[dict[str, Any], tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        name = self.name
        if name not in _factories():
            raise ValueError(_unknown(name))
        if not isinstance(self.kwargs, dict):
            raise ValueError(f"{name}: kwargs must be a dict, got {self.kwargs!r}")
        kwargs = {key: _plain(f"{name}: {key}", value) for key, value in self.kwargs.items()}
        object.__setattr__(self, "kwargs", kwargs)
        parameters = self._parameters
        for key, value in kwargs.items():
            if key not in parameters:
                # difflib does not connect "lr" and "wd" with the names they abbreviate.
                known = {"".join(w[:1] for w in p.split("_")): p for p in parameters}
                hint = _hint(key, known | {p: p for p in parameters}, cutoff=0.5) or "."
                takes = ", ".join(parameters)
                raise ValueError(f"{name} takes no argument {key!r}{hint} It takes: {takes}")
            self._check_value(key, value, parameters[key].default)
        missing = [k for k, p in parameters.items() if kwargs.get(k, p.default) is p.empty]
        # Optax gives the step its sign with the learning rate: without one, adadelta climbs.
        if not self.is_schedule and name != "adafactor" and self._argument("learning_rate") is None:
            missing = ["learning_rate"]
        if missing:
            raise ValueError(f"{name} needs {', '.join(map(repr, missing))}")
        try:
            # Abstractly, so that no accelerator is opened by reading a configuration.
            made: Any = _without_axes(self).make()
            if not self.is_schedule:
                jax.eval_shape(lambda: made.update(p := _example(), made.init(p), p))
            elif jax.eval_shape(lambda: jnp.asarray(made(jnp.zeros((), jnp.int32)))).shape:
                raise ValueError("its value is not a scalar")
        except Exception as error:
            raise ValueError(f"{name}: optax says: {' '.join(str(error).split())}") from error

    def make(self, mask: Mask | None = None, multiplier: float = 1.0) -> Any:
        """The optimizer or the schedule itself; see `Update`."""
        parameters = self._parameters
        kwargs = {key: _resolve(value, mask, multiplier) for key, value in self.kwargs.items()}
        if mask is not None:
            masks = [key for key in ("mask", "weight_decay_mask") if key in parameters]
            unmasked = "adam_weight_decay" if masks else "weight_decay"
            if unmasked in parameters and self._argument(unmasked):
                raise ValueError(
                    f"{self.name}: {unmasked} would decay every parameter, for optax gives it no "
                    "mask; set it to 0 and use l2"
                )
            kwargs = dict.fromkeys(masks, mask) | kwargs
        if _MATRICES in parameters:
            given = self.kwargs.get(_MATRICES)
            kwargs[_MATRICES] = functools.partial(_dimension_numbers, spec=given)
        after = []
        if multiplier != 1 and not self.is_schedule:
            for key in ("learning_rate", "adam_learning_rate"):
                rate = kwargs.get(key, parameters[key].default) if key in parameters else None
                if rate is not None:
                    kwargs[key] = _times(multiplier, rate)
            if "learning_rate" not in kwargs or kwargs["learning_rate"] is None:  # adafactor's own
                after.append(optax.scale(multiplier))
        made = _factories()[self.name](**kwargs)
        return optax.chain(made, *after) if after else made

    def rate(self, step: Any) -> Any:
        """Of an optimizer: see `Update`."""
        rate = self._argument("learning_rate")
        warmup = self.kwargs.get("warmup_steps")  # a schedule-free method's own
        if warmup and not isinstance(rate, Optax):
            return optax.warmup_constant_schedule(0.0, rate, warmup)(step)
        return None if rate is None else schedule(rate)(step)

    @property
    def is_schedule(self) -> bool:
        return "learning_rate" not in self._parameters

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(_factories()[self.name]).parameters)

    def _argument(self, key: str) -> Any:
        return self.kwargs.get(key, self._parameters[key].default)

    def _check_value(self, key: str, value: Any, default: Any) -> None:
        where = f"{self.name}: {key}"
        wanted = "an optimizer" if key == "base_optimizer" else "a number or a schedule"
        amount = key.endswith(("learning_rate", "weight_decay", "value", "_steps"))
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, Optax):
                if leaf.is_schedule == (key == "base_optimizer"):
                    kind = "a schedule" if leaf.is_schedule else "an optimizer"
                    raise ValueError(f"{where} must be {wanted}; {leaf.name!r} is {kind}")
            elif isinstance(leaf, (int, float)) and key != _MATRICES:
                if not math.isfinite(leaf):
                    raise ValueError(f"{where} must be finite, got {leaf}")
                if leaf < 0 and (amount or self.is_schedule):
                    raise ValueError(f"{where} must not be negative, got {leaf}")
        if key == _MATRICES and value is not None:
            _check_matrices(where, value)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        if (numeric or amount) and isinstance(value, (bool, str, list, dict)):
            raise ValueError(f"{where} must be {wanted}, got {value!r}")


Rate = Annotated[float, Ge(0)] | Optax
"""A learning rate, or anything that may change by the step: a number, or a schedule of optax."""


def schedule(rate: float | Optax, multiplier: float = 1.0) -> optax.Schedule:
    """step -> multiplier * rate, for `optax.scale_by_learning_rate` and the like.

    Raises ValueError for what is neither a number nor a schedule.
    """
    if isinstance(rate, Optax) and rate.is_schedule:
        made = cast(optax.Schedule, rate.make())
        return made if multiplier == 1 else _times(multiplier, made)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        kind = f"{rate.name!r} is an optimizer" if isinstance(rate, Optax) else f"got {rate!r}"
        raise ValueError(f"a rate must be a number or a schedule, {kind}")
    return optax.constant_schedule(multiplier * rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """How some of the parameters are trained.

    Attributes:
        match: regex searched in the path "a/b/c" of each parameter.
        multiplier: of the learning rate, and so of decoupled weight decay.
        update: their optimizer; None: that of all.
        frozen: they are never updated, have no optimizer state, and no gradient is computed.

    Raises:
        ValueError: in one line, when the configuration is made.
    """

    match: str
    multiplier: float = 1.0
    update: Annotated[Update | None, tyro.conf.arg(name="")] = None
    frozen: bool = False

    def __post_init__(self) -> None:
        _check_regex("match", self.match)
        where = f"group {self.match!r}"
        if isinstance(self.multiplier, bool) or not isinstance(self.multiplier, (int, float)):
            raise ValueError(f"{where}: multiplier must be a number, got {self.multiplier!r}")
        if not (math.isfinite(self.multiplier) and self.multiplier > 0):
            raise ValueError(
                f"{where}: multiplier must be finite and positive, got {self.multiplier} "
                "(frozen=True trains nothing)"
            )
        if not isinstance(self.frozen, bool):
            raise ValueError(f"{where}: frozen must be true or false, got {self.frozen!r}")
        if self.update is not None:
            _check_update(f"{where}: update", self.update, self)
        if self.frozen and (self.update is not None or self.multiplier != 1):
            raise ValueError(f"{where}: what is frozen takes no update and no multiplier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What turns gradients into steps: clip_value, then clip_norm, then `update` or a group's.

    Attributes:
        update: the optimizer; its weight decay skips the parameters of `no_decay`, unless it is
            given a mask of its own (None: nothing is skipped).
        clip_norm: largest global L2 norm of the gradient.
        clip_value: largest absolute value of an element of the gradient.
        l1: weight of sum |p| in the loss.
        l2: weight of sum p^2 / 2 in the loss.
        no_decay: regex searched in the path "a/b/c" of each parameter; those where it is found get
            neither weight decay nor L1 nor L2.
        groups: parameters that are trained otherwise; the first whose regex is found wins, and
            the clips are of all the parameters together.
        sam_rho: take the gradient again where it points, this far away (Foret et al. 2021), and
            step by that one, which doubles the cost; metrics and state are of the first.

    Raises:
        ValueError: naming the field, in one line, when the configuration is made.
    """

    update: Annotated[Update, tyro.conf.arg(name="")]
    clip_norm: float | None = None
    clip_value: float | None = None
    l1: float = 0.0
    l2: float = 0.0
    no_decay: str = VECTORS
    groups: tuple[Group, ...] = ()
    sam_rho: float | None = None

    def __post_init__(self) -> None:
        _check_update("update", self.update, self)
        object.__setattr__(self, "groups", tuple(self.groups))
        for group in self.groups:
            if not isinstance(group, Group):
                raise ValueError(f"groups must be of Group, got {group!r}")
        for field in ("clip_norm", "clip_value", "sam_rho", "l1", "l2"):
            value, clip = getattr(self, field), field.startswith(("clip", "sam"))
            if clip and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{field} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (clip and value == 0):
                bound = "positive" if clip else "not negative"
                raise ValueError(f"{field} must be finite and {bound}, got {value}")
        _check_regex("no_decay", self.no_decay)
        self.make()

    def make(self) -> optax.GradientTransformation:
        """The optax chain. Its state is a tree of arrays; updates have the parameters' dtypes."""
        mask = functools.partial(decay_mask, no_decay=self.no_decay)
        clips = [] if self.clip_value is None else [optax.clip(self.clip_value)]
        clips += [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        update = self.update.make(mask, 1.0)
        if self.groups:
            parts = {
                str(i): optax.set_to_zero()
                if group.frozen
                else (group.update or self.update).make(mask, group.multiplier)
                for i, group in enumerate(self.groups)
            }
            update = optax.partition(parts | {_REST: update}, self._labels)
        return _keep_dtypes(optax.chain(*clips, update))

    def check(self, params: Any) -> None:
        """Raises ValueError, in one line, for a group that has none of `params` (arrays or shapes),
        and where the optimizer cannot train them."""
        labels = jax.tree.leaves(self._labels(params))
        paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for i, group in enumerate(self.groups):
            if str(i) not in labels:
                earlier = any(re.search(group.match, path) for path in paths)
                which = "that an earlier group leaves; it is" if earlier else "of"
                whose = f"{group.match!r}" if earlier else some(paths)
                raise ValueError(f"groups: {group.match!r} matches no parameter {which} {whose}")
        if all(label != _REST and self.groups[int(label)].frozen for label in labels):
            raise ValueError("groups: every parameter is frozen")
        # By regex, for several groups may share an optimizer, and one of them have no match.
        given: dict[str, list[str]] = {}
        for path, label in zip(paths, labels, strict=True):
            its = Group(match="") if label == _REST else self.groups[int(label)]
            for regex in () if its.frozen else _regexes(its.update or self.update):
                given.setdefault(regex, []).append(path)
        for regex, its_paths in given.items():
            if not any(re.search(regex, path) for path in its_paths):
                raise ValueError(
                    f"{_MATRICES}: {regex!r} matches no parameter of {some(its_paths)}"
                )
        try:
            jax.eval_shape(lambda p: self.make().init(p), params)
        except ValueError as error:
            raise ValueError(" ".join(str(error).split())) from error

    def frozen(self, path: str) -> bool:
        """Whether the parameter at a path is never updated."""
        label = self._label(path)
        return label != _REST and self.groups[int(label)].frozen

    def held(self, params: Any) -> Any:
        """`params`, those that are frozen taken as constants: they have no gradient to compute."""

        def hold(key_path: Any, p: Any) -> Any:
            return jax.lax.stop_gradient(p) if self.frozen(path_of(key_path)) else p

        return jax.tree_util.tree_map_with_path(hold, params)

    def perturbed(self, params: Any, grads: Any) -> Any:
        """`params`, `sam_rho` away along the gradient."""
        norm = optax.tree.norm(grads)
        scale = jnp.where(norm > 0, (self.sam_rho or 0.0) / norm, 0.0)
        return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads)

    @staticmethod
    def eval_params(opt_state: Any, params: Any) -> Any:
        """The parameters to judge: those of training, but the average of a schedule-free method."""

        def found(node: Any) -> bool:
            return isinstance(node, optax.contrib.ScheduleFreeState)

        for state in filter(found, jax.tree.leaves(opt_state, is_leaf=found)):
            z = dict(jax.tree_util.tree_leaves_with_path(state.z))
            average = functools.partial(_average, state, z)
            params = jax.tree_util.tree_map_with_path(average, params)
        return params

    def _labels(self, params: Any) -> Any:
        """A tree like `params` of the groups they are in, by number."""

        return jax.tree_util.tree_map_with_path(lambda path, _: self._label(path_of(path)), params)

    def _label(self, path: str) -> str:
        found = (str(i) for i, g in enumerate(self.groups) if re.search(g.match, path))
        return next(found, _REST)

    def penalty(self, params: Any) -> jax.Array:
        """l1 * sum |p| + l2 / 2 * sum p^2 over the decayed parameters: a scalar, in fp32."""
        total = jnp.zeros((), jnp.float32)
        if self.l1 or self.l2:
            decayed = jax.tree.leaves(decay_mask(params, self.no_decay))
            for p in itertools.compress(jax.tree.leaves(params), decayed):
                p = p.astype(jnp.float32)
                # Not jnp.abs(p), whose gradient at 0 is 1 in JAX: L1 would push zeros about.
                total += self.l1 * jnp.sum(p * jnp.sign(p)) + self.l2 / 2 * jnp.sum(p * p)
        return total

    def learning_rate(self, step: Any) -> jax.Array | None:
        """The rate of update number `step` (from 0, may be traced), fp32; None if it has none.

        It is that of `update`: groups multiply it or have their own.
        """
        rate = self.update.rate(step)
        return None if rate is None else jnp.asarray(rate, jnp.float32)


_REST = "rest"
"""The label of parameters in no group."""

_MATRICES = "muon_weight_dimension_numbers"


@functools.cache
def _factories() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, value in vars(module).items():
            if not (inspect.isfunction(value) or isinstance(value, functools.partial)):
                continue
            # These are parts of optimizers: some take a learning rate, yet step uphill.
            if name.startswith(("_", "scale_by_", "inject_")):
                continue
            schedule = not prefix and hasattr(optax.schedules, name)
            if schedule or "learning_rate" in inspect.signature(value).parameters:
                found[prefix + name] = value
    return found


def _example() -> dict[str, jax.Array]:
    # Unequal leading axes, so that an optimizer which takes a gradient per example is refused.
    return {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros((2,))}


def _hint(word: str, known: dict[str, str], cutoff: float) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def _unknown(name: str) -> str:
    if callable(vars(optax).get(name)):
        return f"optax.{name} is neither an optimizer with a learning rate nor a schedule"
    known = {short: full for full in _factories() for short in (full, full.split(".")[-1])}
    return f"optax has no optimizer or schedule {name!r}{_hint(name, known, cutoff=0.6)}"


def _plain(where: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, Optax)):
        return value
    # NumPy's scalars would promote bf16 parameters, which Python's do not.
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(where, v) for v in value]
    if isinstance(value, dict):
        plain = {str(k): _plain(where, v) for k, v in value.items()}
        return Optax(**plain) if "name" in plain.keys() <= {"name", "kwargs"} else plain
    kinds = "a number, string, bool, None, list, dict or Optax"
    raise ValueError(f"{where} must be {kinds}, got {type(value).__name__}")


def _resolve(value: Any, mask: Mask | None, multiplier: float = 1.0) -> Any:
    if isinstance(value, Optax):
        return value.make(mask, multiplier)
    if isinstance(value, list):
        return tuple(_resolve(v, mask) for v in value)
    if isinstance(value, dict):  # of boundaries and scales, whose steps JSON made strings
        return {int(k) if k.isdigit() else k: _resolve(v, mask) for k, v in value.items()}
    return value


def _times(multiplier: float, rate: Any) -> Any:
    return (lambda step: multiplier * rate(step)) if callable(rate) else multiplier * rate


def _average(state: Any, z: dict[Any, jax.Array], path: Any, param: jax.Array) -> jax.Array:
    if path not in z:  # another group's
        return param
    found = optax.contrib.schedule_free_eval_params(state._replace(z=z[path]), param)
    return found.astype(param.dtype)


def _dimension_numbers(params: Any, spec: dict[str, Any] | None) -> Any:
    """For each parameter the axes that Muon takes for a matrix's, or None where it is not one."""

    def of(key_path: Any, param: Any) -> optax.contrib.MuonDimensionNumbers | None:
        path = path_of(key_path)
        if spec is None:
            matrix = param.ndim in (2, 3) and not re.search(VECTORS, path)
            axes: Any = (-2, -1) if matrix else None
        else:
            axes = next((axes for regex, axes in spec.items() if re.search(regex, path)), None)
        if axes is None:
            return None
        rows, columns = ((a,) if isinstance(a, int) else tuple(a) for a in axes)
        if max(-a if a < 0 else a + 1 for a in (*rows, *columns)) > param.ndim:
            raise ValueError(f"{_MATRICES}: {path} has {param.ndim} axes, and {axes} names others")
        return optax.contrib.MuonDimensionNumbers(rows, columns)

    return jax.tree_util.tree_map_with_path(of, params)


def _regexes(config: Any) -> Iterator[str]:
    """Of the matrices that Muon is given, here or in a nested optimizer."""
    if isinstance(config, Optax):
        yield from config.kwargs.get(_MATRICES) or ()
    fields = [getattr(config, field.name) for field in dataclasses.fields(config)]
    for leaf in filter(dataclasses.is_dataclass, jax.tree.leaves(fields)):
        yield from _regexes(leaf)


def _without_axes(optax_: Optax) -> Optax:
    """The same, but the axes of matrices, which an example of other parameters need not have."""
    kept = {k: v for k, v in optax_.kwargs.items() if k != _MATRICES}
    kwargs = {k: _without_axes(v) if isinstance(v, Optax) else v for k, v in kept.items()}
    found = copy.copy(optax_)
    object.__setattr__(found, "kwargs", kwargs)
    return found


def _check_matrices(where: str, spec: Any) -> None:
    def axes(value: Any) -> bool:
        return type(value) is int or (
            isinstance(value, list) and bool(value) and all(type(a) is int for a in value)
        )

    for regex, pair in spec.items() if isinstance(spec, dict) else [("", spec)]:
        _check_regex(where, regex)
        two = isinstance(pair, list) and len(pair) == 2 and all(map(axes, pair))
        if not (isinstance(spec, dict) and (pair is None or two)):
            raise ValueError(
                f"{where} must be {{regex: [reduction axes, output axes]}}, got {spec!r}"
            )


def _check_update(where: str, update: Any, of: Any) -> None:
    dataclass = dataclasses.is_dataclass(update) and not isinstance(update, type)
    if not (dataclass and isinstance(update, Update)):
        raise ValueError(
            f"{where} must be an Optax, or a frozen dataclass with make(mask, multiplier) and "
            f"rate(step), got {update!r}"
        )
    if isinstance(update, Optax) and update.is_schedule:
        raise ValueError(f"{where} must be an optimizer; {update.name!r} is a schedule")
    both: tuple[Any, Any] = (update, of)  # whose fields the command line has side by side
    names, taken = ({field.name for field in dataclasses.fields(config)} for config in both)
    for name in sorted(names & taken):
        kind, other = type(update).__name__, type(of).__name__
        raise ValueError(f"{where}: {kind} has a field {name!r}, as {other} has: rename it")


def _check_regex(where: str, regex: Any) -> None:
    try:
        re.compile(regex)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where} is not a regular expression: {error}") from error


def _keep_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    # A schedule gives strong fp32 values: one of weight decay would promote bf16 updates and state.
    def cast_like(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), tree, like)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(grads, state, params)
        return cast_like(updates, grads if params is None else params), cast_like(new, state)

    return optax.GradientTransformation(inner.init, update)
