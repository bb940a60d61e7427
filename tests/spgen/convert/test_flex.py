"""FlexAttention's masks become patterns that hold the same pairs as its own dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

import spgen as sp
from spgen.compile import level_1
from spgen.errors import DtypeError, PatternError, ShapeError, UnsupportedError
from spgen.patterns import Pattern

LENGTH = 20
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3] + [7] * 9)
STARTS = torch.tensor([0, 3, 5, 10, 0, 0, 0, 11])
WINDOWS = torch.tensor([2, 5, 9, 30])
PREFIXES = torch.tensor([3, 7])
BUDGETS = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
GLOBAL = torch.tensor([True, False, False, True])
PIECES = torch.arange(LENGTH) // 4 % 2
SIZE = torch.tensor(4)
Mod = Callable[[Any, Any, Any, Any], Any]


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def inside_documents(inner: Mod) -> Mod:
    """Positions relative to the document's start, as attention-gym's document masks have them."""

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q, kv = q_idx - STARTS[DOCUMENTS[q_idx]], kv_idx - STARTS[DOCUMENTS[kv_idx]]
        return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & inner(b, h, q, kv)

    return mask_mod


MODS: dict[str, Mod] = {
    "causal": causal,
    "everything": noop_mask,
    "window": lambda b, h, q, kv: (q >= kv) & (q - kv <= 5),
    "both": and_masks(causal, lambda b, h, q, kv: kv % 3 != 0, lambda b, h, q, kv: q - kv < 9),
    "either": or_masks(causal, lambda b, h, q, kv: kv < 6),
    "documents": same_document,
    "causal documents": and_masks(causal, same_document),
    "other documents": lambda b, h, q, kv: DOCUMENTS[q] != DOCUMENTS[kv],
    "documents or not": lambda b, h, q, kv: (DOCUMENTS[q] == DOCUMENTS[kv]) ^ (q >= kv),
    "document choice": lambda b, h, q, kv: torch.where(h == 1, q >= kv, DOCUMENTS[q] == DOCUMENTS[kv]),
    "positions in documents": inside_documents(causal),
    "windows in documents": inside_documents(lambda b, h, q, kv: torch.abs(q - kv) <= 2),
    "prefix in documents": lambda b, h, q, kv: (DOCUMENTS[q] == DOCUMENTS[kv]) & ((kv < 4) | (q >= kv)),
    "by head": lambda b, h, q, kv: (q - kv < WINDOWS[h]) & (q >= kv),
    "by sequence": lambda b, h, q, kv: (kv < PREFIXES[b]) | (q >= kv),
    "by both": lambda b, h, q, kv: (q - kv).abs() < BUDGETS[b, h],
    "heads that see all": lambda b, h, q, kv: GLOBAL[h] | (q >= kv),
    "a number in a tensor": lambda b, h, q, kv: (kv < SIZE) | (SIZE + kv >= q) & (q // SIZE == kv // SIZE),
    "where": lambda b, h, q, kv: torch.where(q < 8, q >= kv, abs(q - kv) < 3),
    "functions": lambda b, h, q, kv: torch.logical_and(torch.minimum(q, kv) % 2 == 0, torch.logical_not(q < kv)),
    "methods": lambda b, h, q, kv: q.ge(kv).logical_or(kv.remainder(4).eq(0)) & (q.clamp(min=3) > kv.long() - 6),
    "more functions": lambda b, h, q, kv: (
        torch.bitwise_or(torch.div(q, 4, rounding_mode="floor") == torch.floor_divide(kv, 4), torch.eq(kv, 0))
        & torch.ne(torch.max(q, kv), 7)
        & torch.ones_like(q, dtype=torch.bool)
    ),
    "numbers on the left": lambda b, h, q, kv: (
        (SIZE * q - SIZE >= SIZE * kv) | (torch.tensor(17) % (q + 1) == kv) | (SIZE.lt(kv - q))
    ),
    "constants": lambda b, h, q, kv: b.new_zeros((), dtype=torch.bool) | (q >= kv + b.new_ones(())),
}  # fmt: skip
# what has no closed form: evaluated, given the lengths
LOOKUPS: dict[str, Mod] = {
    "pairs": lambda b, h, q, kv: (torch.arange(LENGTH * LENGTH).view(LENGTH, LENGTH) % 7 < 3)[q, kv],
    "rows": lambda b, h, q, kv: (torch.arange(LENGTH) % 3)[q] < kv,
    "pieces": lambda b, h, q, kv: PIECES[q] == PIECES[kv],
    "numbers": lambda b, h, q, kv: torch.sqrt((q - kv).float() ** 2) < 2.5,
}


def dense(mod: Mod, q_len: int = LENGTH, kv_len: int = LENGTH) -> Tensor:
    return create_mask(mod, 2, 4, q_len, kv_len, device="cpu")


def held(pattern: Pattern, q_len: int = LENGTH, kv_len: int = LENGTH, **options: Any) -> Tensor:
    return pattern.mask(q_len, kv_len, q_heads=4, batch=2, **options)


@pytest.mark.parametrize("name", MODS)
def test_a_mask_mod_holds_the_same_pairs(name: str) -> None:
    pattern = sp.from_mask_mod(MODS[name])
    assert torch.equal(held(pattern), dense(MODS[name]))
    assert not any(op in repr(pattern) for op in ("block", "n_of_m"))


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("lengths", [(12, 18), (18, 12), (1, 20)])
def test_rows_count_from_zero_where_lengths_differ(name: str, lengths: tuple[int, int]) -> None:
    pattern = sp.from_mask_mod(MODS[name], q_len=lengths[0], kv_len=lengths[1], batch=2, heads=4)
    assert torch.equal(held(pattern, *lengths), dense(MODS[name], *lengths))
    if "document" not in name:  # or by the call's argument
        assert torch.equal(held(sp.from_mask_mod(MODS[name]), *lengths, q_offset=0), dense(MODS[name], *lengths))


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_evaluated_given_the_lengths(name: str) -> None:
    pattern = sp.from_mask_mod(LOOKUPS[name], q_len=LENGTH, kv_len=LENGTH)
    assert torch.equal(held(pattern), dense(LOOKUPS[name]))
    with pytest.raises((UnsupportedError, DtypeError)):
        sp.from_mask_mod(LOOKUPS[name])


def test_lookups_that_differ_by_head_need_the_heads() -> None:
    table = torch.rand(4, LENGTH, LENGTH) < 0.5
    pattern = sp.from_mask_mod(lambda b, h, q, kv: table[h, q, kv], q_len=LENGTH, kv_len=LENGTH, heads=4)
    assert torch.equal(held(pattern)[1], table)


@pytest.mark.parametrize(
    ("mod", "pattern"),
    [
        (MODS["causal"], sp.causal()),
        (MODS["window"], sp.causal() & sp.window(6)),
        (MODS["either"], sp.causal() | sp.sink(6)),
        (and_masks(causal, or_masks(lambda b, h, q, kv: kv < 4, MODS["window"])),
         sp.causal() & (sp.sink(4) | sp.window(6))),
    ],
)  # fmt: skip
def test_known_masks_are_the_closed_forms(mod: Mod, pattern: Pattern) -> None:
    assert level_1(sp.from_mask_mod(mod).node) is level_1(pattern.node)


@pytest.mark.parametrize("name", [*MODS, *LOOKUPS])
@pytest.mark.parametrize("size", [8, (3, 7), 128])
def test_a_block_mask_holds_the_same_pairs(name: str, size: Any) -> None:
    mod = {**MODS, **LOOKUPS}[name]
    made = create_block_mask(mod, 2, 4, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=size)
    assert torch.equal(held(sp.from_block_mask(made)), dense(mod))


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_any_blocks_and_lengths(seed: int, rows: int, cols: int, q_len: int, kv_len: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-q_len // rows), -(-kv_len // cols)
    kinds = torch.randint(3, (2, 4, *tiles), generator=generator)  # empty, partial, full
    lists = [_as_list(kinds == kind, generator) for kind in (1, 2)]
    made = BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=(rows, cols), mask_mod=MODS["by head"], seq_lengths=(q_len, kv_len)
    )
    kinds = kinds.repeat_interleave(rows, 2).repeat_interleave(cols, 3)[:, :, :q_len, :kv_len]
    wanted = (kinds == 2) | ((kinds == 1) & dense(MODS["by head"], q_len, kv_len))
    assert torch.equal(held(sp.from_block_mask(made), q_len, kv_len), wanted)


def _as_list(mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Counts and indices; what lies behind the count is anything."""
    count = mask.sum(-1)
    indices = mask.int().argsort(dim=-1, descending=True, stable=True)
    behind = torch.arange(mask.shape[-1]) >= count[..., None]
    strange = torch.randint(-3, 99, mask.shape, generator=generator)
    return count.int(), torch.where(behind, strange.clamp(0, mask.shape[-1] - 1), indices).int()


