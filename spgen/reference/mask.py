"""The dense mask of a pattern: each pair (row, key) is decided by recursion, on dense index tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.data import check_shapes
from spgen.errors import ShapeError, UnsupportedError
from spgen.ir import expr
from spgen.ir.node import Op, walk
from spgen.ir.pattern import is_selected, short_text

if TYPE_CHECKING:
    from spgen.patterns import Pattern


@dataclass(frozen=True)
class _Call:
    """One call: its sizes, the pattern's tensors as [B or 1, heads, …], position of row 0 and keys per sequence."""

    data: tuple[Tensor, ...]
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    batch: int
    q_offset: Tensor  # [B]
    lengths: Tensor  # [B]
    rows: Tensor  # [B]
    device: torch.device

    def tensor(self, op: Op, name: str, rank: int) -> Tensor:
        """The data at an attribute, as [B or 1, heads, *rank axes]."""
        found: Tensor = self.data[op[name].index]
        return found.reshape((1,) * (2 + rank - found.dim()) + tuple(found.shape))

    def head_of_data(self, heads: int, h: Tensor) -> Tensor:
        """Which of `heads` data heads serves query head `h`."""
        if heads == self.q_heads:
            return h
        found: Tensor = h // (self.q_heads // self.kv_heads) if heads == self.kv_heads else torch.zeros_like(h)
        return found


@dataclass(frozen=True)
class _Grid:
    """The pairs asked about, as index tensors that broadcast to [B, H, rows, columns].

    `r` is the row among the call's rows, `i` its position, `j` the key. Inside `permuted` these are ranks.
    """

    b: Tensor
    h: Tensor
    r: Tensor
    i: Tensor
    j: Tensor
    known: dict[tuple[Op, bool], Tensor] = field(default_factory=dict)


