"""The CPU backend against the oracle of level-3 kernels: patterns, shapes, types, options."""

from __future__ import annotations

import math

import pytest
import torch

from spgen.backends.extras import Extras
from spgen.backends.tvm import build, default_config
from spgen.errors import UnsupportedError
from spgen.ir.kernel import KERNEL
from tests.cpu_kernels import ALL_CASES, BLOCK_M, CPU, FLAGS, HAS_AVX512, HAS_PAIRS, OTHERS, check, run, typed
from tests.kernel_cases import (
    CASES,
    MORE_CASES,
    Case,
    causal,
    causal_parts,
    dense,
    let,
    packed_causal,
    program,
    segment,
    tensors,
)
from tests.kernel_oracle import masked_attention

pytest.importorskip("tvm")


@pytest.mark.parametrize("name", ALL_CASES)
def test_agrees_with_the_oracle(name: str) -> None:
    check(ALL_CASES[name](BLOCK_M, 64))


@HAS_AVX512
@pytest.mark.parametrize(
    ("isa", "name"),
    [
        ("avx2", "arithmetic"), ("avx2", "packed_group"), ("avx2", "biased_keys"), ("avx2", "words"),
        ("sse2", "permuted"), ("sse2", "capped_scores"), ("sse2", "alibi"), ("sse2", "packed_lists"),
    ],
)  # fmt: skip
def test_narrower_vectors_agree_with_the_oracle(isa: str, name: str) -> None:
    block_m = default_config(64, 64, "float32", OTHERS[isa]).block_m
    check(ALL_CASES[name](block_m, 64), OTHERS[isa])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["packed_causal", "window_and_sink", "block_list", "biased_keys", "packed_group"])
