"""What a compiled kernel takes of a multiprocessor, read from its binary: no device and no other tool is needed.

NVIDIA's binaries are ELF files whose section `.nv.info` lists, for each function, attributes as (format, attribute,
size, value); AMD's assembly ends with the same numbers as text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from spgen.autotune.model import Resources
from spgen.errors import ToolchainError
from spgen.target import Target

# attributes whose value is (symbol, number); the names are those of cuobjdump
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
_WITH_VALUE = 4  # the format whose size counts the bytes that follow; other formats hold their value in it
_SECTION = struct.Struct("<IIQQQQIIQQ")  # of a 64-bit ELF file: name, type, flags, address, offset, size, …


def resources(built: Any, target: Target) -> Resources:
    """Registers and spilled bytes of a thread, and shared memory of a program, of Triton's compiled kernel."""
    if target.kind == "cuda":
        registers, spilled = _of_cubin(built.asm["cubin"])
    else:
        registers, spilled = _of_assembly(built.asm["amdgcn"])
    return Resources(registers, built.metadata.shared, spilled)


def _of_cubin(code: bytes) -> tuple[int, int]:
    """A thread's frame holds nothing but spilled registers: kernels have no arrays of their own."""
    found = dict(_attributes(_section(code, ".nv.info")))
    if _REGISTERS not in found:
        raise ToolchainError("ptxas", given="a binary that names no registers", allowed="an ELF file with .nv.info")
    return found[_REGISTERS], found.get(_FRAME_SIZE, 0)


def _section(code: bytes, wanted: str) -> bytes:
    """The contents of one section of an ELF file, empty if there is none."""
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count, names_at = struct.unpack_from("<HHH", code, 58)
    headers = [_SECTION.unpack_from(code, table + number * size) for number in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        if code[start : code.index(b"\0", start)].decode() == wanted:
            return code[header[4] : header[4] + header[5]]
    return b""


def _attributes(info: bytes) -> Iterator[tuple[int, int]]:
    """Each attribute with the number behind its symbol; a binary of ours has one function."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _WITH_VALUE:
            continue
        if size >= 8:
            yield attribute, struct.unpack_from("<I", info, at + 4)[0]
        at += size


def _of_assembly(text: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # the count of vector registers includes the accumulation registers, which lie in the same file
    return number("vgpr_count"), number("private_segment_fixed_size")
