"""Tensors for the slots of a pattern's text: drawn at random, or read from files. For `spgen show` and `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.data import places, role_of
from spgen.errors import DataError, PatternError, SpgenError, ToolchainError
from spgen.ir.node import Op, Slot

FORMATS = (".pt", ".npy", ".npz", ".safetensors")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the call that random data must fit."""

    batch: int
    q_len: int
    kv_len: int


def random_data(node: Op, density: float, seed: int, sizes: Sizes, run: int = 1) -> dict[int, Tensor]:
    """A tensor for each slot of `node`, by the slot's number.

    `density` is the share that is listed: of blocks, columns or distances; there are 1/density documents; orders are
    random permutations, and n_of_m keeps n of each m. What is listed comes in runs of `run` neighbours. The same seed
    gives the same data. Raises PatternError unless density lies in (0, 1].
    """
    if not 0 < density <= 1:
        raise PatternError("density", given=density, allowed="a share in (0, 1]", remedy="for example 0.1")
    draw = _Draw(density, torch.Generator().manual_seed(seed), sizes, run)
    found: dict[int, Tensor] = {}
    for op, name, slot in places(node):
        if slot.index in found:
            continue
        if op.kind == "block" and op["indptr"] is not None:
            found |= draw.csr(op)
        else:
            found[slot.index] = draw.tensor(op, name, slot)
    return found


@dataclass(frozen=True)
class _Draw:
    density: float
    generator: torch.Generator
    sizes: Sizes
    run: int = 1

    def tensor(self, op: Op, name: str, slot: Slot) -> Tensor:
        """Data for one slot; sizes that the slot does not fix follow from the call."""
        axes = role_of(op, name).axes
        own = slot.dims[-len(axes) :]
        lead = self._lead(slot, len(axes))
        if name in ("q", "k"):
            length = self.sizes.q_len if name == "q" else self.sizes.kv_len
            found = self._rand(*lead, length).argsort(-1)
        elif name == "cu_seqlens":
            found = self._boundaries(own[0])
        elif name == "mask":
            found = self._mask(op, lead)
        else:
            found = self._list(op, name, lead, own)
        return found.to(getattr(torch, slot.dtype))

    def csr(self, op: Op) -> dict[int, Tensor]:
        """indptr and indices of lists of equal lengths."""
        slots = op["indptr"], op["indices"]
        rows, units = _tiles(self.sizes.q_len, op["rows"]), _tiles(self.sizes.kv_len, op["cols"])
        each = self._count(units)
        indptr = (torch.arange(rows + 1) * each).expand(*self._lead(slots[0], 1), -1).contiguous()
        indices = self._distinct((*self._lead(slots[1], 1), rows), units, each).flatten(-2)
        return {
            slot.index: data.to(getattr(torch, slot.dtype)) for slot, data in zip(slots, (indptr, indices), strict=True)
        }

    def _lead(self, slot: Slot, own: int) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else self.sizes.batch for dim in slot.dims[:-own])

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _count(self, units: int) -> int:
        return min(units, max(1, round(self.density * units)))

    def _distinct(self, lead: tuple[int, ...], units: int, count: int) -> Tensor:
        """`count` different numbers below `units` in ascending order; padded with -1 where there are fewer."""
        run = min(self.run, max(units, 1))
        starts = self._rand(*lead, units // run).topk(min(-(-count // run), units // run)).indices * run
        found = (starts[..., None] + torch.arange(run)).flatten(-2).sort(-1).values[..., :count]
        return torch.nn.functional.pad(found, (0, count - found.shape[-1]), value=-1)

    def _list(self, op: Op, name: str, lead: tuple[int, ...], own: tuple[int | str, ...]) -> Tensor:
        """Columns, distances, or units for each group of rows."""
        by_rows = op.kind in ("block", "top_k")
        units = _tiles(self.sizes.kv_len, op["cols"]) if by_rows else self.sizes.kv_len
        rows = (_tiles(self.sizes.q_len, op["rows"]),) if by_rows else ()
        count = own[-1] if isinstance(own[-1], int) else self._count(units)
        found = self._distinct((*lead, *rows), units, count)
        return found.clamp(min=0) if name == "offsets" else found  # distances are padded by repeating one

    def _mask(self, op: Op, lead: tuple[int, ...]) -> Tensor:
        if op.kind == "n_of_m":
            return self._n_of_m(op["n"], op["m"], (*lead, self.sizes.q_len))
        shape = _tiles(self.sizes.q_len, op["rows"]), _tiles(self.sizes.kv_len, op["cols"])
        return self._rand(*lead, *shape) < self.density

    def _n_of_m(self, n: int, m: int, lead: tuple[int, ...]) -> Tensor:
        groups = _tiles(self.sizes.kv_len, m)
        ranks = self._rand(*lead, groups, m).argsort(-1).argsort(-1)
        return (ranks < n).flatten(-2)[..., : self.sizes.kv_len]

    def _boundaries(self, size: int | str) -> Tensor:
        documents = size - 1 if isinstance(size, int) else max(1, round(1 / self.density))
        length = max(self.sizes.q_len, self.sizes.kv_len)
        inside = self._distinct((), max(length - 1, 0), max(min(documents - 1, length - 1), 0)) + 1
        found = torch.cat([torch.zeros(1).long(), inside, torch.tensor([length])])
        missing = documents + 1 - len(found)
        return torch.nn.functional.pad(found, (0, missing), value=length) if missing > 0 else found[: documents + 1]


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def load_data(files: Mapping[int, str]) -> dict[int, Tensor]:
    """The tensors in files, by slot: .pt, .npy, or .npz and .safetensors, of which `file:name` names an array.

    Files are read as data, never run. Raises DataError naming the file.
    """
    return {slot: _load(text) for slot, text in files.items()}


def _load(text: str) -> Tensor:
    path, name = _split(text)
    try:
        found = _READERS[path.suffix](path)
    except SpgenError:
        raise
    except Exception as fault:  # each library has its own for a damaged file
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault).split("\n")[0]
        raise DataError(str(path), given=reason or type(fault).__name__, allowed="a file with one tensor") from fault
    if not isinstance(found, Mapping):
        return _tensor(path, found)
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        raise DataError(
            str(path), given="no name" if name is None else f"the name {name!r}",
            allowed=f"one of {', '.join(sorted(found)) or 'none: it is empty'}", remedy=f"write {path}:NAME",
        )  # fmt: skip
    return _tensor(path, found[name])


def _split(text: str) -> tuple[Path, str | None]:
    """The file and the name in it."""
    for suffix in FORMATS:
        path, found, name = text.partition(f"{suffix}:")
        if found:
            return Path(path + suffix), name
    if Path(text).suffix not in FORMATS:
        raise DataError(text, given="a file of unknown kind", allowed=", ".join(FORMATS))
    return Path(text), None


def _tensor(path: Path, found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise DataError(
            str(path), given=f"a {type(found).__name__}", allowed="a tensor", remedy="save the tensor alone"
        )
    return found


def _read_pt(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_numpy(path: Path) -> Any:
    import numpy as np

    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    return {name: torch.from_numpy(found[name]) for name in found.files}


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ToolchainError("safetensors", given="not installed", remedy="pip install 'spgen[show]'") from None
    return load_file(path)


_READERS = {".pt": _read_pt, ".npy": _read_numpy, ".npz": _read_numpy, ".safetensors": _read_safetensors}
