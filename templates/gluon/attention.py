"""What the Gluon template of attention forward needs to know about a level-3 kernel, and which kernels it serves.

The kernel's structure is that of FlashAttention-3 (Shah et al. 2024): warps that bring tiles, warpgroups that multiply,
the scores of one step beside the values of the step before; its row tiles are handed out while it runs, and a row
tile's first scores come beside the last values of the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from spgen.ir.expr import (
    TRUE,
    Expr,
    and_,
    const,
    free_variables,
    maximum,
    minimum,
    substitute,
    tables,
    var,
    walk,
)
from spgen.ir.kernel import COLUMN_VARIABLES, FLOAT8, PROGRAM_VARIABLES, option, parts
from spgen.ir.node import Op
from spgen.templates.gluon.bits import WORD, Bits, bits_of, conjunction, solved
from spgen.templates.gluon.boxes import LEAST_BOX, box_rows, gathers, load_of, run_of
from spgen.templates.triton.attention import (
    HEADS,
    Parameter,
    Printing,
    by_tile,
    call_parameters,
    expressions_of,
    is_partial,
    names_of,
    never_full,
    padded,
    places_of,
    ranges_of,
    reads_per_pair,
    row_vectors,
    score_parameters,
)
from spgen.templates.triton.expressions import DEAL, Printed
from spgen.templates.triton.masks import Places
from spgen.templates.triton.quantize import KEYS

ENTRY = "attention"
WARPGROUPS = "warpgroups"  # the option by which a schedule asks for this form: 1 or 2 warpgroups that multiply
ROWS = 64  # of a tile, for each of them
COLUMNS = (64, 128)  # of a tile
REGISTERS = 64 * 1024  # of a multiprocessor
_SHARED, _OF_A_PROGRAM = 228 * 1024, 1024  # bytes of its shared memory, and what the driver takes of them
_NUMBERS = 768  # bytes at most of what lies there beside tiles and vectors
LEAST_REGISTERS, BRING_REGISTERS = 24, 72  # that setmaxnreg leaves a thread; of one that brings single rows
VECTOR = 8  # channels, of which tensor maps take multiples
LANES = (64, 256)  # that hold channels: whole rows of 128 bytes at least, and accumulators that fit the registers
_FEW_LANES = 128  # up to which rows are brought one by one
_TENSORS = ("q", "k", "v", "out")
ALIGN = "align"  # the option by which tiles begin at multiples of so many keys, where keys are walked in order
RESULT = "bfloat16"  # what becomes of float8
ELEMENTS = {FLOAT8: "float8e4nv"}  # Triton's names, where they differ
SCALES = ("q_scales", "k_scales", "v_scales")
_FLOAT8_LANES = 128  # of float8: channels whose sums of all steps and products of one fit the registers
_BOUNDS = ("start", "full_start", "full_stop", "stop")
_ALWAYS = ("alive", "buffer", "b", "hk", "h", "tile", "kv_len", "q_offset")
_PACKED = ("sequence", "q_start", "q_len", "k_start")
_OWN = {name: f"own_{name}" for name in COLUMN_VARIABLES}


@dataclass(frozen=True)
class RowBits:
    """A `Bits` as source."""

    name: str
    kind: str
    value: Printed
    table: str
    row: str
    wanted: bool


@dataclass(frozen=True)
class Segment:
    """A segment's expressions as source, and what each partition needs to know of a row tile for them."""

    name: str
    bounds: tuple[str, ...]  # names of start, full_start, full_stop and stop
    bound_values: tuple[Printed, ...]
    full_start: str  # the name, or "" if there are no whole tiles
    direct: bool  # keys of a tile follow each other
    gathered: bool  # hardly any do: rows are brought one by one
    columns: tuple[Printed, ...]  # where its boxes begin; where they follow each other, the first
    column_is_position: bool
    upper: Printed | None  # the first column of a tile that is too far, from `stop` of all rows
    lower: Printed | None  # the first column of a tile that is wanted
    upper_by_row: bool
    lower_by_row: bool
    bits: tuple[RowBits, ...]  # the rest of the mask as bits, if it is nothing else
    rest: Printed | None  # or the rest of the mask
    limits: tuple[str, ...]  # what is computed before the scores have come
    mask_values: tuple[str, ...]
    mask_tables: tuple[str, ...]
    row_lets: tuple[dict[str, Any], ...]
    speaks_of_rows: bool
    deals: bool


