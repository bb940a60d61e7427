"""torch's sparse tensors as patterns: what is stored is what is attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from spgen.errors import DtypeError, ShapeError
from spgen.patterns import Pattern, block

_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr)


def from_sparse(tensor: Tensor) -> Pattern:
    """The pattern of a sparse tensor [L, S], [H, L, S] or [B, H, L, S]: its stored entries, whatever their values.

    BSR tensors become blocks of their size; CSR and COO tensors single pairs. The indices of BSR and CSR tensors are
    used as they are, without a copy; COO tensors are coalesced. The pattern serves calls with L rows and S keys.
    Raises DtypeError for column-compressed and dense tensors.
    """
    if not isinstance(tensor, Tensor):
        raise DtypeError("from_sparse: tensor", given=type(tensor).__name__, allowed="a sparse tensor")
    if tensor.layout not in (*_COMPRESSED, torch.sparse_coo):
        remedy = "use sp.from_mask" if tensor.layout == torch.strided else "convert it with .to_sparse_csr()"
        allowed = "torch.sparse_bsr, torch.sparse_csr or torch.sparse_coo"
        raise DtypeError("from_sparse: tensor", given=str(tensor.layout), allowed=allowed, remedy=remedy)
    if tensor.dim() not in (2, 3, 4) or tensor.dense_dim():
        given = f"shape {list(tensor.shape)} with {tensor.dense_dim()} dense axes"
        allowed = "[L, S], [H, L, S] or [B, H, L, S], all of them sparse"
        raise ShapeError("from_sparse: tensor", given=given, allowed=allowed)
    if tensor.layout == torch.sparse_coo:
        return _from_coo(tensor)
    rows, cols = tensor.values().shape[-2:] if tensor.layout == torch.sparse_bsr else (1, 1)
    return block(rows, cols, indptr=tensor.crow_indices(), indices=tensor.col_indices())


def _from_coo(tensor: Tensor) -> Pattern:
    """Lists of all heads have room for the longest one; what lies behind a list's end is never read."""
    *lead, row, column = tensor.coalesce().indices()
    *heads, rows, _ = tensor.shape
    place = torch.zeros_like(row)
    for index, size in zip(lead, heads, strict=True):
        place = place * size + index
    lists = int(torch.tensor(heads).prod()) if heads else 1
    per_row = torch.bincount(place * rows + row, minlength=lists * rows).reshape(lists, rows)
    indptr = torch.nn.functional.pad(per_row.cumsum(1), (1, 0))
    starts = torch.nn.functional.pad(indptr[:, -1].cumsum(0), (1, 0))
    indices = column.new_full((lists, int(indptr[:, -1].max())), -1)
    indices[place, torch.arange(len(row), device=row.device) - starts[place]] = column
    return block(1, indptr=indptr.reshape(*heads, -1), indices=indices.reshape(*heads, -1))


__all__ = ["from_sparse"]
