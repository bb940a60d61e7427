"""What a kernel of the Gluon template takes of a multiprocessor: threads, registers, lanes and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from spgen.ir.kernel import FLOAT8, option
from spgen.ir.node import Op
from spgen.templates.gluon.bits import WORD
from spgen.templates.gluon.boxes import gathers
from spgen.templates.gluon.segments import marks
from spgen.templates.triton.attention import (
    padded,
)

WARPGROUPS = "warpgroups"  # the option by which a schedule asks for this form: 1 or 2 warpgroups that multiply
ROWS = 64  # of a tile, for each of them
COLUMNS = (64, 128)  # of a tile
REGISTERS = 64 * 1024  # of a multiprocessor
_SHARED, _OF_A_PROGRAM = 228 * 1024, 1024  # bytes of its shared memory, and what the driver takes of them
_NUMBERS = 768  # bytes at most of what lies there beside tiles and vectors
LEAST_REGISTERS, BRING_REGISTERS = 24, 72  # that setmaxnreg leaves a thread; of one that brings single rows
LANES = (64, 256)  # that hold channels: whole rows of 128 bytes at least, and accumulators that fit the registers


def is_fp8(kernel: Op) -> bool:
    """Whether q, k and v are float8 with scales."""
    return bool(kernel["dtype"] == FLOAT8)


def registers(kernel: Op) -> dict[str, int]:
    """Of a thread that multiplies, that brings tiles and that hands them out: all there are, in steps of 8.

    Rows that are brought one by one take a warpgroup of their own.
    """
    count, groups = option(kernel, WARPGROUPS, 0), threads(kernel) // 128
    all_of_them = REGISTERS // programs(kernel) // threads(kernel) // 8 * 8 * groups
    if not brings_by_warpgroup(kernel):
        most = option(kernel, "registers", (all_of_them - LEAST_REGISTERS) // count // 8 * 8)
        rest = all_of_them - count * most
        return {"multiply": most, "bring": rest, "schedule": rest}
    most = (all_of_them - BRING_REGISTERS - LEAST_REGISTERS) // count // 8 * 8
    return {"multiply": most, "bring": all_of_them - count * most - LEAST_REGISTERS, "schedule": LEAST_REGISTERS}


def brings_by_warpgroup(kernel: Op) -> bool:
    """Whether a warpgroup brings tiles, instead of one warp: rows one by one, for two warpgroups that multiply."""
    return gathers(kernel) and option(kernel, WARPGROUPS, 0) > 1


def threads(kernel: Op) -> int:
    """Of a program: warps that do not multiply count as a warpgroup, or two."""
    return 128 * (option(kernel, WARPGROUPS, 0) + (2 if brings_by_warpgroup(kernel) else 1))


def programs(kernel: Op) -> int:
    """Programs that share a multiprocessor, so that one computes its softmax while another multiplies."""
    return 2 // option(kernel, WARPGROUPS, 0)


@dataclass(frozen=True)
class Part:
    """Lanes that hold the channels of a tile from `start` on, in shared memory of their own."""

    start: int
    lanes: int

    @property
    def suffix(self) -> str:
        """What its names end in."""
        return f"_{self.start}" if self.start else ""

    @property
    def layout(self) -> str:
        """The name of its layout in shared memory."""
        return "tiles" if self.swizzle == 128 else "narrow"

    @property
    def swizzle(self) -> int:
        """Bytes of a row that are swizzled."""
        return min(128, 2 * self.lanes)


def lanes(channels: int) -> int:
    """Lanes that hold this many channels: a power of two, or three quarters of one."""
    whole = max(padded(channels), LANES[0])
    return whole * 3 // 4 if LANES[0] < whole and channels <= whole * 3 // 4 else whole


def _split(channels: int, most: int) -> tuple[Part, ...]:
    wanted = lanes(channels)
    first = min(most, 1 << (wanted.bit_length() - 1))
    return (Part(0, first),) if first == wanted else (Part(0, first), Part(first, wanted - first))


def head_parts(kernel: Op) -> tuple[Part, ...]:
    """What holds the channels of q and k."""
    if is_fp8(kernel):
        return (Part(0, max(padded(kernel["head_dim"]), LANES[0])),)
    return _split(kernel["head_dim"], LANES[-1])


def value_parts(kernel: Op) -> tuple[Part, ...]:
    """What holds the channels of v and of the results; a product has no more lanes than registers on entry."""
    if is_fp8(kernel):
        return (Part(0, max(padded(kernel["value_dim"]), LANES[0])),)
    return _split(kernel["value_dim"], LANES[-1] // programs(kernel))


def is_staged(kernel: Op) -> bool:
    """Whether there is room for results in shared memory."""
    return _fits(kernel, buffers=2, results=True)


def q_buffers(kernel: Op) -> int:
    """Row tiles of Q for which there is room in shared memory."""
    return 2 if _fits(kernel, buffers=2, results=is_staged(kernel)) else 1


def _fits(kernel: Op, *, buffers: int, results: bool) -> bool:
    if is_fp8(kernel):  # by its schedule
        return True
    head, value, stages = lanes(kernel["head_dim"]), lanes(kernel["value_dim"]), option(kernel, "stages", 2)
    halves = kernel["block_m"] * (buffers * head + results * value) + stages * kernel["block_n"] * (head + value)
    words = stages * kernel["block_n"] * (gathers(kernel) + (kernel["bias"] == "key"))
    words += stages * kernel["block_n"] // WORD * kernel["block_m"] * marks(kernel)
    return bool(2 * halves + 4 * words + _NUMBERS <= _SHARED // programs(kernel) - _OF_A_PROGRAM)
