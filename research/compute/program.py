"""What a compiled program does on each device, from XLA's optimised HLO, loops by their trips.

XLA's own cost_analysis() counts a loop's body once, a custom call as -1, and is None for a GPU
compiled for ahead of time. What is executed differs from the model's FLOPs where the compiler
changes the mathematics: XLA's CPU backend computes a depthwise convolution's kernel gradient for
every pair of channels and keeps the diagonal, for one.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from research.compute import hlo, megascale, places
from research.compute.hlo import Computation, Instruction, Module, Shape
from research.compute.links import Collective, Wiring

_Key = TypeVar("_Key")
COLLECTIVES = frozenset(
    "all-reduce all-gather reduce-scatter all-to-all collective-permute ragged-all-to-all "
    "collective-broadcast".split()
)
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_FLASH = (
    (re.compile(r"__cudnn\$fmha\w*Backward"), (5, 1)),
    (re.compile(r"__cudnn\$fmha"), (2, 0)),
    (re.compile("splash_fwd"), (2, 0)),
    (re.compile("splash_dq"), (3, 1)),
    (re.compile("splash_dkv"), (4, 2)),
)
"""Kernels of attention: how many products they make, and how many of these again."""
MASKED = "flash attention: masked parts counted too"
"""Why FLOPs are not exact where a kernel may leave out as much as half of its attention's."""
LEFT_OUT = "flash attention under a mask that is not known: what is left out counted too"
"""And where it may leave out more."""
_FREE = frozenset(
    "tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier optimization-barrier domain add-dependency while conditional call async".split()
)
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))
# Custom calls that only place or mark.
_MARKS = re.compile(
    r"Sharding|SPMD\w+|AllocateBuffer|CreateBuffer|Pin|Unpin|annotate_device_placement|"
    r"LayoutConstraint|InspectSharding|ConcatBitcast|AssumeGatherIndicesInBound|"
    r"AsyncCollective(Start|Done)|SliceId|xla\..*"
)
# And those that move, sort or draw.
_NO_PRODUCTS = re.compile(
    r"SliceToDynamic|PadToStatic|(__gpu\$)?TopK|MoveToHost|MoveToDevice|GetRngSeed|"
    r"RngBitGenerator|GatherScatterIndicesBitpacked|PartialReduce|ApproxTopK|"
    r"\w*[tT]hreefry2x32\w*|__cub\$\w+|X64(SplitHigh|SplitLow|Combine)|ZeroCrop"
)
_BACKWARD = {"__cudnn$convBackwardInput": (2, 1, 0), "__cudnn$convBackwardFilter": (0, 2, 1)}


# By XLA's names; count spells dtypes as numpy does.
_DTYPES = {
    **{f"f{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"s{n}": f"int{n}" for n in (2, 4, 8, 16, 32, 64)},
    **{f"u{n}": f"uint{n}" for n in (2, 4, 8, 16, 32, 64)},
    "bf16": "bfloat16",
    "c64": "complex64",
    "c128": "complex128",
}
# The primitives that are products, as paths end in them; "transpose" is of a gradient's.
_PRODUCT = re.compile(r".*(^|/)(dot_general|conv_general_dilated|ragged_dot_general|transpose)")
# What XLA's cost_analysis counts as one FLOP an element.
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp compare complex convert count-leading-zeros divide floor imag "
    "is-finite maximum minimum multiply negate not or popcnt real reduce-precision remainder "
    "round-nearest-afz round-nearest-even select shift-left shift-right-arithmetic "
    "shift-right-logical sign subtract xor".split()
)
# One of these takes an element several times as long as any of those.
_TRANSCENDENTAL = frozenset(
    "atan2 cbrt cosine erf exponential exponential-minus-one log log-plus-one logistic power "
    "rsqrt sine sqrt tan tanh".split()
)


class Product(NamedTuple):
    """Products that a program executes, of one kind in one place."""

    path: str
    """JAX's name stack and primitive."""
    kind: str
    """The HLO operation, the target of a custom call, or "multiply" where the compiler has made
    multiplications and additions of a product."""
    dtype: str
    """Of what is multiplied, and the precision asked for, as count spells them."""

    @property
    def flash(self) -> tuple[int, int] | None:
        """Of attention whose scores are not kept: how many products they are, and how many of these
        were there in the forward pass already; None: they are of something else."""
        return next((found for pattern, found in _FLASH if pattern.match(self.kind)), None)


class Kernel(NamedTuple):
    """What a device is handed to do at once: an instruction, with all that is fused into it."""

    kind: str
    """Of the product in it, as `Product.kind`; without one, the HLO operation."""
    dtype: str
    """Of that product, as `Product.dtype`; else empty."""
    flops: int = 0
    """Of products."""
    patches: int = 0
    """Elements that a convolution's window meets, once for each of its places: what a product of
    matrices in its stead reads on the left."""
    elementwise: int = 0
    """Operations, one an element, and those of reductions."""
    singly: int = 0
    """Those of them that go to places which windows or indices tell: of reductions over windows,
    and of scatters."""
    transcendentals: int = 0
    bytes: int = 0
    """Read and written, in whichever memory."""
    looped: bool = False
    """Whether it is in the body of a loop, and may find there what the trip before has left."""


