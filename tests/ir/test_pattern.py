"""The short text of patterns, for everything a user can write."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spgen.errors import TextError
from spgen.ir.node import Slot, walk
from spgen.ir.pattern import PATTERN, SIGNATURES, is_selected, read_short, renumber, short_text, slots
from tests.ir.programs import programs

SCORES = st.sampled_from(["pooled()", "last_queries(64)", "sort_within(8, scores=page_bounds())"])
WRITTEN = sorted([*SIGNATURES, "per_head", "and", "or", "not", "and", "or", "not"])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_short_text_reads_back_to_the_same_object(data: st.DataObject) -> None:
    op = data.draw(programs(PATTERN, WRITTEN, SCORES))
    text = short_text(op)
    assume(len(text) < 10_000)  # shared parts are written again and again
    assert read_short(text) is op
    assert "\n" not in text


def test_every_operation_that_users_write_is_tried() -> None:
    assert {"before", "listed", "union", "term"} == set(PATTERN.ops) - set(WRITTEN)


def test_slots_are_found_and_renumbered() -> None:
    node = read_short("columns($3: int32[K]) | columns($1: int32[8, K]) & ~columns($3: int32[K])")
    assert [slot.index for slot in slots(node)] == [1, 3]
    renumbered = renumber(node, {1: 0, 3: 1})
    assert short_text(renumbered) == "columns($1: int32[K]) | columns($0: int32[8, K]) & ~columns($1: int32[K])"
    assert slots(renumbered) == (Slot(0, "int32", (8, "K")), Slot(1, "int32", ("K",)))


def test_selections_are_recognised() -> None:
    node = read_short("causal() & (top_k(4, scores=pooled(), among=dense()) | block(4, mask=$0: bool[R, C]))")
    assert [op.kind for op in walk(node) if is_selected(op)] == ["top_k"]
    assert is_selected(read_short("permuted(causal(), k=sort_within(4, scores=pooled()))"))


@pytest.mark.parametrize("text", ["top_k(4)", "block(4, density=0.5)", "n_of_m(2, 4)"])
def test_selections_without_a_score_rank_weights(text: str) -> None:
    assert read_short(text) is read_short(f"{text[:-1]}, scores=magnitude())")


@pytest.mark.parametrize(
    "text",
    [
        "block(4, mask=$0: bool[R, C], scores=pooled())",
        "block(4, mask=$0: bool[R, C], among=causal())",
        "top_k($0: int32[R, K], among=causal())",
        "n_of_m(2, 4, mask=$0: bool[R, C], scores=pooled())",
        "vertical_slash(vertical=4, scores=pooled())",
        "vertical_slash(columns=$0: int32[K], slash=4, scores=pooled())",
        "vertical_slash(vertical=4, slash=4)",
        "block(4, density=1.5, scores=pooled())",
        "permuted(causal())",
        "documents($0: int32[1, N])",
        "documents($0: bool[N])",
        "columns($0: int32[1, 1, 1, K])",
    ],
)
def test_what_the_constructors_refuse_text_refuses(text: str) -> None:
    with pytest.raises(TextError, match="got "):
        read_short(text)
