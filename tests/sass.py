"""Reads the machine code of NVIDIA's compiled kernels, to find what ptxas did wrong.

ptxas 12.8 shares the descriptors of matrix products between loops that follow each other, and computes them before the
first one only: where that one has no steps, the second reads registers that nothing wrote.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*)")
_TARGET = re.compile(r"`?\(?(\.L_\w+)")
_UNIFORM = 64  # registers that a warp's threads share


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; `follows` are the numbers of those that may run next."""

    address: str
    name: str
    operands: str
    follows: tuple[int, ...]

    @property
    def writes(self) -> set[int]:
        """The uniform registers it writes."""
        found = re.match(r"(?:U?P\w+, )?UR(\d+)\b", self.operands)
        if not found or not self.name.startswith(("U", "R2UR", "S2UR", "VOTEU", "REDUX")):
            return set()
        first = int(found[1])
        return {first, first + 1} if ".64" in self.name or "WIDE" in self.name else {first}

    @property
    def describes(self) -> set[int]:
        """The uniform registers that describe the operands of a matrix product."""
        found = re.search(r"gdesc\[UR(\d+)\]", self.operands) if self.name.startswith(("HGMMA", "QGMMA")) else None
        if not found:
            return set()
        first, from_registers = int(found[1]), re.match(r"R\d+, R\d+, gdesc", self.operands)
        return set(range(first + 2 if from_registers else first, first + 4))


def undefined_descriptors(code: bytes) -> list[str]:
    """Matrix products of a binary that describe their operands by registers which some path to them never wrote."""
    instructions = disassembled(code)
    every = frozenset(range(_UNIFORM))
    written = [every] * len(instructions)
    written[0] = frozenset()
    seen, waiting = set[int](), [0]
    while waiting:
        number = waiting.pop()
        seen.add(number)
        after = written[number] | instructions[number].writes
        for one in instructions[number].follows:
            if one not in seen or written[one] & after != written[one]:
                written[one] &= after
                waiting.append(one)
    wrong = [instructions[number] for number in sorted(seen) if instructions[number].describes - written[number]]
    return [f"{one.address}: {one.name} {one.operands}" for one in wrong]


def beside_products(code: bytes, name: str) -> list[int]:
    """How many instructions of a name stand between a wait that leaves products running and the next wait."""
    instructions = disassembled(code)
    waits = [number for number, one in enumerate(instructions) if one.name == "WARPGROUP.DEPBAR.LE"]
    return [
        sum(one.name == name for one in instructions[here:there])
        for here, there in pairwise(waits)
        if not instructions[here].operands.split(", ")[1].startswith("0x0")
    ]


def disassembled(code: bytes) -> list[Instruction]:
    """The instructions of a binary's kernel, in order."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in text.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(lines)
        elif instruction:
            lines.append(instruction)
    return [
        Instruction(line[1], line[3], line[4], _follows(number, line, labels, len(lines)))
        for number, line in enumerate(lines)
    ]


def _follows(number: int, line: re.Match[str], labels: dict[str, int], count: int) -> tuple[int, ...]:
    conditional, name, targets = line[2], line[3], [labels[name] for name in _TARGET.findall(line[4]) if name in labels]
    if name.startswith("EXIT"):
        targets = []
    elif not name.startswith(("BRA", "BRX")):
        targets, conditional = [], "falls through"
    return tuple(one for one in (*targets, *((number + 1,) if conditional else ())) if one < count)