class _Done(NamedTuple):
    """Kernel's figures that instructions add to."""

    flops: int = 0
    patches: int = 0
    elementwise: int = 0
    singly: int = 0
    transcendentals: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, by the compiler's own account."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs that take the place of donated arguments."""
    temporaries: int
    """Activations, and whatever else lives within a step."""
    code: int
    arguments_by: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """`arguments` by the argument's name, or its field's, such as state.params; "padding" is
    what the compiler adds."""

    @property
    def total(self) -> int:
        """Bytes per device, no argument counted twice."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass
class Program:
    """What one execution does on one device."""

    products: Counter[Product] = dataclasses.field(default_factory=Counter)
    """FLOPs executed, 2 a multiply-add; a convolution's taps on padding and holes not counted, a
    complex multiply-add as 4."""
    moved: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    """Bytes read and written by path and memory space; space 0 is the device's main memory."""
    kernels: Counter[Kernel] = dataclasses.field(default_factory=Counter)
    """How often each is executed; collectives are not among them."""
    compulsory: int = 0
    """Bytes of main memory that no fusion spares: each argument as far as it is read, each result,
    once."""
    devices: int = 1
    """That run it together, each on its part."""
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    memory: Memory | None = None
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)
    """Executions of what has no rule here, by name; they count no FLOPs."""
    reasons: list[str] = dataclasses.field(default_factory=list)
    """Why matmul_flops and collectives are not exact, besides unknown."""
    opaque: set[str] = dataclasses.field(default_factory=set)
    """Paths of what is unknown."""
    padded: set[str] = dataclasses.field(default_factory=set)
    """Paths of products whose operands the compiler has padded."""
    filled: set[str] = dataclasses.field(default_factory=set)
    """Paths of convolutions some padding or holes of which it has written out as zeros."""
    ungrouped: set[str] = dataclasses.field(default_factory=set)
    """Paths of convolutions of all channels with all."""
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    """By path, FLOPs of masked attention that its kernel leaves out, none that it makes again."""
    once: tuple[int, int] = (0, 0)
    """FLOPs of products, and of elementwise operations and reductions, with the body of every
    loop once and custom calls left out: what XLA's cost_analysis counts."""

    @property
    def matmul_flops(self) -> int:
        """FLOPs of the dots and convolutions executed."""
        return sum(n for product, n in self.products.items() if product.kind != "multiply")

    @property
    def by_place(self) -> dict[tuple[str, str], int]:
        """matmul_flops by phase and module, as far as the compiler kept their names."""
        found: Counter[tuple[str, str]] = Counter()
        forward = {place.module for place in map(self._place, self.products)}
        for product, n in self.products.items():
            place = places.settle(self._place(product), forward)
            found[place.phase, place.module] += n * (product.kind != "multiply")
        return dict(found)

    @staticmethod
    def _place(product: Product) -> places.Place:
        return places.of_path(product.path)

    @property
    def by_module(self) -> dict[str, tuple[int, int]]:
        """matmul_flops and bytes by module, as far as the compiler kept their names."""
        found: dict[str, tuple[int, int]] = {}
        for (_, module), flops in self.by_place.items():
            found[module] = found.get(module, (0, 0))[0] + flops, 0
        for (path, _), n in self.moved.items():
            module = places.settle(places.of_path(path), found.keys()).module
            flops, before = found.get(module, (0, 0))
            found[module] = flops, before + n
        return found

    @property
    def by_dtype(self) -> dict[str, int]:
        """matmul_flops by what is multiplied."""
        found: Counter[str] = Counter()
        for product, n in self.products.items():
            if product.kind != "multiply":
                found[product.dtype] += n
        return dict(found)

    @property
    def bytes_by_space(self) -> dict[int, int]:
        """`bytes` by memory space; 0 is the device's main memory."""
        found: Counter[int] = Counter()
        for (_, space), n in self.moved.items():
            found[space] += n
        return dict(found)

    @property
    def bytes(self) -> int:
        """Bytes that instructions read and write, inside of fusions not counted; of an array that
        is sliced or updated in place the part touched."""
        return self.moved.total()

    @property
    def recomputed(self) -> int:
        """FLOPs, of matmul_flops, of what was there before: layers that are recomputed as written,
        and products that flash attention makes again."""
        found = 0
        for product, flops in self.products.items():
            if product.kind == "multiply":
                continue
            if places.of_path(product.path).phase == "recompute":
                found += flops
            elif product.flash:
                products, again = product.flash
                found += flops // products * again
        return found

    @property
    def exact(self) -> bool:
        """Whether matmul_flops and collectives leave nothing out."""
        return not (self.unknown or self.reasons)


def program(
    compiled: Any, mesh: jax.sharding.Mesh | None = None, names: Sequence[str] | None = None
) -> Program:
    """Reads a jax.stages.Compiled.

    mesh: what it was compiled for; collectives are given the names of its axes. names: of the
    arrays that it takes, such as state.params['kernel']; by default by their position.

    Raises ValueError where it gives no text.
    """
    try:
        text = compiled.as_text()
    except Exception as error:
        raise ValueError(f"this compiled program gives no HLO text: {error}") from error
    if not text or not text.strip():
        raise ValueError("this compiled program gives no HLO text")
    if not text.lstrip().startswith("HloModule"):
        raise ValueError(f"{type(compiled).__name__} gives no HLO text: not a compiled program")
    found = read(text, mesh)
    found.memory = _memory(compiled, names)
    return found


def read(text: str, mesh: jax.sharding.Mesh | None = None) -> Program:
    """program, from the text alone, without memory."""
    found = Program()
    total = _Cost()
    for module in hlo.modules(text):
        if module.entry:
            walk, entry = _Walk(module, mesh), module.computations[module.entry]
            # Of several slices the program is one's.
            devices = mesh.size if mesh is not None and walk.slice else module.devices
            found.devices = max(found.devices, devices)
            total.add(walk.cost(_Frame(entry)))
            found.compulsory += walk.compulsory(entry)
        else:
            total.reasons["a module without an entry computation"] = None
    found.products, found.moved, found.opaque = total.products, total.moved, total.opaque
    found.kernels = total.kernels
    found.padded, found.filled, found.ungrouped = total.padded, total.filled, total.ungrouped
    found.skipped = total.skipped
    found.once = total.products_once, total.elementwise_once
    found.collectives = [dataclasses.replace(c, count=n) for c, n in total.collectives.items()]
    found.unknown, found.reasons = dict(total.unknown), list(total.reasons)
    return found


def _memory(compiled: Any, names: Sequence[str] | None) -> Memory | None:
    try:
        found = compiled.memory_analysis()
    except (NotImplementedError, RuntimeError):
        return None
    fields = {
        "arguments": "argument",
        "outputs": "output",
        "aliased": "alias",
        "temporaries": "temp",
        "code": "generated_code",
    }
    try:
        sizes = {key: getattr(found, f"{name}_size_in_bytes") for key, name in fields.items()}
    except AttributeError:
        return None
    by = _arguments(compiled, names, sizes["arguments"])
    return Memory(**sizes, arguments_by=by)


