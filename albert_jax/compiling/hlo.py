"""Reads a TPU's optimised program, and counts in it what a step really does.

In:  the text of a compiled program: `compiled.as_text()`, or what the compiler wrote itself when
     given `dump_options` (JAX's printer fails on some programs for v5p and v6e).
Out: a `Module`; operations, cycles and bytes of one run of it on one chip, each loop body as often
     as its loop turns.

The compiler's own totals (`cost_analysis`) take every loop body once, so nothing here uses them.
What a loop's turns are is read from its condition, `i < N`; loops of JAX count from 0 by one. Every
branch of a conditional counts as if it ran.

Sources: the text's grammar and a convolution's operations are XLA's (openxla/xla, hlo/parser and
service/hlo_cost_analysis); "estimated_cycles" is libtpu's own model of each instruction.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}

# Instructions that only name or regroup what is there already, or whose time is that of others.
_MOVES_NOTHING = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "copy-done",
        "slice-done",
        "async-done",
        "async-update",
        "send",
        "recv",
        "send-done",
        "recv-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
    )
)
_COMPUTATION = re.compile(r"(ENTRY )?%([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def dump_options(folder: str) -> dict[str, Any]:
    """Compiler options that leave the program's text in `folder`, for `dumped`."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def dumped(folder: str) -> str | None:
    """The text of the training step compiled last with them; None where there is none."""
    files = list(pathlib.Path(folder).glob("*train_step*.after_codegen.txt"))
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return newest.read_text(encoding="utf-8") if newest else None


class UnreadableError(Exception):
    """The program's text says less than is needed; the message says what is missing."""


