"""The tensors of a pattern: what each place holds, which shapes fit a call, and whether the values make sense.

Shapes are right-aligned `[batch, heads, …]`. The batch axis is 1 or the batch of the call, the heads axis 1, the key
heads or the query heads; both may be left out. `check_shapes` looks at shapes only and never waits for the device;
`check_data` reads the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from spgen.errors import DataError, DeviceError, DtypeError, PatternError, ShapeError
from spgen.ir.node import Op, Slot, walk
from spgen.ir.pattern import INTEGERS, MASKS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Place: TypeAlias = "tuple[Op, str, Slot]"


@dataclass(frozen=True)
class Role:
    """What a tensor means: letters of its own axes, its dtypes, and whether batch and heads may stand before them."""

    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    shared: bool = False


# R row tiles (or rows), C column tiles (or slots of a list), K entries, NNZ entries of all row tiles, P = R + 1, N ids
ROLES: Mapping[tuple[str, str], Role] = {
    ("block", "mask"): Role(("R", "C"), MASKS),
    ("block", "indices"): Role(("R", "C"), INTEGERS),
    ("block", "csr indices"): Role(("NNZ",), INTEGERS),
    ("block", "indptr"): Role(("P",), INTEGERS),
    ("columns", "index"): Role(("K",), INTEGERS),
    ("diagonals", "offsets"): Role(("K",), INTEGERS),
    ("vertical_slash", "columns"): Role(("K",), INTEGERS),
    ("vertical_slash", "offsets"): Role(("K",), INTEGERS),
    ("top_k", "index"): Role(("R", "K"), INTEGERS),
    ("n_of_m", "mask"): Role(("R", "C"), MASKS),
    ("documents", "cu_seqlens"): Role(("N",), INTEGERS, shared=True),
    ("permuted", "q"): Role(("N",), INTEGERS),
    ("permuted", "k"): Role(("N",), INTEGERS),
}


@lru_cache(maxsize=1024)
def places(node: Op) -> tuple[Place, ...]:
    """Every (operation, attribute, slot) of a pattern, in the order they print."""
    return tuple((op, name, value) for op in walk(node) for name, value in op.attrs if isinstance(value, Slot))


@lru_cache(maxsize=1024)
def _mixture_sizes(node: Op) -> tuple[int, ...]:
    """How many patterns each mixture of a pattern has."""
    return tuple(len(op.operands) for op in walk(node) if op.kind == "per_head")


def role_of(op: Op, name: str) -> Role:
    """What the tensor at attribute `name` of `op` means."""
    csr = op.kind == "block" and name == "indices" and op["indptr"] is not None
    return ROLES[op.kind, "csr indices" if csr else name]


def dtype_name(tensor: Tensor) -> str:
    """The dtype without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")


def describe(index: int, subject: str, role: Role, tensor: Tensor) -> Slot:
    """The slot of a tensor; raises DtypeError or ShapeError when it cannot play its role."""
    if dtype_name(tensor) not in role.dtypes:
        raise DtypeError(
            subject,
            given=f"dtype {dtype_name(tensor)}",
            allowed=" or ".join(role.dtypes),
            remedy=f"convert it with .to(torch.{role.dtypes[0]})",
        )
    own = len(role.axes)
    ranks = (own,) if role.shared else (own, own + 1, own + 2)
    if tensor.dim() not in ranks:
        forms = [f"[{', '.join([*('B', 'H')[2 + own - rank :], *role.axes])}]" for rank in ranks]
        raise ShapeError(subject, given=f"shape {list(tensor.shape)}", allowed=" or ".join(forms))
    dims: list[int | str] = list(role.axes)
    if tensor.dim() > own:
        dims.insert(0, int(tensor.shape[-own - 1]))
    if tensor.dim() > own + 1:
        dims.insert(0, 1 if int(tensor.shape[0]) == 1 else "B")
    return Slot(index, dtype_name(tensor), tuple(dims))


