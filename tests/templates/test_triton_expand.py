"""The template of few rows times n-of-m and bitmap weights on tensor cores: what it reads, as text."""

from __future__ import annotations

import re

import pytest

from spgen.ir.config import Config
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.render import render
from spgen.templates.triton.expand import room, symbols
from spgen.weights.compile import Request, Sizes, kernel_of
from spgen.weights.storage import Layout


def rendered(layout: str, values: str = "bfloat16", rows: int = 1, gated: bool = False) -> str:
    return render("triton/expand.py.jinja", **symbols(kernel(layout, values, rows, gated)))


def kernel(layout: str, values: str = "bfloat16", rows: int = 1, gated: bool = False) -> Op:
    request = Request("bfloat16", Layout.read(layout), values, values != "bfloat16", Target.of("sm_90"), gated=gated)
    return kernel_of(request, Sizes(rows, 64, 64, 9), Config(rows, 2, ("expand=1", "warps=2")))


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("bitmap()", 4), ("n_of_m(1, 2)", 2), ("n_of_m(1, 4)", 1), ("n_of_m(3, 4)", 3), ("n_of_m(2, 8)", 2),
     ("n_of_m(4, 8)", 4), ("n_of_m(9, 16)", 4)],
)  # fmt: skip
def test_room(layout: str, wanted: int) -> None:
    assert room(kernel(layout)) == wanted


@pytest.mark.parametrize(
    ("layout", "values", "words"),
    [("bitmap()", "bfloat16", 3), ("n_of_m(3, 4)", "bfloat16", 2), ("n_of_m(1, 4)", "bfloat16", 1),
     ("bitmap()", "int8", 2), ("n_of_m(4, 8)", "int4", 2), ("n_of_m(1, 4)", "int4", 1)],
)  # fmt: skip
def test_words_of_a_window(layout: str, values: str, words: int) -> None:
    """Two words hold three values of 16 bits wherever they begin; four may lie in three."""
    text = rendered(layout, values)
    body = text[text.index("    for start in") :]
    assert len(re.findall(r"tl\.load\(source", body)) == 2 * words  # of two rows
    assert ("mask=first <" in body) == (words > 1 and layout != "bitmap()")  # a bitmap's values end with padding


def test_one_product_for_each_row_of_x_and_two_of_weights() -> None:
    for rows, gated, wanted in ((1, False, 1), (4, False, 4), (4, True, 8)):
        text = rendered("bitmap()", rows=rows, gated=gated)
        assert text.count("= product(") == wanted


def test_ranks_are_those_of_the_group() -> None:
    """Groups of up to four columns begin within a thread's; wider ones count the bits before it."""
    for layout, counted in (("n_of_m(1, 2)", 0), ("n_of_m(1, 4)", 0), ("n_of_m(4, 8)", 4), ("bitmap()", 4)):
        text = rendered(layout)
        assert text.count("+ ones_of(word") == counted  # of two rows, ahead of the loop and in it