class Array(NamedTuple):
    """One array that an instruction gives.

    Attributes:
        dtype: as HLO writes it: f32, bf16, s32, ...
        shape: sizes on one chip.
        in_hbm: False for arrays that the compiler keeps in a chip's faster memories.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype.lstrip("fsuc")) or 0)
        return math.prod(self.shape) * bits // 8

    @property
    def squeezed(self) -> tuple[int, ...]:
        """The shape without its ones."""
        return tuple(size for size in self.shape if size != 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: unique in its computation.
        opcode: what it does.
        result: the text of its type.
        operands: names.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it gives; a tuple's members in order."""
        return tuple(
            Array(
                dtype,
                tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size),
                re.search(r"S\([1-9]", layout) is None,
            )
            for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", self.result))
        )

    @property
    def bytes(self) -> int:
        """Of all that it gives."""
        return sum(array.bytes for array in self.arrays)

    @property
    def scope(self) -> str:
        """The path of JAX names it comes from; empty where the compiler dropped it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one run; 0 where it makes none (kernels, collectives)."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else 0

    def called(self, attribute: str) -> str:
        """The computation named by an attribute such as `body`."""
        found = re.search(rf"\b{attribute}=%([^\s,}})]+)", self.attributes)
        if found is None:
            raise UnreadableError(f"{self.opcode} {self.name} has no {attribute}")
        return found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, `root` the last of them."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Execution:
    """One place in which a computation runs.

    Attributes:
        computation: what runs.
        times: how often in one run of the program.
        in_loop: inside a loop, however deep.
        fusion: the fusion instruction it is the inside of; None for a computation whose
            instructions are scheduled one by one.
    """

    computation: Computation
    times: int
    in_loop: bool
    fusion: Instruction | None


class Module:
    """A whole program.

    Raises:
        UnreadableError: text without an entry computation, or a loop whose turns it does not tell.
    """

    def __init__(self, text: str) -> None:
        self.computations, entry = _parse(text)
        self.executions = list(self._walk(self.computations[entry], 1, False, None))

    def _walk(
        self, computation: Computation, times: int, in_loop: bool, fusion: Instruction | None
    ) -> Iterator[Execution]:
        yield Execution(computation, times, in_loop, fusion)
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                turns = self.turns(instruction)
                body = self.computations[instruction.called("body")]
                yield from self._walk(body, times * turns, True, fusion)
            elif opcode == "fusion":
                inside = self.computations[instruction.called("calls")]
                yield from self._walk(inside, times, in_loop, fusion or instruction)
            elif opcode == "call":
                callee = self.computations[instruction.called("to_apply")]
                yield from self._walk(callee, times, in_loop, fusion)
            elif opcode == "async-start":
                callee = self.computations[instruction.called("calls")]
                yield from self._walk(callee, times, in_loop, fusion)
            elif opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(self.computations[branch], times, in_loop, fusion)

    def turns(self, loop: Instruction) -> int:
        """How often a `while` runs its body.

        Raises:
            UnreadableError: its condition is not `i < N` with N written out.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        test, bounds = condition.root, condition.instructions
        if test.opcode == "fusion":  # the comparison may stand in a fusion of its own
            inside = self.computations[test.called("calls")]
            parameters = [i for i in inside.instructions.values() if i.opcode == "parameter"]
            outside = dict(
                zip((p.name for p in sorted(parameters, key=_number)), test.operands, strict=True)
            )
            test = inside.root
            bounds = {**bounds, **{name: bounds[outer] for name, outer in outside.items()}}
            bounds |= {k: v for k, v in inside.instructions.items() if v.opcode == "constant"}
        limit = re.search(r"direction=LT", test.attributes) and bounds.get(test.operands[-1])
        if test.opcode != "compare" or not limit or limit.opcode != "constant":
            raise UnreadableError(f"the turns of loop {loop.name} are not written out")
        return int(_number(limit))

    def flops(self) -> int:
        """Floating-point operations of all matrix products and convolutions, two a multiply-add."""
        return sum(
            execution.times * _product_flops(instruction, execution.computation)
            for execution in self.executions
            for instruction in execution.computation.instructions.values()
            if instruction.opcode in ("dot", "convolution")
        )

    def kernel_calls(self) -> collections.Counter[str]:
        """How often each Pallas kernel runs on one chip, by its name."""
        calls: collections.Counter[str] = collections.Counter()
        for execution in self.executions:
            for instruction in execution.computation.instructions.values():
                if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                    calls[re.sub(r"\.\d+$", "", instruction.name)] += execution.times
        return calls

    def cycles(self, scope: str = "", outside_loops: bool = False) -> int:
        """The compiler's estimate of all instructions, without collectives and kernels.

        Args:
            scope: only instructions from under this `jax.named_scope`.
            outside_loops: only instructions that no loop repeats.
        """
        return sum(
            execution.times * instruction.cycles
            for execution in self._scheduled()
            for instruction in execution.computation.instructions.values()
            if not (outside_loops and execution.in_loop)
            and (not scope or scope in instruction.scope.split("/"))
        )

    def hbm_bytes(self) -> int:
        """Bytes read from and written to the main memory.

        An instruction reads its operands and writes its result, whole, except that a slice taken
        out of or put into an array, or rows gathered from it, are no more than themselves.
        """
        return sum(
            execution.times * self._traffic(instruction, execution.computation)
            for execution in self._scheduled()
            for instruction in execution.computation.instructions.values()
            if instruction.opcode not in _MOVES_NOTHING
        )

    def loop_accumulators(self, shapes: Collection[tuple[int, ...]]) -> list[tuple[int, Array]]:
        """Arrays that a loop carries and changes, and that have one of `shapes` (ones left out).

        Returns:
            (times the loop's body runs, array), for every loop.
        """
        found = []
        for execution in self.executions:
            for loop in execution.computation.instructions.values():
                if loop.opcode != "while":
                    continue
                body = self.computations[loop.called("body")]
                for array, name in zip(loop.arrays, body.root.operands, strict=True):
                    if array.squeezed in shapes and not _is_passed_on(self, body, name):
                        found.append((execution.times * self.turns(loop), array))
        return found

    def narrowings_in_loops(self, shapes: Collection[tuple[int, ...]]) -> list[str]:
        """Names of float32 to bfloat16 conversions, of arrays of these shapes, that a loop
        repeats.
        """
        return [
            instruction.name
            for execution in self.executions
            if execution.in_loop
            for instruction in execution.computation.instructions.values()
            if instruction.opcode == "convert"
            and instruction.arrays[0].dtype == "bf16"
            and instruction.arrays[0].squeezed in shapes
            and _source(execution.computation, instruction).dtype == "f32"
        ]

    def _scheduled(self) -> Iterator[Execution]:
        return (execution for execution in self.executions if execution.fusion is None)

    def _traffic(self, instruction: Instruction, computation: Computation) -> int:
        known = computation.instructions
        if instruction.opcode == "fusion":
            inside = self.computations[instruction.called("calls")]
            parameters = sorted(
                (i for i in inside.instructions.values() if i.opcode == "parameter"), key=_number
            )
            read = sum(
                min(_hbm(known[name]), _touched(parameter, inside))
                for name, parameter in zip(instruction.operands, parameters, strict=True)
            )
            roots = [inside.root]
            if inside.root.opcode == "tuple":
                roots = [inside.instructions[name] for name in inside.root.operands]
            if len(roots) != len(instruction.arrays):
                return read + _hbm(instruction)
            written = sum(
                _updated(root, inside) if root.opcode == "dynamic-update-slice" else array.bytes
                for root, array in zip(roots, instruction.arrays, strict=True)
                if array.in_hbm
            )
            return read + written
        if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, context) in some order
            to, source = _endpoints(instruction)
            return sum(to.bytes for array in (to, source) if array.in_hbm)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return _hbm(instruction) + min(_hbm(known[instruction.operands[0]]), instruction.bytes)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _updated(instruction, computation) * instruction.arrays[0].in_hbm
        if instruction.opcode == "custom-call" and instruction.bytes == 0:
            return 0
        return _hbm(instruction) + sum(_hbm(known[name]) for name in set(instruction.operands))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}

    def close() -> None:
        if name and instructions:
            last = root or next(reversed(instructions))
            computations[name] = Computation(name, dict(instructions), instructions[last])

    # A computation ends where the next begins: kernels print lines of "}" inside of one.
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            close()
            name, root = header[2], ""
            instructions.clear()
            entry = name if header[1] else entry
            continue
        start = _INSTRUCTION.match(line)
        if start and name:
            instruction = _instruction(start[2], line[start.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root
    close()
    if not entry:
        raise UnreadableError("the program's text has no entry computation")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    inside = rest[:end]
    # Constants and parameters have a value where others have operands.
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(
        name, opcode, result, operands, inside + rest[end:] if not operands else rest[end:]
    )


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _number(instruction: Instruction) -> int:
    """The value of a whole constant, the number of a parameter."""
    found = re.match(r"-?\d+", instruction.attributes)
    if found is None:
        raise UnreadableError(f"{instruction.opcode} {instruction.name} has no number")
    return int(found[0])


def _branches(conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
        return re.findall(r"%([^\s,]+)", listed[1])
    return [conditional.called(f"{value}_computation") for value in ("true", "false")]


def _product_flops(product: Instruction, computation: Computation) -> int:
    left, right = (computation.instructions[name].arrays[0] for name in product.operands[:2])
    out = product.arrays[0]
    if product.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        sizes = [left.shape[int(axis)] for axis in (summed[1] if summed else "").split(",") if axis]
        return 2 * math.prod(out.shape) * math.prod(sizes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    if labels is None:
        raise UnreadableError(f"convolution {product.name} has no dim_labels")
    at_left, at_right, at_out = labels.groups()
    groups = int(_attribute(product, "feature_group_count") or 1)
    batch_groups = int(_attribute(product, "batch_group_count") or 1)
    pairs = left.shape[at_left.index("b")] // batch_groups
    pairs *= left.shape[at_left.index("f")] // groups * out.shape[at_out.index("f")]
    for axis in sorted(set(at_out) - {"b", "f"}):
        pairs *= _window_pairs(
            product,
            int(axis),
            left.shape[at_left.index(axis)],
            right.shape[at_right.index(axis)],
            out.shape[at_out.index(axis)],
        )
    return 2 * pairs


def _window_pairs(product: Instruction, axis: int, left: int, kernel: int, out: int) -> int:
    """How many (output, kernel) places along one spatial axis meet a real input.

    The rest fall on padding or between dilated inputs and cost nothing.
    """
    window = re.search(r"window=\{([^}]*)\}", product.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}

    def setting(name: str, default: str) -> str:
        return settings[name].split("x")[axis] if name in settings else default

    stride, dilation = int(setting("stride", "1")), int(setting("rhs_dilate", "1"))
    spread = int(setting("lhs_dilate", "1"))
    low = int(setting("pad", "0_0").split("_")[0])
    extent = (left - 1) * spread + 1
    return sum(
        0 <= place < extent and place % spread == 0
        for start in range(-low, out * stride - low, stride)
        for place in range(start, start + kernel * dilation, dilation)
    )


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=(\d+)", instruction.attributes)
    return found[1] if found else ""


def _hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _endpoints(start: Instruction) -> tuple[Array, Array]:
    """Where a `copy-start` or `slice-start` copies to and from."""
    first, second = start.arrays[:2]
    return (first, second) if start.opcode == "copy-start" else (second, first)


def _updated(update: Instruction, computation: Computation) -> int:
    return computation.instructions[update.operands[1]].bytes


def _touched(parameter: Instruction, inside: Computation) -> int:
    """The bytes of a fusion's parameter that it can need."""
    total = 0
    for user in inside.instructions.values():
        for position, name in enumerate(user.operands):
            if name != parameter.name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                total += user.bytes
            elif user.opcode == "bitcast":
                total += _touched(user, inside)
            elif not (user.opcode == "dynamic-update-slice" and position == 0):
                return parameter.bytes
    return min(total, parameter.bytes)


def _source(computation: Computation, conversion: Instruction) -> Array:
    return computation.instructions[conversion.operands[0]].arrays[0]


def _is_passed_on(module: Module, body: Computation, name: str) -> bool:
    """Whether what a loop's body gives here is, unchanged, something it got."""
    given = body.instructions[name]
    while given.opcode in ("copy", "bitcast", "copy-start", "copy-done", "get-tuple-element"):
        source = body.instructions[given.operands[0]]
        if given.opcode == "get-tuple-element" and source.opcode == "parameter":
            return True
        if given.opcode == "get-tuple-element" and source.opcode == "while":
            place = int(_attribute(given, "index"))
            inner = module.computations[source.called("body")]
            if not _is_passed_on(module, inner, inner.root.operands[place]):
                return False
            start = body.instructions[source.operands[0]]
            if start.opcode != "tuple":
                return False
            source = body.instructions[start.operands[place]]
        elif given.opcode == "get-tuple-element":
            return False
        given = source
    return False