def test_shared_heads_and_no_full_blocks() -> None:
    count, indices = torch.arange(1, 6, dtype=torch.int32), torch.arange(5, dtype=torch.int32).expand(5, 5)
    made = BlockMask.from_kv_blocks(
        count[None, None], indices[None, None], BLOCK_SIZE=4, mask_mod=causal, seq_lengths=(LENGTH, LENGTH)
    )
    assert torch.equal(held(sp.from_block_mask(made)), dense(causal))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_is_flex_attentions() -> None:
    pytest.importorskip("tvm_ffi")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 100, 32), torch.randn(2, 2, 100, 32), torch.randn(2, 2, 100, 32)
    mod = and_masks(MODS["by head"], lambda b, h, q, kv: (kv < 3) | (q // 7 >= kv // 7) & (kv % 5 != b))
    made = create_block_mask(mod, 2, 4, 100, 100, device="cpu", BLOCK_SIZE=32)
    wanted = flex_attention(q, k, v, block_mask=made, enable_gqa=True)
    for pattern in (sp.from_mask_mod(mod), sp.from_block_mask(made)):
        torch.testing.assert_close(sp.attention(pattern)(q, k, v), wanted, atol=1e-5, rtol=1e-4)


MISTAKES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no function", lambda: sp.from_mask_mod(3), DtypeError, "mask_mod: f: got 3"),  # type: ignore[arg-type]
    ("score_mod", lambda: sp.from_mask_mod(lambda s, b, h, q, kv: s), PatternError, "mask_mod: f: got a function of 5"),
    ("one length", lambda: sp.from_mask_mod(causal, q_len=3), ShapeError, "kv_len: got nothing"),
    ("table", lambda: sp.from_mask_mod(LOOKUPS["pairs"]), UnsupportedError,
     r"a tensor of shape \[20, 20\], torch.bool: got a lookup of i, j\n(.*\n)*.*q_len="),
    ("row", lambda: sp.from_mask_mod(LOOKUPS["rows"]), UnsupportedError, r"shape \[20\], torch.int64: got `load"),
    ("pieces", lambda: sp.from_mask_mod(LOOKUPS["pieces"]), UnsupportedError, "documents in several pieces"),
    ("function", lambda: sp.from_mask_mod(lambda b, h, q, kv: torch.sqrt(q) > kv), UnsupportedError, "torch.sqrt"),
    ("options", lambda: sp.from_mask_mod(lambda b, h, q, kv: torch.add(q, kv, alpha=2) > 3), UnsupportedError,
     r"torch.add: got \(…, …, alpha=…\)"),
    ("rounding", lambda: sp.from_mask_mod(lambda b, h, q, kv: torch.div(q, 2) > kv), UnsupportedError, "rounding_mode"),
    ("half", lambda: sp.from_mask_mod(lambda b, h, q, kv: q[:3] > kv), PatternError, "mask_mod: the number behind"),
    ("slice", lambda: sp.from_mask_mod(lambda b, h, q, kv: WINDOWS[h, None] > kv), UnsupportedError, "not all numbers"),
    ("axes", lambda: sp.from_mask_mod(lambda b, h, q, kv: BUDGETS[h] > kv), UnsupportedError, "1 indices for 2 axes"),
    ("branch", lambda: sp.from_mask_mod(lambda b, h, q, kv: kv if q > 3 else q), PatternError, "truth value"),
    ("floats", lambda: sp.from_mask_mod(lambda b, h, q, kv: torch.rand(4)[h] > kv), PatternError, "integers"),
    ("lookups in where", lambda: sp.where(lambda i, j: WINDOWS[i] > j), UnsupportedError, "where: a tensor"),
    ("attribute", lambda: sp.from_mask_mod(lambda b, h, q, kv: q.cumsum(0) > kv), UnsupportedError,
     "mask_mod: got a traced value has no attribute 'cumsum'"),
    ("rows cut off", lambda: sp.from_block_mask(_cut()), ShapeError, "1 blocks of 4 rows for 20 rows"),
]  # fmt: skip


def _cut() -> BlockMask:
    made = create_block_mask(causal, 1, 1, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=4)
    return made[:, :, torch.tensor([1])]


@pytest.mark.parametrize(("mistake", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_explained(mistake: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mistake()


def test_torch_functions_serve_where_too() -> None:
    pattern = sp.where(lambda i, j: torch.logical_and(j <= i, torch.abs(i - j) < 5))
    assert level_1(pattern.node) is level_1((sp.causal() & sp.window(5)).node)
