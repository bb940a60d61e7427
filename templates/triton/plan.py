"""What the Triton template of planning needs to know about the tables of a level-2 program.

A module has two kernels: `collect` makes the tables that follow from the pattern's tensors alone, `split` those that
also read other tables. Each program of a kernel works for one table; `parameters` is the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spgen.ir.expr import Expr, tables, walk
from spgen.ir.node import Op, Slot
from spgen.ir.ranges import Range
from spgen.templates.triton.expressions import Printed, print_expression

COLLECT, SPLIT = "collect", "split"
ENTRIES = (COLLECT, SPLIT)

LANES = 1024  # elements that a program looks at together
LIST_LANES: tuple[int, ...] = (64, 256, LANES)  # lengths of lists that can be sorted; others go through a bitmap
SPARSE = 4  # words of a bitmap for each entry: beyond them even long lists are sorted
_LATE = ("splits", "groups")  # what `split` makes
TILES = 32  # row tiles whose position bounds a program computes
FRACTIONS = 4  # of a list, between which a search decides at a time
WARPS = 4  # of a program
BITMAPS: tuple[int, ...] = (64, 1024, 4096)  # words of a bitmap in shared memory; more units come piece by piece
SHORT = 32  # words of a bitmap that many short lists have side by side
STATIC_SHARED = (
    44 * 1024
)  # bytes of shared memory that a program takes itself; 48 KB are the limit, Triton's own included
BUFFER = 24 * 1024  # bytes of lists and groups that are put together in shared memory: several programs share it
WORDS = 128  # words of 32 bits that a program packs from a mask

_RANGES: dict[str, Range] = dict.fromkeys(
    ("b", "hk", "h", "tile", "q_len", "kv_len", "n_heads", "group", "q_start", "k_start"), (0, None)
)
_BOUNDS = (("lo", False), ("inner_lo", True), ("inner_hi", False), ("hi", True))


@dataclass(frozen=True)
class Parameter:
    """One argument of a rendered kernel.

    `type` is "*i32", "*i64", "*u8", "*index" (a pointer to int32 or int64), "i32", "i64", or "unit" (a last stride: the
    constant 1 or int64). `changes` says whether each call brings its own value, rather than each set of shapes.
    """

    name: str
    type: str
    changes: bool = False


@dataclass(frozen=True)
class Work:
    """How one table is made: the method, and for a list of few entries the lanes that hold it (0: it has more).

    `partner` is a table that is made beside it: the ends of the runs whose starts these are; the groups, of `words`
    words each, of the units that are marked. A bitmap of `bitmap` words lies in shared memory; in global memory where
    that is 0. Of given lists a program looks at `width` entries of each row at a time, which may be the `whole` row.
    """

    op: Op
    method: str
    lanes: int = 0
    partner: str = ""
    words: int = 0
    bitmap: int = 0
    width: int = 0
    whole: bool = False

    @property
    def sizes(self) -> str:
        """What the text of a planning says of it beside the operation."""
        shown = (self.lanes, self.partner, self.words, self.bitmap, self.width, self.whole)
        return " ".join([self.method, *map(str, shown)])

    @property
    def name(self) -> str:
        """The table's."""
        return str(self.op["name"])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The tensors of the pattern that are read."""
        return tuple(value for _, value in self.op.attrs if isinstance(value, Slot))

    def core(self, slot: Slot) -> int:
        """The axes of a tensor behind its batch and heads."""
        op = self.op
        by_row = op.kind in ("units", "bits", "groups") and op["rows"] and op["indptr"] is None
        return 2 if by_row and slot in (op["mask"], op["indices"]) else 1

    @property
    def side_by_side(self) -> bool:
        """Whether a program makes several lists at a time."""
        return self.method in ("compacted", "sorted", "short")

    @property
    def list_rows(self) -> int:
        """How many lists those are."""
        return LANES // self.lanes if self.lanes else 4

    @property
    def chunk(self) -> int:
        """Entries, or words of a bitmap, that a program looks at together."""
        return min(LANES, 4 * self.bitmap) if self.bitmap else LANES

    @property
    def places(self) -> int:
        """Entries of a list, and their groups, that are put together in shared memory."""
        fit = min(BUFFER, STATIC_SHARED - 8 * self.bitmap) // (4 * (1 + self.words))
        return min(1 << fit.bit_length() - 1, self.lanes or fit)

    @property
    def copied(self) -> int:
        """Words that are copied together from there."""
        return min(4 * LANES, self.places)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: a bitmap, a rank for each of its words, and a part of the tables."""
        parts = 4 * (1 + self.words) * self.places if self.method == "marked" else 0
        return 8 * self.bitmap + parts if self.bitmap else 0

    @property
    def scratch(self) -> bool:
        """Whether it takes global memory beside the table."""
        return self.method == "runs" or (self.method == "marked" and not self.bitmap)

    @property
    def span(self) -> int:
        """Groups of rows that a row tile can cross."""
        op = self.op
        united = op.kind in ("units", "groups") and op["row_tile"] and op["rows"]
        return (op["row_tile"] - 1) // op["rows"] + 2 if united else 1


