"""From a level-3 attention kernel to the code that builds it with TVM."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from spgen.ir.expr import Expr, free_variables, operands, rebuild, tables, var
from spgen.ir.kernel import COLUMN_VARIABLES, PROGRAM_VARIABLES, ROW_VARIABLES, parts
from spgen.ir.node import Op
from spgen.ir.ranges import Range, value_range
from spgen.target import Target
from spgen.templates.render import render
from spgen.templates.tvm.expressions import builder_text, is_truth
from spgen.templates.tvm.schedule import Isa, check, isa_of, key_rows, products, scratch_size, value_rows

_HEADS = {"one": "T.int32(0)", "kv": "hk", "q": "h"}
_NATURAL: Range = (0, None)
_VARIABLES = (*PROGRAM_VARIABLES, *ROW_VARIABLES, *COLUMN_VARIABLES)
# the template's own names that end in the number of a segment, or begin with the name of a table or let
_NUMBERED = re.compile(r"(start|stop|full_start|full_stop|left|full|right|tiles|end|column)_\d+|.*_(of|table)")


def _is_taken(name: str) -> bool:
    return keyword.iskeyword(name) or name in _words() or _NUMBERED.fullmatch(name) is not None


@lru_cache(maxsize=1)
def _words() -> frozenset[str]:
    """Every name that occurs in the templates: a let of such a name gets an underscore in the rendered code."""
    text = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py.jinja"))
    return frozenset(re.findall(r"[A-Za-z_]\w*", text))


@dataclass(frozen=True)
class Value:
    """A named value of the rendered code: `name` in the IR, `label` in the code, `text` what it is."""

    name: str
    label: str
    text: str = ""
    truth: bool = False

    @property
    def definition(self) -> str:
        """What the label stands for; truth values are kept as integers."""
        integer = f'opaque("{self.name}", {f"number({self.text})" if self.truth else self.text})'
        return f"unequal({integer}, 0)" if self.truth else integer

    @property
    def stored(self) -> str:
        """The value as it is stored for each lane."""
        return f"number({self.label})" if self.truth else self.label

    def restored(self, index: str) -> str:
        """The value as a mask reads it back."""
        return (
            f"unequal({self.label}_of[{index}], 0)" if self.truth else f'let("{self.name}", {self.label}_of[{index}])'
        )


@dataclass(frozen=True)
class TableArgument:
    """A table: `head` is the code of its head axis."""

    name: str
    label: str
    head: str


@dataclass(frozen=True)
class Reads:
    """What a mask reads: values of the rows, what is computed once a column, the column, the position."""

    rows: tuple[Value, ...]
    column_lets: tuple[Value, ...]
    column: bool
    position: bool


@dataclass(frozen=True)
class Segment:
    """A segment, its expressions as code (None: absent)."""

    name: str
    contiguous: bool
    column: str
    key: str | None
    start: str
    full_start: str | None
    full_stop: str | None
    stop: str
    mask: str | None
    reads: Reads


def attention_source(kernel: Op, target: Target, *, strided: bool = False) -> str:
    """Python source whose `attention()` gives the PrimFunc of `kernel`; `strided`: last strides other than 1.

    Raises UnsupportedError for a schedule that the vector extension cannot run.
    """
    check(kernel, target)
    isa = isa_of(target)
    multiplied = products(kernel, isa, strided=strided)
    code = _Code(kernel)
    segments = [code.segment(op) for op in parts(kernel, "segment")]
    kept = {value.label: value for segment in segments for value in segment.reads.rows}
    if kernel["bias"] == "alibi":
        kept["i"] = Value("i", "i")
    return render(
        "tvm/attention.py.jinja",
        kernel=str(kernel),
        **{name: kernel[name] for name in ("head_dim", "value_dim", "block_m", "block_n", "pack")},
        **{name: kernel[name] for name in ("dtype", "lse", "q_offset", "kv_lengths")},
        **{name: kernel[name] for name in ("cu_seqlens", "softcap", "sinks", "bias")},
        products=multiplied,
        scratch=scratch_size(kernel, target),
        lanes=isa.lanes,
        key_rows=key_rows(kernel, isa),
        value_rows=value_rows(kernel, isa),
        strided=strided,
        prefetch_rows=not (strided or kernel["cu_seqlens"]) and kernel["row"] is None and kernel["pack"] == 1,
        reads_starts=_reads_starts(kernel),
        tables=code.tables,
        program_lets=code.scalars,
        row_lets=code.rows,
        row=code.row,
        kept=list(kept.values()),
        keeps_column=any(segment.reads.column for segment in segments),
        column_lets=max((segment.reads.column_lets for segment in segments), key=len, default=()),
        segments=segments,
        helpers=_helpers(kernel["dtype"], isa, multiplied),
    )


def _reads_starts(kernel: Op) -> bool:
    """Whether any expression reads the variables that only packed batches have a use for."""
    values = [value for op in (kernel, *kernel.operands) for _, value in op.attrs if isinstance(value, Expr)]
    return any({"q_start", "k_start"} & free_variables(value) for value in values)


def _helpers(dtype: str, isa: Isa, multiplied: str) -> str:
    """The LLVM functions that the kernel calls."""
    text = render(
        "tvm/helpers.ll.jinja", lanes=isa.lanes, scalef=isa.scalef, x86=isa.x86, fma="fma" if isa.fma else "fmuladd"
    )
    if dtype == "float32":
        return text
    return text + render(
        "tvm/elements.ll.jinja", lanes=isa.lanes, dtype=dtype, converts=isa.converts, pairs=multiplied == "pairs"
    )


class _Code:
    """The parts of a kernel as code, in the order in which names come into being."""

    def __init__(self, kernel: Op) -> None:
        self.names = {name: name for name in _VARIABLES}
        self.booleans: set[str] = set()
        # j may be -1 in a mask, where the result does not count
        unknown = ("q_offset", "i", "r", "c", *("b" for _ in range(kernel["cu_seqlens"])))
        self.ranges = {name: _NATURAL for name in _VARIABLES if name not in unknown}
        self.of_rows = set(ROW_VARIABLES)
        self.tables = [self._table(op) for op in parts(kernel, "table")]
        self.row = self._optional(kernel["row"])
        self.ranges["r"] = _NATURAL if self.row is None else value_range(kernel["row"], self.ranges)
        lets = [(op["per"], self._let(op)) for op in parts(kernel, "let")]
        self.scalars = [value for per, value in lets if per == "program"]
        self.rows = [value for per, value in lets if per == "row"]

    def segment(self, op: Op) -> Segment:
        self.ranges["c"] = value_range(op["column"], self.ranges)
        lets: list[Value] = []
        mask = None if op["mask"] is None else self._by_column(op["mask"], lets)
        return Segment(
            name=op["name"],
            contiguous=op["contiguous"],
            column=self.text(op["column"]),
            key=self._optional(op["key"]),
            start=self.text(op["start"]),
            full_start=self._optional(op["full_start"]),
            full_stop=self._optional(op["full_stop"]),
            stop=self.text(op["stop"]),
            mask=self._optional(mask),
            reads=self._reads(op["mask"], mask, lets),
        )

    def _by_column(self, node: Expr, lets: list[Value]) -> Expr:
        """`node` with what it reads of tables for a column, whatever the row, as values of their own."""
        free = free_variables(node)
        if not (tables(node) and free & set(COLUMN_VARIABLES)):
            return node
        if free & self.of_rows:
            return rebuild(node, [self._by_column(child, lets) for child in operands(node)])
        label = f"column_{len(lets) + 1}"
        name = f"column:{label}"  # no let has such a name
        lets.append(Value(label, label, self.text(node), is_truth(node, self.booleans)))
        self._define(name, label, node, lets[-1].truth)
        return var(name)

    def text(self, node: Expr) -> str:
        return builder_text(node, self.names, booleans=self.booleans, ranges=self.ranges)

    def _optional(self, node: Expr | None) -> str | None:
        return None if node is None else self.text(node)

    def _table(self, op: Op) -> TableArgument:
        label = f"{op['name']}_table"
        self.names[f"table:{op['name']}"] = label
        return TableArgument(op["name"], label, _HEADS[op["heads"]])

    def _let(self, op: Op) -> Value:
        """A let; from here on its name means this one, even if another had the name before."""
        name = label = op["name"]
        while _is_taken(label) or label in self.names.values():
            label += "_"
        value = Value(name, label, self.text(op["value"]), is_truth(op["value"], self.booleans))
        self._define(name, label, op["value"], value.truth)
        (self.of_rows.add if op["per"] == "row" else self.of_rows.discard)(name)
        return value

    def _define(self, name: str, label: str, value: Expr, truth: bool) -> None:
        self.ranges[name] = value_range(value, self.ranges)
        self.names[name] = label
        (self.booleans.add if truth else self.booleans.discard)(name)

    def _reads(self, whole: Expr | None, mask: Expr | None, lets: Sequence[Value]) -> Reads:
        """`mask` is what is left of the `whole` for each pair."""
        used = frozenset() if whole is None else free_variables(whole)
        labels = set() if mask is None else {self.names[name] for name in free_variables(mask)}
        of_rows = (*(Value(name, name) for name in ROW_VARIABLES), *self.rows)
        rows = tuple(value for value in of_rows if value.label in labels)
        return Reads(rows, tuple(lets), "c" in used, "p" in used)
