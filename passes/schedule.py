"""schedule: position bounds of each segment, and the kernel with its schedule attached (level 2 to level 3).

segment range  lo = max(0, i_lo - 1023)  hi = i_hi + 1  below = x
    ->  let s0_start = max(0, i_lo - 1023)   let s0_stop = max(s0_start, i_hi + 1)   …
        segment  start = s0_start  full_start = s0_full_start  full_stop = s0_full_stop  stop = s0_stop
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spgen.ir import expr
from spgen.ir.expr import Expr, maximum, minimum, select, substitute, var
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.ir.tiles import segments, table_ops

_BOUNDS = ("start", "full_start", "full_stop", "stop")


@dataclass(frozen=True)
class Call:
    """What a call fixes besides the pattern: element type, head sizes, and which arguments are tensors."""

    dtype: str
    head_dim: int
    value_dim: int
    q_offset: str = "default"
    kv_lengths: bool = False
    lse: bool = False
    cu_seqlens: bool = False
    softcap: bool = False
    sinks: bool = False
    bias: str = "none"


def schedule(program: Op, call: Call, pack: int, options: Sequence[str]) -> Op:
    """The level-3 kernel of a tiled program."""
    lets: list[Op] = []
    runs = [_run(segment, program, lets) for segment in segments(program)]
    used = _tables_read([*lets, *runs, program])
    tables = [KERNEL.make("table", name=t["name"], heads=t["heads"]) for t in table_ops(program) if t["name"] in used]
    return KERNEL.make(
        "attention", *tables, *lets, *runs,
        dtype=call.dtype, head_dim=call.head_dim, value_dim=call.value_dim, block_m=program["block_m"],
        block_n=program["block_n"], pack=pack, q_offset=call.q_offset, kv_lengths=call.kv_lengths,
        cu_seqlens=call.cu_seqlens, softcap=call.softcap, sinks=call.sinks, bias=call.bias, lse=call.lse,
        row=program["row"], options=tuple(options),
    )  # fmt: skip


def _tables_read(ops: Sequence[Op]) -> set[str]:
    values = [value for op in ops for _, value in op.attrs if isinstance(value, Expr)]
    return {name for value in values for name in expr.tables(value)}


def _run(segment: Op, program: Op, lets: list[Op]) -> Op:
    """The level-3 segment; its bounds are appended to `lets`."""

    def let(suffix: str, value: Expr) -> Expr:
        if value.op in ("const", "var"):
            return value
        lets.append(KERNEL.make("let", name=f"{segment['name']}_{suffix}", per="program", value=value))
        return var(f"{segment['name']}_{suffix}")

    if segment["splits"]:
        bounds = _listed_bounds(segment, program["slot"])
    else:
        bounds = _closed_bounds(segment, program["block_n"], let)
    if segment["when"] is not None:
        wanted = let("when", segment["when"])
        bounds = {name: select(wanted, value, bounds["start"]) for name, value in bounds.items()}
    named = {name: let(name, bounds[name]) for name in _BOUNDS if name in bounds}
    return KERNEL.make(
        "segment", name=segment["name"], contiguous=segment["contiguous"], column=segment["column"],
        key=segment["key"], mask=segment["mask"], **named,
    )  # fmt: skip


def _listed_bounds(segment: Op, slot: Expr) -> dict[str, Expr]:
    names = _BOUNDS if segment["exact"] else ("start", "stop")
    return {name: expr.load(segment["splits"], slot, _BOUNDS.index(name)) for name in names}


def _closed_bounds(segment: Op, block_n: int, let: Callable[[str, Expr], Expr]) -> dict[str, Expr]:
    """Positions of the columns lo, inner_lo, inner_hi and hi, in order; no full part shorter than a tile."""
    unit = segment["unit"]

    def below(column: Expr, up: bool) -> Expr:
        position: Expr = substitute(segment["below"], {"x": column})
        rounded: Expr = (position + (unit - 1 if up else 0)) // unit * unit
        return rounded

    start = let("start", below(let("lo", segment["lo"]), up=False))
    stop = let("stop", maximum(below(let("hi", segment["hi"]), up=True), start))
    if not segment["exact"]:
        return {"start": start, "stop": stop}
    first = maximum(below(let("inner_lo", segment["inner_lo"]), up=True), start)
    last = minimum(below(let("inner_hi", segment["inner_hi"]), up=False), stop)
    first, last = let("first", first), let("last", last)
    enough = let("has_full", (last - first) >= block_n)
    return {
        "start": start,
        "full_start": select(enough, first, start),
        "full_stop": select(enough, last, start),
        "stop": stop,
    }