def _arguments(compiled: Any, names: Sequence[str] | None, total: int) -> dict[str, int]:
    """Bytes on a device by argument, or by field where it has some."""
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(compiled.args_info)
    # None where the program has no use for an argument.
    shardings = structure.flatten_up_to(compiled.input_shardings)
    if names is None:
        names = [jax.tree_util.keystr(path[1:]) for path, _ in leaves]
    if len(names) != len(leaves):
        return {}
    found: Counter[str] = Counter()
    for name, (_, info), sharding in zip(names, leaves, shardings, strict=True):
        group = re.match(r"\w+(\.\w+)?|\[[^]]*\](\.\w+)?", name)
        if sharding is None:
            continue
        each = getattr(info.dtype, "itemsize", 0)
        held = math.prod(sharding.shard_shape(info.shape)) * each
        found[group[0] if group else name] += held
    found["padding"] = total - found.total()
    return {name: n for name, n in found.items() if n}


def _scale(total: Counter[_Key], other: Counter[_Key], times: int) -> None:
    for key, n in other.items():
        total[key] += times * n


@dataclasses.dataclass
class _Cost:
    products: Counter[Product] = dataclasses.field(default_factory=Counter)
    kernels: Counter[Kernel] = dataclasses.field(default_factory=Counter)
    done: _Done = _Done()
    last: Product | None = None
    """The product counted last."""
    products_once: int = 0
    elementwise_once: int = 0
    moved: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    """By the collective, its own count left at 0."""
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)
    opaque: set[str] = dataclasses.field(default_factory=set)
    padded: set[str] = dataclasses.field(default_factory=set)
    filled: set[str] = dataclasses.field(default_factory=set)
    ungrouped: set[str] = dataclasses.field(default_factory=set)
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    reasons: dict[str, None] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> int:
        return self.done.flops

    def do(self, **figures: int) -> None:
        """Adds to `done`."""
        done = self.done._asdict()
        self.done = _Done(**done | {name: done[name] + n for name, n in figures.items()})

    def product(self, path: str, kind: str, dtype: str, flops: int) -> None:
        if flops:
            self.last = Product(path, kind, dtype)
            self.products[self.last] += flops
            self.do(flops=flops)
        if kind in ("dot", "convolution"):
            self.products_once += flops

    def move(self, path: str, bytes_by_space: Mapping[int, int]) -> None:
        for space, n in bytes_by_space.items():
            self.moved[path, space] += n

    def launch(self, opcode: str, before: _Done, moved: int) -> None:
        """A kernel, of what was done since `before`."""
        done = _Done(*(b - a for a, b in zip(before, self.done, strict=True)))
        named = self.last if done.flops else None
        kind, dtype = (named.kind, named.dtype) if named else (opcode, "")
        self.kernels[Kernel(kind, dtype, *done, moved)] += 1

    def loop(self) -> None:
        """Its kernels are those of a loop's body."""
        kernels: Counter[Kernel] = Counter()
        for kernel, n in self.kernels.items():
            kernels[kernel._replace(looped=True)] += n
        self.kernels = kernels

    def miss(self, path: str, name: str) -> None:
        self.unknown[name] += 1
        self.opaque.add(path)

    def add(self, other: "_Cost", times: int = 1) -> None:
        self.products_once += other.products_once
        self.elementwise_once += other.elementwise_once
        if not times:
            return
        self.done = _Done(*(a + times * b for a, b in zip(self.done, other.done, strict=True)))
        self.last = other.last or self.last
        _scale(self.kernels, other.kernels, times)
        _scale(self.products, other.products, times)
        _scale(self.moved, other.moved, times)
        _scale(self.collectives, other.collectives, times)
        _scale(self.unknown, other.unknown, times)
        self.opaque |= other.opaque
        self.padded |= other.padded
        self.filled |= other.filled
        self.ungrouped |= other.ungrouped
        _scale(self.skipped, other.skipped, times)
        self.reasons.update(other.reasons)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A computation and the instruction that calls it."""

    computation: Computation
    parent: "_Frame | None" = None
    call: Instruction | None = None
    fused: bool = False

    @property
    def path(self) -> str:
        """The nearest that is told around the computation."""
        frame: _Frame | None = self
        while frame and frame.call and not frame.call.path:
            frame = frame.parent
        return frame.call.path if frame and frame.call else ""

    @property
    def loop(self) -> bool:
        return self.call is not None and self.call.opcode == "while"


@dataclasses.dataclass
class _Walk:
    module: Module
    mesh: jax.sharding.Mesh | None

    def cost(self, frame: _Frame) -> _Cost:
        """Of one execution of a computation."""
        total = _Cost()
        for i in frame.computation.instructions.values():
            if not i.opcode.endswith(("-done", "-update")):
                self.instruction(frame, i, total)
        return total

    def instruction(self, frame: _Frame, i: Instruction, total: _Cost) -> None:
        comp, opcode = frame.computation, i.opcode.removesuffix("-start")
        if opcode in ("constant", "parameter"):
            return
        path = i.path or frame.path
        operands = [comp.instructions[name].shape for name in i.operands]
        before = total.done
        if opcode == "while":
            self.loop(frame, i, total)
        elif opcode == "conditional":
            self.conditional(frame, i, total)
        elif opcode in ("fusion", "call", "async"):
            for name in i.computations("calls", "to_apply"):
                total.add(self.cost(self.enter(frame, i, name)))
        result = _result(comp, i)
        if opcode in ("dot", "scaled-dot"):
            flops = _dot(i, operands, result)
            total.product(path, "dot", _dtype(i, operands), flops)
            if any(self.padded(frame, name) for name in i.operands):
                total.padded.add(path)
        elif opcode == "ragged-dot":
            total.product(path, "dot", _dtype(i, operands), _ragged(i, operands))
        elif opcode == "convolution":
            flops = _convolution(i, operands[0], operands[1], result)
            total.product(path, "convolution", _dtype(i, operands), flops)
            total.do(patches=flops // (2 * _outputs(i, result)))
        elif opcode in ("cholesky", "triangular-solve"):
            total.miss(path, opcode)
        elif opcode in _TRANSCENDENTAL:
            total.do(transcendentals=result.size)
        elif opcode in _ELEMENTWISE:
            total.elementwise_once += result.size
            total.do(elementwise=result.size)
            if opcode == "multiply" and _PRODUCT.fullmatch(path):
                total.product(path, "multiply", _dtype(i, operands), 2 * result.size)
        elif opcode in ("reduce", "reduce-window", "select-and-scatter", "scatter"):
            applied = self.applied(i) * _reductions(i, operands, result)
            total.elementwise_once += applied
            total.do(elementwise=applied, singly=applied * (opcode != "reduce"))
        elif opcode == "custom-call":
            _custom(i, path, operands, result, total)
        elif opcode in COLLECTIVES and not self.repeated(comp, i):
            found = self.collective(i, operands, result, total)
            # TPU: an all-reduce that keeps a part only, moved as a reduce-scatter is.
            if frame.fused and comp.name.startswith("all-reduce-scatter"):
                found = dataclasses.replace(found, kind="reduce-scatter")
            total.collectives[found] += 1
        elif opcode == "send" and (sent := megascale.transfer(i)):
            total.collectives[self.between_slices(sent, total)] += 1
        if opcode in ("convolution", "custom-call") and "dim_labels" in i.attributes:
            if any(self.zeros(frame, name) for name in i.operands):
                total.filled.add(path)
            if not i.dims("feature_group_count") + i.dims("batch_group_count"):
                total.ungrouped.add(path)
        if opcode in ("dot", "convolution") and any(s.dynamic for s in operands):
            total.reasons[f"{opcode}: a dynamic size counted at its bound"] = None
        if not (frame.fused or opcode in _FREE or _MARKS.fullmatch(_target(i))):
            moved = self.writes(comp, i, result)
            for name in dict.fromkeys(i.operands):
                reads = (self.reads(comp, i, k) for k, o in enumerate(i.operands) if o == name)
                shape = comp.instructions[name].shape
                # Of a tuple all is read.
                read = sum(reads)
                part = {shape.space: read} if shape.dtype and read < shape.bytes else None
                moved.update(part or _by_space(shape))
            total.move(path, moved)
            if opcode not in COLLECTIVES:
                total.launch(opcode, before, moved.total())

    def applied(self, i: Instruction) -> int:
        """Operations of the function that a reduction applies."""
        known = self.module.computations
        called = (known[n] for n in i.computations("to_apply") if n in known)
        opcodes = (j.opcode for c in called for j in c.instructions.values())
        return max(1, sum(opcode in _ELEMENTWISE for opcode in opcodes))

    def enter(self, frame: _Frame, i: Instruction, name: str) -> _Frame:
        fused = frame.fused or i.opcode.startswith("fusion")
        return _Frame(self.module.computations[name], frame, i, fused)

    def conditional(self, frame: _Frame, i: Instruction, total: _Cost) -> None:
        keys = ("branch_computations", "true_computation", "false_computation")
        branches = [self.cost(self.enter(frame, i, name)) for name in i.computations(*keys)]
        largest = max(branches, key=lambda b: (b.flops, b.moved.total()))
        if any(
            (b.flops, b.collectives, b.unknown)
            != (largest.flops, largest.collectives, largest.unknown)
            for b in branches
        ):
            total.reasons["conditional: branches differ; the largest counted"] = None
        total.add(largest)

    def loop(self, frame: _Frame, i: Instruction, total: _Cost) -> None:
        trips = self.trips(frame, i)
        body, condition = (
            self.enter(frame, i, i.computations(k)[0]) for k in ("body", "condition")
        )
        if trips is None:
            total.reasons["while: trip count unknown; one counted"] = None
        inner = self.cost(body)
        inner.loop()
        total.add(inner, 1 if trips is None else trips)
        total.add(self.cost(condition), (1 if trips is None else trips) + 1)

    # Trip counts.

    def trips(self, frame: _Frame, i: Instruction) -> int | None:
        """How often a while's body runs; None where neither XLA nor its condition says."""
        known = i.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition = self.enter(frame, i, i.computations("condition")[0])
        at, compare = self.through(condition, condition.computation.root)
        if compare.opcode != "compare":
            return None
        sides = [self.progress(frame, i, self.affine(at, name)) for name in compare.operands]
        if sides[0] is None or sides[1] is None:
            return None
        start, step = (a - b for a, b in zip(*sides, strict=True))
        return _trips(start, step, compare.attributes.get("direction", ""))

    def through(self, frame: _Frame, name: str) -> tuple[_Frame, Instruction]:
        """What a name stands for, inside fusions and behind copies."""
        i = frame.computation.instructions[name]
        if i.opcode in ("fusion", "call"):
            inner = self.enter(frame, i, i.computations("calls", "to_apply")[0])
            return self.through(inner, inner.computation.root)
        if i.opcode in ("copy", "bitcast", "reshape"):
            return self.through(frame, i.operands[0])
        return frame, i

    def padded(self, frame: _Frame, name: str) -> bool:
        """Whether a value, here or where it was passed from, was padded."""
        frame, i = self.through(frame, name)
        if i.opcode == "parameter" and frame.fused and frame.parent and frame.call:
            return self.padded(frame.parent, frame.call.operands[int(i.operands[0])])
        return i.opcode == "pad"

    def zeros(self, frame: _Frame, name: str) -> bool:
        """Whether a pad is in what computes a value, in the fusion that gives it or before."""
        i = frame.computation.instructions[name]
        if i.opcode in ("fusion", "call"):
            inner = self.enter(frame, i, i.computations("calls", "to_apply")[0])
            return any(
                j.opcode == "pad" or (j.opcode == "fusion" and self.zeros(inner, j.name))
                for j in inner.computation.instructions.values()
            )
        if i.opcode == "parameter" and frame.fused and frame.parent and frame.call:
            return self.zeros(frame.parent, frame.call.operands[int(i.operands[0])])
        if i.opcode in ("copy", "bitcast", "reshape", "transpose", "convert"):
            return self.zeros(frame, i.operands[0])
        return i.opcode == "pad"

    def progress(
        self, frame: _Frame, i: Instruction, value: tuple[int | None, int] | None
    ) -> tuple[int, int] | None:
        """The start and the step, over the trips of a while in frame, of a value of its state."""
        if value is None:
            return None
        slot, offset = value
        if slot is None:
            return offset, 0
        step = self.step(frame, i, slot)
        start = self.constant(frame, i.operands[0], slot)
        return None if step is None or start is None else (start + offset, step)

    def step(self, frame: _Frame, i: Instruction, slot: int) -> int | None:
        """What each trip of a while in frame adds to a slot of its state."""
        body = self.enter(frame, i, i.computations("body")[0])
        after = self.affine(body, body.computation.root, slot)
        return after[1] if after and after[0] == slot else None

    def constant(self, frame: _Frame, name: str, index: int | None) -> int | None:
        """A value that every execution of frame finds the same."""
        value = self.affine(frame, name, index)
        if value is None:
            return None
        slot, offset = value
        if slot is None:
            return offset
        while not frame.loop and frame.parent:
            frame = frame.parent
        if frame.parent is None or frame.call is None:
            return None
        if self.step(frame.parent, frame.call, slot) != 0:
            return None
        outer = self.constant(frame.parent, frame.call.operands[0], slot)
        return None if outer is None else outer + offset

    def affine(
        self, frame: _Frame, name: str, index: int | None = None
    ) -> tuple[int | None, int] | None:
        """An integer, or element index of a tuple, as (slot, offset): a slot of the state of the
        loop around (-1 where that is no tuple; None for a constant) plus an offset."""
        i = frame.computation.instructions[name]
        match i.opcode:
            case "constant":
                text = i.operands[0]
                return (None, int(text)) if re.fullmatch(r"-?\d+", text) else None
            case "parameter" if frame.loop:
                return (-1 if index is None else index), 0
            case "parameter" if frame.parent and frame.call and frame.call.opcode != "conditional":
                return self.affine(frame.parent, frame.call.operands[int(i.operands[0])], index)
            case "get-tuple-element" if index is None:
                return self.affine(frame, i.operands[0], int(i.attributes["index"]))
            case "tuple" if index is not None:
                return self.affine(frame, i.operands[0 if index < 0 else index])
            case "copy" | "convert" | "bitcast" | "reshape" | "copy-start" | "copy-done":
                return self.affine(frame, i.operands[0], index)
            case "opt-barrier" | "optimization-barrier":
                return self.affine(frame, i.operands[0], index)
            case "add" | "subtract":
                a, b = (self.affine(frame, o) for o in i.operands)
                if (
                    a is None
                    or b is None
                    or (b[0] is not None and (a[0], i.opcode) != (None, "add"))
                ):
                    return None
                slot = b[0] if a[0] is None else a[0]
                return slot, a[1] + (b[1] if i.opcode == "add" else -b[1])
            case "fusion" | "call":
                inner = self.enter(frame, i, i.computations("calls", "to_apply")[0])
                return self.affine(inner, inner.computation.root, index)
            case "while" if index is not None and self.step(frame, i, index) == 0:
                return self.affine(frame, i.operands[0], index)
        return None

    # Bytes.

    def reads(self, comp: Computation, i: Instruction, k: int) -> int:
        """Bytes that an instruction reads of its operand k."""
        whole = comp.instructions[i.operands[k]].shape.bytes
        if i.opcode in _SLICES and k == 0:
            return min(whole, i.shape.bytes)
        if k == 0 and i.opcode == "dynamic-update-slice":
            return 0
        if k < _scattered(i):
            return self.writes(comp, i, i.shape).total() // _scattered(i)
        if i.opcode == "bitcast":
            return self.used(comp, i.name)
        if i.opcode == "fusion":
            inner = self.module.computations[i.computations("calls")[0]]
            return self.used(inner, inner.parameters[k].name)
        return whole

    def used(self, comp: Computation, name: str) -> int:
        """Bytes read of a value in a computation, all of it where that returns it."""
        whole = comp.instructions[name].shape.bytes
        if name == comp.root:
            return whole
        reads = (
            self.reads(comp, user, k)
            for user in comp.users.get(name, ())
            for k, operand in enumerate(user.operands)
            if operand == name
        )
        return min(whole, sum(reads))

    def writes(self, comp: Computation, i: Instruction, result: Shape) -> Counter[int]:
        """Bytes that an instruction writes of its result, by the memory space of the result."""
        if i.opcode == "dynamic-update-slice":
            return Counter({result.space: comp.instructions[i.operands[1]].shape.bytes})
        inside: list[tuple[str, Shape]] = []
        if n := _scattered(i):
            shapes = result.elements or (result,)
            updates = (comp.instructions[name].shape.bytes for name in i.operands[-n:])
            return sum(
                (Counter({s.space: u}) for s, u in zip(shapes, updates, strict=True)), Counter()
            )
        if i.opcode == "fusion":
            comp = self.module.computations[i.computations("calls")[0]]
            inside = [(comp.root, result)]
        elif i.opcode == "bitcast":
            inside = [(i.operands[0], result)]
        elif i.opcode == "tuple":
            inside = list(zip(i.operands, result.elements, strict=True))
        if not inside:
            return _by_space(result)
        parts = (self.writes(comp, comp.instructions[name], shape) for name, shape in inside)
        return sum(parts, Counter())

    def needed(self, comp: Computation, name: str, index: int | None = None) -> int:
        """Bytes that are read of a value, or of element index of a tuple, however a program runs:
        of what a loop reads those of one trip; of what a branch reads nothing."""
        total = 0
        for user in comp.users.get(name, ()):
            opcode, at = user.opcode, [k for k, o in enumerate(user.operands) if o == name]
            if index is not None and opcode == "get-tuple-element":
                if int(user.attributes["index"]) == index:
                    total += self.needed(comp, user.name)
            elif index is None and opcode == "tuple":
                total += sum(self.needed(comp, user.name, k) for k in at)
            elif opcode == "while" and self.trips(_Frame(comp), user):
                body = self.module.computations[user.computations("body")[0]]
                total += self.needed(body, body.parameters[0].name, index)
            elif opcode == "call":
                inner = self.module.computations[user.computations("to_apply")[0]]
                total += sum(self.needed(inner, inner.parameters[k].name, index) for k in at)
            elif index is None and opcode == "bitcast":
                total += self.needed(comp, user.name)
            elif index is None and opcode not in ("while", "conditional"):
                total += sum(self.reads(comp, user, k) for k in at)
        shape = comp.instructions[name].shape
        return min(total, (shape if index is None else shape.elements[index]).bytes)

    def compulsory(self, entry: Computation) -> int:
        """Main memory that arguments and results take, each once; of arrays that leave a loop
        nothing, for they may have been updated in place."""
        arguments = (p for p in entry.parameters.values() if not p.shape.space)
        read = sum(self.needed(entry, p.name) for p in arguments)
        root = entry.instructions[entry.root]
        names = root.operands if root.opcode == "tuple" else (root.name,)
        written = 0
        for i in map(entry.instructions.__getitem__, names):
            if i.opcode not in ("parameter", "get-tuple-element", "while", "call", "conditional"):
                written += self.writes(entry, i, _result(entry, i))[0]
        return read + written

    # Collectives.

    @functools.cached_property
    def started(self) -> dict[str, str]:
        """TPU: an asynchronous collective stands in several fusions under one channel, those that
        start it, hide it and end it; by the channel, the computation that starts it."""
        return {
            comp.instructions[name].attributes.get("channel_id", ""): comp.name
            for comp in self.module.computations.values()
            for i in comp.instructions.values()
            if i.opcode == "custom-call" and _target(i) == "AsyncCollectiveStart"
            for name in i.operands
            if comp.instructions[name].opcode in COLLECTIVES
        }

    def repeated(self, comp: Computation, i: Instruction) -> bool:
        """Whether another fusion has started this collective."""
        starts = self.started.get(i.attributes.get("channel_id", ""))
        return starts is not None and starts != comp.name

    def collective(
        self, i: Instruction, operands: list[Shape], result: Shape, total: _Cost
    ) -> Collective:
        opcode = i.opcode.removesuffix("-start")
        size = sum(s.bytes for s in operands) if opcode == "reduce-scatter" else result.bytes
        groups = _groups(i, self.module.devices)
        if groups is None:
            total.reasons[f"{opcode}: groups not understood"] = None
            return Collective(opcode, size, 0, 0)
        return self.grouped(opcode, size, groups, self.slice)

    def between_slices(self, sent: megascale.Transfer, total: _Cost) -> Collective:
        if sent.groups is None:
            total.reasons[f"{sent.kind} between slices: groups not understood"] = None
            return Collective(sent.kind, sent.bytes, 0, 0)
        if sent.kind == "collective-permute":
            pairs = itertools.chain.from_iterable(sent.groups)
            sent = sent._replace(groups=list(_connected(list(pairs))))
        return self.grouped(sent.kind, sent.bytes, sent.groups or [], self.numbers)

    def grouped(
        self, kind: str, size: int, groups: list[list[int]], at: Mapping[int, int]
    ) -> Collective:
        """at: the place in the mesh of each number in the groups."""
        axes, span = None, None
        if self.mesh is not None and all(n in at for group in groups for n in group):
            placed = [[at[n] for n in group] for group in groups]
            # XLA parts what several slices exchange into what is exchanged within and between.
            whole = kind != "collective-permute" and self.mesh.size == self.module.devices
            axes = self.axes(self.mesh, placed, whole)
            span = self.wiring.span(placed)
        return Collective(kind, size, max(map(len, groups)), 0, axes, span)

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """The place in the mesh of each device by its own number."""
        return {} if self.mesh is None else {d.id: i for i, d in enumerate(self.mesh.devices.flat)}

    @functools.cached_property
    def slice(self) -> dict[int, int]:
        """The place in the mesh of each device of the program; of several slices, of the first."""
        if self.mesh is None:
            return {}
        slices = [getattr(device, "slice_index", 0) for device in self.mesh.devices.flat]
        whole = len(slices) == self.module.devices
        places = [i for i, n in enumerate(slices) if whole or n == slices[0]]
        return dict(enumerate(places)) if len(places) == self.module.devices else {}

    @functools.cached_property
    def wiring(self) -> Wiring:
        assert self.mesh is not None
        return Wiring(self.mesh.devices.reshape(-1).tolist())

    def axes(
        self, mesh: jax.sharding.Mesh, groups: list[list[int]], complete: bool
    ) -> tuple[str, ...] | None:
        """The mesh axes that groups run along; complete if a group must fill them."""
        shape = tuple(mesh.shape.values())
        varies = np.zeros(len(shape), bool)
        for group in groups:
            places = np.array(np.unravel_index(group, shape))
            varies |= (places != places[:, :1]).any(1)
        filled = math.prod(n for n, v in zip(shape, varies, strict=True) if v)
        if complete and any(len(group) != filled for group in groups):
            return None
        return tuple(str(n) for n, v in zip(mesh.axis_names, varies, strict=True) if v)


