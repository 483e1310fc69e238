"""A module inside a traced function: put together, named, and taken apart again."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

Path = tuple[str, ...]


class Settle(Protocol):
    """Where arrays are in a mesh while a model computes."""

    def equip(self, module: nnx.Module) -> None:
        """Gives a module what it needs to compute over devices by itself."""
        ...

    def rows(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of what a call gives, in a model that was called on an array of that shape."""
        ...

    def whole(self, path: str, x: jax.Array) -> jax.Array:
        """Of a parameter at its use."""
        ...


def keep(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: a backward pass finds all kept but what `Settle` places, and so
    gathers parameters anew, or every device would hold them all by the end of the forward pass."""
    return primitive.name != "sharding_constraint"


def variables(model: nnx.Module) -> tuple[Any, Any]:
    """A module's parameters and its other variables, as plain dictionaries of arrays."""
    states: Any = nnx.split(model, nnx.Param, ...)[1:]
    return nnx.to_pure_dict(states[0]), nnx.to_pure_dict(states[1])


_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def compute_in(model: nnx.Module, dtype: Any) -> None:
    """Has a model's layers compute in dtype, but for norms, which stay float32, and for layers that
    its author gave another dtype; parameters stay as they are.

    A layer is a module of Flax's with a `dtype`: it converts its inputs and parameters when called.
    """
    for _, module in nnx.iter_modules(model):
        # Embeddings take their parameters' dtype where they are given none.
        free = (None, jnp.float32) if isinstance(module, nnx.Embed) else (None,)
        if getattr(module, "dtype", dtype) in free:
            layer: Any = module
            layer.dtype = jnp.float32 if isinstance(module, _NORMS) else dtype


def only_norms_change(model: nnx.Module) -> bool:
    """Whether a model's variables, parameters apart, are batch norms' statistics alone."""
    _, others = variables(model)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    return len(jax.tree.leaves(others)) == sum(len(jax.tree.leaves(variables(m)[1])) for m in norms)


@contextlib.contextmanager
def merged(
    graph: nnx.GraphDef,
    params: Any,
    model_state: Any,
    *,
    training: bool,
    frozen: Callable[[str], bool] = lambda path: False,
    settle: Settle | None = None,
) -> Iterator[Any]:
    """The module, in its training or evaluation form, every submodule's call in its own scope.

    settle: what is done to parameters when their module is called, or the one that it is directly
    in, for that may loop over it; and to whatever a call gives.
    frozen: whether the parameter at a path "a/b" is. A batch norm with no other parameters keeps
    its running statistics and is normalised by them in training too: it stays the function it was.
    """
    model: Any = nnx.merge(graph, params, model_state, copy=True)
    if training:
        model.train()
        for path, module in nnx.iter_modules(model):
            own = [name for name, x in vars(module).items() if isinstance(x, nnx.Param)]
            held = all(frozen("/".join(map(str, (*path, name)))) for name in own)
            if isinstance(module, nnx.BatchNorm) and own and held:
                module.eval()
    else:
        model.eval()
    if settle is not None:
        for _, module in nnx.iter_modules(model):
            settle.equip(module)
    with scopes(model, settle):
        yield model


@contextlib.contextmanager
def scopes(model: nnx.Module, settle: Settle | None = None) -> Iterator[None]:
    """Within, a call of a submodule runs under `jax.named_scope` of its path in the model.

    Flax NNX names nothing by itself; profiles and the ledger read these names. A module that is
    put together during the call, as the layers of a scan are, takes the path that modules of its
    class have in common. settle: as in `merged`.
    """
    paths: dict[int, Path] = {}
    by_class: dict[type, Path] = {}
    owners: dict[Any, Any] = {}
    kept: list[nnx.Module] = []  # an id is only good while its object lives
    active: list[tuple[nnx.Module, Path]] = []
    shape: tuple[int, ...] = ()  # of what the model is called on
    whole: dict[int, nnx.Param] = {}

    def settled(x: Any) -> Any:
        return settle.rows(x, shape) if settle and isinstance(x, jax.Array) else x

    @contextlib.contextmanager
    def gathered(module: nnx.Module, path: Path) -> Iterator[None]:
        if settle is None:
            yield
            return
        children = [(name, x) for name, x in vars(module).items() if isinstance(x, nnx.Module)]
        before: list[tuple[dict[str, Any], str, Any]] = []
        for prefix, owner in [(path, module), *(((*path, name), x) for name, x in children)]:
            attributes: Any = vars(owner)
            for name, x in list(attributes.items()):
                if isinstance(x, nnx.Param) and id(x) not in whole:
                    before.append((attributes, name, x))
                    # A variable in its place: a scan that is traced may not change what is outside.
                    x = nnx.Param(settle.whole("/".join((*prefix, name)), x[...]))
                    whole[id(x)] = attributes[name] = x
        try:
            yield
        finally:
            for attributes, name, x in before:
                attributes[name] = x

    def learn(root: nnx.Module, prefix: Path) -> None:
        for path, module in nnx.iter_modules(root):
            full = prefix + tuple(map(str, path))
            paths[id(module)] = full
            kept.append(module)
            cls = type(module)
            by_class[cls] = _common(by_class.get(cls, full), full)
            owner: Any = next((c for c in cls.__mro__ if "__call__" in c.__dict__), None)
            if owner is not None and owner not in owners:
                owners[owner] = owner.__call__
                owner.__call__ = wrap(owners[owner])

    def wrap(call: Any) -> Any:
        @functools.wraps(call)
        def scoped(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal shape
            if not active:
                shape = next((x.shape for x in args if getattr(x, "ndim", 0)), ())
            if active and active[-1][0] is module:  # super().__call__
                return call(module, *args, **kwargs)
            if id(module) not in paths:
                learn(module, by_class.get(type(module), ()))
            path, around = paths[id(module)], active[-1][1] if active else ()
            inner = path[len(around) :] if path[: len(around)] == around else path[-1:]
            active.append((module, path))
            try:
                scope = jax.named_scope("/".join(inner)) if inner else contextlib.nullcontext()
                with scope, gathered(module, path):
                    return jax.tree.map(settled, call(module, *args, **kwargs))
            finally:
                active.pop()

        return scoped

    try:
        learn(model, ())
        yield
    finally:
        for owner, call in owners.items():
            owner.__call__ = call


def _common(a: Path, b: Path) -> Path:
    same = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(same, min(len(a), len(b)))]