def test_types_of_16_bits_agree_with_the_oracle(name: str, dtype: str) -> None:
    check(typed(ALL_CASES[name](BLOCK_M, 64), dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masks_by_position_over_types_of_16_bits(dtype: str) -> None:
    run_of = segment("0", "kv_len", mask="(p % 3 < 2) & (j <= i)")
    kernel = program(run_of, block_m=BLOCK_M, head_dim=24, value_dim=20)
    check(typed(Case(kernel, *tensors(1, 2, 1, 90, 130, 24, 20)), dtype))


@HAS_AVX512
@pytest.mark.parametrize("isa", ["avx2", "sse2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_16_bits_in_narrower_vectors(isa: str, dtype: str) -> None:
    block_m = default_config(64, 64, dtype, OTHERS[isa]).block_m
    check(typed(CASES["scalar_offset"](block_m, 64), dtype), OTHERS[isa])


@HAS_PAIRS
@pytest.mark.parametrize(
    "name", ["dense", "packed_causal", "gathered_columns", "permuted", "scalar_offset", "capped_scores", "packed_alibi"]
)
def test_pairs_of_bf16_agree_with_the_oracle(name: str) -> None:
    check(typed(ALL_CASES[name](64, 64), "bfloat16"), OTHERS["avx512_bf16"])


@HAS_PAIRS
@pytest.mark.parametrize(("head_dim", "value_dim"), [(2, 1), (37, 40), (96, 33), (256, 256)])
def test_pairs_of_any_head_size(head_dim: int, value_dim: int) -> None:
    kernel = program(*causal_parts(64), head_dim=head_dim, value_dim=value_dim, block_m=64)
    case = Case(kernel, *tensors(1, 2, 1, 70, 91, head_dim, value_dim))
    check(typed(case, "bfloat16"), OTHERS["avx512_bf16"])


@HAS_PAIRS
def test_pairs_of_rows_at_odd_places() -> None:
    case = typed(causal(64, 64), "bfloat16")
    case.q, case.k, case.v = (_in_the_middle(x) for x in (case.q, case.k, case.v))  # rows of 69, from the third on
    check(case, OTHERS["avx512_bf16"])
    case.k = case.k.mT.contiguous().mT
    check(case, OTHERS["avx512_bf16"])


@HAS_PAIRS
def test_a_key_without_a_partner_brings_nothing_of_its_neighbour() -> None:
    case = typed(dense(64, 64), "bfloat16")
    case.k, case.v = case.k[:, :, :63], case.v[:, :, :63]
    memory = torch.full((2, 2, 65, 64), math.inf, dtype=torch.bfloat16)
    case.v = memory[:, :, :63].copy_(case.v)
    check(case, OTHERS["avx512_bf16"])


ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("isa", ["", "avx2", "sse2", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_comes_through(isa: str, dtype: torch.dtype) -> None:
    """One key for each row: the output is the value, whatever its bits."""
    if isa and (isa if isa == "avx512_bf16" else "avx512f") not in FLAGS:
        pytest.skip("another processor")
    target = OTHERS.get(isa, CPU)
    block_m = default_config(64, 64, "float32", target).block_m
    run_of = segment("0", "kv_len", full=("0", "kv_len"))
    kernel = program(run_of, block_m=block_m, head_dim=16, value_dim=16, dtype=str(dtype).removeprefix("torch."))
    v = ALL_BITS.view(dtype).view(1, 4096, 1, 16)
    q = torch.ones(1, 4096, 1, 16, dtype=dtype)
    out, _ = run(Case(kernel, q, q, v), target)
    normal = v.isnan() | (v.abs() >= torch.finfo(dtype).tiny) | (v == 0) | (dtype == torch.float16)
    torch.testing.assert_close(torch.where(normal, out, 0), torch.where(normal, v, 0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 16), (16, 1), (80, 96), (192, 50), (256, 256)])
def test_head_sizes(head_dim: int, value_dim: int) -> None:
    kernel = program(*causal_parts(BLOCK_M), head_dim=head_dim, value_dim=value_dim, block_m=BLOCK_M)
    check(Case(kernel, *tensors(1, 2, 1, 70, 90, head_dim, value_dim)))


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_and_layout_by_one_kernel(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group, q_len, kv_len = (
        int(torch.randint(1, high, (), generator=generator)) for high in (4, 4, 4, 300, 300)
    )
    case = causal(BLOCK_M, 64)
    case.q, case.k, case.v = tensors(batch, kv_heads * group, kv_heads, q_len, kv_len, seed=seed)
    if seed % 3 == 1:  # [B, L, H, D] underneath
        case.q, case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v))
        check(case, out=torch.full((batch, q_len, kv_heads * group, 64), 7.0).transpose(1, 2))
    elif seed % 3 == 2:  # off the vectors' alignment, NaN around
        case.q, case.k, case.v = (_in_the_middle(x) for x in (case.q, case.k, case.v))
        check(case, out=_in_the_middle(torch.empty_like(case.q)))
    else:
        check(case)


def _in_the_middle(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` as a view into memory that is NaN around it."""
    memory = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 5), math.nan, dtype=x.dtype)
    view = memory[:, :, 1:-1, 3:-2]
    return view.copy_(x)


def test_last_strides_other_than_one() -> None:
    case = causal(BLOCK_M, 64)
    case.k = case.k.mT.contiguous().mT
    case.v = torch.stack([case.v, torch.full_like(case.v, math.nan)], -1)[..., 0]
    check(case)
    case.q = case.q.mT.contiguous().mT
    check(case)


def test_a_let_may_take_the_name_of_an_earlier_one() -> None:
    parts = [
        let("stop", "tile + 6"),
        let("near", "i - stop", "row"),
        let("stop", "stop + 3 < 9"),
        let("near", "near < 5", "row"),
        segment("0", "select(stop, kv_len, 7)", mask="near | (j < 2)"),
    ]
    check(Case(program(*parts, block_m=BLOCK_M), *tensors(1, 1, 1, 150, 40)))


def test_broadcast_and_aliased_inputs() -> None:
    case = causal(BLOCK_M, 64)
    case.k = case.v = case.k[:, :, :1].expand(-1, -1, 200, -1)
    check(case)


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing_to_do(q_len: int, kv_len: int, batch: int) -> None:
    case = causal(BLOCK_M, 64)
    case.q, case.k, case.v = tensors(batch, 4, 1, q_len, kv_len)
    out, lse = run(case)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("make", [causal, packed_causal])
def test_nan_stays_in_its_row(make: type[Case]) -> None:
    case = make(BLOCK_M, 64)
    clean, _ = run(case)
    case.q[0, 1, 5, 3] = math.nan
    out, lse = run(case)
    assert out[0, 1, 5].isnan().all()
    assert lse[0, 1, 5].isnan()
    out[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(out, clean)


def test_extreme_scores() -> None:
    case = dense(BLOCK_M, 64)
    case.q = case.q * 300
    out, lse = run(case)
    pairs = torch.ones(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)
    expected, expected_lse = masked_attention(case.q, case.k, case.v, pairs)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-5)
    case.scale = 0.0
    group = case.q.shape[1] // case.k.shape[1]
    mean = case.v.mean(2, keepdim=True).repeat_interleave(group, 1)
    torch.testing.assert_close(run(case)[0], mean.expand_as(out), atol=1e-5, rtol=1e-5)


def test_addresses_beyond_32_bits() -> None:
    try:
        memory = torch.empty(2**31 + 2**20)  # 8 GB, of which a few pages are touched
    except RuntimeError:
        pytest.skip("no address space of 8 GB")
    case = causal(BLOCK_M, 64)
    case.q, k, v = tensors(1, 2, 2, 3, 3)
    far = memory.as_strided((1, 2, 3, 64), (0, 2**17, 2**30, 1))
    case.k = far.copy_(k)
    case.v = memory[2**18 :].as_strided((1, 2, 3, 64), (0, 2**17, 2**30, 1)).copy_(v)
    check(case)


@pytest.mark.parametrize("isa", ["", "avx2", "sse2"])
def test_softcap_is_accurate_over_all_magnitudes(isa: str) -> None:
    """One key and a sink of 0: the log-sum-exp is log(1 + exp(softcap * tanh(score / softcap)))."""
    if isa and "avx512f" not in FLAGS:
        pytest.skip("another processor")
    target = OTHERS.get(isa, CPU)
    block_m = default_config(64, 64, "float32", target).block_m
    kernel = program(segment("0", "kv_len"), block_m=block_m, head_dim=1, value_dim=1, softcap=True)
    scores = torch.cat([torch.logspace(-30, 30, 4001), torch.linspace(0.3, 1.2, 4000)])
    q = torch.cat([scores, -scores, torch.tensor([0.0, math.inf, -math.inf])])[None, None, :, None]
    one = torch.ones(1, 1, 1, 1)
    _, lse = run(Case(kernel, q, one, one, scale=1.0, extras=Extras(softcap=1.0)), target)
    torch.testing.assert_close(lse[0, 0].double(), q[0, 0, :, 0].double().tanh(), rtol=1e-6, atol=2e-38)


def test_extreme_sinks_take_nothing_or_all() -> None:
    q, k, v = tensors(1, 2, 2, 5, 9)
    kernel = program(segment("0", "kv_len"), block_m=BLOCK_M, sinks=True)
    out, lse = run(Case(kernel, q, k, v, extras=Extras(sink_logits=torch.tensor([-math.inf, 2e38]))))
    plain, plain_lse = run(Case(program(segment("0", "kv_len"), block_m=BLOCK_M), q, k, v))
    assert torch.equal(out[:, 0], plain[:, 0])
    assert torch.equal(lse[:, 0], plain_lse[:, 0])
    assert not out[:, 1].any()


@pytest.mark.parametrize(
    "bounds",
    [
        [-5, 10**9, 3, -(2**31), 2**31 - 1, 200, 7, 0], [307] * 8, [0] * 8, [300, 250, 200, 150, 100, 50, 20, 0],
        [0, 307],
    ],
)  # fmt: skip
def test_wrong_boundaries_stay_inside_the_tensors(bounds: list[int]) -> None:
    """Values may be wrong, but nothing outside is read (it is NaN) or written."""
    case = MORE_CASES["packed_batch"](BLOCK_M, 64)
    case.q, case.k, case.v = (_in_the_middle(x.nan_to_num()) for x in (case.q, case.k, case.v))
    out = _in_the_middle(torch.zeros_like(case.q))
    bound = torch.tensor(bounds, dtype=torch.int32)
    case.extras = Extras(bound, bound.flip(0).contiguous())
    run(case, out=out)
    assert not out.isnan().any()
    around = out.as_strided((1, 4, 309 * 69), (309 * 69 * 4, 309 * 69, 1), 0).clone()
    around.as_strided((1, 4, 307, 64), (309 * 69 * 4, 309 * 69, 69, 1), 72).fill_(math.nan)
    assert around.isnan().all()


def test_a_packed_batch_of_no_sequences() -> None:
    case = MORE_CASES["packed_group"](BLOCK_M, 64)
    none = torch.zeros(1, dtype=torch.int32)
    case.extras = case.extras._replace(cu_seqlens_q=none, cu_seqlens_k=none)
    case.q_offset = case.kv_lengths = torch.zeros(0, dtype=torch.int32)
    out, lse = run(case)
    assert not out.any()
    assert case.extras.sink_logits is not None
    torch.testing.assert_close(lse, case.extras.sink_logits[None, :, None].expand_as(lse), atol=1e-6, rtol=1e-6)


def test_inputs_that_require_a_gradient() -> None:
    case = causal(BLOCK_M, 64)
    case.q.requires_grad_()
    run(case)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"dtype": "float64"}, "dtype on the CPU: got float64"),
        ({"block_m": 20}, "block_m: got 20"),
        ({"block_n": 512}, "block_n: got 512"),
        ({"pack": 200}, "pack: got 200"),
    ],
)
def test_impossible_schedules_are_refused(attributes: dict[str, object], message: str) -> None:
    kernel = program(segment("0", "kv_len"))
    changed = KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), **attributes})
    with pytest.raises(UnsupportedError, match=message):
        build(changed, CPU)
