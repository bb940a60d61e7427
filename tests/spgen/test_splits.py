"""Splitting the keys of calls with few row tiles: when it is done, what it costs, and that it compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import spgen as sp
from spgen.autotune.model import Work, predict
from spgen.backends import triton as backend
from spgen.backends.triton_compile import Variant, compile_variant
from spgen.compile import Request, default_config, lowered
from spgen.errors import UnsupportedError
from spgen.explain import explain_text
from spgen.ir.config import Config
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.ir.tiles import table_ops
from spgen.passes.schedule import Call
from spgen.settings import override
from spgen.target import Target
from spgen.templates.triton.attention import parameters, partial
from spgen.tuned import Sizes, request_for
from tests.kernel_cases import CASES, MORE_CASES, causal

H200 = Target.of("h200")
DECODE = Call("bfloat16", 128, 128)


def chosen(
    batch: int, rows: int, keys: int, *, pattern: str = "causal()", heads: tuple[int, int] = (32, 8),
    target: Target = H200, call: Call = DECODE, shapes: tuple[tuple[int, ...], ...] = (),
) -> Config:  # fmt: skip
    """The configuration of a call that nobody tuned."""
    with override(records=False):
        request = request_for(pattern, call, *heads, target, Sizes(batch, rows, keys, shapes))
    return request.config or default_config(request)


def with_splits(kernel: Op, splits: int, **attrs: object) -> Op:
    options = (*kernel["options"], f"splits={splits}")
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), "options": options, **attrs})


@pytest.mark.parametrize(
    ("batch", "rows", "keys", "splits"),
    [
        (1, 1, 32768, 16),  # 8 key heads: 128 programs for 132 multiprocessors
        (8, 1, 32768, 2),
        (16, 1, 32768, 1),
        (32, 1, 32768, 1),
        (1, 1, 4096, 8),  # shares of 512 keys at least
        (1, 1, 700, 1),
        (1, 16, 32768, 16),  # 16 rows of 4 heads are one tile of 64
        (1, 4096, 4096, 1),
        (1, 0, 32768, 16),
    ],
)
def test_keys_are_split_where_multiprocessors_would_idle(batch: int, rows: int, keys: int, splits: int) -> None:
    assert chosen(batch, rows, keys).option("splits", 1) == splits


def test_splits_follow_the_device() -> None:
    assert chosen(1, 1, 2**20, target=replace(H200, cores=16)).option("splits", 1) == 2
    assert chosen(1, 1, 2**20, target=replace(H200, cores=15)).option("splits", 1) == 1
    assert chosen(1, 1, 2**20, target=replace(H200, cores=10000)).option("splits", 1) == 64
    assert chosen(1, 1, 2**20, target=Target.of("cpu")).option("splits", 1) == 1


def test_splits_follow_the_keys_of_a_row() -> None:
    assert chosen(1, 1, 2**20, pattern="causal() & window(1024)").option("splits", 1) == 2
    listed = "causal() & block(1, 64, indices=$0: int32[8, R, N])"
    assert chosen(1, 1, 2**20, pattern=listed, shapes=((8, 1, 64),)).option("splits", 1) == 8


def test_heads_that_differ_are_programs_of_their_own() -> None:
    assert chosen(1, 1, 32768, pattern="causal() & stripe(8, shift_per_head=1)").option("splits", 1) == 4


@pytest.mark.parametrize(
    ("rows", "heads", "height"),
    [(1, (32, 8), 16), (4, (32, 8), 16), (5, (32, 8), 32), (16, (32, 8), 64), (17, (32, 8), 128), (1, (8, 8), 16),
     (1, (64, 1), 64), (40, (8, 8), 64), (65, (8, 8), 128), (4096, (32, 8), 128)],
)  # fmt: skip
def test_row_tiles_are_as_low_as_calls(rows: int, heads: tuple[int, int], height: int) -> None:
    assert chosen(1, rows, 4096, heads=heads).block_m == height


def test_tiles_of_data_stay_within_their_units() -> None:
    assert chosen(1, 1, 4096).block_n == 128
    assert chosen(1, 1, 4096, pattern="block(1, 128, mask=$0: bool[8, R, C])").block_n == 128
    assert chosen(1, 1, 4096, pattern="block(1, 64, mask=$0: bool[8, R, C])").block_n == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_low_tiles_fit(arch: str, dtype: str) -> None:
    for head_dim in (64, 128, 256):
        target = Target.of(arch)
        config = chosen(1, 1, 4096, target=target, call=Call(dtype, head_dim, head_dim))
        size = {"float32": 4, "bfloat16": 2}[dtype]
        buffers = max(1, config.option("stages") - (target.kind == "hip"))
        assert config.block_m == 16
        assert buffers * config.block_n * 2 * head_dim * size <= target.smem_bytes


def test_plans_do_not_depend_on_splits() -> None:
    """A plan and its call may be split differently: their tables are the same."""
    text = "causal() & block(16, 64, mask=$0: bool[8, R, C])"
    request = Request(text, DECODE, 32, 8, True, H200, chosen(1, 1, 32768, pattern=text))
    assert request.config is not None
    whole = replace(request, config=request.config.having(splits=None))
    assert table_ops(lowered(request).program) == table_ops(lowered(whole).program)


def test_explain_states_the_workspace() -> None:
    options = {"kv_heads": 8, "v_dim": 128, "dtype": "bfloat16", "target": "h200", "ir": False, "source": False}
    with override(records=False):
        split = explain_text("causal()", q_shape=(1, 32, 1, 128), kv_len=32768, **options)  # type: ignore[arg-type]
        whole = explain_text("causal()", q_shape=(1, 32, 4096, 128), kv_len=4096, **options)  # type: ignore[arg-type]
    assert f"workspace {32 * 16 * 129 * 4 / 1e6:.2f} MB" in split
    assert "16 programs share its keys" in split
    assert "workspace 0" in whole


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["window_and_sink", "packed_group", "block_list"])
def test_both_kernels_compile_ahead_of_time(arch: str, name: str) -> None:
    target = Target.of(arch)
    kernel = with_splits((CASES | MORE_CASES)[name](32, 64).kernel, 8, dtype="bfloat16")
    built = backend.build(kernel, target)
    assert isinstance(built, backend.SplitKernel)
    made = compile_variant(built.kernel, built.path, Variant(aligned=True), target)
    assert made.metadata.shared <= target.smem_bytes
    assert built._combine.binary().code
    assert "def combine(" in built.source


def test_other_numbers_of_splits_share_binaries() -> None:
    kernel = causal(32, 32).kernel
    assert partial(with_splits(kernel, 2)) == partial(with_splits(kernel, 64, lse=False, sinks=True))
    names = [parameter.name for parameter in parameters(partial(with_splits(kernel, 2)))]
    assert {"splits", "n_parts"} <= set(names)
    assert not {"lse", "out_n", "sink_logits"} & set(names)


def test_one_split_is_the_ordinary_kernel() -> None:
    built = backend.build(with_splits(causal(32, 32).kernel, 1), Target.of("sm_90"))
    assert not isinstance(built, backend.SplitKernel)


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="splits: got 0"):
        backend.build(with_splits(causal(32, 32).kernel, 0), Target.of("sm_90"))


def test_cpus_ignore_splits() -> None:
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 3000, 64), torch.randn(1, 2, 3000, 64)
    assert "splits" not in str(sp.attention(sp.causal()).explain(q, k, v))


def test_the_cost_model_knows_splits() -> None:
    """Eight long programs are slower than their keys dealt to 128; where the device is full it brings nothing."""
    few = Work("bfloat16", 128, 128, 8, 2040, 8, 0, 256, 5e8, 1.3e8)
    many = replace(few, programs=8192, full=2040 * 1024, masked=8 * 1024, flops=5e11, bytes=1.3e11)
    config = chosen(1, 1, 32768)
    whole = config.having(splits=None)
    assert predict(few, config, H200).seconds < 0.3 * predict(few, whole, H200).seconds
    assert predict(many, config, H200).seconds > 0.99 * predict(many, whole, H200).seconds