def _by_space(shape: Shape) -> Counter[int]:
    """The bytes of a shape by memory space."""
    found: Counter[int] = Counter()
    for leaf in shape.leaves:
        found[leaf.space] += leaf.bytes
    return found


def _scattered(i: Instruction) -> int:
    """How many arrays a scatter updates; 0 for anything else."""
    return len(i.operands) // 2 if i.opcode == "scatter" else 0


def _result(comp: Computation, i: Instruction) -> Shape:
    """The shape of the result, for the start of an asynchronous instruction that of its end."""
    if i.opcode in ("send", "recv"):
        return i.shape.elements[0] if i.opcode == "recv" else Shape("")
    if _target(i).startswith(("__cublas$", "__cudnn$")) and i.shape.elements:
        *kept, last = i.shape.elements
        # Their scratch space; how much of it is used is not told.
        scratch = len(last.dims) == 1 and last.dtype in ("s8", "u8")
        return Shape("", elements=tuple(kept)) if scratch else i.shape
    if not i.opcode.endswith("-start"):
        return i.shape
    users = [u for u in comp.users.get(i.name, ()) if u.opcode.endswith(("-done", "-update"))]
    if users:
        return users[0].shape if users[0].opcode.endswith("-done") else _result(comp, users[0])
    if i.opcode == "all-reduce-start" or not i.shape.elements:
        return i.shape
    return i.shape.elements[0 if i.opcode == "copy-start" else 1]


