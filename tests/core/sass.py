"""Compiled kernels read back: whether a register that wgmma reads as its A operand is written while
it may still be in flight.

wgmma runs on after it was issued, until a wait for its group. ptxas keeps its operands apart as it
understands the source's waits; where it fails, results are wrong now and then. So this looks at
what it made.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_REGISTER = re.compile(r"R(\d+)\b")
_PREDICATES = re.compile(r"!?U?P(?:\d|T)$")
_ENDS = ("EXIT", "RET", "KILL")
# Their first register is read.
_READERS = ("NANOSLEEP", "WARPSYNC", "BRX", "R2P", "CALL", "BAR", "MEMBAR", "DEPBAR", "BRA")

State = tuple[tuple[frozenset[int], ...], frozenset[int]]  # groups in flight, one not yet committed
_IDLE: State = ((), frozenset())


class Instruction(NamedTuple):
    predicate: str | None
    opcode: str
    operands: str

    @property
    def is_wgmma(self) -> bool:
        return self.opcode.startswith(("HGMMA", "QGMMA", "IGMMA"))

    def a_registers(self) -> frozenset[int]:
        """That a wgmma reads its A operand from; none where that is in shared memory."""
        found = _REGISTER.match(self.operands.split(",")[1].strip())
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()

    def written(self) -> frozenset[int]:
        """At least what it writes, of the registers of a thread."""
        if self.opcode.split(".")[0] in _READERS:
            return frozenset()
        operands = [operand.strip() for operand in self.operands.split(",")]
        while operands and _PREDICATES.match(operands[0]):
            operands.pop(0)
        found = _REGISTER.match(operands[0]) if operands else None
        if not found:
            return frozenset()
        first = int(found[1])
        if self.is_wgmma:
            width = int(re.search(r"64x(\d+)x", self.opcode)[1]) // 2
        elif ".128" in self.opcode or ".M88.4" in self.opcode:
            width = 4
        elif ".64" in self.opcode or "WIDE" in self.opcode or ".M88.2" in self.opcode:
            width = 2
        else:
            width = 1
        return frozenset(range(first, first + width))


def disassembler() -> str | None:
    """nvdisasm, from its wheel, the path or triton; None where there is none."""
    site = Path(sysconfig.get_path("purelib"))
    for pattern in ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
        for found in site.glob(pattern):
            return str(found)
    return shutil.which("nvdisasm")


def disassemble(cubin: Path) -> list[str]:
    """Lines of all functions' code."""
    command = [disassembler(), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def overwritten_operands(lines: list[str]) -> list[str]:
    """Instructions that write an A operand of a wgmma that may be in flight, on any path."""
    code, labels = _parsed(lines)
    after = [_successors(code, labels, i) for i in range(len(code))]
    bad: dict[int, str] = {}
    seen: set[tuple[int, State]] = set()
    starts = [i for i in range(len(code)) if i == 0 or code[i - 1] is None]
    to_do: list[tuple[int, State]] = [(i, _IDLE) for i in starts if code[i]]
    joins = set(labels.values()) | set(starts)
    while to_do:
        at, state = to_do.pop()
        if at in joins:
            if (at, state) in seen:
                continue
            seen.add((at, state))
        instruction = code[at]
        assert instruction is not None
        in_flight = frozenset().union(*state[0], state[1])
        if instruction.written() & in_flight:
            bad[at] = f"{instruction.opcode} {instruction.operands}"
        state = _next_state(instruction, state)
        to_do += [(i, state) for i in after[at]]
    return [bad[i] for i in sorted(bad)]


def _parsed(lines: list[str]) -> tuple[list[Instruction | None], dict[str, int]]:
    """Instructions, with None where a function ends, and which one each label stands before."""
    code: list[Instruction | None] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.startswith((".section", "//------")) and code and code[-1] is not None:
            code.append(None)
        elif found := _LABEL.match(line.strip()):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(Instruction(*found.groups()))
    if code and code[-1] is not None:
        code.append(None)
    return code, labels


def _successors(code: list[Instruction | None], labels: dict[str, int], at: int) -> tuple[int, ...]:
    instruction = code[at]
    if instruction is None:
        return ()
    kind = instruction.opcode.split(".")[0]
    targets = tuple(labels[name] for name in _TARGET.findall(instruction.operands))
    if kind == "BSSY":  # says where its BSYNC goes on, which is behind it
        targets = ()
    always = instruction.predicate is None and (
        instruction.opcode == "BRA" or kind in ("BRX", *_ENDS)
    )
    fall_through = () if always or code[at + 1] is None else (at + 1,)
    return targets + fall_through if kind in ("BRA", "BRX", "WARPSYNC") else fall_through


def _next_state(instruction: Instruction, state: State) -> State:
    groups, issued = state
    if instruction.is_wgmma:
        issued |= instruction.a_registers()
        if "gsb0" in instruction.operands:  # the last of its group
            groups, issued = (*groups, issued), frozenset()
    elif "DEPBAR" in instruction.opcode and "gsb0" in instruction.operands:
        pending = int(instruction.operands.rsplit(",", 1)[1].strip(), 16)
        groups = groups[len(groups) - pending :] if pending else ()
    return groups, issued
