"""How tiles lie over blocks, and what the template prints for them."""

from __future__ import annotations

from typing import Any

import pytest

from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.templates.render import render
from spgen.templates.triton import linear


def kernel(rows: int, cols: int, block_n: int = 64, step: int = 64, **changes: Any) -> Op:
    given: dict[str, Any] = {
        "dtype": "bfloat16", "storage": "blocks", "rows": rows, "cols": cols, "values": "bfloat16", "scales": False,
        "transposed": False, "gated": False, "bias": False, "activation": "none", "height": "many", "block_m": 64,
        "block_n": block_n, "options": (f"step={step}",), **changes,
    }  # fmt: skip
    return KERNEL.make("linear", **given)


@pytest.mark.parametrize(("rows", "cols", "per", "pieces", "parts"), [
    (64, 64, 1, 1, 1), (128, 128, 1, 2, 2), (32, 32, 2, 1, 1), (7, 5, 8, 1, 1), (48, 48, 1, 1, 1), (96, 96, 1, 2, 2),
])  # fmt: skip
def test_tiles_over_blocks(rows: int, cols: int, per: int, pieces: int, parts: int) -> None:
    shape = linear.shape_of(kernel(rows, cols))
    assert (shape.per, shape.pieces, shape.parts) == (per, pieces, parts)
    assert shape.per * shape.lanes <= max(shape.step, shape.lanes)
    assert shape.pieces * shape.step >= cols or shape.per > 1
    assert shape.parts * shape.block_n >= rows


def test_transposed_blocks_change_sides() -> None:
    shape = linear.shape_of(kernel(32, 128, transposed=True))
    assert (shape.out, shape.into, shape.per, shape.parts) == (128, 32, 2, 2)


def test_blocks_of_few_rows_share_a_program() -> None:
    shape = linear.shape_of(kernel(2, 16, block_n=32, height="few"))
    assert (shape.narrow, shape.lists, shape.per) == (True, 16, 4)
    assert not linear.shape_of(kernel(2, 16, height="many")).narrow


def test_aligned_blocks_need_no_masks_of_their_own() -> None:
    text = render("triton/linear.py.jinja", **linear.symbols(kernel(128, 128)))
    assert "inner < INTO" not in text
    assert "mine < OUT" not in text
    text = render("triton/linear.py.jinja", **linear.symbols(kernel(100, 96)))
    assert "inner < INTO" in text
    assert "mine < OUT" in text


def test_parts_are_added_up_in_order() -> None:
    split = kernel(64, 64, options=("step=64", "splits=3"))
    assert linear.entries(split) == ("linear", "finish")
    assert "for split in tl.static_range(SPLITS)" in render("triton/linear.py.jinja", **linear.symbols(split))
