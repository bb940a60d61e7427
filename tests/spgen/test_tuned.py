"""Which configuration a call gets: only shapes decide, plans agree with calls, and results stay those of the oracle."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spgen as sp
from spgen import reference, tuned
from spgen.arguments import Arguments
from spgen.autotune import workloads
from spgen.autotune.records import Bucket, Device, Record, Records
from spgen.autotune.workloads import named
from spgen.compile import Request, compile_count, default_config, lowered
from spgen.errors import PlanError
from spgen.ir.config import Config
from spgen.ops import request_of, sizes_of
from spgen.passes.schedule import Call
from spgen.settings import override
from spgen.target import Target
from spgen.tuned import Sizes, bucket_of, choice, key_of, request_for, toolchain

CPU = Target.of("cpu")
WINDOW = "causal() & window(100)"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of the user's records, in force."""
    tuned.forget()
    with override(records=tmp_path):
        yield tmp_path
    tuned.forget()


def record_for(request: Request, sizes: Sizes, config: Config, **changes: object) -> Record:
    default = default_config(request)
    made_by = toolchain(request.target)
    done = Record(key_of(request), bucket_of(request, sizes), "mine", default, config, made_by, "quick", gain=1.5)
    return replace(done, **changes)


def keep(directory: Path, *records: Record, device: Device | None = None, name: str = "mine.json") -> None:
    found = Records(device or tuned.device_of(CPU))
    for record in records:
        found.add(record)
    found.save(directory / name)
    tuned.forget()


def other(request: Request) -> Config:
    """A legal configuration that is not the default."""
    default = default_config(request)
    return replace(default, block_n=32 if default.block_n != 32 else 64)


def arguments(rows: int = 256, pattern: str = WINDOW, *data: torch.Tensor) -> Arguments:
    q, k = torch.randn(1, 4, rows, 32), torch.randn(1, 4, rows, 32)
    return Arguments(q, k, k, data, pattern)


def test_calls_near_a_record_use_it_and_give_the_same_result(directory: Path) -> None:
    call = arguments()
    request = request_of(call)
    assert request.config is None
    keep(directory, record_for(request, sizes_of(call), other(request)))
    assert request_of(call).config == request_of(arguments(300)).config == other(request)
    assert request_of(arguments(256, "dense()")).config is None  # another kind
    attend = sp.attention(sp.causal() & sp.window(100))
    q, k, v = torch.randn(1, 4, 256, 32), torch.randn(1, 4, 256, 32), torch.randn(1, 4, 256, 32)
    mask = attend.pattern.mask(256, 256, q_heads=4)
    torch.testing.assert_close(attend(q, k, v), reference.attention(q, k, v, mask).float(), rtol=1e-4, atol=1e-4)
    assert f"{other(request).block_m} x {other(request).block_n}" in str(attend.explain(q, k, v))
    assert "record mine of mine.json: 256 rows x 256 keys x 4 heads, 1.50 x the default" in str(attend.explain(q, k, v))


def test_plans_and_calls_agree(directory: Path) -> None:
    mask = torch.rand(1, 4, 5, 5) < 0.5
    pattern = sp.causal() & sp.block(64, mask=mask)
    q, k, v = (torch.randn(1, 4, 300, 32) for _ in range(3))
    call = Arguments(q, k, v, [mask], repr(pattern))
    keep(directory, record_for(request_of(call), sizes_of(call), other(request_of(call))))
    attend = sp.attention(pattern)
    wanted = reference.attention(q, k, v, pattern.mask(300, 300, q_heads=4)).float()
    for plan in (None, attend.plan(q, k)):
        torch.testing.assert_close(attend(q, k, v, plan=plan), wanted, rtol=1e-4, atol=1e-4)