def refusal(kernel: Op) -> str | None:
    """Why this template cannot express a kernel; None if it can."""
    if kernel["dtype"] == "float32":
        return "products of float32"
    groups = option(kernel, WARPGROUPS, 0)
    if groups not in (1, 2) or kernel["block_m"] != ROWS * groups or kernel["block_n"] not in COLUMNS:
        return f"tiles of {kernel['block_m']} x {kernel['block_n']}"
    if registers(kernel)["bring"] < LEAST_REGISTERS:
        return f"{registers(kernel)['multiply']} registers"
    if kernel["head_dim"] > LANES[-1] or kernel["value_dim"] > LANES[-1]:
        return f"more than {LANES[-1]} channels"
    if kernel["head_dim"] % VECTOR or kernel["value_dim"] % VECTOR:
        return "rows that do not begin at multiples of 16 bytes"
    if kernel["pack"] > 1 or is_partial(kernel) or option(kernel, "splits", 1) > 1:
        return "calls of few rows"
    if kernel["row"] is not None:
        return "permuted rows"
    if is_fp8(kernel) and _refused_of_fp8(kernel):
        return _refused_of_fp8(kernel)
    segments = parts(kernel, "segment")
    if not segments:
        return "no keys"
    if any(op["key"] is not None for op in segments):
        return "permuted keys"
    if gathers(kernel) and max(lanes(kernel["head_dim"]), lanes(kernel["value_dim"])) > _FEW_LANES:
        return f"keys that lie apart, of more than {_FEW_LANES} channels"
    if reads_per_pair(kernel):
        return "masks that read tables pair by pair"
    return None


def is_fp8(kernel: Op) -> bool:
    """Whether q, k and v are float8 with scales."""
    return bool(kernel["dtype"] == FLOAT8)


def _refused_of_fp8(kernel: Op) -> str | None:
    """Why kernels of float8 cannot be expressed, of what other types can; None if they can."""
    if kernel["cu_seqlens"]:
        return "packed batches of float8"
    if kernel["bias"] != "none":
        return "a bias on scores of float8"
    if kernel["head_dim"] % KEYS or kernel["value_dim"] % KEYS:
        return "rows of float8 that do not begin at multiples of 16 bytes"
    if max(kernel["head_dim"], kernel["value_dim"]) > _FLOAT8_LANES:
        return f"more than {_FLOAT8_LANES} channels of float8"
    if not all(_begins_aligned(kernel, op) for op in parts(kernel, "segment")):
        return f"tiles of float8 that do not begin at multiples of {KEYS} keys, all of them following each other"
    if marks(kernel):
        return "masks of float8 that read tables"
    return None


def _begins_aligned(kernel: Op, segment: Op) -> bool:
    """Whether a segment's tiles are keys that follow each other from a multiple of 16 on."""
    if run_of(segment, kernel["block_n"]) < kernel["block_n"]:
        return False
    if segment["column"] is var("p"):
        return option(kernel, ALIGN, 1) % KEYS == 0
    return load_of(segment["column"]) is not None


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


def descriptors(kernel: Op) -> Iterator[tuple[str, str, Part]]:
    """The tensor maps that a kernel takes: name, tensor, and which of its channels come with a box."""
    for tensor in _TENSORS if is_staged(kernel) else _TENSORS[:-1]:
        for part in (head_parts if tensor in "qk" else value_parts)(kernel):
            yield f"{tensor}_blocks{part.suffix}", tensor, part