def _trips(start: int, step: int, direction: str) -> int | None:
    """How often start + n step stands in direction to 0, from n = 0 on."""
    if direction in ("GT", "GE"):
        return _trips(-start, -step, {"GT": "LT", "GE": "LE"}[direction])
    if direction == "LE":
        return _trips(start - 1, step, "LT")
    if direction == "LT":
        return 0 if start >= 0 else -(start // step) if step > 0 else None
    if direction == "NE":
        if start == 0:
            return 0
        return -start // step if step and start % step == 0 and start * step < 0 else None
    return None


def _groups(i: Instruction, devices: int) -> list[list[int]] | None:
    """The devices that communicate with each other; None where the text is not understood."""
    if "source_target_pairs" in i.attributes:
        return list(_connected(i.dims("source_target_pairs")))
    text = i.attributes.get("replica_groups", "{}")
    if match := re.fullmatch(r"\[([\d,]+)\]<=(.*)", text):
        ids = _iota(match[2])
        return None if ids is None else ids.reshape(_integers(match[1])).tolist()
    if match := re.fullmatch(r"mesh\[(.*?)\](.*)", text):
        order = None
        over = match[2]
        if "device_ids" in i.attributes:  # not in the order of their numbers
            ids_text, _, over = i.attributes["device_ids"].rpartition(" ")
            order = _iota(ids_text.strip()[1:-1])
            if order is None:
                return None
        return _mesh_groups(match[1], over.strip(" {}"), order)
    if not re.fullmatch(r"\{[{}\d, ]*\}", text):
        return None
    listed = re.findall(r"\{([\d, ]+)\}", text)
    return [[int(n) for n in g.split(",")] for g in listed] or [list(range(devices))]


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(text: str) -> np.ndarray | None:
    """Devices in the order that a text such as [2,4]T(1,0), or a plain list, puts them."""
    if re.fullmatch(r"[\d, ]+", text):
        return np.array(_integers(text))
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return None
    shape, order = _integers(match[1]), _integers(match[2] or "")
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(order) if order else ids).reshape(-1)


