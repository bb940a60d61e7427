"""Products with active neurons on GPUs: lists made on the device, and the rows of weights that they name.

A gated MLP of few tokens, y = (activation(x Wg^T) * (x Wu^T)) Wd^T, reads only neurons whose gate is large:

    index, count = compact(gate, 0.1, rows_per_list=1)
    h = up(x, w_up, index, count, gate, activation="silu")
    y = down(h, w_down_t, index, count)

Weights lie neuron by neuron, [F, K] and [F, D]. Nothing waits for the device. Thresholds on gates: Lee et al., "CATS",
2024, section 4; unions over a batch: Xu et al., "Polar Sparsity", 2025, section 4.2. With `compacted=False`, `down`
serves input-channel sparsity (Zhang et al., "R-Sparse", 2025; Wang et al., "Q-Sparse", 2024): x is h, its channels are
the neurons, and the weight [K, N] lies channel by channel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_counters import arrivals
from spgen.backends.triton_program import Form, Program
from spgen.errors import DtypeError, ShapeError, SpgenError
from spgen.ir.config import Config
from spgen.ir.kernel import ACTIVATIONS, KERNEL, option
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.triton import neurons
from spgen.templates.triton.bits import padded
from spgen.templates.triton.neurons import FLAGS, MULTIPLY

_COUNTED, _LISTED = 4096, 1024  # neurons that a program counts at once, and lists
_UNION = 256
_LINE = 512  # bytes of a row in a step
_FLAGS = ("positive", "known", "gated", "twofold", "bias", "gathered")


def compact(
    scores: Tensor, threshold: float | Tensor, rows_per_list: int = 1, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Ascending lists of active neurons: index int32 [G, F], of which only the first count[g] are set, count int32 [G].

    List g serves rows g * rows_per_list and following of `scores` [M, F] and holds the neurons that any of them finds
    active: scores above the threshold (`positive`), or no smaller in magnitude. NaN is not active. A threshold on the
    device is a float32 tensor of one element.
    """
    _check_matrix("scores", scores)
    if rows_per_list < 1:
        raise SpgenError("rows_per_list", given=str(rows_per_list), allowed="at least 1")
    m, f = scores.shape
    n_lists = -(-m // rows_per_list)
    index = torch.empty(n_lists, f, dtype=torch.int32, device=scores.device)
    count = torch.zeros(n_lists, dtype=torch.int32, device=scores.device) if not f else index.new_empty(n_lists)
    if not index.numel():
        return index, count
    common = {"positive": positive, "known": not isinstance(threshold, Tensor)}
    target, dtype = _target(scores), scores.dtype
    limit = [threshold.to(torch.float32)] if isinstance(threshold, Tensor) else []
    bits = [] if isinstance(threshold, Tensor) else [struct.unpack("<i", struct.pack("<f", threshold))[0]]
    rows, after = min(rows_per_list, m), (scores.stride(0), *bits)
    if rows < MULTIPLY:
        one = _prepared(target, dtype, "compact", rows, **common)
        one.launch([scores, index, count, *limit], (f, m, *after), n_lists * -(-f // one.block_n))
        return index, count
    flags = torch.empty(n_lists, f, dtype=torch.uint8, device=scores.device)
    union = _prepared(target, dtype, "union", MULTIPLY, **common)
    union.launch([scores, flags, *limit], (f, m, rows, *after), n_lists * -(-f // union.block_n))
    one = _prepared(target, torch.uint8, "compact", 1)
    one.launch([flags, index, count], (f, n_lists), n_lists * -(-f // one.block_n))
    return index, count


def up(
    x: Tensor,
    w_up: Tensor,
    index: Tensor,
    count: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    rows_per_list: int = 1,
    w_gate: Tensor | None = None,
) -> Tensor:
    """The hidden values of active neurons, [M, F] in x's dtype: column a is for the list's a-th, the rest is not set.

    Of x [M, K], w_up and w_gate [F, K]: with `gate` [M, F] activation(gate) * (x . w_up), with `w_gate`
    activation(x . w_gate + bias) * (x . w_up), else activation(x . w_up + bias).
    """  # fmt: skip
    _check_matrix("x", x)
    _check_lists(x, w_up, index, count, rows_per_list)
    if activation not in ACTIVATIONS:
        raise SpgenError("activation", given=activation, allowed=", ".join(ACTIVATIONS))
    if x.shape[1] != w_up.shape[1]:
        raise ShapeError("w_up", given=f"shape {list(w_up.shape)}", allowed=f"[F, {x.shape[1]}], as x")
    (m, k), f = x.shape, len(w_up)
    if gate is not None:
        _check_matrix("gate", gate)
        if gate.shape != (m, f) or gate.dtype != x.dtype or bias is not None:
            raise ShapeError("gate", given=f"shape {list(gate.shape)}", allowed=f"[{m}, {f}] of x's dtype, no bias")
    if w_gate is not None:
        _check_lists(x, w_gate, index, count, rows_per_list)
        if w_gate.shape != w_up.shape or gate is not None:
            raise ShapeError("w_gate", given=f"shape {list(w_gate.shape)}", allowed=f"{list(w_up.shape)}, no gate")
    h = torch.empty(m, f, dtype=x.dtype, device=x.device)
    rows, sizes, tiles = _tiles(m, f, rows_per_list)
    one = _prepared(
        _target(x), x.dtype, "up", rows, gated=gate is not None, twofold=w_gate is not None, bias=bias is not None,
        activation=activation,
    )  # fmt: skip
    programs = max(min(-(-f // one.block_a), one.resident // max(len(count) * tiles, 1)), 1)
    given = [one for one in (w_gate, gate, bias) if one is not None]
    numbers = (programs, *sizes, k, x.stride(0), *([] if gate is None else [gate.stride(0)]))
    if h.numel():
        one.launch([x, w_up, index, count, *given, h], numbers, programs * len(count) * tiles)
    return h


def down(
    h: Tensor,
    w_down_t: Tensor,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None = None,
    compacted: bool = True,
    rows_per_list: int = 1,
) -> Tensor:
    """y [M, D] = sum of h's active neurons times their rows of w_down_t [F, D], + bias, in h's dtype.

    h [M, F] as `up` makes it, or (not `compacted`) with every neuron at its own column. An empty list gives the bias.
    """
    _check_matrix("h", h)
    _check_lists(h, w_down_t, index, count, rows_per_list)
    (m, f), d = h.shape, w_down_t.shape[1]
    if f != len(w_down_t):
        raise ShapeError("h", given=f"shape {list(h.shape)}", allowed=f"[M, {len(w_down_t)}], as w_down_t")
    y = torch.empty(m, d, dtype=h.dtype, device=h.device)
    if not y.numel():
        return y
    rows, sizes, row_tiles = _tiles(m, f, rows_per_list)
    one = _prepared(_target(h), h.dtype, "down", rows, bias=bias is not None, gathered=not compacted)
    tiles = len(count) * row_tiles * -(-d // one.block_n)
    splits = max(min(one.resident // tiles, one.splits, -(-f // one.block_a)), 1)
    parts = h.new_empty(tiles * splits * one.block_n * rows if splits > 1 else 1, dtype=torch.float32)
    tensors = [h, w_down_t, index, count, *([] if bias is None else [bias]), y, parts, arrivals(h, 32 * tiles)]
    one.launch(tensors, (splits, *sizes, d, h.stride(0)), tiles * splits)
    return y


def _tiles(m: int, f: int, rows_per_list: int) -> tuple[int, tuple[int, ...], int]:
    """Rows of a tile, the sizes that kernels ask for, and how many tiles share a list."""
    shared = min(rows_per_list, m)
    rows = neurons.tile_of(shared)
    tiles = -(-shared // max(rows, 1))
    return rows, (f, m, tiles, shared) if rows >= MULTIPLY else (f, m), tiles


def config_of(target: Target, dtype: torch.dtype, part: str, rows: int, weights: int = 1) -> Config:
    """Active neurons by columns of a step (of lists, neurons that a program counts at once, and lists).

    `resident` programs for each multiprocessor; `splits` is the largest number of programs that share a list's neurons.
    """
    size = dtype.itemsize
    if part in ("union", "compact"):
        return Config(1 if part == "union" else _COUNTED, _UNION if part == "union" else _LISTED, ("warps=8",))
    if part == "down":
        if rows >= MULTIPLY:
            return Config(256 // size, 64, ("warps=4", "stages=2", "resident=4", "splits=4"))
        return Config(max(64 // padded(rows), 16), 128, ("warps=4", "resident=4", "splits=16"))
    if rows >= MULTIPLY:
        stages = min(1 + target.smem_bytes // (_LINE * (16 * weights + rows)), 4)
        warps = 2 if rows <= 16 else 4 if rows <= 32 else 8
        return Config(16, _LINE // size, (f"warps={warps}", f"stages={stages}", "resident=4"))
    return Config(1, 1024 // size // min(padded(rows), 2), ("warps=1", "unroll=2", "resident=32"))


class Prepared(NamedTuple):
    """A kernel's launchable form, its tiles, and how many programs run at a time, and share a list."""

    program: Program
    part: str
    block_a: int
    block_n: int
    resident: int
    splits: int

    def launch(self, tensors: Sequence[Tensor], numbers: Sequence[int], grid: int) -> None:
        """Run it over the arguments."""
        self.program.launch(self.part, tensors, numbers, grid)


@lru_cache(maxsize=1024)
def _prepared(
    target: Target, dtype: torch.dtype, part: str, rows: int, *, activation: str = "none", **flags: bool
) -> Prepared:
    config = config_of(target, dtype, part, rows, 1 + flags.get("twofold", False))
    kernel = KERNEL.make(
        "neurons", dtype=str(dtype).removeprefix("torch."), part=part, rows=rows, activation=activation,
        block_a=config.block_m, block_n=config.block_n, options=config.options, **dict.fromkeys(_FLAGS, False) | flags,
    )  # fmt: skip
    resident = config.option("resident", 1) * max(target.cores, 1)
    splits = config.option("splits")
    return Prepared(program_of(kernel, target), part, config.block_m, config.block_n, resident, splits)


@lru_cache(maxsize=1024)
def program_of(kernel: Op, target: Target) -> Program:
    """The launchable form of a level-3 `neurons` kernel."""
    return Program(
        "triton/neurons.py.jinja", str(kernel), lambda: neurons.symbols(kernel), [form(kernel)], target
    )  # fmt: skip


def form(kernel: Op) -> Form:
    """How a kernel is compiled."""
    types = {"flags": "*u8"} | ({} if kernel["dtype"] == FLAGS else {"data": f"*{TRITON_TYPES[kernel['dtype']]}"})
    vector = VECTOR // ELEMENT_BYTES.get(kernel["dtype"], 1)
    return Form(kernel["part"], neurons.parameters(kernel), types, vector, option(kernel, "warps", 4))


def _target(tensor: Tensor) -> Target:
    return Target.of(tensor.device)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if str(tensor.dtype).removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
        raise DtypeError(name, given=str(tensor.dtype), allowed="float32, bfloat16, float16")
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        given = f"shape {list(tensor.shape)}, strides {list(tensor.stride())}"
        raise ShapeError(name, given=given, allowed="two axes, the last contiguous")


def _check_lists(x: Tensor, weight: Tensor, index: Tensor, count: Tensor, rows_per_list: int) -> None:
    if weight.dim() != 2 or not weight.is_contiguous() or weight.dtype != x.dtype:
        given = f"{weight.dtype}, shape {list(weight.shape)}, strides {list(weight.stride())}"
        raise ShapeError("weight", given=given, allowed=f"{x.dtype}, two axes, contiguous")
    n_lists = -(-len(x) // max(rows_per_list, 1))
    if (
        count.shape != (n_lists,)
        or index.shape != (n_lists, len(weight))
        or index.dtype != torch.int32
        or count.dtype != torch.int32
    ):
        given = f"index {index.dtype} {list(index.shape)}, count {count.dtype} {list(count.shape)}"
        raise ShapeError("index, count", given=given, allowed=f"int32, [{n_lists}, {len(weight)}] and [{n_lists}]")