def box_of(kernel: Op, name: str) -> tuple[int, int]:
    """Rows and lanes that a descriptor brings, or takes away, at once; of float8 values, channels and keys."""
    tensor, part = next((tensor, part) for known, tensor, part in descriptors(kernel) if known == name)
    found = box_rows(kernel) if tensor in "kv" else ROWS, part.lanes
    return found[::-1] if is_fp8(kernel) and tensor == "v" else found


def element_of(kernel: Op, name: str) -> str:
    """The element type behind a data argument or a descriptor."""
    return str(RESULT if is_fp8(kernel) and name.startswith("out") else kernel["dtype"])


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    yield from (("q", "data"), ("k", "data"), ("v", "data"), ("out", "data"))
    if kernel["lse"]:
        yield "lse", "*fp32"
    yield from ((name, "desc") for name, _, _ in descriptors(kernel))
    yield from call_parameters(kernel)
    yield "scale", "fp32"
    yield from score_parameters(kernel)
    if is_fp8(kernel):
        yield from ((name, "*fp32") for name in SCALES)
    yield "tickets", "*i32"
    yield from ((size, "i32") for size in ("q_len", "k_len", "n_key_heads", "group"))
    if gathers(kernel):
        for tensor in ("k", "v"):
            yield from ((f"{tensor}_b", "stride"), (f"{tensor}_h", "stride"), (f"{tensor}_n", "step"))
    if kernel["cu_seqlens"]:
        yield "n_sequences", "i32"
    elif not is_staged(kernel):
        yield "out_b", "stride"
    if kernel["cu_seqlens"] or not is_staged(kernel):
        yield from (("out_h", "stride"), ("out_n", "stride"))
    yield "n_tickets", "i32"
    yield "NEGATIVE", "constexpr"


def symbols(kernel: Op) -> dict[str, Any]:
    """Every symbol of attention.py.jinja; its head comment says what they are."""
    sliced = {op["name"]: f"own_{op['name']}_table" for op in parts(kernel, "table")}
    printing = Printing({**names_of(kernel), **sliced}, ranges_of(kernel), row_vectors(kernel))
    segments = [_segment(kernel, op, printing) for op in parts(kernel, "segment")]
    lets = [op for op in parts(kernel, "let") if op["name"] not in printing.rows]
    columns = [op["column"] for op in parts(kernel, "segment")]
    producer = _scalars(kernel, columns, printing)
    packed = _PACKED if kernel["cu_seqlens"] else ()
    slope = ("slope",) if kernel["bias"] == "alibi" else ()
    values = dict.fromkeys(
        (*_ALWAYS, *packed, *slope, *(name for one in segments for name in (*one.bounds, *one.mask_values)), *producer)
    )
    bounds = [name for one in segments for name in one.bounds]
    marked = [one for one in segments if one.bits]
    return {
        "text": str(kernel).rstrip("\n").split("\n"),
        "parameters": parameters(kernel),
        "element": ELEMENTS.get(kernel["dtype"], kernel["dtype"]),
        "element_bytes": 1 if is_fp8(kernel) else 2,
        "fp8": is_fp8(kernel),
        "result_element": RESULT,
        "head_parts": head_parts(kernel),
        "value_parts": value_parts(kernel),
        "q_buffers": q_buffers(kernel),
        "staged": is_staged(kernel),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "box": box_rows(kernel),
        "stages": option(kernel, "stages", 2),
        "warpgroups": option(kernel, WARPGROUPS, 0),
        "registers": registers(kernel),
        "gathers": gathers(kernel),
        "q_offset": kernel["q_offset"],
        "kv_lengths": kernel["kv_lengths"],
        "cu_seqlens": kernel["cu_seqlens"],
        "head_dim": kernel["head_dim"],
        "value_dim": kernel["value_dim"],
        "softcap": kernel["softcap"],
        "sinks": kernel["sinks"],
        "bias": kernel["bias"],
        "lse": kernel["lse"],
        "call": _call(kernel),
        "values": tuple(values),
        "tables": [{"name": f"{op['name']}_table", "head": HEADS[op["heads"]]} for op in parts(kernel, "table")],
        "lets": [
            {"name": printing.names[op["name"]], "value": printing.text(op["value"], printing.names[op["name"]])}
            for op in lets
        ],
        "segments": [_bound(one, op, printing) for one, op in zip(segments, parts(kernel, "segment"), strict=True)],
        "producer_values": tuple(dict.fromkeys(("b", "hk", "h", "tile", "kv_len", *packed, *bounds, *producer))),
        "marker_values": tuple(
            dict.fromkeys(("b", "hk", "h", *bounds, *(name for one in marked for name in one.mask_values), *producer))
        ),
        "marker_tables": tuple(
            {f"{name}_table" for column in columns for name in tables(column)}.union(
                *(one.mask_tables for one in marked)
            )
        ),
        "producer_tables": tuple({f"{name}_table" for column in columns for name in tables(column)}),
        "operations": {node.op for value in expressions_of(kernel) for node in walk(value)},
    }


