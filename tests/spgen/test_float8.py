"""Float8 on machines without a GPU: what it stands for, who may use it, its quantisation in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spgen as sp
from spgen.arguments import Arguments
from spgen.backends.triton_binary import compile_ahead
from spgen.backends.triton_quantize import quantizer
from spgen.ops import request_of
from spgen.target import Target
from spgen.templates.triton.quantize import ENTRIES, KEYS, Quantization, key_at, padded_keys
from tests.interpreted import run_interpreted

FLOAT8 = torch.float8_e4m3fn
H200 = Target.of("h200")


def test_quantisation_in_the_interpreter() -> None:
    run_interpreted("test_float8_interpreted.py")


def float8(heads: int, length: int, dim: int, scales: tuple[int, ...]) -> sp.Float8:
    return sp.Float8(torch.randn(2, heads, length, dim).to(FLOAT8), torch.rand(2, *scales) + 0.5)


def operands(rows: int = 20, keys: int = 37, dim: int = 32) -> tuple[sp.Float8, sp.Float8, sp.Float8]:
    values = torch.randn(2, 2, dim, padded_keys(keys)).to(FLOAT8)
    v8 = sp.Float8(values, torch.rand(2, 2) + 0.5, keys)
    return float8(4, rows, dim, (4, rows)), float8(2, keys, dim, (2,)), v8


def test_weights_meet_their_values() -> None:
    """A thread of four has columns 2t, 2t + 1, 8 + 2t and 9 + 2t of sixteen, and is asked for 4t to 4t + 3."""
    assert sorted(map(key_at, range(KEYS))) == list(range(KEYS))
    for thread in range(4):
        held = [2 * thread, 2 * thread + 1, 8 + 2 * thread, 9 + 2 * thread]
        assert [key_at(4 * thread + x) for x in range(4)] == held


def test_what_it_stands_for() -> None:
    q8, k8, v8 = operands()
    torch.testing.assert_close(q8.dequantize(), q8.values.float() * q8.scales[..., None])
    torch.testing.assert_close(k8.dequantize(), k8.values.float() * k8.scales[..., None, None])
    found = v8.dequantize()
    assert found.shape == v8.tensor.shape == (2, 2, 37, 32)
    for place in range(37 // KEYS * KEYS):
        key = place // KEYS * KEYS + key_at(place % KEYS)
        torch.testing.assert_close(found[:, :, key], v8.values[..., place].float() * v8.scales[:, :, None])
    assert v8.dequantize(torch.bfloat16).dtype == torch.bfloat16


def refusal(kind: type[sp.SpgenError], name: str, *call: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        sp.attention(sp.causal())(*call, **options)
    assert caught.value.subject == name
    assert caught.value.allowed
    return str(caught.value)


def test_the_cpu_has_no_kernels() -> None:
    assert "Hopper" in refusal(sp.UnsupportedError, "q", *operands())
    with pytest.raises(sp.DeviceError, match="Hopper"):
        sp.quantize(torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16))


def test_all_three_or_none() -> None:
    q8, k8, v8 = operands()
    plain = torch.randn(2, 2, 37, 32)
    assert "sp.quantize" in refusal(sp.DtypeError, "k", q8, plain, v8)
    assert "sp.quantize" in refusal(sp.DtypeError, "v", q8, k8, plain)
    assert "Tensor" in refusal(sp.DtypeError, "k", torch.randn(2, 4, 20, 32), k8, plain)


def requested(target: str, pattern: str = "causal()", dim: int = 32, **options: Any) -> Any:
    """What a call on a GPU that is not here asks for."""
    q8, k8, v8 = operands(200, 200, dim)
    scales = [one.scales for one in (q8, k8, v8)]
    arguments = Arguments(q8.tensor, k8.tensor, v8.tensor, [], pattern, scales=scales, **options)
    return request_of(arguments, target=Target.of(target))


def test_other_gpus_have_no_kernels() -> None:
    for target in ("a100", "sm_89"):
        with pytest.raises(sp.UnsupportedError, match="sm_8"):
            requested(target)


def test_which_patterns_are_served() -> None:
    for pattern in ("dense()", "causal() & window(100)", "causal() & (sink(3) | window(30, 5))"):
        assert requested("h200", pattern).call.dtype == "float8_e4m3fn"
    for pattern, reason in (("causal() & stripe(8)", "16 keys"), ("where(i // 8 == j // 8) & stripe(2)", "16 keys")):
        with pytest.raises(sp.UnsupportedError, match=reason):
            requested("h200", pattern)
    with pytest.raises(sp.UnsupportedError, match="128 channels"):
        requested("h200", dim=192)


def test_tiles_begin_where_groups_of_keys_do() -> None:
    from spgen.compile import lowered
    from spgen.ir.expr import evaluate
    from spgen.ir.kernel import parts

    kernel = lowered(requested("h200", "causal() & (sink(7) | window(100))")).kernel
    for first in (0, 1, 133):
        known = {"tile": 1, "q_len": 300, "kv_len": 300 + first, "q_offset": first}
        for let in parts(kernel, "let"):
            if let["per"] == "program":
                known[let["name"]] = evaluate(let["value"], known)
        for segment in parts(kernel, "segment"):
            for bound in ("start", "full_start", "full_stop", "stop"):
                assert int(evaluate(segment[bound], known)) % KEYS == 0


BAD_INPUT = {
    "packed": (ValueError, "q", {"q": (8, 2, 16)}),
    "head size of q": (sp.ShapeError, "q", {"q": (1, 2, 8, 24), "k": (1, 2, 8, 24)}),
    "head size of v": (sp.ShapeError, "v", {"v": (1, 2, 8, 40)}),
    "heads": (sp.ShapeError, "k", {"k": (1, 3, 8, 16), "v": (1, 3, 8, 16)}),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_shapes(name: str) -> None:
    kind, subject, shapes = BAD_INPUT[name]
    tensors = [torch.randn(shapes.get(x, (1, 2, 8, 16))) for x in "qkv"]
    with pytest.raises(kind) as caught:
        sp.quantize(*tensors)
    assert getattr(caught.value, "subject", "") == subject


def test_bad_types() -> None:
    tensors = [torch.zeros(1, 2, 8, 16, dtype=torch.int32) for _ in range(3)]
    with pytest.raises(sp.DtypeError, match="int32"):
        sp.quantize(*tensors)
    q8, k8, v8 = operands()
    assert "scales" in refusal(sp.DtypeError, "q", *(torch.zeros(1, 1, 4, 16).to(FLOAT8).to("meta") for _ in range(3)))
    del q8, k8, v8


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("quantization", [
    Quantization("bfloat16", 128, 128, False), Quantization("float32", 80, 48, True),
])  # fmt: skip
@pytest.mark.parametrize("aligned", [True, False])
def test_compiles_ahead_of_time(entry: str, quantization: Quantization, aligned: bool) -> None:
    built = compile_ahead(quantizer(quantization, H200).specialised(entry, aligned), H200)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in built.asm["ptx"]) == (entry == "quantize")
    assert ("ld.global.v4" in built.asm["ptx"]) == aligned
