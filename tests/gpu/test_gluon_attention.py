"""Hopper's own form of attention against the oracle, on a Hopper GPU."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

import spgen as sp
from spgen import ops
from spgen.backends import triton_counters
from spgen.backends.gluon import HopperKernel
from spgen.target import Target
from tests.agreement import assert_agrees
from tests.gpu.test_triton_attention import ALL, HALF, built, check, on_device, strided, with_attributes
from tests.kernel_cases import Case, causal, causal_parts, program, tensors

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a Hopper GPU")]

FORMS = {
    "two warpgroups": (128, 128, ("warps=12", "warpgroups=2", "stages=2", "registers=232")),
    "one warpgroup": (64, 64, ("warps=8", "warpgroups=1", "stages=2", "registers=192")),
}


def specialised(case: Case, form: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    case = on_device(case, dtype)
    case.kernel = with_attributes(case.kernel, options=FORMS[form][2])
    return case


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_oracle(name: str, form: str, dtype: torch.dtype) -> None:
    check(specialised(ALL[name](*FORMS[form][:2]), form, dtype))


@pytest.mark.parametrize("dims", [(16, 16), (32, 64), (80, 80), (96, 128), (128, 128), (128, 64), (8, 24), (96, 96)])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes(form: str, dims: tuple[int, int]) -> None:
    block_m, block_n, _ = FORMS[form]
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, head_dim=dims[0], value_dim=dims[1])
    case = specialised(Case(kernel, *tensors(2, 4, 2, 200, 333, *dims)), form)
    check(case)
    assert isinstance(built(case), HopperKernel)
    assert built(case).compile_count == 1


WIDE = {
    "two warpgroups": ((128, 64), ("warps=12", "warpgroups=2", "stages=2", "registers=240")),
    "one warpgroup": ((64, 64), ("warps=8", "warpgroups=1", "stages=1", "registers=232")),
}
WIDE_CASES = {
    "causal": ((192, 192), (256, 256), (192, 128), (160, 200), (64, 256), (256, 72)),
    "window_and_sink": ((256, 256),),
    "block_list": ((192, 192), (256, 256)),
    "lengths_and_offsets": ((192, 128), (256, 256)),
    "packed_batch": ((192, 192), (256, 256)),
    "shared_bias": ((192, 192),),
    "alibi": ((256, 256),),
    "words": ((192, 192),),
}  # fmt: skip


@pytest.mark.parametrize("form", WIDE)
@pytest.mark.parametrize(("name", "dims"), [(name, dims) for name, all_of in WIDE_CASES.items() for dims in all_of])
def test_wide_heads(name: str, form: str, dims: tuple[int, int]) -> None:
    tile, options = WIDE[form]
    case = ALL[name](*tile)
    case.q, case.k, case.v = (wider(x, n) for x, n in ((case.q, dims[0]), (case.k, dims[0]), (case.v, dims[1])))
    case.kernel = with_attributes(case.kernel, head_dim=dims[0], value_dim=dims[1])
    case = on_device(case, torch.bfloat16)
    case.kernel = with_attributes(case.kernel, options=options)
    check(case)
    assert isinstance(built(case), HopperKernel)
    assert built(case).compile_count == 1


def wider(x: torch.Tensor, channels: int) -> torch.Tensor:
    """The same rows with as many channels, of which some repeat; what is NaN stays it."""
    return torch.cat([x] * -(-channels // x.shape[-1]), -1)[..., :channels].contiguous()


@pytest.mark.parametrize(
    "kind", ["rows outermost", "channels outermost", "one element off", "every second row", "shared heads"]
)
def test_strides(kind: str) -> None:
    """What tensor maps cannot express goes through plain Triton."""
    case = specialised(causal(128, 128), "two warpgroups")
    case.q, case.k, case.v = (strided(x, kind) for x in (case.q, case.k, case.v))
    check(case)


def rows(length: int, *, heads: int = 4, dtype: torch.dtype = torch.bfloat16, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, h, length, 128, device="cuda", dtype=dtype) for h in (heads, 2, 2)]


def is_specialised(pattern: sp.Pattern, q: torch.Tensor, k: torch.Tensor) -> bool:
    text = str(sp.attention(pattern).explain(q, k, k))
    return "gluon attention" in text


@pytest.mark.parametrize("length", [129, 1000, 1408])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_block_lists(size: int, length: int) -> None:
    """Some heads and rows have no blocks at all, some all."""
    blocks = -(-length // size)
    mask = (
        torch.rand(4, blocks, blocks, device="cuda") < torch.tensor([0.0, 0.2, 0.6, 1.0], device="cuda")[:, None, None]
    )
    for pattern in (sp.block(size, mask=mask), sp.causal() & sp.block(size, mask=mask)):
        q, k, v = rows(length)
        assert is_specialised(pattern, q, k)
        assert_agrees(pattern, q, k, v, tolerance=4e-2)


NARROW = {
    "64 keys": lambda: sp.causal() & sp.block(128, 64, mask=torch.rand(4, 8, 16, device="cuda") < 0.4),
    "16 keys": lambda: sp.causal() & sp.block(128, 16, mask=torch.rand(4, 8, 63, device="cuda") < 0.4),
    "32 keys for 64 rows": lambda: sp.block(64, 32, indices=torch.randint(-2, 33, (1, 2, 16, 9), device="cuda")),
    "blocks of 32": lambda: sp.causal() & sp.block(32, mask=torch.rand(4, 32, 32, device="cuda") < 0.3),
    "columns": lambda: sp.causal() & sp.columns(numbers(1000, 4, 300)),
    "columns for all rows": lambda: sp.columns(numbers(1000, 4, 130)),
    "late columns": lambda: sp.causal() & sp.columns(numbers(500, 4, 100) + 500),  # most rows have none
    "vertical and slash": lambda: sp.causal() & sp.vertical_slash(numbers(1000, 4, 200), offsets()),
    "diagonals": lambda: sp.causal() & sp.diagonals(offsets()),
    "diagonals to both sides": lambda: sp.diagonals(offsets() - 300),
    "columns and a window": lambda: sp.causal() & (sp.window(100) | sp.columns(numbers(1000, 4, 150))),
    "tokens for 64 rows": lambda: sp.top_k(numbers(1010, 2, 16, 130) - 5, rows=64),
    "tokens for 128 rows": lambda: sp.causal() & sp.top_k(numbers(1000, 4, 8, 300), rows=128),
    "a stripe of tokens": lambda: sp.causal() & sp.stripe(8, shift_per_head=1),
}


def numbers(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, below, shape, device="cuda", dtype=torch.int32)


def offsets() -> torch.Tensor:
    """Bands that touch and such that do not, single diagonals, and the main one."""
    bands = numbers(15, 4, 4).sort(-1).values * 64
    near = (bands[..., None] + torch.arange(64, device="cuda", dtype=torch.int32)).flatten(1)
    return torch.cat([near, numbers(1000, 4, 30), torch.zeros_like(near[:, :1])], 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", NARROW)
def test_keys_that_lie_apart(name: str, head_dim: int) -> None:
    torch.manual_seed(1)
    pattern = NARROW[name]()
    q, k, v = (x[..., :head_dim] for x in rows(1000))
    assert is_specialised(pattern, q, k)
    assert_agrees(pattern, q, k, v, tolerance=4e-2)
    lengths = torch.tensor([1000, 333], device="cuda")
    k[1, :, 333:] = v[1, :, 333:] = torch.nan
    assert_agrees(pattern, q, k, v, tolerance=4e-2, kv_lengths=lengths)


@pytest.mark.parametrize("name", ["columns", "late columns", "vertical and slash", "a stripe of tokens"])
def test_keys_that_lie_apart_in_packed_batches(name: str) -> None:
    torch.manual_seed(3)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in rows(1700, batch=1))
    cu = torch.tensor([0, 1, 130, 130, 1100, 1700], device="cuda", dtype=torch.int32)
    assert_agrees(NARROW[name](), q, k, v, tolerance=4e-2, cu_seqlens_q=cu, cu_seqlens_k=cu)


@pytest.mark.parametrize("name", NARROW)
def test_biases_of_keys_that_lie_apart(name: str) -> None:
    """What lies beyond a length is NaN in the bias too."""
    torch.manual_seed(3)
    pattern = NARROW[name]()
    q, k, v = rows(1000)
    lengths = torch.tensor([1000, 333], device="cuda")
    bias = torch.randn(2, 4, 1000, device="cuda")
    k[1, :, 333:] = v[1, :, 333:] = bias[1, :, 333:] = torch.nan
    assert_agrees(pattern, q, k, v, tolerance=4e-2, kv_lengths=lengths, bias=bias)
    slopes = sp.alibi(torch.rand(4, device="cuda"))
    assert_agrees(pattern, q, k, v, tolerance=4e-2, kv_lengths=lengths, bias=slopes, softcap=3.0)


@pytest.mark.parametrize("name", NARROW)
def test_keys_that_lie_apart_the_same_bits(name: str) -> None:
    """What copies bring is there before it is multiplied."""
    torch.manual_seed(2)
    pattern = NARROW[name]()
    q, k, v = rows(1000, heads=4, batch=8)
    attend = sp.attention(pattern)
    plan = attend.plan(q, k)
    first = attend(q, k, v, plan=plan)
    for _ in range(200):
        torch.empty_like(first).fill_(torch.nan)
        assert torch.equal(attend(q, k, v, plan=plan), first)


def test_what_lies_beyond_a_length_is_never_multiplied() -> None:
    q, k, v = rows(700, batch=5)
    lengths = torch.tensor([700, 0, 117, 128, 513], device="cuda")
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    for pattern in (sp.causal() & (sp.sink(7) | sp.window(300)), sp.dense()):
        assert_agrees(pattern, q, k, v, tolerance=4e-2, kv_lengths=lengths)


def test_packed_batches() -> None:
    """Sequences end within row tiles, and the next ones' rows stay theirs."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in rows(1500, batch=1))
    for bounds in ([0, 1, 130, 130, 700, 1372, 1500], [0, 1500], [3, 400, 1490]):
        cu = torch.tensor(bounds, device="cuda", dtype=torch.int32)
        for pattern in (sp.causal(), sp.causal() & (sp.sink(64) | sp.window(100))):
            out = sp.attention(pattern)(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
            for start, stop in pairwise(bounds):
                if start < stop:
                    alone = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
                    wanted = sp.attention(pattern)(*alone)[0].transpose(0, 1)
                    torch.testing.assert_close(out[start:stop], wanted, atol=2e-2, rtol=2e-2)
    cu_q, cu_k = torch.tensor([0, 600, 1500], device="cuda"), torch.tensor([0, 900, 1500], device="cuda")
    assert_agrees(sp.causal() & sp.window(200), q, k, v, tolerance=4e-2, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def test_neighbours_of_a_packed_batch_are_not_multiplied() -> None:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in rows(600, batch=1))
    cu = torch.tensor([0, 250, 600], device="cuda", dtype=torch.int32)
    attend = sp.attention(sp.dense())
    clean = attend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    k[250:], v[250:] = torch.nan, torch.nan
    assert torch.equal(attend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)[:250], clean[:250])


