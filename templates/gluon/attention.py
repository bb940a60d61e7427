"""What the Gluon template of attention forward needs to know about a level-3 kernel, and which kernels it serves.

The kernel's structure is that of FlashAttention-3 (Shah et al. 2024): warps that bring tiles, warpgroups that multiply,
the scores of one step beside the values of the step before; its row tiles are handed out while it runs, and a row
tile's first scores come beside the last values of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spgen.ir.expr import TRUE, Expr, and_, free_variables, tables, var, walk
from spgen.ir.kernel import COLUMN_VARIABLES, PROGRAM_VARIABLES, option, parts
from spgen.ir.node import Op
from spgen.templates.triton.attention import (
    HEADS,
    INSIDE,
    Parameter,
    Printing,
    by_tile,
    expressions_of,
    gathers,
    is_partial,
    names_of,
    never_full,
    padded,
    ranges_of,
    reads_per_pair,
    row_vectors,
)
from spgen.templates.triton.expressions import DEAL, Printed

ENTRY = "attention"
DESCRIPTORS = ("q_blocks", "k_blocks", "v_blocks", "out_blocks")
LANES = (64, 128)  # channels that the layouts hold: whole rows of 128 bytes, and accumulators that fit the registers
_BOUNDS = ("start", "full_start", "full_stop", "stop")
_ALWAYS = ("alive", "b", "hk", "h", "tile", "kv_len", "q_offset")
_OWN = {name: f"own_{name}" for name in (*COLUMN_VARIABLES, INSIDE)}


@dataclass(frozen=True)
class Segment:
    """A segment's expressions as source, and what each partition needs to know of a row tile for them."""

    name: str
    bounds: tuple[str, ...]  # names of start, full_start, full_stop and stop
    bound_values: tuple[Printed, ...]
    full_start: str  # the name, or "" if there are no whole tiles
    column: Printed
    column_is_position: bool
    mask: Printed
    mask_values: tuple[str, ...]
    mask_tables: tuple[str, ...]
    row_lets: tuple[dict[str, Any], ...]
    deals: bool


def refusal(kernel: Op) -> str | None:
    """Why this template cannot express a kernel; None if it can."""
    if kernel["dtype"] == "float32":
        return "products of float32"
    if (kernel["block_m"], kernel["block_n"]) != (128, 128):
        return f"tiles of {kernel['block_m']} x {kernel['block_n']}"
    if lanes(kernel["head_dim"]) > LANES[-1] or lanes(kernel["value_dim"]) > LANES[-1]:
        return f"more than {LANES[-1]} channels"
    if kernel["pack"] > 1 or is_partial(kernel) or option(kernel, "splits", 1) > 1:
        return "calls of few rows"
    if kernel["row"] is not None:
        return "permuted rows"
    if kernel["cu_seqlens"]:
        return "packed batches"
    if kernel["kv_lengths"]:
        return "lengths of keys on the device"
    if kernel["bias"] != "none":
        return "a bias"
    if not parts(kernel, "segment") or gathers(kernel):
        return "keys that do not follow each other"
    if reads_per_pair(kernel):
        return "masks that read tables pair by pair"
    return None


def lanes(channels: int) -> int:
    """Lanes that hold this many channels: rows of 128 bytes at least."""
    return max(padded(channels), LANES[0])


def box_of(kernel: Op, name: str) -> tuple[int, int]:
    """Rows and lanes that a descriptor brings, or takes away, at once."""
    rows = kernel["block_n"] if name in ("k_blocks", "v_blocks") else kernel["block_m"] // 2
    return rows, lanes(kernel["head_dim" if name in ("q_blocks", "k_blocks") else "value_dim"])


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    yield from (("q", "data"), ("k", "data"), ("v", "data"), ("out", "data"))
    if kernel["lse"]:
        yield "lse", "*fp32"
    yield from ((name, "desc") for name in DESCRIPTORS)
    if kernel["q_offset"] != "default":
        yield "q_offset", "*index" if kernel["q_offset"] == "tensor" else "i32"
    if kernel["kv_lengths"]:
        yield "kv_lengths", "*index"
    for table in parts(kernel, "table"):
        yield f"{table['name']}_table", "*i32"
        yield from ((f"{table['name']}_table_{axis}", "i64") for axis in ("b", "h", "r"))
        yield from ((f"{table['name']}_table_{size}", "i32") for size in ("rows", "cols"))
    yield "scale", "fp32"
    if kernel["softcap"]:
        yield "softcap", "fp32"
    if kernel["sinks"]:
        yield "sink_logits", "*fp32"
    yield "tickets", "*i32"
    yield from ((size, "i32") for size in ("q_len", "k_len", "n_key_heads", "group", "n_tickets"))
    yield "NEGATIVE", "constexpr"