def test_plans_for_longer_lists_have_their_own_tiles(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def blocks(width: int) -> sp.Pattern:
        listed = torch.stack([torch.randperm(16)[:width] for _ in range(16)])
        return sp.causal() & sp.block(32, indices=listed.to(torch.int32)[None, None])

    q, k, v = (torch.randn(1, 4, 512, 32) for _ in range(3))
    short, long = blocks(1), blocks(8)
    assert repr(short) == repr(long)
    calls = [Arguments(q, k, v, one.data, repr(one)) for one in (short, long)]
    default = default_config(request_of(calls[0]))
    configs = [replace(default, block_m=CPU.simd), other(request_of(calls[1]))]
    saved = tmp_path_factory.mktemp("plans") / "long.plan"
    sp.attention(long).plan(q, k).save(saved)
    keep(directory, *(record_for(request_of(c), sizes_of(c), x) for c, x in zip(calls, configs, strict=True)))
    assert [request_of(call).config for call in calls] == configs
    for pattern in (short, long):
        attend = sp.attention(pattern)
        wanted = reference.attention(q, k, v, pattern.mask(512, 512, q_heads=4)).float()
        torch.testing.assert_close(attend(q, k, v, plan=attend.plan(q, k)), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(PlanError, match="shapes of the pattern's tensors"):
        sp.attention(long)(q, k, v, plan=sp.attention(short).plan(q, k))
    with pytest.raises(PlanError, match="tables for other tiles"):  # from before there were records
        sp.Plan.load(saved)


def test_compiled_graphs_of_changing_lengths_use_records(directory: Path) -> None:
    attend = sp.attention(sp.causal() & sp.columns(torch.arange(0, 250, 7)))
    call = arguments(300, repr(attend.pattern), *attend.pattern.data)
    keep(directory, record_for(request_of(call), sizes_of(call), other(request_of(call))))
    compiled = torch.compile(lambda q: attend(q, q, q, plan=attend.plan(q, q)), backend="aot_eager", dynamic=True)
    for rows in (300, 290, 511):
        q = torch.randn(1, 4, rows, 32)
        wanted = reference.attention(q, q, q, attend.pattern.mask(rows, rows, q_heads=4)).float()
        torch.testing.assert_close(compiled(q), wanted, rtol=1e-4, atol=1e-4)


def test_a_record_whose_tiles_are_lower_than_the_group_is_not_used(directory: Path) -> None:
    target, call, sizes = Target.of("sm_90"), Call("bfloat16", 128, 128), Sizes(1, 1, 4096)
    few = request_for("causal()", call, 32, 8, target, sizes)
    low = Config(16, 64, ("warps=4", "stages=2"))
    keep(directory, record_for(few, sizes, low), device=tuned.device_of(target))
    assert request_for("causal()", call, 32, 8, target, sizes).config == low
    many = request_for("causal()", call, 32, 1, target, sizes)
    assert many.packed
    assert lowered(many).kernel["block_m"] >= 32
    assert choice(many, sizes).record is None


def test_a_record_does_not_change_how_float32_is_multiplied(directory: Path) -> None:
    target, call, sizes = Target.of("sm_90"), Call("float32", 64, 64), Sizes(1, 4096, 4096)
    request = request_for("causal()", call, 8, 8, target, sizes)
    exact = Config(64, 32, ("warps=4", "stages=2", "tf32x3=1"))
    keep(directory, record_for(request, sizes, exact), device=tuned.device_of(target))
    assert request_for("causal()", call, 8, 8, target, sizes).config == exact
    with override(float32="ieee"):
        assert request_for("causal()", call, 8, 8, target, sizes).config is None


def test_records_that_know_another_form_as_the_default_are_passed_over(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spgen.autotune.records.SHIPPED", tmp_path)
    target, call, sizes = Target.of("sm_90"), Call("bfloat16", 128, 128), Sizes(1, 8192, 8192)
    request = request_for("causal()", call, 8, 8, target, sizes)
    fast = Config(128, 64, ("warps=8", "stages=3"))
    for default, wanted, said in (
        (default_config(request, plain=True), None, "default: records of another form passed over"),
        (default_config(request), fast, "record mine of mine.json"),
    ):
        keep(directory, record_for(request, sizes, fast, default=default), device=tuned.device_of(target))
        assert request_for("causal()", call, 8, 8, target, sizes).config == wanted
        assert str(choice(request, sizes)).startswith(said)


def test_a_new_length_in_the_same_bucket_compiles_nothing(directory: Path) -> None:
    call = arguments(200)
    keep(directory, record_for(request_of(call), sizes_of(call), other(request_of(call))))
    attend = sp.attention(sp.causal() & sp.window(100))
    q = torch.randn(1, 4, 200, 32)
    attend(q, q, q)
    before = compile_count()
    for rows in (199, 230, 300):
        q = torch.randn(1, 4, rows, 32)
        attend(q, q, q)
    assert compile_count() == before


def test_records_of_another_compiler_are_passed_over_with_a_note(directory: Path) -> None:
    call = arguments()
    request = request_of(call)
    keep(directory, record_for(request, sizes_of(call), other(request), toolchain="apache-tvm 0.1"))
    assert request_of(call).config is None
    assert "1 of another compiler passed over" in str(choice(request, sizes_of(call)))


def test_a_damaged_file_is_left_out_with_a_warning(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "bad.json").write_text("{")
    tuned.forget()
    with caplog.at_level(logging.WARNING, "spgen"):
        assert choice(request_of(arguments()), Sizes(1, 256, 256)).record is None
    assert "bad.json" in caplog.text


def test_records_can_be_switched_off(directory: Path) -> None:
    call = arguments()
    request = request_of(call)
    keep(directory, record_for(request, sizes_of(call), other(request)))
    with override(records=False):
        assert request_of(call).config is None


def test_the_users_record_comes_before_a_shipped_one(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr("spgen.autotune.records.SHIPPED", shipped)
    call = arguments()
    request = request_of(call)
    keep(shipped, record_for(request, sizes_of(call), other(request)))
    assert request_of(call).config == other(request)
    mine = replace(other(request), block_n=16 * 3)
    keep(directory, record_for(request, sizes_of(call), mine))
    assert request_of(call).config == mine


def test_a_gpu_uses_records_of_its_architecture_if_it_has_none(directory: Path) -> None:
    h200 = Target.of("sm_90")
    h100 = replace(h200, name="NVIDIA H100 80GB HBM3")
    sizes = Sizes(1, 4096, 4096)
    request = request_for("causal()", Call("bfloat16", 128, 128), 8, 8, h200, sizes)
    config = Config(64, 64, ("warps=4", "stages=2"))
    keep(directory, record_for(request, sizes, config), device=tuned.device_of(h200))
    assert request_for("causal()", request.call, 8, 8, h200, sizes).config == config
    assert request_for("causal()", request.call, 8, 8, h100, sizes).config == config
    own = Config(128, 32, ("warps=4", "stages=2"))
    keep(directory, record_for(request, sizes, own), device=tuned.device_of(h100), name="h100.json")
    assert request_for("causal()", request.call, 8, 8, h100, sizes).config == own
    assert request_for("causal()", request.call, 8, 8, Target.of("sm_80"), sizes).config is None


@pytest.mark.parametrize(
    ("pattern", "shapes", "structure", "width"),
    [
        ("causal()", (), "before", 4096),
        ("causal() & window(1000)", (), "before", 1024),
        ("causal() & (sink(64) | window(1024))", (), "before", 1024),
        ("dense()", (), "", 4096),
        ("causal() & block(128, indices=$0: int32[1, 8, R, K])", ((1, 8, 32, 5),), "before&listed(128x128)", 512),
        ("causal() & block(64, mask=$0: bool[1, 8, R, C])", ((1, 8, 64, 64),), "before&listed(64x64)", 0),
        ("causal() & columns($0: int32[8, K])", ((8, 250),), "before&listed(0x1)", 256),
        (
            "causal() & vertical_slash($0: int32[8, K], $1: int32[8, L])", ((8, 1000), (8, 2000)),
            "before&diagonals&~term|before&listed(0x1)", 4096,
        ),
        ("per_head([causal(), causal() & window(64)])", (), "before&where", 0),
    ],
)  # fmt: skip
def test_kinds_and_sizes(pattern: str, shapes: tuple[tuple[int, ...], ...], structure: str, width: int) -> None:
    request = Request(pattern, Call("float32", 64, 64), 8, 8, False, CPU)
    bucket = bucket_of(request, Sizes(3, 4000, 4100, shapes))
    assert key_of(request).structure == structure
    assert bucket == Bucket(4096, 4096, 32, width)


def test_every_workload_has_a_kind() -> None:
    cases = [case for name in named() for case in workloads.load(name)]
    for case in cases:
        if isinstance(case, workloads.Case):
            call = Call(case.dtype, case.head_dim, case.value_dim)
            request = Request(case.pattern, call, case.q_heads, case.kv_heads, False, CPU)
            assert key_of(request).head_dim == case.head_dim
