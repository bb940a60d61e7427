"""Products with active neurons in Triton's interpreter, in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton_neurons.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spgen.backends.triton_neurons import compact, down
from spgen.settings import triton_interpreted
from tests.neurons import Neurons, check
from tests.products import ACTIVATIONS

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")


@st.composite
def calls(draw: st.DrawFn) -> Neurons:
    return Neurons(
        draw(st.sampled_from((1, 2, 7, 33, 75))), draw(st.sampled_from((1, 2, 4, 16, 70))), draw(st.integers(1, 200)),
        draw(st.integers(1, 80)), draw(st.integers(1, 150)), draw(st.sampled_from(("float32", "float16"))),
        *(draw(st.booleans()) for _ in range(4)), draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.sampled_from((0.0, 0.7, 2.0, 9.0))), draw(st.booleans()), draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=12)
@given(calls())
def test_calls(call: Neurons) -> None:
    check(call)


@pytest.mark.parametrize(("m", "rows"), [(1, 1), (3, 1), (9, 4), (20, 16), (64, 64), (150, 100), (200, 200)])
def test_lists(m: int, rows: int) -> None:
    check(Neurons(m, rows, 1300, 33, 70, positive=rows == 4, bias=True))
    check(Neurons(m, rows, 130, 33, 7, gated=False, twofold=True, bias=rows == 4))


def test_nothing_is_active_where_scores_are_not_numbers() -> None:
    scores = torch.full((2, 40), torch.nan)
    for positive in (False, True):
        assert not compact(scores, 0.0, positive=positive)[1].any()


def test_empty_lists_give_the_bias() -> None:
    index, count = compact(torch.zeros(3, 40), 0.5)
    bias = torch.randn(24)
    assert torch.equal(down(torch.randn(3, 40), torch.randn(40, 24), index, count, bias), bias.expand(3, 24))
