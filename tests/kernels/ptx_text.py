"""The PTX of a kernel as Triton makes it, read into instructions (for `ptx_machine`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ptx_arithmetic import PtxError

NOTHING = np.uint64(2**64 - 1)  # what no instruction has written: NaN in every format, and no address


class Address(NamedTuple):
    """[register + offset]."""

    base: int
    offset: np.uint64


@dataclass
class Instruction:
    """guard: register of the predicate and the value that it must have. operands: numbers of registers, tuples of them,
    addresses; of a branch the instruction that it leads to."""

    name: str
    guard: tuple[int, bool] | None
    operands: list[Any]
    text: str


_TOKEN = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|([^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)")
_STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+")
_NAME = re.compile(r"_$|%(tid|n?ctaid)\.|-?\d|\w+_param_\d+$")  # of what nobody declares
_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


class Kernel:
    """The one kernel of a PTX text, read. `dynamic`: bytes of shared memory that its launch asks for."""

    def __init__(self, ptx: str, dynamic: int = 0) -> None:
        header, body = ptx[ptx.index(".entry") :].split("{", 1)
        self.parameters = len(re.findall(r"^\s*\.param", header, re.MULTILINE))
        self.threads = int(re.findall(r"\.reqntid (\d+)", header)[0])
        self.registers: dict[str, int] = {}  # number by name; constants, special registers and symbols are registers too
        self.predicates: set[int] = set()
        self.instructions: list[Instruction] = []
        self.shared = [(1024, dynamic)] if dynamic else []  # begin and bytes of each array
        self._symbols = {"global_smem": 1024}
        self._read(re.sub(r"//[^\n]*|^\s*\.(loc|file|section)\b[^\n]*", "", body, flags=re.MULTILINE))

    def _read(self, body: str) -> None:
        names: list[dict[str, str]] = [{}]  # of each open scope: what a name stands for
        labels: dict[str, int] = {}
        found: list[tuple[str, list[dict[str, str]]]] = []
        position = 0
        while names:
            token = _TOKEN.match(body, position)
            if token is None:
                raise PtxError(f"not read: {body[position : position + 80]!r}")
            position = token.end()
            opens, closes, label, statement = token.groups()
            if opens:
                names.append({})
            elif closes:
                names.pop()
            elif label:
                names[-1][label] = f"{label} {len(found)}"
                labels[names[-1][label]] = len(found)
            elif statement.startswith((".reg", ".shared")):
                self._declare(statement, names[-1])
            elif statement and not statement.startswith("."):
                found.append((statement, list(names)))
        for statement, scope in found:
            self.instructions.append(self._instruction(statement, scope, labels))

    def _declare(self, statement: str, scope: dict[str, str]) -> None:
        if statement.startswith(".shared"):
            align, name, size = re.findall(r"\.align (\d+) \.b8 (\w+)\[(\d+)\]", statement)[0]
            scope[name] = f"{name} {len(self.shared)}"
            end = max([1024, *(first + length for first, length in self.shared)]) + 128  # a gap that nobody may touch
            begin = -(-end // (2 * int(align))) * 2 * int(align) + int(align)  # aligned as it says, and not better
            self._symbols[scope[name]] = begin
            self.shared.append((begin, int(size)))
            return
        _, kind, rest = statement.split(None, 2)
        for part in rest.split(","):
            stem, count = re.findall(r"([^\s<]+)(?:<(\d+)>)?", part)[0]
            for name in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                number = len(self.registers)
                scope[name] = f"{name} {number}"
                self.registers[scope[name]] = number
                if kind == ".pred":
                    self.predicates.add(number)

    def _instruction(self, statement: str, scopes: list[dict[str, str]], labels: dict[str, int]) -> Instruction:
        def register(name: str) -> int:
            meant = next((scope[name] for scope in reversed(scopes) if name in scope), name)
            if not (meant in self.registers or meant in self._symbols or _NAME.match(meant)):
                raise PtxError(f"unknown name {name}: {statement}")
            return self.registers.setdefault(meant, len(self.registers))

        def operand(text: str) -> Any:
            if text.startswith("{"):
                return tuple(register(name) for name in re.findall(r"[^\s,{}]+", text))
            address = _ADDRESS.fullmatch(text)
            if address:
                return Address(register(address[1]), np.uint64(int(address[2] or "0", 0) % 2**64))
            return register(text)

        parts = _STATEMENT.fullmatch(statement)
        if parts is None:
            raise PtxError(f"not read: {statement}")
        negated, guard, name, rest = parts.groups()
        if name in ("bra", "bra.uni"):
            operands = [labels[next(scope[rest] for scope in reversed(scopes) if rest in scope)]]
        else:
            operands = [operand(text) for text in _OPERAND.findall(rest)]
        return Instruction(name, (register(guard), not negated) if guard else None, operands, statement)

    def value(self, name: str, arguments: Sequence[int], program: Sequence[int], grid: Sequence[int]) -> Any:
        """What a register holds when the program begins."""
        if name in self._symbols:
            return self._symbols[name]
        if name == "%tid.x":
            return np.arange(self.threads)
        special = re.fullmatch(r"%(n?ctaid)\.([xyz])", name)
        if special:
            return (program if special[1] == "ctaid" else grid)["xyz".index(special[2])]
        parameter = re.fullmatch(r"\w+_param_(\d+)", name)
        if parameter:
            return arguments[int(parameter[1])] % 2**64
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", name):
            return int(name[2:], 16)
        if not re.match(r"-?\d", name):
            return NOTHING
        if not re.fullmatch(r"-?\d\w*", name):
            raise PtxError(f"no number: {name}")  # PTX has decimal fractions, no kernel does
        return int(name.rstrip("U"), 0) % 2**64
