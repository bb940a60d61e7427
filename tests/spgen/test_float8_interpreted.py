"""The quantisation kernels in Triton's interpreter: they run in a process of their own (TRITON_INTERPRET=1).

Started by test_float8.py. Where rounding reaches the next power of two, Triton 3.6's interpreter forgets the carry.
"""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen.settings import triton_interpreted

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, 70, 32), (2, 2, 133, 32), (2, 2, 133, 48))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(x: torch.Tensor, one: sp.Float8) -> None:
    peak = x.float().abs().amax(3 if one.scales.dim() == 3 else (2, 3))
    torch.testing.assert_close(one.scales, torch.where(peak > 0, peak / 448, 1.0))
    scales = one.scales.reshape(*one.scales.shape, *(1,) * (4 - one.scales.dim()))
    wanted = (x.float() / scales).to(torch.float8_e4m3fn).float()
    found = one.dequantize() / scales
    carried = wanted.frexp().mantissa.abs() == 0.5
    last_digit = wanted.abs() / 8 + 2.0**-9  # ties go up
    assert ((found - wanted).abs() <= last_digit * 1.001)[~carried].all()
    assert found.isclose(wanted, rtol=1e-5).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_scales(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    given[0][0, 1, 3] = 0
    for x, one in zip(given, sp.quantize(*given), strict=True):
        check(x, one)


def test_strides() -> None:
    given = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors()]
    for x, one in zip(given, sp.quantize(*given), strict=True):
        check(x, one)


def test_what_lies_beyond_a_length_is_not_read() -> None:
    q, k, v = tensors()
    k[1, :, 20:] = v[1, :, 20:] = torch.nan
    quantized = sp.quantize(q, k, v, kv_lengths=torch.tensor([133, 20]))
    k[1, :, 20:] = v[1, :, 20:] = 0
    for x, one in zip((q, k, v), quantized, strict=True):
        check(x, one)