@dataclass(frozen=True)
class Planning:
    """The tables that the kernels make, and which arguments they take: `q_offset` as in a level-3 kernel.

    In a packed batch the kernels find sequences by cu_seqlens_q and cu_seqlens_k. With `ptx` they may use PTX, by which
    they reach shared memory.
    """

    works: tuple[Work, ...]
    heads: tuple[tuple[str, str], ...]  # whose head axis each table of the program has
    q_offset: str
    kv_lengths: bool
    packed: bool = False
    ptx: bool = False

    def __str__(self) -> str:
        made = (f"{work.sizes} {work.op}" for work in self.works)
        heads = ", ".join(f"{name} {heads}" for name, heads in self.heads)
        call = f"q_offset {self.q_offset}, kv_lengths {self.kv_lengths}{', packed' if self.packed else ''}"
        call += ", ptx" if self.ptx else ""
        return f"{call}; heads: {heads}\n{''.join(made)}"

    def of(self, entry: str) -> tuple[Work, ...]:
        """The tables that a kernel makes."""
        return tuple(work for work in self.works if (work.method in _LATE) == (entry == SPLIT))

    def shared(self, entry: str) -> int:
        """Bytes of shared memory that a kernel takes beside Triton's own."""
        return max((work.shared for work in self.of(entry)), default=0)

    def read_by(self, work: Work) -> tuple[str, ...]:
        """The tables that a table is made from."""
        if work.method == "groups":
            return (self.units_of(work.op),)
        return tuple(sorted(split_reads(work.op))) if work.method == "splits" else ()

    def units_of(self, groups: Op) -> str:
        """The table of the units that `groups` stands beside."""
        return next(work.name for work in self.works if is_beside(groups, work.op))


def is_beside(groups: Op, units: Op) -> bool:
    """Whether `groups` says who lists each of `units`."""
    wanted = [(name, value) for name, value in groups.attrs if name not in ("name", "heads", "words")]
    return groups.kind == "groups" and units.kind == "units" and wanted == [*units.attrs[2:]]