def check_slot(subject: str, slot: Slot, role: Role, tensor: Tensor) -> None:
    """Raises DtypeError or ShapeError unless `tensor` fits the dtype and dims of `slot`, and these its role."""
    found = describe(slot.index, subject, role, tensor)
    if slot.dtype != found.dtype:
        raise DtypeError(subject, given=f"dtype {found.dtype}", allowed=f"{slot.dtype}, as `{slot}` says")
    heads = slot.dims[-len(role.axes) - 1] if len(slot.dims) > len(role.axes) else 1
    if not isinstance(heads, int):
        raise ShapeError(subject, given=f"`{slot}`", allowed="a number of heads, which is part of the pattern")
    sizes = tuple(int(size) for size in tensor.shape)
    known = len(slot.dims) == len(sizes) and all(
        dim == size for dim, size in zip(slot.dims, sizes, strict=True) if isinstance(dim, int)
    )
    if not known:
        raise ShapeError(subject, given=f"shape {list(sizes)}", allowed=f"{list(slot.dims)}, as `{slot}` says")


def _subject(op: Op, name: str, slot: Slot) -> str:
    return f"{op.kind}: {name} (${slot.index})"


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


@dataclass(frozen=True)
class _Call:
    """The sizes of one call."""

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    batch: int


def check_shapes(
    node: Op,
    data: Sequence[Tensor],
    *,
    q_len: int | None,
    kv_len: int | None,
    q_heads: int,
    kv_heads: int,
    batch: int,
    device: torch.device | str | None = None,
) -> None:
    """Raises ShapeError, DtypeError, DeviceError or PatternError unless `data` fit a call of these sizes.

    `data[n]` is the tensor of slot `$n`. Only shapes are read: nothing waits for the device. `device` is where q and k
    are; None skips that comparison. Lengths of None (a packed batch) leave the data's rows and columns unchecked.
    """
    call = _Call(q_len or 0, kv_len or 0, q_heads, kv_heads, batch)
    for size in _mixture_sizes(node):
        if size not in (q_heads, kv_heads):
            raise PatternError(
                "per_head",
                given=f"{size} patterns",
                allowed=f"{q_heads} (the query heads) or {kv_heads} (the key heads)",
                remedy="pass one pattern for each head, as in per_head([a] * 4 + [b] * 28)",
            )
    for op, name, slot in places(node):
        if slot.index >= len(data):
            raise PatternError(
                _subject(op, name, slot), given=f"{len(data)} tensors", allowed=f"at least {slot.index + 1}"
            )
        tensor, subject = data[slot.index], _subject(op, name, slot)
        check_slot(subject, slot, role_of(op, name), tensor)
        if device is not None and tensor.device != _device(device, tensor):
            raise DeviceError(
                subject,
                given=f"a tensor on {tensor.device}",
                allowed=f"{device}, where q and k are",
                remedy="move the pattern with pattern.to(device)",
            )
        _check_leading(subject, role_of(op, name), tensor, call)
        if q_len is not None and kv_len is not None:
            _check_extents(subject, op, name, tensor, call)


def _device(device: torch.device | str, like: Tensor) -> torch.device:
    """`device` with an index where `like` has one: "cuda" means the tensor's own card."""
    from torch import device as make

    wanted = make(device)
    same = wanted.type == like.device.type and wanted.index is None
    return like.device if same else wanted


def _check_leading(subject: str, role: Role, tensor: Tensor, call: _Call) -> None:
    """The batch and heads axes."""
    own = len(role.axes)
    if tensor.dim() > own and tensor.shape[-own - 1] not in (1, call.kv_heads, call.q_heads):
        raise ShapeError(
            subject,
            given=f"{tensor.shape[-own - 1]} heads in shape {list(tensor.shape)}",
            allowed=f"1, {call.kv_heads} (the key heads) or {call.q_heads} (the query heads)",
        )
    if tensor.dim() > own + 1 and tensor.shape[0] not in (1, call.batch):
        raise ShapeError(
            subject,
            given=f"batch {tensor.shape[0]} in shape {list(tensor.shape)}",
            allowed=f"1 or {call.batch} (the batch of the call)",
        )


