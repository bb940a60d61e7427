"""FlexAttention's masks as patterns.

A `mask_mod` is captured symbolically, like a predicate of `where`: intervals of keys skip work. Of the tensors that it
closes over, those looked up by head or sequence become constants, and `document_id[q_idx] == document_id[kv_idx]`
becomes `documents(…)`. Inside a document, offsets looked up by its number cancel: relative positions need no table.

FlexAttention counts the rows of a call from 0, spgen stands the last row at the last key (`i = r + q_offset`). They are
the same while there are as many rows as keys; else pass `q_len=` and `kv_len=` here, or `q_offset=0` to the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.convert.mask import from_mask
from spgen.errors import ShapeError, SpgenError
from spgen.ir import expr
from spgen.ir.expr import Expr, var
from spgen.ir.linear import linear
from spgen.ir.pattern import PATTERN
from spgen.patterns import Pattern, block, dense, documents
from spgen.trace import Tracing, trace
from spgen.trace_torch import refuse_lookup

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SUBJECT = "mask_mod"
_ROW, _KEY = var("i"), var("j")


def from_mask_mod(
    mask_mod: Callable[..., Any],
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
) -> Pattern:
    """The pattern of a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`.

    Closed-over integers and tensors are read once, now. With `q_len` and `kv_len` the pattern is that of calls with
    these lengths, and what cannot be captured (`table[q_idx, kv_idx]`) is evaluated to a mask of [batch, heads, q_len,
    kv_len], as `create_block_mask` does; `batch` or `heads` left out means that the mask does not differ along it.

    Raises UnsupportedError for a lookup or a function that is not captured, naming the tensor.
    """
    if (q_len is None) != (kv_len is None):
        missing = "q_len" if q_len is None else "kv_len"
        raise ShapeError(f"from_mask_mod: {missing}", given="nothing", allowed="both q_len and kv_len, or neither")
    shift = 0 if q_len is None or kv_len is None else kv_len - q_len
    what = Tracing(_SUBJECT, lookups=[])
    try:
        predicate = trace(mask_mod, what)
        return _Reader(what.lookups or [], shift).pattern(predicate)
    except SpgenError:
        if q_len is None or kv_len is None or not callable(mask_mod):
            raise
    return from_mask(_evaluated(mask_mod, batch, heads, q_len, kv_len))


def from_block_mask(block_mask: BlockMask, *, batch: int | None = None, heads: int | None = None) -> Pattern:
    """The pattern of a FlexAttention `BlockMask`: full blocks, and partial blocks where their `mask_mod` holds.

    Any BLOCK_SIZE; per sequence and head as the block mask is. It serves calls of the block mask's lengths. A
    `mask_mod` that cannot be captured is evaluated, for `batch` and `heads` (default: those of the block mask).

    What `create_block_mask` makes of a `mask_mod` is all in the `mask_mod`: `from_mask_mod` needs no data for it, and
    serves any length. Raises ShapeError for a block mask cut along its rows.
    """
    rows, cols = block_mask.BLOCK_SIZE
    q_len, kv_len = block_mask.seq_lengths
    if block_mask.kv_num_blocks.shape[-1] != -(-q_len // rows):
        raise ShapeError(
            "block_mask", given=f"{block_mask.kv_num_blocks.shape[-1]} blocks of {rows} rows for {q_len} rows",
            allowed=f"{-(-q_len // rows)} blocks of rows", remedy="convert the whole block mask",
        )  # fmt: skip
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, -(-kv_len // cols))
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, partial.shape[-1])
    if not bool(partial.any()):
        return block(rows, cols, mask=full)
    lead = (1, 1, *partial.shape[:-2])[-2:]
    inside = from_mask_mod(
        block_mask.mask_mod, q_len=q_len, kv_len=kv_len, batch=lead[0] if batch is None else batch,
        heads=lead[1] if heads is None else heads,
    )  # fmt: skip
    if inside == dense():
        return block(rows, cols, mask=full | partial)
    partly = block(rows, cols, mask=partial) & inside
    return block(rows, cols, mask=full) | partly if bool(full.any()) else partly


def _listed(count: Tensor, indices: Tensor, tiles: int) -> Tensor:
    """The listed blocks as a mask [..., R, tiles]; what follows the count is undefined."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    found = torch.zeros((*indices.shape[:-1], tiles + 1), dtype=torch.bool, device=indices.device)
    target = torch.where(valid & (indices < tiles), indices, tiles).long()
    return found.scatter_(-1, target, torch.ones_like(target, dtype=torch.bool))[..., :tiles]


def _evaluated(mask_mod: Callable[..., Any], batch: int | None, heads: int | None, q_len: int, kv_len: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    device = next((tensor.device for tensor in _captured(mask_mod)), torch.device("cpu"))
    return create_mask(mask_mod, batch, heads, q_len, kv_len, device=device)


def _captured(value: Any) -> Iterator[Tensor]:
    """The tensors that a function closes over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _captured(item)
    elif inspect.isfunction(value):
        seen = inspect.getclosurevars(value)
        for item in (*seen.nonlocals.values(), *seen.globals.values()):
            if item is not value:
                yield from _captured(item)


class _Reader:
    """Turns a traced condition with lookups (`load(tensor_0, 0, i)`) into a pattern."""

    def __init__(self, tensors: list[Tensor], shift: int) -> None:
        self.tensors, self.shift = tensors, shift
        self.documents: dict[str, Pattern] = {}

    def pattern(self, node: Expr, same: frozenset[str] = frozenset()) -> Pattern:
        """`node` as a pattern, inside documents that row and key share in the tables `same`."""
        if not expr.tables(node):
            return self._where(node)
        if node.op in ("and", "or"):
            return self._connected(node, same)
        if node.op == "not":
            return ~self.pattern(node.args[0], same)
        if node.op in ("xor", "select"):
            return self.pattern(expr.cases(node), same)
        if (table := _document(node)) is not None:
            return self._documents(table)
        if node.op == "ne" and _document(~node) is not None:
            return ~self.pattern(~node, same)
        inside = _one_side(node, same)
        if expr.tables(inside):
            refuse_lookup(self.tensors[_number(sorted(expr.tables(inside))[0])], f"`{inside}`", _SUBJECT)
        return self._where(inside)

    def _connected(self, node: Expr, same: frozenset[str]) -> Pattern:
        parts = list(expr.flatten(node.op, node))
        if node.op == "and":
            same = same.union(table for part in parts if (table := _document(part)) is not None)
        plain = [part for part in parts if not expr.tables(part)]
        found = [self.pattern(part, same) for part in parts if expr.tables(part)]
        if plain:
            found.insert(0, self._where(reduce(expr.and_ if node.op == "and" else expr.or_, plain)))
        return reduce(lambda a, b: a & b if node.op == "and" else a | b, found)

    def _where(self, predicate: Expr) -> Pattern:
        moved = expr.substitute(predicate, {"i": _ROW - self.shift})
        if moved.op == "const":
            return dense() if moved.args[0] else ~dense()
        return Pattern(PATTERN.make("where", predicate=moved))

    def _documents(self, table: str) -> Pattern:
        if table not in self.documents:
            numbers = self.tensors[_number(table)]
            runs, lengths = torch.unique_consecutive(numbers, return_counts=True)
            if self.shift:
                refuse_lookup(numbers, "documents, and rows that do not start at the first key", _SUBJECT)
            if len(runs.unique()) < len(runs):
                refuse_lookup(numbers, "documents in several pieces", _SUBJECT)
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            self.documents[table] = documents(ends.to(torch.int32))
        return self.documents[table]


def _number(table: str) -> int:
    return int(table.removeprefix("tensor_"))


def _document(node: Expr) -> str | None:
    """The table of `document_id[q_idx] == document_id[kv_idx]`."""
    if node.op != "eq" or any(side.op != "load" for side in node.args):
        return None
    (table, _, a), (other, _, b) = (side.args for side in node.args)
    return str(table) if table == other and {a, b} == {_ROW, _KEY} else None


def _one_side(node: Expr, same: frozenset[str]) -> Expr:
    """A comparison in which the key's document is the row's, and what is equal on both sides cancels."""
    done: dict[Expr, Expr] = {}
    for current in expr.walk(node):
        found = expr.rebuild(current, [done[child] for child in expr.operands(current)])
        if current.op == "load" and current.args[0] in same and current.args[2] is _KEY:
            found = expr.load(current.args[0], 0, _ROW)
        if current.op in ("add", "sub") and expr.tables(found):
            found = linear(found).expression()
        if current.op in ("lt", "le", "eq", "ne") and expr.tables(found):
            found = expr.rebuild(found, linear(found.args[0] - found.args[1]).sides())
        done[current] = found
    return done[node]


__all__ = ["from_block_mask", "from_mask_mod"]
