"""Products with active neurons without a GPU: the interpreter, and compiling ahead of time."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen.backends import triton_neurons
from spgen.backends.triton_neurons import compact, down, program_of, up
from spgen.ir.kernel import KERNEL
from spgen.target import Target
from tests.interpreted import run_interpreted

ATTRIBUTES = {
    "dtype": "bfloat16", "positive": False, "known": True, "gated": False, "twofold": False, "bias": True,
    "gathered": False, "activation": "relu",
}  # fmt: skip


def test_in_the_interpreter() -> None:
    run_interpreted("test_backend_triton_neurons_interpreted.py")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("part", "rows"), [("union", 16), ("compact", 1), ("up", 1), ("up", 16), ("up", 64), ("down", 2), ("down", 32)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_ahead_of_time(target: str, part: str, rows: int, dtype: str) -> None:
    config = triton_neurons.config_of(Target.of(target), getattr(torch, dtype), part, rows)
    options = {"block_a": config.block_m, "block_n": config.block_n, "options": config.options}
    kernel = KERNEL.make("neurons", part=part, rows=rows, **{**ATTRIBUTES, "dtype": dtype}, **options)
    binary = program_of(kernel, Target.of(target)).binary(part)
    assert binary.code
    assert not binary.resources["spilled"] or (target, rows) == ("gfx942", 64)


def test_parts_are_known() -> None:
    with pytest.raises(sp.SpgenError, match="part"):
        KERNEL.make("neurons", part="sideways", rows=1, block_a=1, block_n=1, options=(), **ATTRIBUTES)


def test_what_is_refused() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(6, 8)
    index, count = torch.zeros(4, 6, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(sp.SpgenError, match="rows_per_list"):
        compact(x, 0.5, rows_per_list=0)
    with pytest.raises(sp.DtypeError, match="scores"):
        compact(x.double(), 0.5)
    with pytest.raises(sp.ShapeError, match="last contiguous"):
        compact(x.T, 0.5)
    with pytest.raises(sp.ShapeError, match="w_up"):
        up(x[:, :7].contiguous(), w, index, count)
    with pytest.raises(sp.ShapeError, match="weight"):
        up(x, w.bfloat16(), index, count)
    with pytest.raises(sp.ShapeError, match="gate"):
        up(x, w, index, count, gate=x)
    with pytest.raises(sp.ShapeError, match="w_gate"):
        up(x, w, index, count, w_gate=w[:, :7].contiguous())
    with pytest.raises(sp.SpgenError, match="activation"):
        up(x, w, index, count, activation="tan")
    with pytest.raises(sp.ShapeError, match="index, count"):
        up(x, w, index, count, rows_per_list=2)
    with pytest.raises(sp.ShapeError, match="index, count"):
        down(x[:, :6].contiguous(), w, index.long(), count)
    with pytest.raises(sp.ShapeError, match="h"):
        down(x, w, index, count)
