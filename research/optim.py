"""Optimizers and schedules of optax as frozen, JSON-able configuration."""

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import numbers
import re
from collections.abc import Callable
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import optax.schedules
import tyro

__all__ = ["Optax", "Optimizer", "decay_mask", "path_of"]


def path_of(key_path: tuple[Any, ...]) -> str:
    """The path of a leaf as "layers/0/kernel", from the keys that jax.tree_util gives it."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def decay_mask(params: Any, no_decay: str) -> Any:
    """A tree like `params`, True where the regex `no_decay` is found nowhere in the leaf's path."""
    search = re.compile(no_decay).search
    return jax.tree_util.tree_map_with_path(lambda path, _: not search(path_of(path)), params)


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optimizer or schedule of optax, by name and with its own arguments; checked when made.

    Optimizers are the functions of optax and optax.contrib ("contrib.muon") that take a
    `learning_rate` and need only gradients and parameters; schedules those of optax.schedules.
    `kwargs` holds numbers, strings, bools, None, lists, dicts of these, and further Optax, which
    `dataclasses.asdict` and JSON keep: tuples become lists, and {"name", "kwargs"} an Optax.

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
        if self._is_optimizer and name != "adafactor" and self._argument("learning_rate") is None:
            missing = ["learning_rate"]
        if missing:
            raise ValueError(f"{name} needs {', '.join(map(repr, missing))}")
        try:
            # Abstractly, so that no accelerator is opened by reading a configuration.
            made: Any = self.make()
            if self._is_optimizer:
                jax.eval_shape(lambda: made.update(p := _example(), made.init(p), p))
            elif jax.eval_shape(lambda: jnp.asarray(made(jnp.zeros((), jnp.int32)))).shape:
                raise ValueError("its value is not a scalar")
        except Exception as error:
            raise ValueError(f"{name}: optax says: {' '.join(str(error).split())}") from error

    def make(self) -> optax.GradientTransformation | optax.Schedule:
        """The optimizer or schedule itself; weight decay applies to every parameter."""
        return self._make(None)

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(_factories()[self.name]).parameters)

    @property
    def _is_optimizer(self) -> bool:
        return "learning_rate" in self._parameters

    def _argument(self, key: str) -> Any:
        return self.kwargs.get(key, self._parameters[key].default)

    def _check_value(self, key: str, value: Any, default: Any) -> None:
        where = f"{self.name}: {key}"
        wanted = "an optimizer" if key == "base_optimizer" else "a number or a schedule"
        amount = key.endswith(("learning_rate", "weight_decay", "value", "_steps"))
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, Optax):
                if leaf._is_optimizer != (key == "base_optimizer"):
                    kind = "an optimizer" if leaf._is_optimizer else "a schedule"
                    raise ValueError(f"{where} must be {wanted}; {leaf.name!r} is {kind}")
            elif isinstance(leaf, (int, float)):
                if not math.isfinite(leaf):
                    raise ValueError(f"{where} must be finite, got {leaf}")
                if leaf < 0 and (amount or not self._is_optimizer):
                    raise ValueError(f"{where} must not be negative, got {leaf}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        if (numeric or amount) and isinstance(value, (bool, str, list, dict)):
            raise ValueError(f"{where} must be {wanted}, got {value!r}")

    def _make(self, mask: Callable[[Any], Any] | None) -> Any:
        parameters = self._parameters
        kwargs = {key: _resolve(value, mask) for key, value in self.kwargs.items()}
        if mask is not None:
            masks = [key for key in ("mask", "weight_decay_mask") if key in parameters]
            unmasked = "adam_weight_decay" if masks else "weight_decay"
            if unmasked in parameters and self._argument(unmasked):
                raise ValueError(
                    f"{self.name}: {unmasked} would decay every parameter, for optax gives it no "
                    "mask; set it to 0 and use l2"
                )
            kwargs = dict.fromkeys(masks, mask) | kwargs
        return _factories()[self.name](**kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What turns gradients into steps: clip_value, then clip_norm, then `update`.

    Attributes:
        update: the optimizer; its weight decay skips the parameters of `no_decay`, unless it is
            given a mask of its own (None: nothing is skipped).
        clip_norm: largest global L2 norm of the gradient.
        clip_value: largest absolute value of an element of the gradient.
        l1: weight of sum |p| in the loss.
        l2: weight of sum p^2 / 2 in the loss.
        no_decay: regex searched in the path "a/b/c" of each parameter; those where it is found get
            neither weight decay nor L1 nor L2.

    Raises:
        ValueError: naming the field, in one line, when the configuration is made.
    """

    update: Annotated[Optax, tyro.conf.arg(name="")]
    clip_norm: float | None = None
    clip_value: float | None = None
    l1: float = 0.0
    l2: float = 0.0
    no_decay: str = r"(^|/)(bias|scale|.*norm.*)(/|$)"

    def __post_init__(self) -> None:
        if not isinstance(self.update, Optax):
            raise ValueError(f"update must be an Optax, got {self.update!r}")
        if not self.update._is_optimizer:
            raise ValueError(f"update must be an optimizer; {self.update.name!r} is a schedule")
        for field in ("clip_norm", "clip_value", "l1", "l2"):
            value, clip = getattr(self, field), field.startswith("clip")
            if clip and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{field} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (clip and value == 0):
                bound = "positive" if clip else "not negative"
                raise ValueError(f"{field} must be finite and {bound}, got {value}")
        try:
            re.compile(self.no_decay)
        except (re.error, TypeError) as error:
            raise ValueError(f"no_decay is not a regular expression: {error}") from error
        self.make()

    def make(self) -> optax.GradientTransformation:
        """The optax chain. Its state is a tree of arrays; updates have the parameters' dtypes."""
        mask = functools.partial(decay_mask, no_decay=self.no_decay)
        clips = [] if self.clip_value is None else [optax.clip(self.clip_value)]
        clips += [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        return _keep_dtypes(optax.chain(*clips, self.update._make(mask)))

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
        """The rate of update number `step` (from 0, may be traced), fp32; None if it has none."""
        rate = self.update._argument("learning_rate")
        if isinstance(rate, Optax):
            rate = cast(optax.Schedule, rate.make())(step)
        return None if rate is None else jnp.asarray(rate, jnp.float32)


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


def _resolve(value: Any, mask: Callable[[Any], Any] | None) -> Any:
    if isinstance(value, Optax):
        return value._make(mask)
    if isinstance(value, list):
        return tuple(_resolve(v, mask) for v in value)
    if isinstance(value, dict):  # of boundaries and scales, whose steps JSON made strings
        return {int(k) if k.isdigit() else k: _resolve(v, mask) for k, v in value.items()}
    return value


def _keep_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    # A schedule gives strong fp32 values: one of weight decay would promote bf16 updates and state.
    def cast_like(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), tree, like)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(grads, state, params)
        return cast_like(updates, grads if params is None else params), cast_like(new, state)

    return optax.GradientTransformation(inner.init, update)
