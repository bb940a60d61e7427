"""Which products Hopper's form serves, and what its template prints for them."""

from __future__ import annotations

from typing import Any

import pytest

from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.templates.gluon import linear
from spgen.templates.render import render


def kernel(rows: int, cols: int, **changes: Any) -> Op:
    given: dict[str, Any] = {
        "dtype": "bfloat16", "storage": "blocks", "rows": rows, "cols": cols, "values": "bfloat16", "scales": False,
        "transposed": False, "gated": False, "bias": False, "activation": "none", "height": "many", "block_m": 256,
        "block_n": 128, "options": ("step=64", "warpgroups=2", "stages=3"), **changes,
    }  # fmt: skip
    return KERNEL.make("linear", **given)


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, True), ({"rows": 48}, False), ({"cols": 8}, False), ({"dtype": "float32", "values": "float32"}, False),
    ({"values": "int8", "scales": True}, False), ({"height": "few"}, False), ({"gated": True, "block_m": 128}, True),
    ({"storage": "bitmap"}, False),
])  # fmt: skip
def test_what_it_expresses(changes: dict[str, Any], expected: bool) -> None:
    sides = {"rows": 64, "cols": 64} | {name: changes.pop(name) for name in ("rows", "cols") if name in changes}
    assert linear.expresses(kernel(**sides, **changes)) == expected


@pytest.mark.parametrize(("rows", "cols", "width", "lanes", "per"), [
    (128, 128, 128, 64, 1), (32, 32, 32, 32, 2), (64, 16, 64, 16, 4), (256, 64, 128, 64, 1),
])  # fmt: skip
def test_boxes(rows: int, cols: int, width: int, lanes: int, per: int) -> None:
    one = kernel(rows, cols)
    assert (linear.width(one), linear.lanes(one), linear.per(one)) == (width, lanes, per)
    assert linear.boxes(one)["w_tiles"] == (width, lanes)
    assert linear.boxes(one)["x_blocks"] == (256, lanes)


def test_transposed_blocks_come_as_they_lie() -> None:
    one = kernel(32, 128, transposed=True)
    assert linear.boxes(one)["w_tiles"] == (32, 128)
    assert ".permute(" not in render("gluon/linear.py.jinja", **linear.symbols(one))


def test_lists_by_twos() -> None:
    paired = ("step=32", "warpgroups=2", "stages=8", "paired=1")
    assert linear.expresses(kernel(32, 32, options=paired))
    assert not linear.expresses(kernel(128, 128, options=paired))
    assert not linear.expresses(kernel(32, 32, options=paired, gated=True, block_m=128))
    assert not linear.expresses(kernel(32, 32, options=paired, block_n=16))  # a tile has all columns of both lists
    text = render("gluon/linear.py.jinja", **linear.symbols(kernel(32, 32, options=paired, bias=True)))
    assert text.count("w_s.index((stage * PER + sub) * 2") == 2
    assert "order" not in text


def test_two_weights_have_two_lists() -> None:
    text = render("gluon/linear.py.jinja", **linear.symbols(kernel(64, 64, gated=True, activation="silu", block_m=128)))
    assert "activated(gate_sums) * up_sums" in text
    assert "VALUES = tl.constexpr(6)" in text