def method_of(op: Op, entries: int, words: int, shared: bool = False) -> Work | None:
    """How a table is made; None where no kernel makes it.

    Lists of `entries` entries, repeats included, are sorted or go through a bitmap of `words` words: sorted if they are
    short, or the bitmap is very long. `shared` says whether bitmaps may lie in shared memory, where marking pays for
    short lists too.
    """
    if op.kind == "units" and op["mask"] is None:
        lanes = next((lanes for lanes in LIST_LANES if entries <= lanes), 0)
        if op["indptr"] is None:
            if shared and 0 < lanes < LIST_LANES[-1] and words <= SHORT:
                return Work(op, "short", lanes, bitmap=SHORT * (LANES // lanes + 1))
            if 0 < lanes <= LIST_LANES[0 if shared else -2] or (lanes > 0 and words > SPARSE * entries):
                return Work(op, "sorted", lanes)
        if not shared:
            return Work(op, "marked")
        return Work(op, "marked", lanes, bitmap=next((size for size in BITMAPS if words <= size), BITMAPS[-1]))
    if op.kind == "units":
        return Work(op, "compacted")
    if op.kind == "bits":
        if op["mask"] is not None:
            return Work(op, "transposed" if op["by_unit"] else "packed")
        return Work(op, "bits") if op["indptr"] is None and not op["by_unit"] else None
    if op.kind == "groups":
        return Work(op, "groups") if op["mask"] is None else None
    if op.kind == "extent":
        return Work(op, "extent", 1 << (op["row_tile"] - 1).bit_length())
    if op.kind == "diagonal_runs" and op["part"] == "starts":
        lanes = next((lanes for lanes in LIST_LANES if entries <= lanes), LIST_LANES[-1])
        return Work(op, "runs", lanes)
    kinds = ("diagonal_bits", "documents", "capacity", "order", "rank", "splits")
    return Work(op, op.kind) if op.kind in kinds else None


def together(works: Sequence[Work]) -> tuple[Work, ...]:
    """`works` with groups made beside the units that a bitmap lists: its bits tell each entry's place."""
    found = []
    for work in works:
        beside = [other for other in works if work.method == "marked" and is_beside(other.op, work.op)]
        found += [replace(work, partner=other.name, words=other.op["words"]) for other in beside[:1]] or [work]
    partners = {work.partner for work in found}
    return tuple(work for work in found if work.name not in partners)


def with_width(work: Work, count: int) -> Work:
    """`work` with how many of a row's `count` entries a program looks at at a time: as few lanes as possible idle."""
    least = work.chunk >> work.span.bit_length() - 1
    widths = [1 << bit for bit in range(work.chunk.bit_length()) if 1 << bit >= max(least, 32)]
    width = min(reversed(widths), key=lambda width: -(-count // width) * width)
    return replace(work, width=width, whole=count <= width)


def ends_beside(op: Op, ops: Sequence[Op]) -> str:
    """The table of the ends of the runs whose starts are `op`."""
    wanted = {**dict(op.attrs), "name": "", "part": "ends"}
    return next(
        str(other["name"]) for other in ops if other.kind == op.kind and {**dict(other.attrs), "name": ""} == wanted
    )


def parameters(planning: Planning, entry: str) -> tuple[Parameter, ...]:
    """The arguments of a rendered kernel, in order."""
    works = planning.of(entry)
    found = [*_call(planning)]
    for slot in slots(planning, entry):
        found += _tensor(slot)
    for name in reads(planning) if entry == SPLIT else ():
        found.append(Parameter(f"{name}_table", "*i32", changes=True))
        found += (Parameter(f"{name}_table_{axis}", "i64") for axis in ("b", "h", "r"))
        found += (Parameter(f"{name}_table_{size}", "i32") for size in ("rows", "cols"))
    for work in works:
        found += (Parameter(name, "*i32", changes=True) for name in (work.name, work.partner) if name)
        if work.scratch:
            found += (Parameter(f"{work.name}_words", "*i32", changes=True), Parameter(f"{work.name}_step", "i32"))
        found += (Parameter(f"{work.name}_{size}", "i32") for size in ("heads", "rows", "cols", "lists", "end"))
    return tuple(found)


def slots(planning: Planning, entry: str) -> tuple[Slot, ...]:
    """The tensors of the pattern that a kernel reads."""
    return tuple(dict.fromkeys(slot for work in planning.of(entry) for slot in work.slots))


def _call(planning: Planning) -> Iterator[Parameter]:
    if planning.kv_lengths:
        yield Parameter("kv_lengths", "*index", changes=True)
    if planning.q_offset != "default":
        yield Parameter("q_offset", "*index" if planning.q_offset == "tensor" else "i32", changes=True)
    if planning.packed:
        yield from (Parameter(name, "*index", changes=True) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        yield Parameter("n_sequences", "i32")
    yield from (Parameter(size, "i32") for size in ("q_len", "k_len", "n_heads", "group"))


def _tensor(slot: Slot) -> Iterator[Parameter]:
    name = f"data_{slot.index}"
    pointer = {"int32": "*i32", "int64": "*i64"}.get(slot.dtype, "*u8")
    yield Parameter(name, pointer, changes=True)
    yield from (Parameter(f"{name}_{axis}", "i64") for axis in ("b", "h", "r"))
    yield Parameter(f"{name}_c", "unit")
    yield from (Parameter(f"{name}_{size}", "i32") for size in ("rows", "cols"))


def split_reads(op: Op) -> frozenset[str]:
    """The tables that a table of position bounds reads."""
    return frozenset({str(op["units"])}).union(*map(tables, split_limits(op)))


def reads(planning: Planning) -> tuple[str, ...]:
    """The tables that `split` reads."""
    return tuple(sorted({name for work in planning.of(SPLIT) for name in planning.read_by(work)}))


def split_limits(op: Op) -> tuple[Expr, ...]:
    """In units, which of them lie below each of a run's bounds; two bounds if the run is never whole, else four."""
    unit = op["unit"]
    found = []
    for bound, up in _BOUNDS if op["exact"] else (_BOUNDS[0], _BOUNDS[3]):
        column = op[bound] - op["base"]
        if op["starts"]:
            found.append(column if up else column - (unit - 1))
        else:
            found.append((column + (unit - 1 if up else 0)) // unit)
    return tuple(found)


def symbols(planning: Planning) -> dict[str, Any]:
    """Every symbol of plan.py.jinja; its head comment says what they are."""
    works = planning.works
    bounds = [work for work in works if work.method == "splits"]
    return {
        "text": str(planning).rstrip("\n").split("\n"),
        "entries": {entry: planning.of(entry) for entry in ENTRIES if planning.of(entry)},
        "parameters": {entry: parameters(planning, entry) for entry in ENTRIES},
        "slots": {entry: [slot.index for slot in slots(planning, entry)] for entry in ENTRIES},
        "read": {COLLECT: (), SPLIT: reads(planning)},
        "arguments": {work.name: _arguments(work, planning) for work in works},
        "shared": {entry: planning.shared(entry) for entry in ENTRIES},
        "call": [parameter.name for parameter in _call(planning)],
        "q_offset": planning.q_offset,
        "kv_lengths": planning.kv_lengths,
        "packed": planning.packed,
        "ptx": planning.ptx,
        "reads": {work.name: planning.read_by(work) for work in works},
        "heads": {name: _HEADS[heads] for name, heads in planning.heads},
        "limits": {work.name: _limits(work.op, planning.packed) for work in bounds},
        "operations": {node.op for work in bounds for limit in split_limits(work.op) for node in walk(limit)},
        "methods": {work.method for work in works},
        "lanes": LANES,
        "tiles": TILES,
        "fractions": FRACTIONS,
        "words": WORDS,
    }


_HEADS = {"one": "0", "kv": "hk", "q": "h"}


def _arguments(work: Work, planning: Planning) -> list[str]:
    """What the function of a table takes beside its program, the table and the call's scalars."""
    data = [f"data_{slot.index}" for slot in work.slots] if work.method != "splits" else []
    scratch = [f"{work.name}_words", f"{work.name}_step"] if work.scratch else []
    scratch += [work.partner] if work.partner else []
    scratch += ["memory"] if work.shared else []
    return [*data, *scratch, *(f"{name}_table" for name in planning.read_by(work))]


def _limits(op: Op, packed: bool) -> list[Printed]:
    names = {name: name for name in (*_RANGES, "q_offset")} | {name: f"{name}_table" for name in split_reads(op)}
    ranges = {**_RANGES, "b": (-1 if packed else 0, None)}  # what lies before the first sequence is number -1
    return [print_expression(limit, names, ranges, f"limit_{number}") for number, limit in enumerate(split_limits(op))]