def mask(
    pattern: Pattern,
    q_len: int,
    kv_len: int | None = None,
    *,
    q_heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    q_offset: int | Tensor | Sequence[int] | None = None,
    q_lengths: Tensor | Sequence[int] | None = None,
    kv_lengths: Tensor | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The dense mask of a pattern: bool [batch, q_heads, q_len, kv_len].

    `kv_len` defaults to `q_len`, `kv_heads` to `q_heads`. `q_offset` (an int or [batch]) is the position of row 0 and
    defaults to the keys of the sequence less its rows; `kv_lengths` and `q_lengths` [batch] say how many keys and rows
    each sequence has. With `rows` (integers [N]) the result holds these rows of the call only.
    The result is on `device`: by default where the pattern's data are, else on the CPU.
    Raises ShapeError and its kin when the data do not fit, UnsupportedError for a selection.
    """
    kv_len = q_len if kv_len is None else kv_len
    kv_heads = q_heads if kv_heads is None else kv_heads
    check_heads(q_heads, kv_heads)
    for op in walk(pattern.node):
        if is_selected(op):
            raise UnsupportedError(
                f"mask of `{short_text(op)}`",
                allowed="patterns whose data are given",
                remedy="what a selection holds depends on q and k: pass the index data that its plan found",
            )
    check_shapes(
        pattern.node, pattern.data, q_len=q_len, kv_len=kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch
    )
    if device is None:
        device = pattern.data[0].device if pattern.data else "cpu"
    device = torch.device(device)
    lengths = _per_sequence("kv_lengths", kv_len if kv_lengths is None else kv_lengths, batch, device).clamp(0, kv_len)
    own_rows = _per_sequence("q_lengths", q_len if q_lengths is None else q_lengths, batch, device)
    offsets = lengths - own_rows if q_offset is None else _per_sequence("q_offset", q_offset, batch, device)
    data = tuple(tensor.detach().to(device) for tensor in pattern.data)
    data = tuple(tensor if tensor.dtype == torch.bool else tensor.long() for tensor in data)
    call = _Call(data, q_len, kv_len, q_heads, kv_heads, batch, offsets, lengths, own_rows, device)
    asked = torch.arange(q_len, device=device) if rows is None else rows.to(device)
    grid = _grid(call, asked + offsets[:, None])
    wanted = _holds(call, grid, pattern.node, True) & _exists(call, grid) & _in_call(call, grid)
    return wanted.expand(batch, q_heads, len(asked), kv_len).clone()


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raises ShapeError unless the query heads are whole groups."""
    if kv_heads < 1 or q_heads % kv_heads:
        raise ShapeError("kv_heads", given=kv_heads, allowed=f"a divisor of the {q_heads} query heads")


def _per_sequence(subject: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """An int, or one integer for each sequence, as int64 [batch]."""
    found = torch.as_tensor(value, dtype=torch.int64, device=device)
    if found.dim() == 0:
        found = found.expand(batch)
    if found.shape != (batch,):
        raise ShapeError(subject, given=f"shape {list(found.shape)}", allowed=f"[{batch}], one for each sequence")
    return found


def _grid(call: _Call, positions: Tensor) -> _Grid:
    """The grid of rows at `positions` [B, rows] and all keys."""
    b = torch.arange(call.batch, device=call.device)[:, None, None, None]
    h = torch.arange(call.q_heads, device=call.device)[:, None, None]
    i = positions[:, None, :, None]
    j = torch.arange(call.kv_len, device=call.device)
    return _Grid(b, h, i - call.q_offset[:, None, None, None], i, j)


def _exists(call: _Call, grid: _Grid) -> Tensor:
    """Whether `j` is a key of its sequence."""
    return (grid.j >= 0) & (grid.j < call.lengths[:, None, None, None])


def _in_call(call: _Call, grid: _Grid) -> Tensor:
    return (grid.r >= 0) & (grid.r < call.rows[:, None, None, None])


def _holds(call: _Call, grid: _Grid, op: Op, positive: bool) -> Tensor:
    """Whether each pair is in `op` (or, for `positive=False`, in its complement).

    Negation is pushed to the leaves because of `cover`, which looks at rows outside the call: data that differ by row
    say nothing there, neither yes nor no.
    """
    if (op, positive) not in grid.known:
        grid.known[op, positive] = _decide(call, grid, op, positive)
    return grid.known[op, positive]


def _decide(call: _Call, grid: _Grid, op: Op, positive: bool) -> Tensor:
    if op.kind == "not":
        return _holds(call, grid, op.operands[0], not positive)
    if op.kind in ("and", "or"):
        left, right = (_holds(call, grid, operand, positive) for operand in op.operands)
        return left & right if (op.kind == "and") == positive else left | right
    if op.kind == "per_head":
        return _per_head(call, grid, op, positive)
    if op.kind == "permuted":
        return _permuted(call, grid, op, positive)
    found = _LEAVES[op.kind](call, grid, op) == positive
    return found & _in_call(call, grid) if op.kind in ("block", "top_k", "n_of_m") else found


def _per_head(call: _Call, grid: _Grid, op: Op, positive: bool) -> Tensor:
    """One pattern for each query head, or for each key head."""
    own = call.head_of_data(len(op.operands), grid.h)
    found = torch.zeros((), dtype=torch.bool, device=call.device)
    for n, operand in enumerate(op.operands):
        found = torch.where(own == n, _holds(call, grid, operand, positive), found)
    return found


def _permuted(call: _Call, grid: _Grid, op: Op, positive: bool) -> Tensor:
    """The operand holds of the ranks; what an order leaves out has no rank and no pairs."""
    r, i, j = grid.r, grid.i, grid.j
    if op["q"] is not None:
        r = _rank(call, grid, call.tensor(op, "q", 1), grid.r)
        r = torch.where(r < call.rows[:, None, None, None], r, -1)
        i = r + call.q_offset[:, None, None, None]
    if op["k"] is not None:
        j = _rank(call, grid, call.tensor(op, "k", 1), grid.j)
    ranked = torch.ones((), dtype=torch.bool, device=call.device)
    ranked = ranked if op["q"] is None else ranked & (r >= 0)
    ranked = ranked if op["k"] is None else ranked & (j >= 0)
    inner = _holds(call, _Grid(grid.b, grid.h, r, i, j), op.operands[0], positive)
    found = inner & ranked if positive else inner | ~ranked
    return found if op["q"] is None else found & _in_call(call, grid)


def _rank(call: _Call, grid: _Grid, order: Tensor, original: Tensor) -> Tensor:
    """The place of `original` in its order [B or 1, heads, N], or -1."""
    size = order.shape[-1]
    ranks = torch.full(order.shape, -1, device=call.device)
    for b in range(order.shape[0]):
        for h in range(order.shape[1]):
            for rank, value in reversed(list(enumerate(order[b, h].tolist()))):
                if 0 <= value < size:
                    ranks[b, h, value] = rank
    return _at(call, grid, ranks[:, :, None, :], torch.zeros_like(original), original, -1)


def _at(call: _Call, grid: _Grid, table: Tensor, row: Tensor, column: Tensor, outside: Any = False) -> Tensor:
    """`table[b, h, row, column]` of a [B or 1, heads, R, C] table; `outside` where row or column is out of range."""
    rows, columns = table.shape[-2:]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    if rows == 0 or columns == 0:
        return torch.full_like(inside, outside, dtype=table.dtype)
    b = grid.b if table.shape[0] > 1 else torch.zeros_like(grid.b)
    h = call.head_of_data(table.shape[1], grid.h)
    found = table[b, h, row.clamp(0, rows - 1), column.clamp(0, columns - 1)]
    return torch.where(inside, found, torch.as_tensor(outside, dtype=table.dtype, device=call.device))


def _members(lists: Tensor, size: int) -> Tensor:
    """For lists [..., K]: whether each of 0 … size-1 is listed, [..., size]."""
    return (lists[..., None, :] == torch.arange(size, device=lists.device)[:, None]).any(-1)


def _dense(call: _Call, grid: _Grid, op: Op) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=call.device)


def _causal(call: _Call, grid: _Grid, op: Op) -> Tensor:
    return grid.j <= grid.i


def _sink(call: _Call, grid: _Grid, op: Op) -> Tensor:
    n: int = op["n"]
    return grid.j < n


def _window(call: _Call, grid: _Grid, op: Op) -> Tensor:
    left, right = int(op["left"]), int(op["right"])
    return (grid.i - left < grid.j) & (grid.j <= grid.i + right)


def _stripe(call: _Call, grid: _Grid, op: Op) -> Tensor:
    cols, width = int(op["cols"]), int(op["width"])
    x = grid.i // cols - grid.j // cols if op["relative"] else grid.j // cols
    found: Tensor = (x - op["offset"] - grid.h * op["shift_per_head"]) % op["stride"] < width
    return found


def _where(call: _Call, grid: _Grid, op: Op) -> Tensor:
    env = {"b": grid.b, "h": grid.h, "i": grid.i, "j": grid.j}
    return torch.as_tensor(expr.evaluate(op["predicate"], env, _OPERATIONS), device=call.device)


def _block(call: _Call, grid: _Grid, op: Op) -> Tensor:
    tiles = -(-call.kv_len // op["cols"])
    if op["mask"] is not None:
        table = call.tensor(op, "mask", 2) != 0
    elif op["indptr"] is None:
        table = _members(call.tensor(op, "indices", 2), tiles)
    else:
        table = _from_csr(call.tensor(op, "indptr", 1), call.tensor(op, "indices", 1), call, tiles)
    return _at(call, grid, table, grid.r // op["rows"], grid.j // op["cols"])


def _from_csr(indptr: Tensor, indices: Tensor, call: _Call, tiles: int) -> Tensor:
    """The block mask [B, Hq, R, tiles] of lists in CSR form."""
    table = torch.zeros(call.batch, call.q_heads, indptr.shape[-1] - 1, tiles, dtype=torch.bool, device=call.device)
    for b in range(call.batch):
        for h in range(call.q_heads):
            starts, found = (_of(call, tensor, b, h) for tensor in (indptr, indices))
            for row, (start, stop) in enumerate(itertools.pairwise(starts)):
                for column in found[max(start, 0) : max(stop, 0)]:
                    if 0 <= column < tiles:
                        table[b, h, row, column] = True
    return table


def _of(call: _Call, tensor: Tensor, b: int, h: int) -> list[int]:
    """The list of sequence `b` and query head `h` in data [B or 1, heads, K]."""
    head = int(call.head_of_data(tensor.shape[1], torch.tensor(h)))
    found: list[int] = tensor[b if tensor.shape[0] > 1 else 0, head].tolist()
    return found


def _in_columns(call: _Call, grid: _Grid, index: Tensor) -> Tensor:
    table = _members(index, call.kv_len)[:, :, None, :]
    return _at(call, grid, table, torch.zeros_like(grid.j), grid.j)


def _in_diagonals(call: _Call, grid: _Grid, offsets: Tensor) -> Tensor:
    distance = grid.i - grid.j
    distance = distance.expand(call.batch, call.q_heads, *distance.shape[-2:])
    found = torch.zeros_like(distance, dtype=torch.bool)
    for b in range(call.batch):
        for h in range(call.q_heads):
            wanted = torch.tensor(_of(call, offsets, b, h), dtype=torch.int64, device=call.device)
            found[b, h] = torch.isin(distance[b, h], wanted)
    return found


def _columns(call: _Call, grid: _Grid, op: Op) -> Tensor:
    return _in_columns(call, grid, call.tensor(op, "index", 1))


def _diagonals(call: _Call, grid: _Grid, op: Op) -> Tensor:
    return _in_diagonals(call, grid, call.tensor(op, "offsets", 1))


def _vertical_slash(call: _Call, grid: _Grid, op: Op) -> Tensor:
    columns, offsets = call.tensor(op, "columns", 1), call.tensor(op, "offsets", 1)
    return _in_columns(call, grid, columns) | _in_diagonals(call, grid, offsets)


def _top_k(call: _Call, grid: _Grid, op: Op) -> Tensor:
    table = _members(call.tensor(op, "index", 2), -(-call.kv_len // op["cols"]))
    return _at(call, grid, table, grid.r // op["rows"], grid.j // op["cols"])


def _n_of_m(call: _Call, grid: _Grid, op: Op) -> Tensor:
    return _at(call, grid, call.tensor(op, "mask", 2) != 0, grid.r, grid.j)


def _documents(call: _Call, grid: _Grid, op: Op) -> Tensor:
    """The same number of boundaries lies at or before both, and neither is before the first or after the last."""
    boundaries = call.data[op["cu_seqlens"].index]
    before: list[Tensor] = [(x[..., None] >= boundaries).sum(-1) for x in (grid.i, grid.j)]
    inside = [(count > 0) & (count < len(boundaries)) for count in before]
    return before[0].eq(before[1]) & inside[0] & inside[1]


def _cover(call: _Call, grid: _Grid, op: Op) -> Tensor:
    """Whether the operand holds anywhere in the tile of (i, j): at all its positions, and the keys that exist."""
    rows, cols = op["rows"], op["cols"]
    if grid.i.numel() == 0 or call.kv_len == 0:
        return torch.zeros((), dtype=torch.bool, device=call.device)
    first, last = int(grid.i.min()) // rows, int(grid.i.max()) // rows
    positions = torch.arange(first * rows, (last + 1) * rows, device=call.device).expand(call.batch, -1)
    whole = _grid(call, positions)
    touched = _holds(call, whole, op.operands[0], True) & _exists(call, whole)
    touched = touched.expand(call.batch, call.q_heads, positions.shape[1], call.kv_len)
    touched = torch.nn.functional.pad(touched, (0, -call.kv_len % cols))
    tiled = touched.reshape(call.batch, call.q_heads, last + 1 - first, rows, -1, cols)
    tiles = tiled.any(-1).any(-2)
    return _at(call, grid, tiles, grid.i // rows - first, grid.j // cols)


_LEAVES: Mapping[str, Callable[[_Call, _Grid, Op], Tensor]] = {
    "dense": _dense, "causal": _causal, "sink": _sink, "window": _window, "stripe": _stripe, "where": _where,
    "block": _block, "columns": _columns, "diagonals": _diagonals, "vertical_slash": _vertical_slash, "top_k": _top_k,
    "n_of_m": _n_of_m, "documents": _documents, "cover": _cover,
}  # fmt: skip


def _on_tensors(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """`function` on tensors, given tensors and integers."""

    def apply(*args: Any) -> Tensor:
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        result: Tensor = function(*(torch.as_tensor(arg, device=device) for arg in args))
        return result

    return apply


_ON_TENSORS: Mapping[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.floor_divide, "mod": torch.remainder,
    "min": torch.minimum, "max": torch.maximum, "abs": torch.abs, "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift, "lt": torch.lt, "le": torch.le, "eq": torch.eq, "ne": torch.ne,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor, "not": torch.bitwise_not,
    "select": torch.where,
}  # fmt: skip
_OPERATIONS = {name: _on_tensors(function) for name, function in _ON_TENSORS.items()}