def _call(kernel: Op) -> tuple[str, ...]:
    """What the scheduler takes of the call."""
    offset = {"default": (), "scalar": ("q_offset",), "tensor": ("q_offsets",)}[kernel["q_offset"]]
    packed = ("cu_seqlens_q", "cu_seqlens_k", "n_sequences") if kernel["cu_seqlens"] else ()
    return (*offset, *(("kv_lengths",) if kernel["kv_lengths"] else ()), *packed)


def _segment(kernel: Op, op: Op, printing: Printing) -> Segment:
    has_full = op["full_start"] is not None and not never_full(op, kernel["block_n"], printing.ranges)
    names = tuple(f"{op['name']}_{bound}_at" for bound in _BOUNDS)
    uppers, lowers, others, bits = _kept(kernel, op, printing.rows)
    direct, box = run_of(op, kernel["block_n"]) == kernel["block_n"], box_rows(kernel)
    gathered = run_of(op, kernel["block_n"]) < LEAST_BOX
    if not gathered and not _starts_inside(op["column"]):
        lowers.append(const(0))
    rest = reduce(and_, others) if others and not bits else None
    mask = None if rest is None else printing.mask(rest, frozenset(), _OWN)
    asked = [*uppers, *lowers, *((one.value for one in bits) if bits else others)]
    lets = _row_lets(kernel, asked, printing)
    bodies = [let["value"] for let in lets]
    speaks = [*asked, *bodies, var("kv_len")]
    rows = bool(printing.rows & {name for value in speaks for name in free_variables(value)})
    speaks += [var("tile"), var("q_offset")] if rows else []
    read = {f"{name}_table" for value in speaks for name in tables(value)}
    read |= {f"{one.table}_table" for one in bits if one.table}
    heads = {HEADS[table["heads"]] for table in parts(kernel, "table") if f"{table['name']}_table" in read}
    speaks += [var(head) for head in heads if head != "0"] if read else []
    near = var("c0") if direct or bits else const(0)
    upper = reduce(minimum, [value - near for value in uppers], var("stop")) if uppers else None
    lower = reduce(maximum, [value - near for value in lowers]) if lowers else None
    own = {"c0": "c0", "stop": "stop"}
    which = ("sequence",) if kernel["cu_seqlens"] else ("b",)
    printed = tuple(_printed_bits(f"asked_{n}", one, printing) for n, one in enumerate(bits))
    limits = [
        *([] if direct else ["near"]),
        "stop",
        *(["first"] if lowers else []),
        *(_named(mask, printing, lets) if mask else []),
    ]
    return Segment(
        name=op["name"],
        bounds=names,
        bound_values=(),
        full_start=names[1] if has_full else "",
        direct=direct,
        gathered=gathered,
        columns=_columns(op["column"], printing, box, 0 if gathered else 1 if direct else kernel["block_n"] // box),
        column_is_position=op["column"] is var("p"),
        upper=None if upper is None else printing.text(upper, "upper", **own),
        lower=None if lower is None else printing.text(lower, "lower", **own),
        upper_by_row=any(printing.rows & free_variables(value) for value in uppers),
        lower_by_row=any(printing.rows & free_variables(value) for value in lowers),
        bits=printed,
        rest=mask,
        limits=tuple(limits),
        mask_values=tuple(dict.fromkeys((*names, *_scalars(kernel, speaks, printing), *(which if read else ())))),
        mask_tables=tuple(sorted(f"{name}" for name in read)),
        row_lets=tuple(
            {"name": printing.names[let["name"]], "value": printing.text(let["value"], let["name"])} for let in lets
        ),
        speaks_of_rows=rows,
        deals=mask is not None and any(f"{DEAL}(" in line for line in mask.lines),
    )


def _columns(column: Expr, printing: Printing, box: int, count: int) -> tuple[Printed, ...]:
    """Where the boxes of a tile begin, `count` of them; 0: the vector of all its columns."""
    if not count:
        return (printing.text(column, "column"),)
    firsts = (substitute(column, {"p": var("p0") + x * box}) for x in range(count))
    return tuple(printing.text(first, f"column_{x}") for x, first in enumerate(firsts))


def _kept(kernel: Op, op: Op, rows: set[str]) -> tuple[list[Expr], list[Expr], list[Expr], list[Bits]]:
    """A segment's mask apart, as `_limits`, and what remains as bits if all of it can be said so."""
    uppers, lowers, others = _limits(TRUE if op["mask"] is None else by_tile(op), places_of(rows))
    if run_of(op, kernel["block_n"]) < WORD:
        return uppers, lowers, others, []
    lets = {op["name"]: op["value"] for op in parts(kernel, "let") if op["name"] in rows}
    aligned = load_of(op["column"]) is not None
    found = [bits_of(part, lets, places_of(rows), aligned=aligned) for part in others]
    return uppers, lowers, others, [] if None in found else [one for one in found if one is not None]


def marks(kernel: Op) -> bool:
    """Whether masks of any segment are bits, which the warps that bring tiles write beside them."""
    rows = row_vectors(kernel)
    return any(_kept(kernel, op, rows)[-1] for op in parts(kernel, "segment"))


def _printed_bits(name: str, bits: Bits, printing: Printing) -> RowBits:
    value = printing.text(bits.value, f"{name}_part", c0="c0", p="p")
    table = printing.names[bits.table] if bits.table else ""
    return RowBits(name, bits.kind, value, table, printing.text(bits.row, name).value, bits.wanted)


def _limits(mask: Expr, places: Places) -> tuple[list[Expr], list[Expr], list[Expr]]:
    """A conjunction apart: columns are below all of the first, at least all of the second, and the rest holds.

    So all rows' bounds meet before columns come in: one comparison for each pair, whatever bounds there are.
    """
    found: dict[str, list[Expr]] = {"upper": [], "lower": [], "": []}
    for part in conjunction(mask):
        side, bound = solved(part, places) or ("", part)
        if bound is not TRUE:
            found[side].append(bound)
    return found["upper"], found["lower"], found[""]


def _starts_inside(column: Expr) -> bool:
    """Whether no tile begins before the first key: positions of ranges, and units of lists, do not."""
    return column is var("p") or load_of(column) is not None


def _named(mask: Printed, printing: Printing, lets: Sequence[Op]) -> list[str]:
    """The names that the value of a mask speaks of."""
    made = {line.partition(" = ")[0] for line in mask.lines}
    known = made | {printing.names[let["name"]] for let in lets} | {"i", "r", "s", "p", "c", "j"}
    return sorted(known & set(re.findall(r"\w+", mask.value)))


def _bound(segment: Segment, op: Op, printing: Printing) -> Segment:
    """The same with the source of its bounds, which the scheduler computes."""
    whole = (op["full_start"], op["full_stop"]) if segment.full_start else (op["start"], op["start"])
    values = [op["start"], *whole, op["stop"]]
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
    given = {*PROGRAM_VARIABLES} - {"n_heads", "group"}
    if not kernel["cu_seqlens"]:
        given -= {"q_len", "q_start", "k_start"}
    found = {name for value in values for name in free_variables(value)}
    return [printing.names[name] for name in sorted(found & (lets | given))]