def _extents(op: Op, name: str, q_len: int, kv_len: int) -> dict[str, tuple[int, str]]:
    """For the axes whose size a call fixes: that size, and how to compute it."""
    rows = (q_len, f"{q_len} rows of the call")
    cols = (kv_len, f"{kv_len} keys")
    if (op.kind, name) == ("permuted", "q"):
        return {"N": rows}
    if (op.kind, name) == ("permuted", "k"):
        return {"N": cols}
    if op.kind == "n_of_m":
        return {"R": rows, "C": cols}
    if op.kind not in ("block", "top_k"):
        return {}
    tiles = _tiles(q_len, op["rows"])
    row_tiles = (tiles, f"ceil(q_len / rows) = ceil({q_len} / {op['rows']})")
    if name == "indptr":
        return {"P": (tiles + 1, f"{row_tiles[1]} + 1")}
    if name == "mask":
        col_tiles = (_tiles(kv_len, op["cols"]), f"ceil(kv_len / cols) = ceil({kv_len} / {op['cols']})")
        return {"R": row_tiles, "C": col_tiles}
    return {"R": row_tiles}


def _check_extents(subject: str, op: Op, name: str, tensor: Tensor, call: _Call) -> None:
    axes = role_of(op, name).axes
    sizes = dict(zip(axes, tensor.shape[-len(axes) :], strict=True))
    for axis, (size, reason) in _extents(op, name, call.q_len, call.kv_len).items():
        if axis in sizes and sizes[axis] != size:
            raise ShapeError(
                subject,
                given=f"{axis} = {sizes[axis]} in shape {list(tensor.shape)}",
                allowed=f"{axis} = {size}, exactly: {reason}",
                remedy="the rows of data are those of the call, its columns all keys: pad a short one, cut a long one",
            )


def check_data(
    node: Op,
    data: Sequence[Tensor],
    *,
    q_len: int,
    kv_len: int,
    q_heads: int,
    kv_heads: int,
    batch: int,
) -> None:
    """Raises DataError naming the first value that contradicts its role, with its place.

    Reported are indices out of range (-1 is padding; an offset is out of range when no pair can have it), a decreasing
    indptr or cu_seqlens, orders that are no permutations, and n_of_m masks with more than n of m. Without this check
    kernels ignore indices out of range. Shapes must have passed `check_shapes`. Waits for the device.
    """
    call = _Call(q_len, kv_len, q_heads, kv_heads, batch)
    for op, name, slot in places(node):
        _CHECKS[op.kind, name](_subject(op, name, slot), op, data[slot.index].detach().cpu(), data, call)


def check_boundaries(subject: str, boundaries: Tensor, length: int) -> int:
    """The length of the longest sequence; raises DataError unless `boundaries` lead from 0 to `length`. Waits."""
    found = boundaries.detach().cpu()
    remedy = "cumulative lengths: 0, the end of the first sequence, …, the end of the last"
    _check_ascending(subject, found, remedy)
    for place, wanted in ((0, 0), (len(found) - 1, length)):
        if int(found[place]) != wanted:
            _fail(subject, found, (place,), ("P",), str(wanted), remedy)
    return int((found[1:] - found[:-1]).max())


def _first(bad: Tensor) -> tuple[int, ...] | None:
    """The place of the first true element."""
    found = bad.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _where(place: tuple[int, ...], axes: Sequence[str]) -> str:
    """A place in words: `(b=0, h=2, r=1, 5)`; the last axis needs no name."""
    names = ["b", "h", *axes[:-1]][-len(place) + 1 :] if len(place) > 1 else []
    return f"({', '.join([*(f'{n}={p}' for n, p in zip(names, place, strict=False)), str(place[-1])])})"


def _fail(subject: str, tensor: Tensor, place: tuple[int, ...], axes: Sequence[str], allowed: str, remedy: str) -> None:
    value = tensor[place].item()
    raise DataError(f"{subject} at {_where(place, axes)}", given=value, allowed=allowed, remedy=remedy)


def _check_range(subject: str, tensor: Tensor, low: int, high: int, axes: Sequence[str], what: str) -> None:
    place = _first((tensor < low) | (tensor >= high))
    if place is not None:
        remedy = "pad with -1" if low == -1 else "pad by repeating an offset"
        _fail(subject, tensor, place, axes, f"{low} to {high - 1}: {what}", remedy)


