"""What the compiler did with a pattern, and why: the answer of `attend.explain(q, k, v)` and `spgen explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spgen.arguments import Arguments, check, sequences_of
from spgen.attend import Attention
from spgen.autotune.model import Prediction, Work, predict
from spgen.compile import Lowered, Request, backend_of, lowered, why_plain
from spgen.data import check_shapes
from spgen.ir import expr
from spgen.ir.config import Config
from spgen.ir.expr import Expr
from spgen.ir.kernel import option, parts
from spgen.ir.node import Op
from spgen.ir.pattern import read_short, slots
from spgen.ir.tiles import segments, table_ops
from spgen.ops import request_of, sizes_of
from spgen.passes.cost import Cost, Counts, cost_of, keys_of_row
from spgen.passes.schedule import Call
from spgen.patterns import Pattern, pattern
from spgen.reference import mask
from spgen.tables import Builder
from spgen.target import Target
from spgen.tuned import Choice, Sizes, choice, request_for

_EXACT_PAIRS = 2**24  # up to this many pairs density is counted, beyond it is measured on sampled rows
_SAMPLED_ROWS = 64
_LONG_MASK = 100  # characters: longer ones are named by the tables they read, and shown by `--ir`


@dataclass(frozen=True)
class Explanation:
    """The parts of an explanation; `str()` lays them out."""

    pattern: str
    target: Target
    lowered: Lowered
    shape: tuple[int, int, int, int, int]
    counts: tuple[Counts, ...] = ()
    cost: Cost | None = None
    prediction: Prediction | None = None
    density: float | None = None
    sampled: bool = False
    packed: int | None = None  # sequences of a packed batch
    kernel: Any = field(default=None, repr=False)
    choice: Choice = field(default_factory=Choice)
    dense: str = ""  # what dense="auto" decides
    plain: str | None = None  # why the target's faster form of kernels does not serve

    def __str__(self) -> str:
        lines = [f"pattern    {self.pattern}", f"target     {self.target}", f"call       {self._call()}"]
        lines += [f"density    {self._density()}"]
        lines += self._segments()
        if self.cost is not None:
            lines += _cost_lines(self.cost, self.workspace)
            lines += [f"predicted  {self.prediction}"]
        lines += [f"kernel     {self._kernel()}", f"tuned      {self.choice}"]
        lines += [f"dense      {self.dense}"] if self.dense else []
        return "\n".join(lines)

    @property
    def workspace(self) -> int:
        """Bytes that a call allocates beside its results: the parts of split keys, and their log-sum-exps."""
        batch, q_heads, _, q_len, _ = self.shape
        splits = option(self.lowered.kernel, "splits", 1) if self.target.kind != "cpu" else 1
        parts = batch * q_heads * q_len * splits if splits > 1 else 0
        return 4 * parts * (int(self.lowered.kernel["value_dim"]) + 1)

    def _call(self) -> str:
        batch, q_heads, kv_heads, q_len, kv_len = self.shape
        kernel = self.lowered.kernel
        sequences = "" if self.packed is None else f"  {self.packed} packed sequences"
        return (
            f"{kernel['dtype']}  q [{batch}, {q_heads}, {q_len}, {kernel['head_dim']}]  "
            f"k [{batch}, {kv_heads}, {kv_len}, {kernel['head_dim']}]  v [..., {kernel['value_dim']}]{sequences}"
        )

    def _density(self) -> str:
        if self.density is None:
            return "depends on the data"
        return f"{self.density:.2%} of the pairs" + (f" (on {_SAMPLED_ROWS} sampled rows)" if self.sampled else "")

    def _segments(self) -> list[str]:
        lines = []
        for number, segment in enumerate(segments(self.lowered.program)):
            count = next((c for c in self.counts if c.name == segment["name"]), None)
            tiles = f"{count.full:,} full + {count.masked:,} masked tiles" if count else "tiles depend on the data"
            head = "segments   " if number == 0 else "           "
            lines.append(f"{head}{segment['name']} {segment['source']}  {tiles}  {_how(segment)}")
        tables = [op["name"] for op in table_ops(self.lowered.program)]
        return [*lines, f"tables     {', '.join(tables) or 'none: closed forms need no plan'}"]

    def _kernel(self) -> str:
        kernel, pack = served(self.lowered.kernel, self.target), self.lowered.pack
        backend = "triton" if self.target.kind != "cpu" else "tvm"
        form = "gluon" if option(kernel, "warpgroups", 0) else backend
        reasons = [f"row tiles of {kernel['block_m']} x {kernel['block_n']} keys"]
        reasons += [f"{pack} heads of a group share a row tile, because the call has few rows"] if pack > 1 else []
        splits = option(kernel, "splits", 1) if backend == "triton" else 1
        reasons += [f"{splits} programs share its keys, because row tiles are few"] if splits > 1 else []
        reasons += [", ".join(kernel["options"])] if kernel["options"] else []
        reasons += [f"plain, because of {self.plain}"] if self.plain and form == backend else []
        return f"{form} attention: {'; '.join(reasons)}"


def _how(segment: Op) -> str:
    if segment["exact"]:
        return "whole tiles run without a mask"
    mask = segment["mask"]
    if mask is None:
        return "lengths are masked"
    text = str(mask)
    if len(text) > _LONG_MASK and expr.tables(mask):
        text = f"what {', '.join(sorted(expr.tables(mask)))} say"
    return f"every tile is masked by {text}"


def _cost_lines(cost: Cost, workspace: int) -> list[str]:
    useful = cost.needed_pairs / cost.visited_pairs if cost.visited_pairs else 1.0
    memory = f"{workspace / 1e6:,.2f} MB" if workspace else "0"
    tables = f"of it {cost.plan_bytes / 1e6:,.2f} MB of tables"
    return [
        f"work       {cost.flops / 1e9:,.2f} GFLOP, {useful:.0%} of the {cost.visited_flops / 1e9:,.2f} GFLOP computed",
        f"bytes      {cost.bytes / 1e6:,.1f} MB, {tables}; workspace {memory}",
    ]


def explain(attend: Attention, arguments: Arguments) -> Explanation:
    """Explains a call; reads the pattern's data, so it waits for the device. Errors are those of the call."""
    check(arguments)
    request = request_of(arguments)
    found = _explained(request, attend.pattern, arguments)
    if attend.dense != "auto":
        return found
    from spgen.dispatch import verdict

    return replace(found, dense=str(verdict(arguments, request, False)))