def symbols(kernel: Op) -> dict[str, Any]:
    """Every symbol of attention.py.jinja; its head comment says what they are."""
    sliced = {op["name"]: f"own_{op['name']}_table" for op in parts(kernel, "table")}
    printing = Printing({**names_of(kernel), **sliced}, ranges_of(kernel), row_vectors(kernel))
    segments = [_segment(kernel, op, printing) for op in parts(kernel, "segment")]
    lets = [op for op in parts(kernel, "let") if op["name"] not in printing.rows]
    columns = [op["column"] for op in parts(kernel, "segment")]
    producer = _scalars(kernel, columns, printing)
    values = dict.fromkeys((*_ALWAYS, *(name for one in segments for name in (*one.bounds, *one.mask_values)), *producer))
    bounds = [name for one in segments for name in one.bounds]
    return {
        "text": str(kernel).rstrip("\n").split("\n"),
        "parameters": parameters(kernel),
        "element": kernel["dtype"],
        "head_lanes": lanes(kernel["head_dim"]),
        "value_lanes": lanes(kernel["value_dim"]),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "stages": option(kernel, "stages", 2),
        "registers": option(kernel, "registers", 240),
        "others": (64 * 1024 - 256 * option(kernel, "registers", 240)) // 128 // 8 * 8,
        "q_offset": kernel["q_offset"],
        "kv_lengths": kernel["kv_lengths"],
        "softcap": kernel["softcap"],
        "sinks": kernel["sinks"],
        "lse": kernel["lse"],
        "call": _call(kernel),
        "values": tuple(values),
        "tables": [{"name": f"{op['name']}_table", "head": HEADS[op["heads"]]} for op in parts(kernel, "table")],
        "lets": [{"name": printing.names[op["name"]], "value": printing.text(op["value"], printing.names[op["name"]])} for op in lets],
        "segments": [_bound(one, op, printing) for one, op in zip(segments, parts(kernel, "segment"), strict=True)],
        "producer_values": tuple(dict.fromkeys(("b", "hk", "h", "tile", *bounds, *producer))),
        "producer_tables": tuple({f"{name}_table" for column in columns for name in tables(column)}),
        "operations": {node.op for value in expressions_of(kernel) for node in walk(value)},
    }


def _call(kernel: Op) -> tuple[str, ...]:
    """What the scheduler takes of the call."""
    offset = {"default": (), "scalar": ("q_offset",), "tensor": ("q_offsets",)}[kernel["q_offset"]]
    return (*offset, *(("kv_lengths",) if kernel["kv_lengths"] else ()))


def _segment(kernel: Op, op: Op, printing: Printing) -> Segment:
    has_full = op["full_start"] is not None and not never_full(op, kernel["block_n"], printing.ranges)
    names = tuple(f"{op['name']}_{bound}_at" for bound in _BOUNDS)
    wanted = and_(var(INSIDE), TRUE if op["mask"] is None else by_tile(op))
    mask = printing.mask(wanted, frozenset(), _OWN)
    lets = _row_lets(kernel, [wanted], printing)
    speaks = [wanted, *(let["value"] for let in lets), var("tile"), var("q_offset"), var("kv_len"), var("b")]
    read = {f"{name}_table" for value in speaks for name in tables(value)}
    heads = {HEADS[table["heads"]] for table in parts(kernel, "table") if f"{table['name']}_table" in read}
    speaks += [var(head) for head in heads if head != "0"]
    return Segment(
        name=op["name"],
        bounds=names,
        bound_values=(),
        full_start=names[1] if has_full else "",
        column=printing.text(op["column"], "column", p="p0"),
        column_is_position=op["column"] is var("p"),
        mask=mask,
        mask_values=tuple(dict.fromkeys((*names, *_scalars(kernel, speaks, printing)))),
        mask_tables=tuple(sorted(read)),
        row_lets=tuple({"name": printing.names[let["name"]], "value": printing.text(let["value"], let["name"])} for let in lets),
        deals=any(f"{DEAL}(" in line for line in mask.lines),
    )


def _bound(segment: Segment, op: Op, printing: Printing) -> Segment:
    """The same with the source of its bounds, which the scheduler computes."""
    zero = op["start"] if not segment.full_start else None
    values = [op["start"], zero or op["full_start"], zero or op["full_stop"], op["stop"]]
    printed = tuple(printing.text(value, name) for value, name in zip(values, segment.bounds, strict=True))
    return Segment(**{**segment.__dict__, "bound_values": printed})


def _row_lets(kernel: Op, values: Iterable[Expr], printing: Printing) -> list[Op]:
    """The vectors over rows that some expressions speak of, in order."""
    wanted = {name for value in values for name in free_variables(value)}
    found = []
    for op in reversed(parts(kernel, "let")):
        if op["name"] in wanted and op["name"] in printing.rows:
            found.append(op)
            wanted |= free_variables(op["value"])
    return found[::-1]


def _scalars(kernel: Op, values: Iterable[Expr], printing: Printing) -> list[str]:
    """What some expressions speak of that the scheduler knows, as names of the source."""
    lets = {op["name"] for op in parts(kernel, "let")} - printing.rows
    given = {*PROGRAM_VARIABLES} - {"q_len", "n_heads", "group", "q_start", "k_start"}
    found = {name for value in values for name in free_variables(value)}
    return [printing.names[name] for name in sorted(found & (lets | given))]

