"""Reads the text of an optimized XLA module: computations, instructions, shapes with their layout, loops.

Only what `training/plans/hlo_cost.py` needs is read. The text is the one of `jax.stages.Compiled.as_text()`; the
grammar is described at https://openxla.org/xla/operation_semantics and https://openxla.org/xla/shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence

MOST_TRIPS = 100_000


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array as it lies in memory.

    Attributes:
      dims: logical sizes.
      size: logical bytes; `padded` counts the padding to whole tiles of the layout too.
      in_hbm: whether it lies in main memory, rather than in a memory on the chip (or on the host).
    """

    dims: tuple[int, ...]
    size: int
    padded: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `outputs` are the leaves of its shape in order, `attributes` the text after the operands.

    `arguments` is the text between the parentheses, which for a constant is its value and for a parameter its number.
    """

    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def attribute(self, name: str) -> str:
        """The text of an attribute such as `direction=LT`, `slice={[0:1]}` without braces, or ""."""
        found = re.search(rf"[ ,]{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", " " + self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def config(self, name: str) -> str:
        """The number under a key of the backend's configuration, as text, or ""."""
        found = re.search(rf'"{name}":"?(-?\d+)', self.attributes)
        return found[1] if found else ""

    def called(self, *names: str) -> list[str]:
        """Computations that attributes such as `calls` or `body` name."""
        texts = [self.attribute(name) for name in names]
        return [name.strip().removeprefix("%") for text in texts for name in text.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the one whose value is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(i.arguments): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take the value of a name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name; `entry` is where the program starts."""

    computations: Mapping[str, Computation]
    entry: Computation


# --- text -------------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([^\s,()]+)")


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: the text is not that of a module with an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    body: dict[str, Instruction] = {}
    shapes: dict[str, str] = {}
    root: Instruction | None = None
    name, is_entry = "", False
    for line in text.splitlines():
        if line.startswith("}") and body and root is not None:
            computations[name] = Computation(name, body, root)
            entry = computations[name] if is_entry else entry
            body, root = {}, None
        elif header := _HEADER.match(line):
            is_entry, name, body, shapes, root = bool(header[1]), header[2], {}, {}, None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3])
            for operand in instruction.operands:
                _name_element(operand, body, shapes)
            body[instruction.name], shapes[instruction.name] = instruction, _shape_and_rest(found[3])[0]
            root = instruction if found[1] else root
    if entry is None:
        raise ValueError("this text is no XLA module: it has no entry computation")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    shape, rest = _shape_and_rest(text)
    opcode, _, rest = rest.partition("(")
    end = rest.find(")")
    arguments, attributes = rest[:end], rest[end + 1 :]
    return Instruction(
        name, opcode.strip(), _buffers(shape), tuple(_NAME.findall(arguments)), arguments.strip(), attributes
    )


def _name_element(operand: str, body: dict[str, Instruction], shapes: dict[str, str]) -> None:
    """Adds the instruction that JAX 0.12 leaves out, where it writes `%fusion.8#1` for an element of a tuple."""
    source, mark, index = operand.rpartition("#")
    if not mark or operand in body or not index.isdigit():
        return
    _name_element(source, body, shapes)
    shapes[operand] = _elements(shapes[source])[int(index)]
    body[operand] = Instruction(
        operand, "get-tuple-element", _buffers(shapes[operand]), (source,), f"%{source}", f", index={index}"
    )


def _elements(shape: str) -> list[str]:
    """The shapes in the shape of a tuple, which may be tuples themselves."""
    found, depth, start = [], 0, 1
    for place, sign in enumerate(shape):
        depth += (sign in "({[") - (sign in ")}]")
        if (sign == "," and depth == 1) or (sign == ")" and depth == 0):
            found.append(shape[start:place].strip())
            start = place + 1
    return found


def _shape_and_rest(text: str) -> tuple[str, str]:
    """Splits `(f32[2]{0:T(128)}, u32[]) opcode(...)` after the shape, whose parentheses may nest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return text[: bracket.end()], text[bracket.end() :].lstrip()
    raise ValueError(f"unbalanced shape in {text[:80]!r}")


@functools.lru_cache(maxsize=100_000)
def _buffers(shape: str) -> tuple[Buffer, ...]:
    return tuple(_buffer(found[1], found[2], found[3] or "") for found in _ARRAY.finditer(shape))


def _buffer(dtype: str, dims_text: str, layout: str) -> Buffer:
    """A buffer from `f32`, `4,197` and the layout `1,0:T(8,128)S(1)`: minor-to-major order, tiles, memory space."""
    dims = tuple(int(size.removeprefix("<=")) for size in dims_text.split(",") if size)
    order, _, rest = layout.partition(":")
    width = re.search(r"\d+", dtype)
    bits = int(width[0]) if width else {"pred": 8}.get(dtype, 0)
    physical = [dims[int(axis)] for axis in reversed(order.split(",")) if axis] or list(dims)
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        sizes = [int(size) for size in tile[1].split(",")]
        physical = [1] * (len(sizes) - len(physical)) + physical
        first = len(physical) - len(sizes)
        physical[first:] = [-(-size // step) * step for size, step in zip(physical[first:], sizes, strict=True)]
    space = re.search(r"S\((\d+)\)", rest)
    return Buffer(dims, math.prod(dims) * bits // 8, math.prod(physical) * bits // 8, space is None or space[1] == "0")


# --- loops ------------------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """A value that does not follow from constants."""


def trip_count(module: Module, where: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` of `where` runs, or None where that does not follow from the module alone.

    The compiler may have noted it; otherwise the scalars that the loop's condition depends on are computed, pass by
    pass.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    body, condition = (module.computations[loop.called(name)[0]] for name in ("body", "condition"))
    initial = where.instructions[loop.operands[0]]
    if initial.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    state = _state(lambda index: _scalar(module, where, initial.operands[index], []))

    def after(state: Callable[[int], int]) -> Callable[[int], int]:
        return _state(lambda index: _scalar(module, body, body.root.operands[index], [state]))

    try:
        for trips in range(MOST_TRIPS):
            if not _scalar(module, condition, condition.root.name, [state]):
                return trips
            state = after(state)
    except _Unknown:
        return None
    return None


def _state(value: Callable[[int], int]) -> Callable[[int], int]:
    return functools.lru_cache(maxsize=None)(value)


def _ignoring_index(value: Callable[[str], int], operand: str, index: int) -> int:
    del index  # the argument of a fusion is no tuple
    return value(operand)


_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SCALAR: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.not_,
    "select": lambda chosen, yes, no: yes if chosen else no,
    "negate": operator.neg,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


def _scalar(module: Module, where: Computation, name: str, arguments: Sequence[Callable[[int], int]]) -> int:
    """The value of an integer scalar, given those of the computation's parameters.

    Args:
      arguments: for each parameter a function from the index in its tuple (0 for what is no tuple) to the value.

    Raises:
      _Unknown: it depends on more than constants and `arguments`.
    """
    instruction = where.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def value(operand: str) -> int:
        return _scalar(module, where, operand, arguments)

    def result_of_call(caller: Instruction, index: int | None) -> int:
        called = module.computations[caller.called("calls", "to_apply")[0]]
        inner = [functools.partial(_ignoring_index, value, operand) for operand in caller.operands]
        root = called.root if index is None else called.instructions[called.root.operands[index]]
        return _scalar(module, called, root.name, inner)

    if opcode == "constant":
        text = {"true": "1", "false": "0"}.get(instruction.arguments, instruction.arguments)
        if re.fullmatch(r"-?\d+", text):
            return int(text)
    elif opcode == "parameter" and arguments:
        return arguments[int(instruction.arguments)](0)
    elif opcode == "get-tuple-element":
        source, index = where.instructions[operands[0]], int(instruction.attribute("index"))
        if source.opcode == "parameter" and arguments:
            return arguments[int(source.arguments)](index)
        if source.opcode == "tuple":
            return value(source.operands[index])
        if source.opcode in ("fusion", "call"):
            return result_of_call(source, index)
    elif opcode in _SAME:
        return value(operands[0])
    elif opcode == "compare":
        return int(_COMPARE[instruction.attribute("direction")](value(operands[0]), value(operands[1])))
    elif opcode in _SCALAR:
        return int(_SCALAR[opcode](*(value(operand) for operand in operands)))
    elif opcode in ("fusion", "call"):
        return result_of_call(instruction, None)
    raise _Unknown(name)
