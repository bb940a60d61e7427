"""What the benchmarks' cases hold: pairs, keys and masks against the oracle, and the peers' forms of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from spgen import reference
from spgen.bench import cases
from spgen.bench.blocks import BlockList
from spgen.bench.workloads import Workload, eight_heads, llama3_8b, short

WORK = Workload(heads=4, kv_heads=2, length=256, head_dim=16, dtype=torch.float32, device="cpu")
RAGGED = replace(WORK, length=200)
TWO = replace(WORK, batch=2)

MAKERS: dict[str, tuple[Workload, Callable[[Workload], cases.Problem]]] = {
    "blocks": (WORK, partial(cases.block_list, size=32, sparsity=0.5)),
    "blocks, ragged": (RAGGED, partial(cases.block_list, size=32, sparsity=0.5)),
    "blocks, two sequences": (TWO, partial(cases.block_list, size=64, sparsity=0.9)),
    "columns": (WORK, partial(cases.columns, count=20)),
    "columns, ragged": (RAGGED, partial(cases.columns, count=20)),
    "diagonals": (RAGGED, partial(cases.diagonals, bands=2, width=32)),
    "far diagonals": (WORK, partial(cases.diagonals, bands=1, width=64)),
    "vertical-slash": (TWO, partial(cases.vertical_slash, vertical=9, bands=3, width=16)),
    "streaming": (RAGGED, partial(cases.streaming, window=50, sink=5)),
    "tokens of 64 rows": (RAGGED, partial(cases.tokens, count=20, rows=64)),
    "tokens of a row": (WORK, partial(cases.tokens, count=7, rows=1)),
    "permuted freely": (WORK, partial(cases.permuted_keys, size=32, sparsity=0.3)),
    "permuted within 64": (TWO, partial(cases.permuted_keys, size=32, sparsity=0.8, sort=64)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_problem_is_what_it_says(name: str) -> None:
    work, make = MAKERS[name]
    problem = make(work)
    wanted = reference.mask(
        problem.pattern, work.length, q_heads=work.heads, kv_heads=work.kv_heads, batch=work.batch, device="cpu"
    )
    assert torch.equal(problem.whole_mask().expand_as(wanted), wanted)
    assert problem.pairs == wanted.sum()
    assert problem.touched == wanted.unflatten(1, (work.kv_heads, work.group)).any(2).any(2).sum()
    assert problem.flops == 4 * problem.pairs * work.head_dim
    rows = 2 * work.batch * work.heads * work.length + 2 * problem.touched  # q and out, k and v
    assert problem.bytes == rows * work.head_dim * 4 + sum(tensor.nbytes for tensor in problem.pattern.data)


@pytest.mark.parametrize("name", [name for name, (work, make) in MAKERS.items() if make(work).flex is not None])
def test_flex_is_given_the_same_pairs(name: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    work, make = MAKERS[name]
    problem = make(work)
    assert problem.flex is not None
    mask = problem.flex()
    inside = create_mask(mask.mask_mod, 1, work.heads, work.length, work.length, device="cpu")
    tiles = mask.to_dense().bool()  # listed: whole, or where the mask function holds
    size = mask.BLOCK_SIZE[0]
    spread = tiles.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., : work.length, : work.length]
    assert torch.equal((spread & inside).expand(1, work.heads, -1, -1), problem.whole_mask())


def test_sparsity_is_that_of_the_blocks_below_the_diagonal() -> None:
    work = eight_heads(4096)
    for sparsity in (0.0, 0.5, 0.95):
        keep = BlockList.random(work, 64, sparsity).keep
        assert bool(keep.diagonal(dim1=1, dim2=2).all())
        assert not keep.triu(1).any()
        assert abs(float(keep.tril(-1).sum()) / (8 * 64 * 63 / 2) - (1 - sparsity)) < 0.02


def test_errors_are_seen() -> None:
    problem = cases.block_list(WORK, size=32, sparsity=0.5)
    q, k, v = WORK.tensors()
    right = reference.attention(q, k, v, problem.pattern)
    assert problem.largest_error(right, q, k, v) < 1e-12
    assert problem.largest_error(right + 1, q, k, v) == pytest.approx(1)


def test_workloads_of_any_size() -> None:
    work = llama3_8b(1024, device="cpu", dtype=torch.float16)
    assert (work.group, work.record()["dtype"]) == (4, "float16")
    assert work.causal_pairs == 32 * 1024 * 1025 // 2
    q, k, v = replace(work, heads=4, kv_heads=1, length=3, batch=2).tensors()
    assert (q.shape, k.shape, v.dtype) == ((2, 4, 3, 128), (2, 1, 3, 128), torch.float16)
    assert [short(length) for length in (0, 200, 1024, 128 * 1024)] == ["0", "200", "1K", "128K"]
