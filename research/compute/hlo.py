"""A reader of HLO text: computations, instructions, shapes and attributes, as XLA prints them."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[({]|[\])}]|,| ', re.DOTALL)
_QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_OPENS = re.compile(r'["\[({]')
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"(ENTRY\s+)?%?([^\s(={]+)\s*(\(.*)?\{$")
_INSTRUCTION = re.compile(r"\s*(ROOT\s+)?%?([^\s=]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{(.*)\})?$", re.DOTALL)
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_PATH = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array, or a tuple of shapes."""

    dtype: str
    """As HLO spells it; empty for a tuple."""
    dims: tuple[int, ...] = ()
    """Where dynamic, the bound."""
    dynamic: bool = False
    bits: int = 0
    """Of one element as stored."""
    space: int = 0
    """Memory space: 0 is a device's main memory; on TPU 1 is on the chip and 5 the host's."""
    elements: tuple["Shape", ...] = ()

    @property
    def size(self) -> int:
        """Elements of an array."""
        return math.prod(self.dims)

    @property
    def leaves(self) -> list["Shape"]:
        """The arrays in it, in order."""
        return [self] if self.dtype else [leaf for e in self.elements for leaf in e.leaves]

    @property
    def bytes(self) -> int:
        """Bytes of all its arrays, tiling's padding left out."""
        return sum(-(-leaf.size * leaf.bits // 8) for leaf in self.leaves)


@dataclasses.dataclass(slots=True)
class Instruction:
    """One line of a computation. Programs have tens of thousands: no dictionary for each."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    """Names; for a constant and a parameter the text in the parentheses."""
    tail: str
    """What is printed after the operands."""
    _attributes: dict[str, str] | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """By key, as printed."""
        if self._attributes is None:
            pairs = (part.partition("=") for part in split(self.tail))
            self._attributes = {key: value for key, equals, value in pairs if equals}
        return self._attributes

    @property
    def path(self) -> str:
        """JAX's name stack and primitive, such as jit(f)/jvp(layers)/dot_general."""
        found = _PATH.search(self.tail)
        return found[1] if found else ""

    @property
    def config(self) -> dict[str, Any]:
        """backend_config where it is JSON, printed bare or as a string."""
        try:
            found = json.loads(self.attributes.get("backend_config", "{}"))
            found = json.loads(found) if isinstance(found, str) else found
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def dims(self, key: str) -> list[int]:
        """The integers of an attribute, such as dimensions={0,1}."""
        return [int(n) for n in re.findall(r"\d+", self.attributes.get(key, ""))]

    def computations(self, *keys: str) -> list[str]:
        """The names of the computations in these attributes."""
        found = (self.attributes.get(key, "").strip("{}") for key in keys)
        return [name.strip().lstrip("%") for names in found for name in names.split(",") if name]


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By the name of an operand, each instruction once."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}


@dataclasses.dataclass
class Module:
    """A compiled program, for one of its devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    """Replicas times partitions."""


def modules(text: str) -> list[Module]:
    """The HLO modules printed in text."""
    return [
        _module(part) for part in re.split(r"^(?=HloModule )", text, flags=re.M) if part.strip()
    ]


def _module(text: str) -> Module:
    counts = [
        int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", text.split("\n")[0])
    ]
    found = Module({}, "", math.prod(counts))
    current: Computation | None = None
    for line in _lines(text):
        if current is None:
            header = None if line.startswith(("HloModule", " ")) else _HEADER.match(line)
            if header:
                current = found.computations[header[2]] = Computation(header[2])
                if header[1]:
                    found.entry = header[2]
        elif line.startswith("}"):
            current = None
        else:
            instruction, root = _instruction(line)
            current.instructions[instruction.name] = instruction
            if root or not current.root:
                current.root = instruction.name
    return found


def _lines(text: str) -> Iterator[str]:
    """Lines without comments; an instruction printed over several (a large literal, or what a
    kernel of Pallas says of itself) as one."""
    held, inside = "", False
    for line in text.splitlines():
        starts = not inside and (line[:1] not in (" ", "\t", "") or " = " in line)
        if held and starts:
            yield held
            held = ""
        if not line.strip():
            continue
        line = _COMMENT.sub("", line).rstrip() if "/*" in line else line.rstrip()
        if starts and not _INSTRUCTION.match(line):
            yield line
        else:
            held = f"{held} {line.strip()}" if held else line
            if inside or line.endswith("kernel_metadata={"):
                bare = _QUOTED.sub("", held)
                inside = bare.count("{") > bare.count("}")
    if held:
        yield held


def _instruction(line: str) -> tuple[Instruction, bool]:
    match = _INSTRUCTION.match(line)
    if not match:
        raise ValueError(f"not an HLO instruction: {line.strip()[:80]}")
    # A shape has spaces between the elements of a tuple alone.
    end = _end(line, match.end(), " ") if line[match.end()] == "(" else line.find(" ", match.end())
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise ValueError(f"not an HLO instruction: {line.strip()[:80]}")
    close = _end(line, opcode.end(), ")")
    inside = line[opcode.end() : close]
    if opcode[1] in ("constant", "parameter"):
        operands: tuple[str, ...] = (inside.strip(),)
    else:
        operands = tuple([o.split()[-1].lstrip("%") for o in split(inside) if o])
    where = shape(line[match.end() : end])
    found = Instruction(match[2], where, opcode[1], operands, line[close + 1 :])
    return found, bool(match[1])


def _end(text: str, start: int, stop: str) -> int:
    """Where stop first stands outside quotes and brackets that open after start."""
    first = text.find(stop, start)
    if not _OPENS.search(text, start, first if first >= 0 else len(text)):
        return first if first >= 0 else len(text)
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = token[0]
        if depth == 0 and mark == stop:
            return token.start()
        depth += (mark in "[({") - (mark in "])}")
    return len(text)


def split(text: str) -> list[str]:
    """At the commas outside quotes and brackets."""
    parts, start = [], 0
    while start < len(text):
        end = _end(text, start, ",")
        parts.append(text[start:end].strip())
        start = end + 1
    return parts


@functools.lru_cache(4096)
def shape(text: str) -> Shape:
    """A shape from its text, such as bf16[8,<=128]{1,0:T(8,128)(2,1)S(1)} or (f32[], token[])."""
    text = text.strip()
    if text.startswith("("):
        return Shape("", elements=tuple(shape(part) for part in split(text[1:-1]) if part))
    if text.startswith("b("):  # A buffer, of the shape inside.
        return shape(text[2:-1])
    match = _ARRAY.match(text)
    if not match:
        raise ValueError(f"not an HLO shape: {text[:80]}")
    dtype, dims, layout = match[1], match[2].replace(" ", ""), match[3] or ""
    width = re.match(r"[a-z]+(\d+)", dtype)
    # Types narrower than a byte take one each unless the layout packs them.
    packed = re.search(r"E\((\d+)\)", layout)
    bits = 8 if dtype == "pred" else max(8, int(width[1])) if width else 0
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(
        dtype,
        tuple(int(d.lstrip("<=").replace("?", "0")) for d in dims.split(",") if d),
        "<=" in dims or "?" in dims,
        int(packed[1]) if packed else bits,
        int(space[1]) if space else 0,
    )
