"""What a level-3 segment becomes in the Gluon template: source of its bounds, columns and masks, and what they read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
)
from spgen.ir.kernel import COLUMN_VARIABLES, PROGRAM_VARIABLES, parts
from spgen.ir.node import Op
from spgen.templates.gluon.bits import WORD, Bits, bits_of, conjunction, solved
from spgen.templates.gluon.boxes import LEAST_BOX, box_rows, load_of, run_of
from spgen.templates.triton.attention import (
    HEADS,
    Printing,
    by_tile,
    never_full,
    places_of,
    row_vectors,
)
from spgen.templates.triton.expressions import DEAL, Printed
from spgen.templates.triton.masks import Places

_BOUNDS = ("start", "full_start", "full_stop", "stop")
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


def segment_of(kernel: Op, op: Op, printing: Printing) -> Segment:
    """A segment's columns and masks as source; its bounds are named only."""
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
        mask_values=tuple(dict.fromkeys((*names, *scalars(kernel, speaks, printing), *(which if read else ())))),
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


def with_bounds(segment: Segment, op: Op, printing: Printing) -> Segment:
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


def scalars(kernel: Op, values: Iterable[Expr], printing: Printing) -> list[str]:
    """What some expressions speak of that the scheduler knows, as names of the source."""
    lets = {op["name"] for op in parts(kernel, "let")} - printing.rows
    given = {*PROGRAM_VARIABLES} - {"n_heads", "group"}
    if not kernel["cu_seqlens"]:
        given -= {"q_len", "q_start", "k_start"}
    found = {name for value in values for name in free_variables(value)}
    return [printing.names[name] for name in sorted(found & (lets | given))]
