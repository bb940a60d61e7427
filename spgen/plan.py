"""Plans: the index tensors of a pattern for given lengths, kept over calls, moved to other devices, and on disk."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spgen.arguments import Arguments
from spgen.compile import lowered
from spgen.errors import PlanError
from spgen.ir.tiles import table_ops
from spgen.ops import request_of

FORMAT = "spgen plan"
VERSION = 2  # of the file; the meaning of tables is part of `tiles`
_FIELDS = {"format", "version", "key", "tiles", "checksum", "tables"}
_UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError
)  # fmt: skip


class PlanKey(NamedTuple):
    """What a plan was made for; a call must ask for the same."""

    pattern: str
    data: tuple[torch.Size, ...]  # shapes of the pattern's tensors, by which tiles are chosen
    q: torch.Size
    k: torch.Size
    sequences: int | None  # of a packed batch
    dtype: torch.dtype
    device: torch.device
    q_offset: int | None
    no_q_offsets: bool  # whether q_offset was no tensor
    no_kv_lengths: bool


_NAMES = (
    "pattern", "shapes of the pattern's tensors", "shape of q", "shape of k", "packed sequences", "dtype", "device",
    "q_offset", "no q_offset tensor", "no kv_lengths",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Plan:
    """The index tensors of a pattern for given lengths, on the device; reusable over steps and layers.

    `tables` are int32 [batch or 1, heads, rows, columns]; their meaning is that of the level-2 program, which
    `spgen explain --ir` prints. `key` is what the plan was made for. Made by `attend.plan(q, k, …)`.
    """

    tables: list[Tensor]
    key: PlanKey

    @property
    def nbytes(self) -> int:
        """Device memory that the tables take, in bytes."""
        return sum(table.nbytes for table in self.tables)

    @property
    def device(self) -> torch.device:
        """Where the tables are, and calls must be."""
        return self.key.device

    def __repr__(self) -> str:
        shapes = "".join(f"\n  int32{list(table.shape)}, {_size(table.nbytes)}" for table in self.tables)
        key = self.key
        return (
            f"plan of {key.pattern} for q {list(key.q)} and k {list(key.k)}, {_name(key.dtype)} on {key.device}: "
            f"{_size(self.nbytes)}{shapes}"
        )

    def to(self, device: torch.device | str) -> Plan:
        """The plan on another device.

        Raises PlanError where that device's kernels use other tiles, to which other tables belong.
        """
        key = self.key._replace(device=_indexed(device))
        if key == self.key:
            return self
        if tiles_of(key) != tiles_of(self.key):
            raise PlanError(
                "plan: device", given=str(key.device), allowed=f"devices with the tiles of {self.key.device}",
                remedy="make a plan there: attend.plan(q, k, …)",
            )  # fmt: skip
        return Plan([table.to(key.device) for table in self.tables], key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`, with what it was made for; nothing that is loaded from there is ever run."""
        tables = [table.cpu() for table in self.tables]
        content = {
            "format": FORMAT, "version": VERSION, "key": _plain(self.key), "tiles": tiles_of(self.key),
            "checksum": _checksum(tables), "tables": tables,
        }  # fmt: skip
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(content, file)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Plan:
        """The plan in a file that :meth:`save` wrote, on `device` (by default on a device like the one it was on).

        Raises PlanError for a file that is damaged or no plan, or that another version wrote, and where the device's
        kernels use other tiles.
        """
        content = _content(path)
        tables, key = content["tables"], _key(content["key"], path)
        if _checksum(tables) != content["checksum"]:
            raise _broken(path, "tables that differ from those that were written")
        key = key._replace(device=key.device if device is None else _indexed(device))
        if key.device.type == "cuda" and not torch.cuda.is_available():
            raise PlanError(
                f"plan: {os.fspath(path)}", given="a plan for a GPU, on a machine without one", allowed="a device",
                remedy='say where: Plan.load(path, device="cpu")',
            )  # fmt: skip
        if tiles_of(key) != content["tiles"]:
            raise PlanError(
                f"plan: {os.fspath(path)}", given="tables for other tiles, of another device or version of spgen",
                allowed=f"those of {key.device}", remedy="make a plan there: attend.plan(q, k, …)",
            )  # fmt: skip
        return Plan([table.to(key.device) for table in tables], key)


