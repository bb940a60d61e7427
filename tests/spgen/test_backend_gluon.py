"""Hopper's own form of attention without a GPU: who gets it, binaries made ahead of time, and what serves the rest."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from spgen.arguments import Arguments
from spgen.autotune.work import occupancy
from spgen.backends import gluon, triton
from spgen.backends import triton_launch as launch
from spgen.backends.extras import Extras, Operands
from spgen.backends.triton_binary import compile_ahead
from spgen.backends.triton_compile import Variant
from spgen.backends.triton_resources import resources
from spgen.compile import Request, default_config, lower, why_plain
from spgen.errors import CompileError, UnsupportedError
from spgen.explain import _explained, explain_text
from spgen.ir.config import Config
from spgen.ir.kernel import FLOAT8, KERNEL, option
from spgen.ir.node import Op
from spgen.ops import request_of
from spgen.passes.schedule import Call
from spgen.patterns import pattern
from spgen.precompile import compile_text, resources_of
from spgen.target import Target
from spgen.templates.gluon.resources import threads
from spgen.tuned import Sizes, default_of, request_for
from tests.kernel_cases import causal
from tests.sass import beside_products, undefined_descriptors

H200 = Target.of("h200")
TALL = Config(128, 128, ("warps=12", "warpgroups=2", "stages=2", "registers=232"))
WIDE = Config(128, 64, ("warps=12", "warpgroups=2", "stages=2", "registers=224"))
SHORT = Config(64, 64, ("warps=8", "warpgroups=1", "stages=2", "registers=192"))
BLOCKS = "causal() & block({0}, mask=$0: bool[8, R, C])"
COLUMNS = "causal() & columns($0: int32[8, K])"
SLASHES = "causal() & vertical_slash($0: int32[8, K], $1: int32[8, N])"
PERMUTED = "permuted(window(64), k=$0: int32[8, N])"


def call_of(**attrs: Any) -> Call:
    return Call(**{"dtype": "bfloat16", "head_dim": 128, "value_dim": 128, **attrs})


def request(text: str, target: Target = H200, **attrs: Any) -> Request:
    return Request(text, call_of(**attrs), 8, 2, False, target)


def kernel_of(text: str, **attrs: Any) -> Op:
    wanted = request(text, **attrs)
    return lower(wanted, default_config(wanted)).kernel


# text of the pattern, what the call has beside it, warpgroups
COMPILED: dict[str, tuple[str, dict[str, Any], int]] = {
    "all keys, 64 channels": ("dense()", {"head_dim": 64, "value_dim": 64}, 2),
    "causal": ("causal()", {}, 2),
    "two segments, 80 channels": ("causal() & (sink(64) | window(1000))", {"head_dim": 80, "value_dim": 80}, 2),
    "documents, float16": ("causal() & documents($0: int32[S])", {"dtype": "float16"}, 2),
    "blocks of 128": (BLOCKS.format(128), {"lse": True}, 2),
    "blocks of 64": (BLOCKS.format(64), {}, 1),
    "blocks of 64, 64 channels, float16": (
        BLOCKS.format(64), {"dtype": "float16", "head_dim": 64, "value_dim": 64}, 1,
    ),
    "diagonals": ("causal() & diagonals($0: int32[8, K])", {}, 1),
    "blocks of 32": (BLOCKS.format(32), {"lse": True}, 1),
    "columns": (COLUMNS, {"lse": True}, 2),
    "columns, lengths, packed": (COLUMNS, {"kv_lengths": True, "cu_seqlens": True}, 2),
    "columns and diagonals": (SLASHES, {"lse": True}, 1),
    "columns and diagonals, lengths, packed": (SLASHES, {"kv_lengths": True, "cu_seqlens": True, "lse": True}, 1),
    "columns and diagonals, 64 channels": (SLASHES, {"head_dim": 64, "value_dim": 64}, 1),
    "columns and diagonals, 96 channels": (SLASHES, {"head_dim": 96, "value_dim": 96, "lse": True}, 1),
    "diagonals, 256 channels": ("causal() & diagonals($0: int32[8, K])", {"head_dim": 256, "value_dim": 256}, 1),
    "tokens for 64 rows": ("causal() & top_k($0: int32[8, R, K], rows=64)", {"lse": True, "kv_lengths": True}, 1),
    "lengths": ("causal() & window(300)", {"kv_lengths": True}, 2),
    "packed": ("causal()", {"cu_seqlens": True, "lse": True}, 2),
    "packed blocks": (BLOCKS.format(64), {"cu_seqlens": True}, 1),
    "96 channels": ("causal()", {"head_dim": 96, "value_dim": 96, "lse": True}, 2),
    "192 channels": ("causal() & (sink(64) | window(1000))", {"head_dim": 192, "value_dim": 192, "lse": True}, 2),
    "192 channels, packed, float16": (
        "causal()", {"dtype": "float16", "head_dim": 192, "value_dim": 192, "cu_seqlens": True}, 2,
    ),
    "192 and 128 channels": (BLOCKS.format(128), {"head_dim": 192, "value_dim": 128, "kv_lengths": True}, 2),
    "256 channels": ("causal()", {"head_dim": 256, "value_dim": 256, "lse": True}, 2),
    "256 channels, blocks of 16 keys": (
        "causal() & block(128, 16, mask=$0: bool[8, R, C])", {"head_dim": 256, "value_dim": 256, "kv_lengths": True}, 2,
    ),
    "64 and 256 channels": ("dense()", {"head_dim": 64, "value_dim": 256}, 2),
    "192 channels, blocks of 64": (BLOCKS.format(64), {"head_dim": 192, "value_dim": 192}, 1),
    "256 channels, blocks of 64": (BLOCKS.format(64), {"head_dim": 256, "value_dim": 256, "lse": True}, 1),
    "a bias of keys": ("causal()", {"bias": "key", "lse": True}, 2),
    "a bias of keys, packed": (
        "causal() & window(300)", {"bias": "key", "cu_seqlens": True, "softcap": True, "sinks": True}, 2,
    ),
    "a bias of keys, blocks of 64": (BLOCKS.format(64), {"bias": "key", "kv_lengths": True}, 1),
    "slopes": ("causal()", {"bias": "alibi", "lse": True}, 2),
    "slopes, blocks of 16 keys": (
        "causal() & block(128, 16, mask=$0: bool[8, R, C])", {"bias": "alibi", "cu_seqlens": True}, 2,
    ),
    "slopes, blocks of 64": (BLOCKS.format(64), {"bias": "alibi"}, 1),
    "float8": ("causal()", {"dtype": FLOAT8, "lse": True}, 2),
    "float8, 64 and 48 channels": (
        "causal() & (sink(7) | window(99))", {"dtype": FLOAT8, "head_dim": 64, "value_dim": 48, "kv_lengths": True}, 2,
    ),
    "float8, 96 and 80 channels": ("causal()", {"dtype": FLOAT8, "head_dim": 96, "value_dim": 80}, 2),
    "float8, blocks of 128": (BLOCKS.format(128), {"dtype": FLOAT8, "softcap": True, "sinks": True}, 2),
    "float8, blocks of 64": (BLOCKS.format(64), {"dtype": FLOAT8}, 1),
    "options of scores": (
        "causal() & window(1000)", {"q_offset": "tensor", "lse": True, "softcap": True, "sinks": True}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_ahead_of_time(name: str) -> None:
    text, attrs, groups = COMPILED[name]
    kernel = kernel_of(text, **attrs)
    assert option(kernel, "warpgroups", 0) == groups
    assert triton.refusal(kernel, H200) is None
    built = compile_ahead(gluon.specialised(kernel, gluon.source_path(kernel), Variant(True, True)), H200)
    for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor.4d"):
        assert instruction in built.asm["ptx"]
    taken = resources(built, H200)
    assert built.metadata.num_warps == threads(kernel) // 32
    assert taken.shared <= H200.smem_bytes
    config = default_config(request(text, **attrs))
    assert occupancy(config, H200, taken) == 2 // groups
    # accumulators of 256 channels leave few registers, and so do distances of columns that lie apart
    most = {256: 48 if groups == 2 else 160}.get(
        attrs.get("value_dim", 0), 112 if "slopes, blocks of 16" in name else 32
    )
    if attrs.get("dtype") == FLOAT8:  # sums of all steps beside the products of one
        most = 128
        exponentials = beside_products(built.asm["cubin"], "MUFU.EX2")
        assert exponentials
        assert min(exponentials) >= kernel["block_n"] // 2  # a thread's share of a step
    assert taken.spilled <= most
    assert not undefined_descriptors(built.asm["cubin"])


def test_binaries_hold_for_every_tensor_map() -> None:
    kernel = kernel_of("causal()")
    built = gluon.binary(kernel, gluon.source_path(kernel), Variant(True, True), H200)
    assert [list(box.extent)[::-1] for box in built.boxes] == [[1, 1, rows, 64] for rows in (64, 128, 128, 64)]
    assert built.threads == 384


def test_kernels_come_into_the_cache_ahead_of_their_calls() -> None:
    shape: dict[str, Any] = {"q_shape": (1, 8, 4096, 128), "kv_heads": 2, "kv_len": 4096, "v_dim": 128}
    path = compile_text("causal()", **shape, dtype="bfloat16", target="h200")
    assert "warp_specialize" in path.read_text()
    assert resources_of(request("causal()")).registers == 168
    built = triton.build(kernel_of("causal()"), H200)
    assert isinstance(built, gluon.HopperKernel)
    assert built.compile_count == 1


def test_stages_that_do_not_fit_are_an_error() -> None:
    deep = lower(request("causal()"), TALL.having(stages=4)).kernel
    with pytest.raises(CompileError, match=r"bytes of shared memory"):
        gluon.binary(deep, gluon.source_path(deep), Variant(True, True), H200)


def test_what_is_refused_gets_plain_triton_over_the_same_tiles() -> None:
    wanted = replace(request(PERMUTED), config=TALL)
    kernel = lower(wanted, TALL).kernel
    assert option(kernel, "warpgroups", 0) == 2
    built = triton.build(kernel, H200)
    assert type(built) is triton.AttentionKernel
    assert built.kernel == gluon.portable(kernel) == triton.served(kernel, H200)
    assert (built.kernel["block_m"], built.kernel["block_n"]) == (128, 128)
    assert not option(built.kernel, "warpgroups", 0)
    assert "import gluon" not in built.source
    taken = resources_of(wanted)
    assert taken.shared <= H200.smem_bytes
    assert taken.spilled <= 48
    assert triton.served(kernel_of("causal()"), H200) == kernel_of("causal()")


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_targets_refuse_what_was_tuned_for_hopper(arch: str) -> None:
    target = Target.of(arch)
    kernel = lower(request("causal()", target), TALL).kernel
    assert triton.refusal(kernel, target) == f"{arch}, which is not Hopper"
    assert not option(triton.build(kernel, target).kernel, "warpgroups", 0)


@pytest.mark.parametrize(
    ("text", "attrs", "wanted"),
    [
        ("causal()", {}, TALL),
        ("dense()", {"head_dim": 64, "value_dim": 64}, TALL.having(stages=4)),
        ("causal() & window(64)", {"dtype": "float16", "cu_seqlens": True, "kv_lengths": True}, TALL),
        (BLOCKS.format(128), {}, TALL),
        (BLOCKS.format(256), {}, TALL),
        (BLOCKS.format(64), {}, SHORT),
        (BLOCKS.format(64), {"head_dim": 64, "value_dim": 64}, SHORT.having(stages=4)),
        (BLOCKS.format(32), {}, SHORT),
        (BLOCKS.format(16), {}, None),
        ("causal()", {"dtype": "float32"}, None),
        ("causal()", {"head_dim": 192}, TALL),
        ("causal()", {"head_dim": 192, "value_dim": 192}, replace(TALL, block_n=64)),
        ("causal()", {"head_dim": 256, "value_dim": 256}, WIDE),
        ("causal()", {"head_dim": 96, "value_dim": 96}, TALL.having(stages=3)),
        (BLOCKS.format(64), {"head_dim": 256, "value_dim": 256}, SHORT.having(stages=1, registers=232)),
        ("causal()", {"head_dim": 50, "value_dim": 50}, None),
        ("causal()", {"head_dim": 64, "value_dim": 256}, replace(TALL, block_n=64)),
        (COLUMNS, {}, TALL),
        ("causal() & stripe(8)", {}, TALL),
        (COLUMNS, {"head_dim": 192, "value_dim": 128}, None),
        (SLASHES, {}, SHORT),
        ("top_k($0: int32[8, R, K], rows=64)", {}, SHORT),
        ("top_k($0: int32[8, R, K], rows=16)", {}, None),
        ("permuted(window(64), q=$0: int32[8, N], k=$1: int32[8, N])", {}, None),
        ("causal() & permuted(window(64), k=$0: int32[8, N])", {}, TALL),  # masked by ranks
    ],
)
def test_who_gets_the_form(text: str, attrs: dict[str, Any], wanted: Config | None) -> None:
    found = default_config(request(text, **attrs))
    if wanted is None:
        assert not found.option("warpgroups")
        assert found == default_config(request(text, **attrs), plain=True)
    else:
        assert found == wanted
    for arch in ("sm_80", "sm_100", "gfx942"):
        assert not default_config(request(text, Target.of(arch), **attrs)).option("warpgroups")


@pytest.mark.parametrize("rows", [0, 1, 17, 64, 65, 4096])
def test_calls_of_few_rows_are_plain(rows: int) -> None:
    sizes = Sizes(16, rows, 4096)
    for kv_heads in (8, 2):
        found = request_for("causal()", call_of(), 8, kv_heads, H200, sizes)
        config = found.config or default_config(found)
        assert bool(config.option("warpgroups")) == (rows > 64)
        assert triton.refusal(lower(found, config).kernel, H200) is None


def test_split_keys_are_plain() -> None:
    few, many = (Sizes(1, rows, 32768) for rows in (256, 8192))
    config = default_of(request("causal()"), few)
    assert config.option("splits") > 1
    assert not config.option("warpgroups")
    assert default_of(request("causal()"), many) == TALL
    assert not default_of(request("causal()"), many, plain=True).option("warpgroups")


def test_symbolic_sizes_are_only_compared() -> None:
    """Under torch.compile a length is a symbol, which must not become a number."""
    shapes = ShapeEnv()

    def symbol(name: str, value: int) -> Any:
        source = ConstantSource(name)
        made = shapes.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        return shapes.create_symintnode(made, hint=value, source=source)

    rows, keys = symbol("rows", 8000), symbol("keys", 9000)
    for text in ("causal()", PERMUTED):
        found = request_for(text, call_of(), 8, 8, H200, Sizes(1, rows, keys, ((8, 100),)))
        assert bool((found.config or default_config(found)).option("warpgroups")) == (text == "causal()")
    assert not shapes.replacements
    assert shapes.guards


@pytest.mark.parametrize("text", ["causal()", BLOCKS.format(128), BLOCKS.format(64), COLUMNS])
@pytest.mark.parametrize(
    "attrs", [{"lse": True}, {"bias": "key"}, {"bias": "alibi"}, {"softcap": True}, {"sinks": True}]
)
def test_plans_and_calls_choose_the_same_tiles(text: str, attrs: dict[str, Any]) -> None:
    assert default_config(request(text, **attrs)) == default_config(request(text))
    assert lower(request(text, **attrs), default_config(request(text, **attrs))).program == (
        lower(request(text), default_config(request(text))).program
    )


def test_the_interpreter_knows_plain_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    special, plain = (
        kernel_of("causal()"),
        lower(request("causal()"), default_config(request("causal()"), plain=True)).kernel,
    )
    assert triton.refusal(plain, H200) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refusal(special, H200) == "Triton's interpreter"
    assert triton.refusal(plain, H200) is None


def explained(text: str, **options: Any) -> str:
    call = {
        "q_shape": (1, 8, 4096, 128), "kv_heads": 8, "kv_len": 4096, "v_dim": 128, "dtype": "bfloat16",
        "target": "h200", "ir": False, "source": False,
    }  # fmt: skip
    found = explain_text(text, **{**call, **options})
    return next(line for line in found.splitlines() if line.startswith("kernel"))


def test_explanations_say_why_a_kernel_is_plain() -> None:
    assert "gluon attention: row tiles of 128 x 128 keys; warps=12, warpgroups=2" in explained("causal()")
    assert "plain" not in explained("causal()")
    assert explained(COLUMNS).startswith("kernel     gluon attention")
    listed = explained(PERMUTED)
    assert listed.startswith("kernel     triton attention")
    assert listed.endswith("plain, because of permuted keys")
    assert explained("causal() & where((i * j) % 3 == 0)").startswith("kernel     gluon attention")
    assert explained("causal()", q_shape=(1, 8, 4, 128), kv_heads=2).endswith("plain, because of calls of few rows")
    assert "plain" not in explained(PERMUTED, target="sm_80")  # which has no other form
    assert why_plain(request("causal()", Target.of("sm_80"))) is None


def test_explanations_speak_of_the_kernel_that_serves() -> None:
    q, k = torch.empty(1).expand(1, 8, 4096, 128).bfloat16(), torch.empty(1).expand(1, 2, 4096, 128).bfloat16()
    texts = []
    order = (torch.arange(4096, dtype=torch.int32).expand(8, 4096),)
    for text, data, options in (("causal()", (), {"bias": torch.zeros(1, 1, 4096)}), (PERMUTED, order, {})):
        arguments = replace(Arguments(q, k, k, data, text), **options)
        wanted = replace(request_of(arguments, target=H200), config=TALL)
        texts.append(str(_explained(wanted, pattern(text, *data), arguments)))
    assert "gluon attention" in texts[0]
    assert "triton attention: row tiles of 128 x 128 keys; warps=8, stages=2" in texts[1]
    assert "plain, because of permuted keys" in texts[1]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that has tensor maps or not, and encodes none."""
    found = SimpleNamespace(has_tensor_maps=True, encode=lambda *_: False)
    for module in (gluon, launch):
        monkeypatch.setattr(module, "driver", lambda: found)
    return found