def _check_columns(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    _check_range(subject, tensor, -1, call.kv_len, ("K",), f"one of {call.kv_len} keys, or -1 for none")


def _check_offsets(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    reach = max(call.q_len, call.kv_len)
    _check_range(subject, tensor, 1 - reach, reach, ("K",), "a distance i - j that some pair can have")


def _check_indices(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    tiles = _tiles(call.kv_len, op["cols"])
    axes = ("r", "K") if op.kind == "top_k" or op["indptr"] is None else ("NNZ",)
    _check_range(subject, tensor, -1, tiles, axes, f"one of {tiles} tiles of {op['cols']} keys, or -1 for none")


def _check_ascending(subject: str, tensor: Tensor, remedy: str) -> None:
    place = _first(tensor < 0)
    if place is not None:
        _fail(subject, tensor, place, ("P",), "boundaries of at least 0", remedy)
    place = _first(tensor[..., 1:] < tensor[..., :-1])
    if place is not None:
        before = tensor[place].item()
        place = (*place[:-1], place[-1] + 1)
        _fail(subject, tensor, place, ("P",), f"at least {before}, the boundary before it", remedy)


def _check_indptr(subject: str, op: Op, tensor: Tensor, data: Sequence[Tensor], call: _Call) -> None:
    _check_ascending(subject, tensor, "indptr counts the indices before each row tile, and never decreases")
    entries = int(data[op["indices"].index].shape[-1])
    place = _first(tensor > entries)
    if place is not None:
        _fail(subject, tensor, place, ("P",), f"at most {entries}, the number of indices", "pass all indices")


def _check_cu_seqlens(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    _check_ascending(
        subject, tensor, "cu_seqlens are the documents' starts and the end of the last: cumulative lengths"
    )


def _check_order(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    """The first entry out of range or seen before."""
    size = int(tensor.shape[-1])
    axes, remedy = ("N",), "an order lists every original exactly once, as argsort does"
    place = _first((tensor < 0) | (tensor >= size))
    if place is not None:
        _fail(subject, tensor, place, axes, f"0 to {size - 1}", remedy)
    ranked, by = tensor.sort(dim=-1, stable=True)
    again = (ranked[..., 1:] == ranked[..., :-1]).nonzero().tolist()
    if again:
        place = min((*lead, int(by[(*lead, at + 1)])) for *lead, at in again)
        _fail(subject, tensor, place, axes, "each original once (this one came before)", remedy)


def _check_n_of_m(subject: str, op: Op, tensor: Tensor, _: Sequence[Tensor], call: _Call) -> None:
    """No group of m columns has more than n."""
    from torch.nn.functional import pad

    groups = (
        pad((tensor != 0).int(), (0, -int(tensor.shape[-1]) % op["m"])).view(*tensor.shape[:-1], -1, op["m"]).sum(-1)
    )
    place = _first(groups > op["n"])
    if place is not None:
        remedy = f"keep {op['n']} of each {op['m']} consecutive columns"
        _fail(f"{subject}, group", groups, place, ("r", "C"), f"at most {op['n']} columns", remedy)


def _accept(subject: str, op: Op, tensor: Tensor, data: Sequence[Tensor], call: _Call) -> None:
    """A mask of blocks is right whatever it holds."""


_CHECKS: Mapping[tuple[str, str], Any] = {
    ("block", "mask"): _accept,
    ("block", "indices"): _check_indices,
    ("block", "indptr"): _check_indptr,
    ("columns", "index"): _check_columns,
    ("diagonals", "offsets"): _check_offsets,
    ("vertical_slash", "columns"): _check_columns,
    ("vertical_slash", "offsets"): _check_offsets,
    ("top_k", "index"): _check_indices,
    ("n_of_m", "mask"): _check_n_of_m,
    ("documents", "cu_seqlens"): _check_cu_seqlens,
    ("permuted", "q"): _check_order,
    ("permuted", "k"): _check_order,
}
