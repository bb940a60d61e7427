"""The Triton backend on a CUDA device against the oracle."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest
import torch

from spgen.backends import triton as backend
from spgen.backends.extras import Extras
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.target import Target
from tests.kernel_cases import CASES, MORE_CASES, Case, causal, causal_parts, let, program, segment, table, tensors
from tests.kernel_oracle import masked_attention

pytestmark = pytest.mark.gpu

# || out - exact || / || exact ||
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = [torch.float16, torch.bfloat16]
ALL = CASES | MORE_CASES


def with_attributes(kernel: Op, **attrs: object) -> Op:
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), **attrs})


def on_device(case: Case, dtype: torch.dtype) -> Case:
    """The case on the GPU in `dtype`, with the schedule's warps and stages."""
    kernel = case.kernel
    name = str(dtype).removeprefix("torch.")
    options = backend.default_config(kernel["head_dim"], kernel["value_dim"], name, Target.of("cuda")).options
    case.kernel = with_attributes(kernel, dtype=name, options=options)
    case.q, case.k, case.v = (x.to("cuda", dtype) for x in (case.q, case.k, case.v))
    case.tables = [x.cuda() for x in case.tables]
    if isinstance(case.q_offset, torch.Tensor):
        case.q_offset = case.q_offset.cuda()
    if case.kv_lengths is not None:
        case.kv_lengths = case.kv_lengths.cuda()
    case.extras = Extras(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in case.extras))
    return case


def tile(dtype: torch.dtype) -> tuple[int, int]:
    name = str(dtype).removeprefix("torch.")
    chosen = backend.default_config(64, 64, name, Target.of("cuda"))
    return chosen.block_m, chosen.block_n


def built(case: Case) -> backend.AttentionKernel:
    return backend.build(case.kernel, Target.of(case.q.device))


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    out = case.q.new_full((*case.q.shape[:3], case.v.shape[3]), math.nan)
    lse = torch.full(case.q.shape[:3], math.nan, device="cuda")
    wanted = lse if case.kernel["lse"] else None
    built(case)(
        case.q, case.k, case.v, out, wanted, case.tables, case.q_offset, case.kv_lengths, case.scale, case.extras
    )
    return out, lse


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check(case: Case) -> None:
    out, lse = run(case)
    expected = case.expected()
    written = expected.written
    assert relative(out.cpu()[written], expected.out[written]) < TOLERANCE[case.q.dtype]
    assert out.cpu()[~written].isnan().all()
    if case.kernel["lse"]:
        tolerance = 1e-5 if case.q.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(lse.cpu().double()[written], expected.lse[written], atol=tolerance, rtol=tolerance)


