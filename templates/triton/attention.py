"""What the Triton template of attention forward needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher: which arguments the rendered kernel takes, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spgen.errors import UnsupportedError
from spgen.ir.expr import TRUE, Expr, and_, floordiv, free_variables, operands, rebuild, tables, var, walk
from spgen.ir.kernel import COLUMN_VARIABLES, KERNEL, ROW_VARIABLES, option, parts
from spgen.ir.node import Op
from spgen.ir.ranges import Range, value_range
from spgen.templates.triton.expressions import DEAL, Printed, print_expression, print_mask
from spgen.templates.triton.masks import Places, separate

ENTRY = "attention"  # the kernel's name in the rendered module
INSIDE = "inside"  # columns that are keys of the segment
SMALLEST_TILE = 16  # tl.dot takes no fewer rows, columns or channels

# rows and keys that are out of range are masked, so what their expressions give does not matter
RANGES: dict[str, Range] = dict.fromkeys(
    ("hk", "h", "tile", "q_len", "kv_len", "q_start", "k_start", "n_heads", "group", "s", "r", "p", "p0", "j"),
    (0, None),
)


@dataclass(frozen=True)
class Parameter:
    """One argument of the rendered kernel.

    `type` is "data" (a pointer to the tensors' dtype), "*fp32", "workspace" (float32 of the launcher's own), "*i32",
    "*index" (a pointer to int32 or int64), "desc" (a tensor descriptor or None), "i32", "i64", "stride" (int64, a
    multiple of 16 bytes in the aligned variants),
    "step" (a stride of rows: the same, but int32 except in the wide variants), "unit" (a last stride: the constant 1 or
    int64), "fp32" or "constexpr".
    """

    name: str
    type: str

    @property
    def text(self) -> str:
        """The parameter as it stands in the kernel's signature."""
        return f"{self.name}: tl.constexpr" if self.type == "constexpr" else self.name


@dataclass(frozen=True)
class Segment:
    """A segment's expressions as source; None where the kernel has none."""

    name: str
    contiguous: bool
    direct: bool  # keys of a tile follow each other: it is one block of K and V
    start: Printed
    full_start: Printed | None
    full_stop: Printed | None
    stop: Printed
    column: Printed
    first_column: Printed | None  # with next_column: the full loop reads a tile's column one step ahead
    next_column: Printed | None
    key: Printed | None
    mask: Printed  # of pairs, where the key of a column is there at all


def is_partial(kernel: Op) -> bool:
    """Whether a program visits one share of its row tile's keys, out of a number that the launch chooses.

    Its results are parts [B, Hq, Lq, splits, Dv], and behind them their log-sum-exps to base 2 [B, Hq, Lq, splits];
    combine.py.jinja adds them up.
    """
    return option(kernel, "partial", 0) == 1


def partial(kernel: Op) -> Op:
    """The kernel that makes the parts of `kernel`, which has the option `splits`; any number of them."""
    options = [text for text in kernel["options"] if not text.startswith("splits=")]
    attributes = {**dict(kernel.attrs), "options": (*options, "partial=1"), "lse": False, "sinks": False}
    return KERNEL.make("attention", *kernel.operands, **attributes)


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    memory = "workspace" if is_partial(kernel) else "data"
    yield from (("q", "data"), ("k", "data"), ("v", "data"), ("out", memory))
    if kernel["lse"]:
        yield "lse", "*fp32"
    yield from (("k_blocks", "desc"), ("v_blocks", "desc"))
    yield from call_parameters(kernel)
    yield "scale", "fp32"
    yield from score_parameters(kernel)
    for size in ("q_len", "k_len", "n_key_heads", "group", *(["n_sequences"] if kernel["cu_seqlens"] else [])):
        yield size, "i32"
    if is_partial(kernel):
        yield from (("splits", "i32"), ("n_parts", "i64"))
    for tensor in ("q", "k", "v", *([] if is_partial(kernel) else ["out"])):
        for axis, kind in (("b", "stride"), ("h", "stride"), ("n", "step")):
            yield f"{tensor}_{axis}", kind
        if tensor != "out":
            yield f"{tensor}_d", "unit"
    for choice in ("TMA", "NEGATIVE", "STAGES", "MASKED_STAGES"):
        yield choice, "constexpr"


def call_parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    """What a call brings beside its tensors: offsets, lengths, boundaries and the tables of its plan."""
    if kernel["q_offset"] != "default":
        yield "q_offset", "*index" if kernel["q_offset"] == "tensor" else "i32"
    if kernel["kv_lengths"]:
        yield "kv_lengths", "*index"
    if kernel["cu_seqlens"]:
        yield from (("cu_seqlens_q", "*index"), ("cu_seqlens_k", "*index"))
    for table in parts(kernel, "table"):
        yield f"{table['name']}_table", "*i32"
        for axis in ("b", "h", "r"):
            yield f"{table['name']}_table_{axis}", "i64"
        for size in ("rows", "cols"):
            yield f"{table['name']}_table_{size}", "i32"


