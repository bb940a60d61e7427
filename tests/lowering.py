"""What a lowered pattern means, without any backend: tables are built and the kernel's text is interpreted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from spgen.backends.extras import Extras
from spgen.compile import Lowered, Request, lower
from spgen.ir.config import Config
from spgen.passes.schedule import Call
from spgen.patterns import Pattern
from spgen.sequences import Sequences
from spgen.tables import Builder
from spgen.target import Target
from tests.kernel_oracle import interpret


@dataclass(frozen=True)
class Lengths:
    """The sizes of a call, as `pattern.mask` takes them, and how it is tiled.

    With `cu_q` and `cu_k` the batch is packed: `q_len` and `kv_len` are those of the longest sequence.
    """

    q_len: int
    kv_len: int
    q_heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    q_offset: int | torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    block_m: int = 16
    block_n: int = 16
    pack: bool = False
    align: int = 1

    @property
    def rows(self) -> int:
        """Rows of the tensors."""
        return self.q_len if self.cu_q is None else int(self.cu_q[-1]) + 3

    @property
    def keys(self) -> int:
        """Keys of the tensors."""
        return self.kv_len if self.cu_k is None else int(self.cu_k[-1]) + 2


def lowered_builder(pattern: Pattern, call: Lengths) -> tuple[Lowered, Builder]:
    """The levels of `pattern` for a call, and its tables, already built."""
    offset = call.q_offset
    mode = "default" if offset is None else "scalar" if isinstance(offset, int) else "tensor"
    fixed = Call("float32", 1, 1, mode, call.kv_lengths is not None, cu_seqlens=call.cu_q is not None)
    target = Target("cpu", "test", "generic")
    request = Request(repr(pattern), fixed, call.q_heads, call.kv_heads, call.pack, target)
    levels = lower(request, Config(call.block_m, call.block_n, (f"align={call.align}",)))
    sequences = Sequences(
        call.batch, call.rows, call.keys, torch.device("cpu"), offset, call.kv_lengths, call.cu_q, call.cu_k
    )
    builder = Builder(pattern.data, sequences, call.q_heads, call.kv_heads)
    builder.build(levels.program)
    return levels, builder


def lowered_pairs(pattern: Pattern, call: Lengths) -> torch.Tensor:
    """The pairs that the kernel of `pattern` visits, bool [batch, q_heads, q_len, kv_len]; each once, or it raises."""
    levels, builder = lowered_builder(pattern, call)
    read = [builder.tables[op["name"]] for op in levels.kernel.operands if op.kind == "table"]
    batch = call.batch if call.cu_q is None else 1
    q = torch.zeros(batch, call.q_heads, call.rows, 1)
    k = torch.zeros(batch, call.kv_heads, call.keys, 1)
    found = interpret(
        levels.kernel, q, k, k, read, q_offset=call.q_offset, kv_lengths=call.kv_lengths,
        extras=Extras(call.cu_q, call.cu_k),
    ).pairs  # fmt: skip
    return found if call.cu_q is None else _unpacked(found[0], call)


def _unpacked(pairs: torch.Tensor, call: Lengths) -> torch.Tensor:
    """The pairs of each sequence; raises if there are any between sequences or outside all."""
    assert call.cu_q is not None
    assert call.cu_k is not None
    padded = torch.zeros(call.batch, call.q_heads, call.q_len, call.kv_len, dtype=torch.bool)
    bounds = zip(*(itertools.pairwise(cu.tolist()) for cu in (call.cu_q, call.cu_k)), strict=True)
    for b, ((row, row_end), (key, key_end)) in enumerate(bounds):
        padded[b, :, : row_end - row, : key_end - key] = pairs[:, row:row_end, key:key_end]
    assert padded.sum() == pairs.sum(), "a pair that belongs to no sequence"
    return padded


def wanted_pairs(pattern: Pattern, call: Lengths) -> torch.Tensor:
    """The oracle's mask; of a packed batch that of the padded one, without the rows that do not exist."""
    heads = {"q_heads": call.q_heads, "kv_heads": call.kv_heads}
    if call.cu_q is None or call.cu_k is None:
        options = {"q_offset": call.q_offset, "kv_lengths": call.kv_lengths}
        return pattern.mask(call.q_len, call.kv_len, **heads, batch=call.batch, **options)
    rows, keys = call.cu_q.diff(), call.cu_k.diff()
    lengths = keys if call.kv_lengths is None else torch.minimum(keys, call.kv_lengths.clamp(min=0))
    offset = lengths - rows if call.q_offset is None else call.q_offset
    options = {"q_offset": offset, "kv_lengths": lengths, "q_lengths": rows}
    return pattern.mask(call.q_len, call.kv_len, **heads, batch=call.batch, **options)