@pytest.mark.parametrize("size", [64, 128])
def test_the_same_bits_every_time(size: int) -> None:
    q, k, v = rows(3000, heads=8, batch=1)
    attend = sp.attention(
        sp.causal() & sp.block(size, mask=torch.rand(8, -(-3000 // size), -(-3000 // size), device="cuda") < 0.3)
    )
    plan, first = attend.plan(q, k), attend(q, k, v)
    for _ in range(200):
        torch.empty_like(first).fill_(torch.nan)  # what the next result may be written over
        assert torch.equal(attend(q, k, v, plan=plan), first)


def test_a_graph_replays_beside_others() -> None:
    """The counter that hands out row tiles belongs to one launch at a time."""
    q, k, v = rows(2000, heads=8)
    attend = sp.attention(sp.causal())
    wanted = attend(q, k, v)
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(attend(q, k, v))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = attend(q, k, v)
        torch.cuda.synchronize()
        assert all(torch.equal(result, wanted) for result in (*results, eager))


def test_streams_and_threads_draw_from_counters_of_their_own() -> None:
    q, k, v = rows(1500, heads=8)
    attend = sp.attention(sp.causal())
    wanted = attend(q, k, v)
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [attend(q, k, v) for _ in range(50)]
            results[number] = torch.stack([(x != wanted).any() for x in found]).any()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 6
    assert not any(results.values())


def test_a_counter_beside_a_capture() -> None:
    """The first counter of a device may be wanted while another thread captures."""
    counters, stream = triton_counters.Counters(0), torch.cuda.Stream()
    found: list[int] = []

    def work() -> None:
        with torch.cuda.stream(stream):
            found.append(counters.of(stream.cuda_stream))

    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert x.item() == 1
    assert len(found) == 1


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # which torch makes to keep its pool
def test_compiled_into_graphs() -> None:
    """Memory that outlives a call must not come from the pools of graphs."""
    q, k, v = rows(1400)
    attend = sp.attention(sp.causal())
    wanted = 2 * attend(q, k, v)
    triton_counters.counters.cache_clear()
    ops._ready.clear()
    compiled = torch.compile(lambda q, k, v: 2 * attend(q, k, v), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(compiled(q, k, v).clone(), wanted, atol=2e-2, rtol=2e-2)


def test_one_length_for_all_sequences() -> None:
    q, k, v = rows(500)
    lengths = torch.tensor([300], device="cuda").expand(2)
    assert_agrees(sp.causal() & sp.window(100), q, k, v, tolerance=4e-2, kv_lengths=lengths, q_offset=lengths - 200)
    assert_agrees(sp.causal() & sp.window(100), q, k, v, tolerance=4e-2, kv_lengths=lengths, q_offset=lengths)


def test_every_option_of_scores() -> None:
    q, k, v = rows(500)
    sinks = torch.randn(4, device="cuda")
    pattern = sp.causal() & sp.window(200)
    assert_agrees(pattern, q, k, v, tolerance=4e-2, softcap=5.0, sink_logits=sinks)
    assert_agrees(pattern, q, k, v, tolerance=4e-2, q_offset=torch.tensor([0, 77], device="cuda"))
    assert_agrees(pattern, q, k, v, tolerance=4e-2, q_offset=-100)
    assert_agrees(pattern, q, k, v, tolerance=4e-2, bias=sp.alibi(torch.rand(4, device="cuda")))
    assert_agrees(pattern, q, k, v, tolerance=4e-2, bias=torch.randn(2, 4, 500, device="cuda"))
    out = sp.attention(pattern, scale=-0.1)(q, k, v)
    torch.testing.assert_close(out, sp.attention(pattern, scale=0.1)(-q, k, v), atol=2e-2, rtol=2e-2)


def test_nan_stays_in_its_row() -> None:
    q, k, v = rows(400)
    clean = sp.attention(sp.causal())(q, k, v)
    q[:, :, 130] = torch.nan
    out = sp.attention(sp.causal())(q, k, v)
    assert out[:, :, 130].isnan().all()
    others = torch.arange(400, device="cuda") != 130
    assert torch.equal(out[:, :, others], clean[:, :, others])


def test_a_new_length_compiles_nothing() -> None:
    attend = sp.attention(sp.causal())
    q, k, v = rows(1500)
    attend(q, k, v)
    before = sp.compile_count()
    for length in (1499, 1410, 1450, 1480):  # shorter calls have so few row tiles that their keys are split
        attend(q[:, :, :length], k[:, :, :length], v[:, :, :length])
    assert sp.compile_count() == before


def test_without_gluon_plain_triton_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from spgen.backends import gluon

    def broken(*_: object) -> None:
        raise AttributeError("module has no attribute warp_specialize")

    monkeypatch.setattr(gluon, "binary", broken)
    gluon._say_once.cache_clear()
    case = specialised(causal(128, 128), "two warpgroups")
    case.kernel = with_attributes(case.kernel, options=(*FORMS["two warpgroups"][2], "tma=1"))
    assert isinstance(built(case), HopperKernel)
    check(case)
    check(case)
    assert Target.of("cuda").arch == "sm_90"
    assert sum("plain Triton serves" in record.message for record in caplog.records) == 1