def uses_tensor_maps(case: Case) -> bool:
    return any(variant.tma for variant in built(case)._binaries)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    check(on_device(ALL[name](*tile(dtype)), dtype))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(16, 16), (32, 64), (80, 80), (96, 128), (192, 128), (256, 256), (8, 7)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_sizes(dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    name = str(dtype).removeprefix("torch.")
    chosen = backend.default_config(head_dim, value_dim, name, Target.of("cuda"))
    block_m, block_n = chosen.block_m, chosen.block_n
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, head_dim=head_dim, value_dim=value_dim)
    case = on_device(Case(kernel, *tensors(2, 4, 2, 200, 333, head_dim, value_dim)), dtype)
    check(case)
    if head_dim % 8 == value_dim % 8 == 0 and torch.cuda.get_device_capability()[0] >= 9:
        assert uses_tensor_maps(case)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values with other strides; memory around them is NaN where there is any."""
    if kind == "rows outermost":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "channels outermost":
        return x.mT.contiguous().mT
    if kind == "one element off":
        return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)
    if kind == "every second row":
        return torch.stack([x, torch.full_like(x, math.nan)], 3)[:, :, :, 0]
    assert kind == "shared heads"
    return x[:, :1].expand_as(x)


@pytest.mark.parametrize(
    "kind", ["rows outermost", "channels outermost", "one element off", "every second row", "shared heads"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(dtype: torch.dtype, kind: str) -> None:
    case = on_device(causal(*tile(dtype)), dtype)
    case.q, case.k, case.v = (strided(x, kind) for x in (case.q, case.k, case.v))
    check(case)


def test_lengths_and_batches_compile_once() -> None:
    case = on_device(causal(128, 128), torch.bfloat16)
    q, k, v = tensors(3, 8, 2, 300, 300)
    q, k, v = (x.cuda().bfloat16() for x in (q, k, v))
    for length in range(1, 300, 6):
        batch, heads = 1 + length % 3, 1 + length % 2
        case.q, case.k, case.v = q[:batch, : 4 * heads, :length], k[:batch, :heads], v[:batch, :heads]
        run(case)
    check(case)
    assert built(case).compile_count == 1


def block_lists(heads: int, blocks: int, density: float) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    mask = (torch.rand(1, heads, blocks, blocks, generator=generator) < density).tril()
    mask.diagonal(dim1=2, dim2=3).fill_(True)
    index = torch.where(mask, torch.arange(blocks), 2**31 - 1).sort(-1).values.int()
    stop = 128 * mask.sum(-1)
    return [index.cuda(), torch.stack([0 * stop, 0 * stop, stop - 128, stop], -1).int().cuda()], mask


def listed(heads: int = 8, blocks: int = 12, density: float = 0.3, **attrs: object) -> tuple[Case, torch.Tensor]:
    """A causal list of 128 x 128 blocks per head, the diagonal block last; and its mask over rows and keys."""
    tables, mask = block_lists(heads, blocks, density)
    bounds = [let(name, f"load(splits, tile, {x})") for x, name in enumerate(("start", "first", "last", "stop"))]
    run = segment(
        "start", "stop", full=("first", "last"), mask="j <= i", column="load(blocks, tile, p // 128) * 128 + p % 128"
    )
    kernel = program(table("blocks", "q"), table("splits", "q"), *bounds, run, block_m=128, block_n=128, head_dim=128,
                     value_dim=128)  # fmt: skip
    case = on_device(Case(kernel, *tensors(1, heads, heads // 4, 128 * blocks, 128 * blocks, 128)), torch.bfloat16)
    case.tables = tables
    case.kernel = with_attributes(case.kernel, **attrs)
    return case, mask.repeat_interleave(128, 2).repeat_interleave(128, 3).tril()


@pytest.mark.parametrize("options", [("warps=8", "prefetch=1"), ("warps=4", "tma=0"), ("warps=8", "masked_stages=1")])
def test_block_lists(options: tuple[str, ...]) -> None:
    case, pairs = listed(options=options)
    out, lse = run(case)
    expected, expected_lse = masked_attention(case.q, case.k, case.v, pairs)
    assert relative(out, expected) < 1e-2
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-3, rtol=1e-3)


def test_the_same_bits_every_time() -> None:
    case, _ = listed(blocks=40)
    first = run(case)
    for _ in range(30):
        again = run(case)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_a_graph_replays_on_new_inputs() -> None:
    case, pairs = listed()
    out = torch.full_like(case.q, math.nan)
    arguments = (
        case.q,
        case.k,
        case.v,
        out,
        torch.empty(case.q.shape[:3], device="cuda"),
        case.tables,
        None,
        None,
        0.1,
    )
    kernel = built(case)
    kernel(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*arguments)
    for _ in range(3):
        for x in (case.q, case.k, case.v):
            x.normal_()
        out.fill_(math.nan)
        graph.replay()
        assert relative(out, masked_attention(case.q, case.k, case.v, pairs, 0.1)[0]) < 1e-2


def test_other_tensors_of_the_same_shape() -> None:
    case, pairs = listed()
    for _ in range(3):
        case.q, case.k, case.v = (torch.randn_like(x) for x in (case.q, case.k, case.v))
        assert relative(run(case)[0], masked_attention(case.q, case.k, case.v, pairs)[0]) < 1e-2


def test_other_threads_and_streams() -> None:
    case, _ = listed()
    expected = run(case)[0]
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[number] = run(case)[0]
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], expected) for number in range(4))


def test_float32_of_any_size() -> None:
    case = on_device(causal(64, 32), torch.float32)
    case.q, case.k, case.v = case.q * 1e15, case.k * 1e-15, case.v * 1e25
    check(case)
    case.kernel = with_attributes(case.kernel, options=("warps=8", "stages=1"))
    assert 'input_precision="ieee"' in built(case).source
    check(case)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scales(scale: float) -> None:
    case = on_device(causal(128, 64), torch.float16)
    case.scale = scale
    check(case)


@pytest.mark.parametrize("name", ["causal", "packed_causal"])
def test_nan_stays_in_its_row(name: str) -> None:
    case = on_device(CASES[name](64, 64), torch.bfloat16)
    clean, _ = run(case)
    case.q[0, 1, 17] = math.nan
    out, _ = run(case)
    assert out[0, 1, 17].isnan().all()
    out[0, 1, 17] = clean[0, 1, 17]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("gathered", [False, True])
def test_addresses_beyond_32_bits(gathered: bool) -> None:
    length, last = 2**24 + 300, 400
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free memory")
    k = torch.zeros(1, 1, length, 128, device="cuda", dtype=torch.bfloat16)
    k[:, :, -last:].normal_()
    q = torch.randn(1, 2, 40, 128, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(last, device="cuda").int() + (length - last)
    key = "load(order, 0, p)" if gathered else None
    start = 0 if gathered else length - last
    run_ = segment(str(start), str(start + last), full=(str(start), str(start + last)), key=key)
    kernel = program(table("order"), run_, block_m=64, block_n=64, head_dim=128, value_dim=128)
    case = on_device(Case(kernel, q, k, k, [order.view(1, 1, 1, -1)]), torch.bfloat16)
    out, _ = run(case)
    exact, _ = masked_attention(q, k[:, :, -last:], k[:, :, -last:], torch.ones(1, 2, 40, last, dtype=torch.bool))
    assert relative(out, exact) < 1e-2