TABLE_OPERATIONS = ("load", "bit", "word", "count_le")
BIAS_AXES: Mapping[str, tuple[str, ...]] = {"none": (), "key": ("b", "h", "g"), "alibi": ("b",)}


def score_parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    """What changes scores: the cap, the sinks' logits, the bias and its strides."""
    if kernel["softcap"]:
        yield "softcap", "fp32"
    if kernel["sinks"]:
        yield "sink_logits", "*fp32"
    if kernel["bias"] != "none":
        yield "bias", "*fp32"
        for axis in BIAS_AXES[kernel["bias"]]:
            yield f"bias_{axis}", "i64"


def symbols(kernel: Op) -> dict[str, Any]:
    """Every symbol of attention.py.jinja; its head comment says what they are."""
    check(kernel)
    printing = Printing(names_of(kernel), ranges_of(kernel), row_vectors(kernel))
    segments = [_segment(kernel, op, printing) for op in parts(kernel, "segment")]
    return {
        "text": str(kernel).rstrip("\n").split("\n"),
        "parameters": parameters(kernel),
        "dtype": kernel["dtype"],
        "precision": "tf32x3" if option(kernel, "tf32x3", 0) else "ieee",
        "head_dim": kernel["head_dim"],
        "value_dim": kernel["value_dim"],
        "head_lanes": padded(kernel["head_dim"]),
        "value_lanes": value_lanes(kernel["value_dim"], kernel["dtype"]),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "pack": kernel["pack"],
        "q_offset": kernel["q_offset"],
        "kv_lengths": kernel["kv_lengths"],
        "cu_seqlens": kernel["cu_seqlens"],
        "softcap": kernel["softcap"],
        "sinks": kernel["sinks"],
        "bias": kernel["bias"],
        "lse": kernel["lse"],
        "partial": is_partial(kernel),
        "row": printing.optional(kernel["row"], "row"),
        "tables": [{"name": f"{op['name']}_table", "head": HEADS[op["heads"]]} for op in parts(kernel, "table")],
        "lets": [
            {"name": printing.names[op["name"]], "value": printing.text(op["value"], printing.names[op["name"]])}
            for op in parts(kernel, "let")
        ],
        "segments": segments,
        "deals": kernel["bias"] == "key"
        or any(f"{DEAL}(" in line for segment in segments for line in segment.mask.lines),
        "operations": {node.op for value in expressions_of(kernel) for node in walk(value)},
    }


HEADS = {"one": "0", "kv": "hk", "q": "h"}


def check(kernel: Op) -> None:
    """Raises UnsupportedError for a kernel that this template cannot express."""
    for name in ("block_m", "block_n"):
        size = kernel[name]
        if size < SMALLEST_TILE or size & (size - 1):
            raise UnsupportedError(name, given=size, allowed="a power of two of at least 16")
    if kernel["pack"] > kernel["block_m"]:
        raise UnsupportedError("pack", given=kernel["pack"], allowed=f"at most block_m, which is {kernel['block_m']}")
    if option(kernel, "splits", 1) < 1:
        raise UnsupportedError("splits", given=option(kernel, "splits", 1), allowed="a number of at least 1")
    rows = row_vectors(kernel)
    for op in parts(kernel, "segment"):
        for attribute, value in op.attrs:
            if isinstance(value, Expr) and attribute != "mask" and free_variables(value) & rows:
                raise UnsupportedError(
                    f"segment {op['name']}: {attribute}",
                    given=str(value),
                    allowed="no vector over rows, but in the mask",
                )


def reads_per_pair(kernel: Op) -> bool:
    """Whether a mask reads tables at places that differ by row and by column: slow, and many registers."""
    places = places_of(row_vectors(kernel))
    masks = [op["mask"] for op in parts(kernel, "segment") if op["mask"] is not None]
    reads = (node for mask in masks for node in walk(mask) if node.op in TABLE_OPERATIONS)
    return any(places.kind(node) == "pair" for node in reads)


def gathers(kernel: Op) -> bool:
    """Whether keys of a tile lie apart from each other in any segment."""
    return any(not op["contiguous"] or op["key"] is not None for op in parts(kernel, "segment"))


def places_of(rows: set[str]) -> Places:
    """Which variables of a kernel are vectors over rows, `rows` among them, and which over columns."""
    return Places(frozenset(rows), frozenset({*COLUMN_VARIABLES, INSIDE}))


def padded(channels: int) -> int:
    """Lanes that hold this many channels: the next power of two."""
    return max(SMALLEST_TILE, 1 << (channels - 1).bit_length())


def value_lanes(channels: int, dtype: str) -> int:
    """Lanes of a row of v: at least 128 bytes.

    Triton 3.6 lays narrower rows out in shared memory so that wgmma reads beside them (wrong results, and reads out of
    bounds, for 16 and 32 half-precision channels that come through masked loads).
    """
    return max(padded(channels), 32 if dtype == "float32" else 64)


