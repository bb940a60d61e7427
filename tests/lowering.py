"""What a lowered pattern means, without any backend: tables are built and the kernel's text is interpreted."""

from __future__ import annotations

import torch

from spgen.compile import Lowered, Request, lower
from spgen.passes.schedule import Call
from spgen.patterns import Pattern
from spgen.tables import Builder
from spgen.target import Target
from tests.kernel_oracle import interpret


def lowered_builder(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    *,
    q_heads: int = 1,
    kv_heads: int = 1,
    batch: int = 1,
    q_offset: int | torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    block_m: int = 16,
    block_n: int = 16,
    packed: bool = False,
) -> tuple[Lowered, Builder]:
    """The levels of `pattern` for a call, and its tables, already built."""
    mode = "default" if q_offset is None else "scalar" if isinstance(q_offset, int) else "tensor"
    call = Call("float32", 1, 1, q_offset=mode, kv_lengths=kv_lengths is not None)
    target = Target("cpu", "test", "generic")
    levels = lower(Request(repr(pattern), call, q_heads, kv_heads, packed, target), block_m, block_n, ())
    lengths: int | torch.Tensor = kv_len if kv_lengths is None else kv_lengths.clamp(0, kv_len)
    offset = lengths - q_len if q_offset is None else q_offset
    builder = Builder(
        pattern.data, torch.device("cpu"), batch, q_heads, kv_heads, q_len, kv_len, q_offset=offset, kv_len=lengths
    )
    builder.build(levels.program)
    return levels, builder


def lowered_pairs(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    *,
    q_heads: int = 1,
    kv_heads: int = 1,
    batch: int = 1,
    q_offset: int | torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    block_m: int = 16,
    block_n: int = 16,
    packed: bool = False,
) -> torch.Tensor:
    """The pairs that the kernel of `pattern` visits, bool [batch, q_heads, q_len, kv_len]; each once, or it raises."""
    levels, builder = lowered_builder(
        pattern, q_len, kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch, q_offset=q_offset,
        kv_lengths=kv_lengths, block_m=block_m, block_n=block_n, packed=packed,
    )  # fmt: skip
    read = [builder.tables[op["name"]] for op in levels.kernel.operands if op.kind == "table"]
    q = torch.zeros(batch, q_heads, q_len, 1)
    k = torch.zeros(batch, kv_heads, kv_len, 1)
    return interpret(levels.kernel, q, k, k, read, q_offset=q_offset, kv_lengths=kv_lengths).pairs