def _explained(request: Request, pattern: Pattern, arguments: Arguments) -> Explanation:
    levels = lowered(request)
    given = arguments
    sequences = sequences_of(
        given.q, given.k, given.cu_seqlens_q, given.cu_seqlens_k, given.q_offset, given.kv_lengths
    )  # fmt: skip
    packed = sequences.batch if sequences.packed else None
    batch = 1 if sequences.packed else sequences.batch
    shape = (batch, request.q_heads, request.kv_heads, sequences.q_len, sequences.kv_len)
    builder = Builder(pattern.data, sequences, request.q_heads, request.kv_heads)
    tables = builder.build(levels.program)
    tiles = tiles_of_programs(levels, builder)
    counts = tuple(_counts(levels.kernel, tiles))
    total = _all_pairs(builder)
    needed, sampled = count_pairs(levels.terms, builder), False
    if needed is None:
        measured, sampled = measure_density(pattern, builder)
        needed = round(measured * total)
    density = needed / total if total else 0.0
    plan_bytes, l2_bytes = sum(t.nbytes for t in tables), request.target.l2_bytes
    cost = cost_of(levels.kernel, list(counts), needed, shape, plan_bytes, l2_bytes)
    work = work_of(levels.kernel, tiles, float(cost.flops), float(cost.bytes))
    prediction = predict(work, config_of(served(levels.kernel, request.target)), request.target)
    return Explanation(
        request.pattern, request.target, levels, shape, counts, cost, prediction, density, sampled, packed,
        choice=choice(request, sizes_of(arguments)), plain=why_plain(request),
    )  # fmt: skip


def _lengths(builder: Builder) -> dict[str, Tensor]:
    """Rows, keys and the offset of each sequence, int64 [B]."""
    scalars, batch = builder.sequences.scalars(), builder.sequences.batch
    names = ("q_len", "kv_len", "q_offset")
    return {name: torch.as_tensor(scalars[name], dtype=torch.int64).expand(batch).cpu() for name in names}