def expressions_of(kernel: Op) -> Iterator[Expr]:
    """All expressions of a kernel."""
    for op in (kernel, *kernel.operands):
        yield from (value for _, value in op.attrs if isinstance(value, Expr))


def names_of(kernel: Op) -> dict[str, str]:
    """What variables and tables are called in the source; a let cannot clash with the template's own names."""
    own = {name: name for name in (*RANGES, "b", "q_offset", "i", "c", INSIDE)}
    if not kernel["cu_seqlens"]:
        own |= {"q_start": "0", "k_start": "0"}
    data = {op["name"]: f"{op['name']}_table" for op in parts(kernel, "table")}
    lets = {op["name"]: f"let_{op['name']}" for op in parts(kernel, "let")}
    return {**own, **data, **lets}


def row_vectors(kernel: Op) -> set[str]:
    """The variables that are vectors over rows: a let "per row" of scalars alone is none."""
    vectors = set(ROW_VARIABLES)
    for op in parts(kernel, "let"):
        if free_variables(op["value"]) & vectors:
            vectors.add(op["name"])
    return vectors


def ranges_of(kernel: Op) -> dict[str, Range]:
    """Intervals of all variables, lets included."""
    ranges = {**RANGES, "b": (-1 if kernel["cu_seqlens"] else 0, None)}
    for op in parts(kernel, "let"):
        ranges[op["name"]] = value_range(op["value"], ranges)
    return ranges


@dataclass(frozen=True)
class Printing:
    """How the expressions of one kernel are printed: names, intervals, and which variables are vectors over rows."""

    names: Mapping[str, str]
    ranges: Mapping[str, Range]
    rows: set[str]

    def text(self, value: Expr, temporary: str, **names: str) -> Printed:
        """The source of `value`, some variables under other names."""
        return print_expression(value, {**self.names, **names}, self.ranges, temporary)

    def optional(self, value: Expr | None, temporary: str) -> Printed | None:
        """The source of what may be absent."""
        return None if value is None else self.text(value, temporary)

    def mask(self, value: Expr, loaded: frozenset[str], own: Mapping[str, str] | None = None) -> Printed:
        """The source of a mask, over rows and columns; `loaded` are the columns' variables that tables give.

        `own` are the names of columns where vectors are dealt out (see print_mask).
        """
        places = places_of(self.rows)
        return print_mask(separate(value, places), self.names, self.ranges, places, "mask", loaded, own)


def _segment(kernel: Op, op: Op, printing: Printing) -> Segment:
    """The expressions of one segment; those of a contiguous one are evaluated at a tile's first position `p0`."""
    contiguous, column = op["contiguous"], op["column"]
    has_full = op["full_start"] is not None and not never_full(op, kernel["block_n"], printing.ranges)
    ahead = has_full and contiguous and option(kernel, "prefetch", 0) == 1 and bool(tables(column))
    return Segment(
        name=op["name"],
        contiguous=contiguous,
        direct=contiguous and op["key"] is None,
        start=printing.text(op["start"], "start"),
        full_start=printing.text(op["full_start"], "full_start") if has_full else None,
        full_stop=printing.text(op["full_stop"], "full_stop") if has_full else None,
        stop=printing.text(op["stop"], "stop"),
        column=printing.text(column, "column", **({"p": "p0"} if contiguous else {})),
        first_column=printing.text(column, "column", p="p_next") if ahead else None,
        next_column=printing.text(column, "column", p="p_next") if ahead else None,
        key=printing.optional(op["key"], "key"),
        mask=printing.mask(and_(var(INSIDE), TRUE if op["mask"] is None else by_tile(op)), _loaded(op)),
    )


def _loaded(op: Op) -> frozenset[str]:
    """The variables of a segment's columns that each column reads from a table."""
    key = op["key"] is not None and bool(tables(op["key"]))
    column = not op["contiguous"] and bool(tables(op["column"]))
    return frozenset({"j", INSIDE} if key or column else ()) | ({"c"} if column else set())


def by_tile(op: Op) -> Expr:
    """The mask of a segment; units of which its column reads one per tile are numbered by scalars.

    Where columns follow each other and come from entry `p // n` of a table, a tile lies within one entry.
    """
    mask: Expr = op["mask"]
    if not op["contiguous"]:
        return mask
    reads = [node for node in walk(op["column"]) if node.op == "load"]
    units = {node for read in reads for node in walk(read) if node.op == "floordiv" and node.args[0] is var("p")}
    done: dict[Expr, Expr] = {unit: floordiv(var("p0"), unit.args[1]) for unit in units}
    for node in walk(mask):
        done.setdefault(node, rebuild(node, [done[child] for child in operands(node)]))
    return done[mask]


def never_full(op: Op, block_n: int, ranges: Mapping[str, Range]) -> bool:
    """Whether the full run is shorter than a tile in every call: its loop would only cost registers.

    It is more than that: ptxas (12.8, 12.9) crashes on some pipelined loops that LLVM knows to be empty.
    """
    longest = value_range(op["full_stop"] - op["full_start"], ranges)[1]
    return longest is not None and longest < block_n
