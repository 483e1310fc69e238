"""Where an operation belongs, phase and module, from the names that JAX gives it."""

import dataclasses
import functools
import re
from collections.abc import Set

CAUSAL = "causal"
"""The name of the scope in which attention that masks the future marks its products."""

PHASES = ("forward", "backward", "recompute", "optimizer")

_RECOMPUTED = "rematted_computation"
_UNNAMED = frozenset(("", CAUSAL, "checkpoint", _RECOMPUTED))
"""Scopes that are no module; nor are the subscripts by which einsum names its products."""
_CONTROL = re.compile(
    r"while|body|cond|closed_call|eval_jaxpr|core_call|call|custom_(jvp|vjp)_call\w*|remat2?|"
    r"shard_map|scan|pallas_call|branch_\d+_fun|(static|dynamic)_sparsity_splash|splash_m[hq]a_\w+"
)
"""What the path of an operation in a compiled program has besides the scopes: names of control
flow, and those by which JAX's kernels of attention call themselves."""


@dataclasses.dataclass(frozen=True)
class Place:
    phase: str = "forward"
    module: str = ""
    causal: bool = False

    def around(self, inner: "Place") -> "Place":
        """The place of what is at `inner` in a body that is called here."""
        return Place(
            max(self.phase, inner.phase, key=PHASES.index),
            f"{self.module}.{inner.module}".strip("."),
            self.causal or inner.causal,
        )


@functools.lru_cache(maxsize=4096)
def of_stack(stack: str) -> Place:
    """From a name stack of a jaxpr, such as `transpose(jvp(layers))/attention`."""
    scopes = re.sub(r"\w+\(|\)", "", stack).split("/")
    phase = "backward" if "transpose(" in stack else "forward"
    named = (n for n in scopes if n not in _UNNAMED and "," not in n)
    return Place("recompute" if _RECOMPUTED in scopes else phase, ".".join(named), CAUSAL in scopes)


@functools.lru_cache(maxsize=16384)
def of_path(path: str) -> Place:
    """From a path that a compiled program keeps (op_name): the name stacks of the calls around an
    operation, its own, and its primitive."""
    scopes, _, _ = re.sub(r"\bp?jit\([^()]*\)", "", path).rpartition("/")
    place = of_stack(scopes)
    return dataclasses.replace(place, module=scoped(place.module))


def scoped(module: str) -> str:
    """A module's name without the names of control flow, which only compiled programs have."""
    return ".".join(n for n in module.split(".") if not _CONTROL.fullmatch(n))


def settle(place: Place, forward: Set[str]) -> Place:
    """With the module's name in the forward pass, and the phase of the optimizer's scope."""
    module = named(place.module, forward)
    phase = "optimizer" if module.split(".")[0] == "optimizer" else place.phase
    return Place(phase, module, place.causal)


def named(module: str, forward: Set[str]) -> str:
    """A module's name in the forward pass. Transposing an equation at a/b may put it at a/b/a/b:
    immediate repeats are taken out until the name is one of those, or none is left."""
    found = [module]
    for name in found:
        if name in forward:
            return name
        path = name.split(".")
        for n in range(len(path) // 2, 0, -1):
            for i in range(len(path) - 2 * n + 1):
                shorter = ".".join(path[:i] + path[i + n :])
                if path[i : i + n] == path[i + n : i + 2 * n] and shorter not in found:
                    found.append(shorter)
    return min(found, key=len)