def _all_pairs(builder: Builder) -> int:
    """Pairs of rows and keys of the same sequence, over all query heads; padding counts in an ordinary batch."""
    sequences = builder.sequences
    if not sequences.packed:
        return sequences.batch * builder.q_heads * sequences.q_len * sequences.kv_len
    lengths = _lengths(builder)
    return builder.q_heads * int((lengths["q_len"] * lengths["kv_len"]).sum())


def count_tiles(levels: Lowered, builder: Builder) -> list[Counts]:
    """The tiles of each segment, summed over sequences, heads and row tiles."""
    return _counts(levels.kernel, tiles_of_programs(levels, builder))


class Tiles(NamedTuple):
    """Whole and masked tiles of a segment, and the columns in both, integers [sequences, heads, row tiles]."""

    full: Tensor
    masked: Tensor
    columns: Tensor


def _counts(kernel: Op, tiles: Sequence[Tiles]) -> list[Counts]:
    found = zip(parts(kernel, "segment"), tiles, strict=True)
    return [Counts(op["name"], int(one.full.sum()), int(one.masked.sum()), op["contiguous"]) for op, one in found]


def work_of(kernel: Op, tiles: Sequence[Tiles], flops: float, moved: float) -> Work:
    """What the cost model is told of a kernel whose segments have these tiles (see `tiles_of_programs`).

    `flops` are those of the needed pairs, `moved` the bytes that must move.
    """
    counts = _counts(kernel, tiles)
    each = sum((one.full + one.masked for one in tiles), torch.zeros((), dtype=torch.int64))
    return Work(
        kernel["dtype"], kernel["head_dim"], kernel["value_dim"],
        programs=each.numel(),
        full=sum(one.full for one in counts),
        masked=sum(one.masked for one in counts),
        gathered=sum(one.tiles for one in counts if not one.contiguous),
        longest=int(each.max()) if each.numel() else 0,
        flops=flops,
        bytes=moved,
        columns=sum(int(one.columns.sum()) for one in tiles),
    )  # fmt: skip


def served(kernel: Op, target: Target) -> Op:
    """The kernel with the schedule that its backend gives it."""
    return backend_of(target).served(kernel, target)


def config_of(kernel: Op) -> Config:
    """The configuration of a level-3 kernel."""
    return Config(kernel["block_m"], kernel["block_n"], tuple(kernel["options"]))


def tiles_of_programs(levels: Lowered, builder: Builder) -> list[Tiles]:
    """The tiles of each segment."""
    kernel, program = levels.kernel, levels.program
    tiles = builder.sequences.tiles(program["row_tile"])
    heads = "kv" if levels.pack > 1 else "q"
    batch = 1 if builder.sequences.packed else builder.sequences.batch
    whole = (batch, builder.kv_heads if levels.pack > 1 else builder.q_heads, tiles.count)
    env: dict[str, Any] = builder.variables(heads, 1, tiles)
    for let in parts(kernel, "let"):
        if let["per"] == "program":
            env[let["name"]] = builder.evaluate(let["value"], env, heads, 1)

    def value(node: Expr) -> Tensor:
        found = torch.as_tensor(builder.evaluate(node, env, heads, 1), device=builder.device)
        return found.expand(whole) if found.dim() in (0, 3) else found

    return [_count(segment, kernel["block_n"], value) for segment in parts(kernel, "segment")]


def _count(segment: Op, block_n: int, value: Any) -> Tiles:
    def tiles(length: Tensor) -> Tensor:
        return torch.div(length + (block_n - 1), block_n, rounding_mode="floor")

    start, stop = value(segment["start"]), value(segment["stop"])
    columns = (stop - start).clamp(min=0)
    if segment["full_start"] is None:
        masked = tiles(stop - start)
        return Tiles(torch.zeros_like(masked), masked, columns)
    first, last = value(segment["full_start"]), value(segment["full_stop"])
    full = torch.div(last - first, block_n, rounding_mode="floor")
    masked = tiles(first - start) + tiles(stop - first - full * block_n)
    return Tiles(full, masked, columns)


