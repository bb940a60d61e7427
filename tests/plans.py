"""Both forms of planning side by side: tensor operations, which define the tables, and kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from spgen.backends.triton_plan import Planner, planner
from spgen.ir.tiles import table_ops
from spgen.patterns import Pattern
from spgen.tables import Builder
from spgen.target import Target
from tests.kinds import LENGTH
from tests.lowering import Lengths, lowered_builder


def packed_lengths(**options: Any) -> Lengths:
    """Sequences that fit tests/kinds.py: empty ones, rows before the first, rows and keys behind the last."""
    cu_q = torch.tensor([5, LENGTH, 33, 0, 1, 90]).cumsum(0)
    cu_k = torch.tensor([3, LENGTH, 40, 7, 0, 60]).cumsum(0).int()
    return Lengths(LENGTH, LENGTH, 4, 2, 5, cu_q=cu_q, cu_k=cu_k, **options)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def planned(pattern: Pattern, call: Lengths, device: str = "cpu") -> tuple[Planner, Builder, list[torch.Tensor]]:
    """The planner of `pattern`, its argument on `device`, and the tables that it should make."""
    levels, defined = lowered_builder(pattern, call)
    place = torch.zeros(0, device=device).device
    tensors = {
        name: _moved(getattr(defined.sequences, name), place) for name in ("q_offset", "kv_lengths", "cu_q", "cu_k")
    }
    sequences = replace(defined.sequences, device=place, **tensors)
    builder = Builder([_moved(t, place) for t in defined.data], sequences, call.q_heads, call.kv_heads)
    wanted = [defined.tables[op["name"]] for op in table_ops(levels.program)]
    return planner(levels.program, Target.of(device)), builder, wanted


def assert_same_tables(pattern: Pattern, call: Lengths, device: str = "cpu") -> Planner:
    """Kernels make the tables that tensor operations make, bit for bit, and the same ones again."""
    made_by, builder, wanted = planned(pattern, call, device)
    for _ in range(2):
        made = made_by(builder)
        assert len(made) == len(wanted)
        for op, table, right in zip(made_by.tables, made, wanted, strict=True):
            assert table.shape == right.shape, f"{op}{list(table.shape)} for {list(right.shape)}"
            assert table.is_contiguous()
            assert torch.equal(table.cpu(), right), f"{op}{table}\n{right}"
    return made_by