def _mesh_groups(mesh: str, over: str, ids: np.ndarray | None) -> list[list[int]] | None:
    """Groups as mesh['a'=4,'b'=2] {'a'} gives them; 'a':(2)2 is a part of an axis, the one of
    size 2 after 2. ids: the devices in the mesh's order, where that is not their own."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
    dims: list[tuple[int, bool]] = []
    chosen = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over)
    if not sizes or any(name not in sizes for name, *_ in chosen):
        return None
    for name, size in sizes.items():
        left = size
        for before, part in sorted(
            (int(b or 1), int(p or size)) for n, b, p in chosen if n == name
        ):
            held = size // left
            dims += [(before // held, False), (part, True)]
            left = size // (before * part)
        dims.append((left, False))
    ids = np.arange(math.prod(sizes.values())) if ids is None else ids
    order = sorted(range(len(dims)), key=lambda d: dims[d][1])
    group = math.prod(n for n, inside in dims if inside)
    laid = ids.reshape([n for n, _ in dims]).transpose(order)
    found: list[list[int]] = laid.reshape(-1, group).tolist()
    return found


def _connected(ends: list[int]) -> Iterator[list[int]]:
    """The devices joined by pairs, given as a flat list."""
    joined: dict[int, set[int]] = {}
    for a, b in zip(ends[::2], ends[1::2], strict=True):
        both = joined.get(a, {a}) | joined.get(b, {b})
        joined.update(dict.fromkeys(both, both))
    seen: set[int] = set()
    for device, group in joined.items():
        if device not in seen:
            seen |= group
            yield sorted(group)
    if not joined:
        yield [0]


# FLOPs.


def _dot(i: Instruction, operands: list[Shape], result: Shape) -> int:
    return _product(
        operands[0], operands[1], i.dims("rhs_contracting_dims") + i.dims("rhs_batch_dims")
    )


def _product(left: Shape, right: Shape, shared: list[int]) -> int:
    """FLOPs of a product; shared are the dimensions of the right one that the left one has too."""
    free = right.size // (math.prod(right.dims[d] for d in shared) or 1)
    return 2 * left.size * free * _complex(left)


def _complex(shape: Shape) -> int:
    """Real multiply-adds in one."""
    return 4 if shape.dtype.startswith("c") else 1


def _ragged(i: Instruction, operands: list[Shape]) -> int:
    """Every row of the left one meets the right one of its own group only."""
    shared = {int(d) for k in ("contracting", "batch", "group") for d in i.dims(f"rhs_{k}_dims")}
    return _product(operands[0], operands[1], sorted(shared))


def _convolution(i: Instruction, image: Shape, kernel: Shape, result: Shape) -> int:
    """FLOPs of a forward convolution, or of the same one's gradients, on valid taps."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", i.attributes["dim_labels"].replace("?", "x"))
    if not labels:
        raise ValueError(f"not a convolution's dim_labels: {i.attributes['dim_labels']}")
    named = [
        dict(zip(text, shape.dims, strict=True))
        for text, shape in zip(labels.groups(), (image, kernel, result), strict=True)
    ]
    window = dict(re.findall(r"(\w+)=(\S+)", i.attributes.get("window", "").strip("{}")))
    spatial = sorted(set(filter(str.isdigit, labels[2])), key=int)

    def of(key: str, d: int, default: str) -> str:
        return str(window[key].split("x")[d]) if key in window else default

    taps = 1
    for d, label in enumerate(spatial):
        low = int(of("pad", d, "0_0").split("_")[0])
        stride, hole, spread = (
            int(of(key, d, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        sizes = (named[0][label], named[1][label], named[2][label])
        taps *= valid_taps(*sizes, stride, low, hole, spread)
    return 2 * named[2]["b"] * named[2]["f"] * named[1]["i"] * taps * _complex(image)


def _outputs(i: Instruction, result: Shape) -> int:
    """Features of a convolution's result that one of its patches gives."""
    place = i.attributes["dim_labels"].partition("->")[2].index("f")
    groups = i.dims("feature_group_count") + i.dims("batch_group_count")
    return max(1, result.dims[place] // math.prod(groups))


def valid_taps(
    image: int, kernel: int, out: int, stride: int, low: int, hole: int, spread: int
) -> int:
    """Pairs of an output and a kernel position, in one dimension, that meet an element of the
    image: stride of the window, padding at its low end, dilation of the image and the kernel."""
    extent = (image - 1) * hole + 1 if image else 0
    common = math.gcd(stride, hole)
    period = hole // common
    inverse = pow(stride // common, -1, period) if period > 1 else 0
    total = 0
    for k in range(kernel):
        # Output n meets the image at n stride + at.
        at = k * spread - low
        if at % common:
            continue
        first = max(0, -(at // stride))
        last = min(out - 1, (extent - 1 - at) // stride)
        phase = (-at // common) * inverse % period if period > 1 else 0
        first += (phase - first) % period
        if last >= first:
            total += (last - first) // period + 1
    return total


def _dtype(i: Instruction, operands: list[Shape]) -> str:
    """What a product multiplies: its dtype, or both, and the precision where one is asked for."""
    names = dict.fromkeys(_DTYPES.get(s.dtype, s.dtype) for s in operands[:2])
    found = [n.upper() for n in re.findall(r"\w+", i.attributes.get("operand_precision", ""))]
    if i.opcode == "custom-call":
        config = i.config.get("gemm_backend_config", {}).get("precision_config", {})
        found += config.get("operand_precision", [])
    asked = {n for n in found if n != "DEFAULT"}
    if algorithm := i.attributes.get("algorithm"):
        asked = {algorithm.removeprefix("dot_").upper()}
    return "*".join(names) + (f":{'+'.join(sorted(asked))}" if asked else "")


def _reductions(i: Instruction, operands: list[Shape], result: Shape) -> int:
    """How often a reduction's function is applied."""
    if i.opcode == "scatter":
        return operands[-1].size
    if i.opcode == "reduce":
        return max(0, operands[0].size - result.leaves[0].size)
    window = re.search(r"size=([\dx]+)", i.attributes.get("window", ""))
    taps = math.prod(int(n) for n in window[1].split("x")) if window else 1
    if i.opcode == "reduce-window":
        return result.leaves[0].size * (taps - 1)
    return operands[1].size * taps


def _target(i: Instruction) -> str:
    if i.opcode != "custom-call":
        return ""
    return i.attributes.get("custom_call_target", "").strip('"')


def _custom(i: Instruction, path: str, operands: list[Shape], result: Shape, total: _Cost) -> None:
    """The products in a custom call whose kind is known; the name of any other."""
    target = _target(i)
    first = result.leaves[0] if result.leaves else Shape("")
    flops: int | None = None
    if target.startswith("__cublas$"):
        config = i.config.get("gemm_backend_config") or i.config.get(
            "grouped_gemm_backend_config", {}
        ).get("gemm_backend_config", {})
        numbers = config.get("dot_dimension_numbers")
        if numbers and "grouped" not in target:
            shared = [
                int(d)
                for key in ("rhs_contracting_dimensions", "rhs_batch_dimensions")
                for d in numbers.get(key, ())
            ]
            flops = _product(operands[0], operands[1], shared)
    elif target.startswith("__cudnn$conv") and "dim_labels" in i.attributes:
        shapes = (operands[0], operands[1], first)
        order = _BACKWARD.get(target, (0, 1, 2))
        flops = _convolution(i, *(shapes[k] for k in order))
    elif Product(path, target, "").flash:
        flops = _attention(i, target, operands, total)
    elif target == "__onednn$matmul":
        config = i.config.get("onednn_matmul_config", {})
        inner = operands[0].dims[-2 if config.get("transpose_a") else -1]
        flops = 2 * first.size * inner
    elif target == "__onednn$convolution" and "dim_labels" in i.attributes:
        flops = _convolution(i, operands[0], operands[1], first)
    elif target == "tpu_custom_call" and (kernel := _SPLASH.search(path)):
        target = f"splash_{kernel[1]}"
        flops = _splash(i, Product(path, target, ""), operands, result, total)
        operands = [s for s in operands if s.dtype in ("bf16", "f32")]
    elif target == "tpu_custom_call":
        estimate = i.config.get("custom_call_config", {}).get("cost_estimate", {}).get("flops")
        if estimate is not None:
            flops = int(estimate)
            total.reasons["tpu_custom_call: its author's estimate of FLOPs counted"] = None
    elif _MARKS.fullmatch(target) or _NO_PRODUCTS.fullmatch(target):
        flops = 0
    if flops is None:
        total.miss(path, target or "custom-call")
    else:
        total.product(path, target, _dtype(i, operands), flops)


def _attention(i: Instruction, target: str, operands: list[Shape], total: _Cost) -> int | None:
    """Of cuDNN."""
    config = i.config.get("cudnn_fmha_backend_config", {})
    dims = config.get("intermediate_tensor_shape", {}).get("dimensions")
    if not dims:
        return None
    if config.get("sliding_window_length"):
        total.reasons[LEFT_OUT] = None
    elif config.get("mask_type", "NO_MASK") != "NO_MASK":
        total.reasons[MASKED] = None
    flash = Product("", target, "").flash
    assert flash is not None
    return 2 * flash[0] * math.prod(int(n) for n in dims) * operands[0].dims[-1]


def _splash(
    i: Instruction, product: Product, operands: list[Shape], result: Shape, total: _Cost
) -> int | None:
    """Of JAX's kernels for TPU, which leave out blocks of scores that are masked as a whole.

    Operands: of the mask, whole numbers; q [.., heads, T, h], k [.., key heads, T, h], v, and more.
    All are taken for products of what q is: weights of scores are widened to float32 on the chip,
    where by default it multiplies bfloat16.
    """
    name, flash = product.kind.removeprefix("splash_"), product.flash
    assert flash is not None
    suffix = "" if name == "fwd" else f"_{name}"
    blocks = [re.search(rf'block_{of}{suffix}\\*": (\d+)', i.tail) for of in ("q", "kv")]
    turned = re.search(r'[qkv]_layout\\*": [^1]', i.tail)
    arrays = [s for s in operands if s.dtype in ("bf16", "f32")]
    if turned or not all(blocks) or len(arrays) < 3:
        return None
    q, k, v = arrays[:3]
    # A kernel that gives the gradient of q too, in parts to add up, makes other products.
    parts = any(len(s.dims) > len(q.dims) for s in result.leaves)
    if parts or q.dims[-1] != v.dims[-1]:
        return None
    queries, keys = q.dims[-2], k.dims[-2]
    each_q, each_kv = (int(found[1]) for found in blocks if found)
    down, across = -(-queries // each_q), -(-keys // each_kv)
    products, again = flash
    whole = done = 2 * q.size * keys
    # Of what blocks to do, and of which documents queries and keys are: two arrays each. One more
    # is of where queries are, by which a causal mask is made; what blocks a mask leaves out that
    # is none of these is not known. (One that is cut along blocks looks like none.)
    told = [s.dims[-2:] for s in operands if s.dtype in ("s8", "s16", "s32")]
    rest = [dims for dims in told if dims not in ((down, across), (across, down))]
    rows = {(queries, 128), (keys, 128), (8, queries), (8, keys)}
    masked = len(rest) % 2 == 1
    plain = len(told) - len(rest) == 2 and rows.issuperset(rest)
    if not plain or (masked and not places.of_path(product.path).causal):
        total.reasons[LEFT_OUT] = None
    elif masked:
        there = sum(min(-(-(n + 1) * each_q // each_kv), across) for n in range(down))
        done = whole // (across * down) * there
        total.skipped[product.path] += (products - again) * (whole - done)
    return products * done