def count_pairs(terms: Op, builder: Builder) -> int | None:
    """The pairs of disjoint terms, counted row by row from their symbolic counts; None if a term has none."""
    counts = [keys_of_row(term) for term in terms.operands]
    if None in counts:
        return None
    rows = builder.sequences.tiles(1)
    env = builder.variables("q", 1, rows)
    env["i"] = env["tile"] + env["q_offset"]
    batch = 1 if builder.sequences.packed else builder.sequences.batch
    exists = torch.as_tensor(env["tile"] < env["q_len"])
    total = 0
    for count in counts:
        keys = torch.as_tensor(builder.evaluate(count, env, "q", 1))  # type: ignore[arg-type]
        total += int((keys.to(torch.int64) * exists).expand(batch, builder.q_heads, rows.count).sum())
    return total


def measure_density(pattern: Pattern, builder: Builder) -> tuple[float, bool]:
    """Share of the pairs that the pattern holds, and whether it was measured on sampled rows only."""
    lengths = _lengths(builder)
    q_len, kv_len = int(lengths["q_len"].max()), int(lengths["kv_len"].max())
    if not builder.sequences.packed:
        kv_len = builder.sequences.kv_len
    pairs = builder.sequences.batch * builder.q_heads * q_len * kv_len
    if pairs == 0:
        return 0.0, False
    sampled = pairs > _EXACT_PAIRS and q_len > _SAMPLED_ROWS
    rows = torch.arange(q_len)
    if sampled:
        rows = (2 * torch.arange(_SAMPLED_ROWS) + 1) * q_len // (2 * _SAMPLED_ROWS)
    found = 0
    for some in rows.split(max(1, _EXACT_PAIRS // (pairs // q_len))):
        dense = mask(
            pattern, q_len, kv_len, q_heads=builder.q_heads, kv_heads=builder.kv_heads,
            batch=builder.sequences.batch, q_offset=lengths["q_offset"], q_lengths=lengths["q_len"],
            kv_lengths=lengths["kv_len"], rows=some,
        )  # fmt: skip
        found += int(dense.sum())
    return found / (_all_pairs(builder) / q_len * len(rows)), sampled


def explain_text(
    pattern_text: str, *, q_shape: tuple[int, int, int, int], kv_heads: int, kv_len: int, v_dim: int, dtype: str,
    target: str, ir: bool, source: bool, data: Sequence[Tensor] = (),
) -> str:  # fmt: skip
    """The explanation of pattern text for shapes; with `ir` all levels, with `source` the rendered kernel.

    `data` fills the pattern's slots; without, what depends on them is left open.
    """
    node = read_short(pattern_text)
    chosen = Target.of(target)
    batch, q_heads, q_len, head_dim = q_shape
    call = Call(dtype, head_dim, v_dim)
    sizes = Sizes(batch, q_len, kv_len, tuple(tensor.shape for tensor in data))
    request = request_for(pattern_text, call, q_heads, kv_heads, chosen, sizes)
    shape = (batch, q_heads, kv_heads, q_len, kv_len)
    if slots(node) and not data:
        report = Explanation(
            pattern_text, chosen, lowered(request), shape, choice=choice(request, sizes), plain=why_plain(request)
        )
    else:
        check_shapes(node, data, q_len=q_len, kv_len=kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch)
        q, k = (torch.empty(1).expand(shape) for shape in (q_shape, (batch, kv_heads, kv_len, head_dim)))
        report = _explained(request, pattern(pattern_text, *data), Arguments(q, k, k, data, pattern_text))
    sections = [str(report)]
    if ir:
        sections += [f"-- {name} --\n{level}" for name, level in levels_of(report.lowered).items()]
    if source:
        kernel = backend_of(chosen).build(report.lowered.kernel, chosen)
        sections += [f"-- source --\n{kernel.source}"]
    return "\n\n".join(sections)


def levels_of(levels: Lowered) -> Mapping[str, str]:
    """The text of each level, in order."""
    return {
        "level 1: pattern": str(levels.pattern),
        "level 1: disjoint terms": str(levels.terms),
        "level 2: tiles": str(levels.program),
        "level 3: kernel": str(levels.kernel),
    }