def prepared(kernel: gluon.HopperKernel, rows: int) -> launch.Call | None:
    """The launch of Hopper's own form, None where plain Triton serves."""
    q, k = torch.zeros(1, 4, rows, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)
    return kernel._prepared(Operands(q, k, k, q.clone(), torch.zeros(1, 4, rows), (), None, None, 0.1))


def hopper() -> gluon.HopperKernel:
    kernel = causal(128, 128).kernel
    attrs = {**dict(kernel.attrs), "dtype": "bfloat16", "options": TALL.options}
    return gluon.HopperKernel(KERNEL.make("attention", *kernel.operands, **attrs), H200)


def test_calls_that_no_tensor_map_expresses_are_remembered(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, launched = hopper(), []
    monkeypatch.setattr(kernel._instead(), "prepare", lambda operands, aligned: launched.append)
    q, k = torch.zeros(1, 4, 200, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)
    operands, bound = (q, k, k, q.clone(), torch.zeros(1, 4, 200), (), None, None, 0.1), kernel.bind()
    bound(*operands)
    driver.encode = None  # would fail
    bound(*operands)
    assert launched[0] == launched[1]
    assert len(launched[0]) == 6  # four tensors, lse and scale: no counter
    plain = kernel._instead()
    assert plain.kernel == gluon.portable(kernel.kernel)
    assert kernel._instead() is plain


def test_float8_comes_with_scales_and_maps_of_turned_values(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps: list[tuple[str, list[int], list[int]]] = []
    driver.launch = None
    driver.encode = lambda _, at, dtype, shape, steps, box: maps.append((dtype, list(shape), list(steps))) or True
    kernel = gluon.HopperKernel(kernel_of("causal()", dtype=FLOAT8, lse=True), H200)
    kinds = ["map" if p.type == "desc" else "fixed" if p.name in kernel._fixed else "changing"
             for p in kernel._arguments(Variant(aligned=True, tma=True))]  # fmt: skip
    function = launch.Function(1, 0, 384, 0, kinds, 0)
    monkeypatch.setattr(kernel, "_function", lambda variant, device: function)
    q, k = torch.zeros(1, 8, 200, 128).to(torch.float8_e4m3fn), torch.zeros(1, 2, 300, 128).to(torch.float8_e4m3fn)
    v = torch.zeros(1, 2, 128, 304).to(torch.float8_e4m3fn).transpose(-1, -2)[:, :, :300]
    scales = [torch.ones(1, 8, 200), torch.ones(1, 2), torch.ones(1, 2)]
    out, lse = torch.zeros(1, 8, 200, 128, dtype=torch.bfloat16), torch.zeros(1, 8, 200)
    operands = Operands(q, k, v, out, lse, (), None, None, 0.1, Extras(scales=scales))
    assert kernel._prepared(operands) is not None
    assert [name for name, _, _ in maps] == ["float8_e4m3fn"] * 3 + ["bfloat16"]
    assert maps[2][1:] == ([1, 2, 128, 304], [16, 128 * 304, 304, 1])
    assert maps[3][1:] == ([1, 8, 200, 128], [32, 2 * 200 * 128, 256, 2])
    launched: list[list[int]] = []
    monkeypatch.setattr(kernel, "prepare", lambda operands, aligned: launched.append)
    kernel.bind()(*operands)
    assert launched[0][-3:] == [one.data_ptr() for one in scales]
    assert len(launched[0]) + 1 == kinds.count("changing")  # and the counter


def test_an_old_driver_compiles_nothing(driver: SimpleNamespace) -> None:
    driver.has_tensor_maps = False
    kernel = hopper()
    assert prepared(kernel, 200) is None
    assert kernel.compile_count == 0


def test_a_compiler_that_fails_is_asked_once(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def broken(*_: object) -> None:
        asked.append(1)
        raise AttributeError("module has no attribute warp_specialize")

    monkeypatch.setattr(gluon, "binary", broken)
    gluon._say_once.cache_clear()
    kernel = hopper()
    assert [prepared(kernel, rows) for rows in (100, 200, 300)] == [None] * 3
    assert len(asked) == 1
    assert sum("plain Triton serves" in record.message for record in caplog.records) == 1


def test_nothing_serves_float8_in_its_place(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.zeros(1, heads, 200, 128).to(torch.float8_e4m3fn) for heads in (8, 2))
    v = torch.zeros(1, 2, 128, 208).to(torch.float8_e4m3fn).transpose(-1, -2)[:, :, :200]
    scales = [torch.ones(1, 8, 200), torch.ones(1, 2), torch.ones(1, 2)]
    out = torch.zeros(1, 8, 200, 128, dtype=torch.bfloat16)
    operands = Operands(q, k, v, out, None, (), None, None, 0.1, Extras(scales=scales))
    kernel = gluon.HopperKernel(kernel_of("causal()", dtype=FLOAT8), H200)
    with pytest.raises(UnsupportedError, match="tensor maps cannot express"):
        kernel.prepare(operands, aligned=False)

    def broken(*_: object) -> None:
        raise AttributeError("module has no attribute warp_specialize")

    monkeypatch.setattr(gluon, "binary", broken)
    with pytest.raises(UnsupportedError, match="Gluon does not compile"):
        kernel.prepare(operands, aligned=True)


def test_faults_that_users_must_see_are_not_hidden(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise CompileError("kernel", given="one that is not in the cache")

    monkeypatch.setattr(gluon, "binary", forbidden)
    with pytest.raises(CompileError, match="not in the cache"):
        prepared(hopper(), 100)


def test_sources_are_files_of_their_own() -> None:
    kernel = kernel_of("causal()")
    built = triton.build(kernel, H200)
    assert built.path.read_text() == built.source
    assert built.path != triton.build(gluon.portable(kernel), H200).path