def refuse(plan: Plan, wanted: PlanKey) -> None:
    """Raises PlanError naming the first thing for which the plan was not made."""
    name, made, asked = next(
        field for field in zip(_NAMES, plan.key, wanted, strict=True) if field[1] != field[2]
    )  # fmt: skip
    raise PlanError(
        f"plan: {name}", given=str(made), allowed=str(asked),
        remedy="make a plan with this call's arguments: attend.plan(q, k, …)",
    )  # fmt: skip


def tiles_of(key: PlanKey) -> str:
    """A digest of the tables' definitions, which follow from the pattern and the tiles of a device's kernels."""
    q, k = (
        torch.empty_strided(shape, (0,) * len(shape), dtype=key.dtype, device=key.device) for shape in (key.q, key.k)
    )
    data = [torch.empty_strided(shape, (0,) * len(shape), dtype=torch.int32) for shape in key.data]
    number = torch.zeros(1, dtype=torch.int32)
    offset = key.q_offset if key.no_q_offsets else number
    boundaries = None if key.sequences is None else number.expand(key.sequences + 1)
    arguments = Arguments(
        q, k, k, data, key.pattern, boundaries, boundaries, offset, None if key.no_kv_lengths else number
    )
    program = lowered(request_of(arguments)).program
    return hashlib.sha256("".join(map(str, table_ops(program))).encode()).hexdigest()


def _content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a file, once it is known to be a plan of this version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as fault:
        raise _broken(path, "a file that cannot be read") from fault
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _broken(path, "a file that is no plan")
    if content.get("version") != VERSION:
        raise _broken(path, f"a plan of version {content.get('version')}")
    tables = content.get("tables")
    sound = (
        set(content) == _FIELDS
        and isinstance(tables, list)
        and all(isinstance(table, Tensor) and table.dtype == torch.int32 and table.dim() == 4 for table in tables)
    )
    if not sound:
        raise _broken(path, "a plan with missing or unknown parts")
    return content


def _broken(path: str | os.PathLike[str], given: str) -> PlanError:
    return PlanError(
        f"plan: {os.fspath(path)}", given=given, allowed=f"a file of plan.save(path), version {VERSION}",
        remedy="make the plan anew: attend.plan(q, k, …).save(path)",
    )  # fmt: skip


def _plain(key: PlanKey) -> dict[str, Any]:
    return {
        **key._asdict(), "data": [list(shape) for shape in key.data], "q": list(key.q), "k": list(key.k),
        "dtype": _name(key.dtype), "device": str(key.device),
    }  # fmt: skip


def _key(plain: Any, path: str | os.PathLike[str]) -> PlanKey:
    try:
        key = PlanKey(**plain)
        return key._replace(
            data=tuple(map(torch.Size, plain["data"])), q=torch.Size(plain["q"]), k=torch.Size(plain["k"]),
            dtype=getattr(torch, plain["dtype"]), device=torch.device(plain["device"]),
        )  # fmt: skip
    except _UNREADABLE as fault:
        raise _broken(path, "a plan that does not say what it is for") from fault


def _checksum(tables: Sequence[Tensor]) -> int:
    """A number that changes with any entry or shape."""
    total = 0
    for table in tables:
        place = torch.arange(1, table.numel() + 1).mul_(0x9E3779B97F4A7C1)
        total = total * 31 + int(((table.flatten() + 1).long() * place).sum())
        for size in table.shape:
            total = total * 31 + size
    return total % 2**61


def _indexed(device: torch.device | str) -> torch.device:
    """A device with its number, as tensors have it."""
    found = torch.device(device)
    if str(found) == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"
