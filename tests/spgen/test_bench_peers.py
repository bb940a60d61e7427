"""Peers: each plug-in against a stand-in for its library that checks what the documented API asks for."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.bench import cases, peers
from spgen.bench.peers import CAUSAL, MORE, PEERS, Contender, attempt, available, chosen, flex
from spgen.bench.workloads import Workload
from spgen.errors import SpgenError, ToolchainError

WORK = Workload(heads=4, kv_heads=2, length=384, head_dim=16, dtype=torch.bfloat16, device="cpu")
BLOCKS = cases.block_list(WORK, size=128, sparsity=0.6)
SLASHES = cases.vertical_slash(WORK, vertical=9, bands=3, width=16)
STREAMING = cases.streaming(WORK, window=50, sink=5)
CLOSE = 2e-2


def contender(name: str, problem: cases.Problem) -> Contender:
    found = available(name, problem, *problem.work.tensors())
    assert isinstance(found, Contender), found
    return found


def reason(name: str, problem: cases.Problem) -> str:
    found = available(name, problem, *problem.work.tensors())
    assert isinstance(found, str)
    return found


def check(name: str, problem: cases.Problem) -> None:
    """Both ways to run give what the oracle says."""
    found = contender(name, problem)
    for out in (found.run(found.made()), found.with_plan()):
        assert out.shape == (1, problem.work.heads, problem.work.length, problem.work.head_dim)
        assert problem.largest_error(out, *problem.work.tensors()) < CLOSE


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    parent, _, last = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
    monkeypatch.setitem(sys.modules, name, module)
    return module


# FlashAttention-4


class Tensors(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, mask_mod: Callable[..., Any], block_sparse_tensors: Tensors
) -> tuple[Tensor, None]:
    """Row blocks walk the listed whole blocks, and the listed partial ones where mask_mod holds."""
    batch, rows, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    assert k.shape == v.shape == (batch, keys, key_heads, dim)
    assert heads % key_heads == 0
    assert all(x.is_contiguous() and x.dtype in (torch.float16, torch.bfloat16) for x in (q, k, v))
    listed = block_sparse_tensors
    assert listed.block_size is not None
    height, width = listed.block_size
    assert height % 128 == 0
    assert width % 128 == 0
    blocks = -(-rows // height), -(-keys // width)
    mask = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    inside = mask_mod(0, 0, torch.arange(rows)[:, None], torch.arange(keys)[None], None, None)
    for count, index, holds in (
        (listed.mask_block_cnt, listed.mask_block_idx, inside),
        (listed.full_block_cnt, listed.full_block_idx, torch.ones_like(inside)),
    ):
        assert count is not None
        assert index is not None
        assert count.dtype == index.dtype == torch.int32
        assert count.shape == (batch, heads, blocks[0])
        assert index.shape[:3] == count.shape
        assert index.shape[3] <= blocks[1]
        for h in range(heads):
            for row in range(blocks[0]):
                for block in index[0, h, row, : int(count[0, h, row])].tolist():
                    place = slice(row * height, (row + 1) * height), slice(block * width, (block + 1) * width)
                    assert not mask[0, h][place].any(), "a block is listed once"
                    mask[0, h][place] = holds[place]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return reference.attention(*heads_first, mask).to(q.dtype).transpose(1, 2), None


@pytest.fixture
def flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    stand_in(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    stand_in(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=Tensors)
    stand_in(monkeypatch, "cutlass")
    stand_in(monkeypatch, "cutlass.cute", jit=lambda function: function)


@pytest.mark.usefixtures("flash_attention_4")
def test_flash_attention_4() -> None:
    check("flash-attn-4", BLOCKS)
    check("flash-attn-4", cases.block_list(replace(WORK, length=300), size=128, sparsity=0.0))
    assert "lists of blocks" in reason("flash-attn-4", STREAMING)
    assert "multiples of 128" in reason("flash-attn-4", cases.block_list(WORK, size=64, sparsity=0.5))
    single = replace(WORK, dtype=torch.float32)
    assert "float32 is neither" in reason("flash-attn-4", cases.block_list(single, size=128, sparsity=0.5))


# FlashInfer


class Wrapper:
    """Every block row is a request; `causal` aligns its last row with the last of its listed keys."""

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20

    def plan(
        self, block_mask_map: Tensor, block_row_sz: Tensor, block_col_sz: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, causal: bool = False, q_data_type: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        heads, rows, columns = block_mask_map.shape
        assert (heads, block_mask_map.dtype) == (num_kv_heads, torch.bool)
        assert (block_row_sz.shape, block_col_sz.shape) == ((heads, rows), (heads, columns))
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        self.listed, self.heights, self.widths = block_mask_map, block_row_sz, block_col_sz
        self.heads, self.dim, self.causal, self.dtype = (num_qo_heads, num_kv_heads), head_dim, causal, q_data_type

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q.shape[0], k.shape[0]) == self.heads
        assert q.shape[2] == k.shape[2] == self.dim
        assert q.dtype == k.dtype == v.dtype == self.dtype
        mask = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
        group = self.heads[0] // self.heads[1]
        for h in range(q.shape[0]):
            starts = self.widths[h // group].cumsum(0) - self.widths[h // group]
            end = 0
            for row, height in enumerate(self.heights[h // group].tolist()):
                chosen = self.listed[h // group, row].nonzero().flatten()
                keys = torch.cat([starts[c] + torch.arange(int(self.widths[h // group, c])) for c in chosen])
                for r in range(height):
                    seen = keys[: len(keys) - height + r + 1] if self.causal else keys
                    mask[h, end + r, seen] = True
                end += height
        return reference.attention(q[None], k[None], v[None], mask[None])[0].to(q.dtype)


def test_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flashinfer", VariableBlockSparseAttentionWrapper=Wrapper)
    check("flashinfer", BLOCKS)
    check("flashinfer", cases.block_list(replace(WORK, length=200), size=32, sparsity=0.7))
    assert "lists of blocks" in reason("flashinfer", SLASHES)
    assert "one sequence" in reason("flashinfer", cases.block_list(replace(WORK, batch=2), size=128))
    assert "float32 is neither" in reason("flashinfer", cases.block_list(replace(WORK, dtype=torch.float32), size=128))


# MInference


def vertical_slash_sparse_attention(query: Tensor, key: Tensor, value: Tensor, v_idx: Tensor, s_idx: Tensor) -> Tensor:
    """Columns and offsets of each head, as a pattern."""
    assert query.shape == key.shape == value.shape
    batch, heads, length, _ = query.shape
    assert batch == 1
    for index in (v_idx, s_idx):
        assert index.shape[:2] == (batch, heads)
        assert index.dtype == torch.int32
        assert ((index >= 0) & (index < length)).all()
    pattern = sp.causal() & sp.vertical_slash(v_idx, s_idx)
    return reference.attention(query, key, value, pattern).to(query.dtype)


def test_minference(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "minference", vertical_slash_sparse_attention=vertical_slash_sparse_attention)
    check("minference", SLASHES)
    found = contender("minference", SLASHES)
    assert (found.plans_inside, found.plan, found.pairs) == (True, None, MORE)
    assert "columns and diagonals" in reason("minference", BLOCKS)
    assert "one sequence" in reason("minference", cases.vertical_slash(replace(WORK, batch=2), 9, 3, 16))
    single = cases.vertical_slash(replace(WORK, dtype=torch.float32), 9, 3, 16)
    assert "float32 is neither" in reason("minference", single)


# torch's own


@pytest.mark.parametrize("problem", [BLOCKS, SLASHES, STREAMING], ids=["blocks", "slashes", "streaming"])
def test_dense_attention(problem: cases.Problem) -> None:
    check("sdpa-mask", problem)
    found = contender("sdpa", problem)
    assert found.pairs == CAUSAL
    q, k, v = problem.work.tensors()
    assert (found.run(None).double() - reference.attention(q, k, v, sp.causal())).abs().max() < CLOSE
    for name in ("cudnn", "flash"):
        assert reason(name, problem) == "does not serve this: its kernel is for GPUs"


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool, kernel_options: Any) -> Tensor:
    """The listed blocks where the mask function holds, as `flex_attention` computes them once it is compiled."""
    from torch.nn.attention.flex_attention import create_mask

    heads, length = q.shape[1:3]
    assert enable_gqa == (heads != k.shape[1])
    size = block_mask.BLOCK_SIZE[0]
    listed = block_mask.to_dense().bool().repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :length, :length]
    inside = create_mask(block_mask.mask_mod, 1, heads, length, length, device="cpu")
    return reference.attention(q, k, v, listed & inside).to(q.dtype)


def test_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_it(function: Any, dynamic: bool) -> Any:
        compiled.append(function)
        return compiled_flex

    monkeypatch.setattr(flex, "_compiled", {})
    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    check("flex", cases.block_list(WORK, size=128, sparsity=0.5))
    check("flex", cases.block_list(WORK, size=64, sparsity=0.9))
    assert len(compiled) == 1  # block lists share their mask function
    check("flex", cases.streaming(WORK, window=50, sink=5))
    check("flex", SLASHES)
    assert len(compiled) == 3
    assert "no list of its blocks" in reason("flex", cases.tokens(WORK, count=7))


# the registry


@pytest.mark.parametrize("name", [peer.name for peer in PEERS.values() if peer.needs])
def test_what_is_not_installed_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PEERS[name].needs.partition(".")[0], None)
    for module in [known for known in sys.modules if known.startswith(PEERS[name].needs.partition(".")[0] + ".")]:
        monkeypatch.delitem(sys.modules, module)
    assert reason(name, BLOCKS) == f"not installed (pip install {PEERS[name].install})"


def test_a_library_that_breaks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    stand_in(monkeypatch, "minference", vertical_slash_sparse_attention=broken)
    assert reason("minference", SLASHES) == "failed: RuntimeError: no kernel"
    stand_in(monkeypatch, "minference")
    assert reason("minference", SLASHES).startswith("failed: ImportError: cannot import name")
    monkeypatch.setattr(peers, "import_module", lambda name: (_ for _ in ()).throw(OSError("libcuda.so")))
    assert reason("minference", SLASHES) == "failed: OSError: libcuda.so"


def test_a_part_of_another_library_that_is_missing_is_no_missing_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'einops'", name="einops")
    monkeypatch.setattr(peers, "import_module", lambda name: (_ for _ in ()).throw(missing))
    assert reason("flashinfer", BLOCKS) == "failed: ModuleNotFoundError: No module named 'einops'"


def test_a_toolchain_that_is_missing_is_an_error() -> None:
    def make() -> Contender:
        raise ToolchainError("tvm")

    with pytest.raises(ToolchainError):
        attempt(make)


def test_peers_are_chosen_by_name() -> None:
    known = ("sdpa", "flex", "minference")
    assert chosen("all", known) == known
    assert chosen("none", known) == ()
    assert chosen("flex, sdpa", known) == ("sdpa", "flex")
    for text in ("felx", "flex,cudnn", "", ","):
        with pytest.raises(SpgenError, match=r"(?s)--peers.*sdpa, flex, minference"):
            chosen(text, known)
