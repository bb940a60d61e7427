"""A short campaign, the same one each time; what campaigns have found; and the campaign's own parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spgen as sp
from tests.fuzz import campaign, products
from tests.fuzz.cases import VARIANTS, Case, case, tensors_of
from tests.fuzz.check import Disagreement, check
from tests.fuzz.shrink import shrink

BACKENDS = ("none", "cpu", pytest.param("gpu", marks=pytest.mark.gpu))

# what campaigns have found, made minimal; docs/fuzz.json says what was wrong
FOUND = {
    "widened values behind a mask of positions": Case(
        sp.diagonals(torch.tensor([0, 3])), rows=(9,), keys=(9,), q_heads=2, head_dim=33, dtype="float16"
    ),
    "lengths beyond the keys": Case(sp.causal(), rows=(2,), keys=(1,), kv_lengths=(55,)),
}


def _needs(backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("tvm", reason="the CPU backend needs apache-tvm")


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("backend", BACKENDS)
def test_found_before(backend: str, name: str) -> None:
    _needs(backend)
    check(FOUND[name], backend)


@pytest.mark.parametrize("group", range(24))
def test_lowered_cases(group: int) -> None:
    check(case(100, group * VARIANTS + group % VARIANTS), "none")


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_cases(backend: str, group: int) -> None:
    """Each kernel with all of its variants."""
    _needs(backend)
    for number in range(group * VARIANTS, (group + 1) * VARIANTS):
        check(case(101, number), backend)


def test_a_case_is_the_same_everywhere() -> None:
    """Its text is all of it, and was the same when this was written."""
    one = case(0, 0)
    again = eval(str(one), {"Case": Case, "sp": sp, "torch": torch})
    assert str(again) == str(one)
    for x, y in zip(tensors_of(one).q.flatten(), tensors_of(again).q.flatten(), strict=True):
        assert x == y or (x.isnan() and y.isnan())
    assert str(case(0, 3).pattern) == str(one.pattern)  # variants share a kernel


def test_what_lies_beyond_lengths_is_nan() -> None:
    one = Case(sp.dense(), rows=(3, 3), keys=(5, 5), kv_lengths=(2, 9))
    keys = tensors_of(one).k[:, 0, :, 0].isnan()
    assert keys.tolist() == [[False, False, True, True, True], [False] * 5]
    packed = Case(sp.dense(), rows=(2, 0), keys=(1, 3), packed=True, margins=(1, 2), kv_lengths=(1, 2))
    assert tensors_of(packed).k[:, 0, 0].isnan().tolist() == [True, False, False, False, True, True, True]
    assert tensors_of(packed).q[:, 0, 0].isnan().tolist() == [True, False, False, True, True]


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair too many, and one number a little off."""
    one = Case(sp.causal() & sp.window(5), rows=(20,), keys=(20,), seed=3)
    wrong = replace(one, pattern=sp.causal() & sp.window(6))
    monkeypatch.setattr("tests.fuzz.check.lowered_pairs", lambda pattern, call: wrong.pattern.mask(20, 20))
    with pytest.raises(Disagreement, match="15 pairs: the kernel visits row 5, key 0"):
        check(one, "none")


@pytest.mark.parametrize("error", [0.0, 1e-4])
def test_errors_beyond_rounding_are_found(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    def exact(self: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> object:
        options.pop("plan", None)
        found = sp.reference.attention(q, k, v, sp.causal(), **options)
        return (found[0] * (1 + error)).to(q.dtype), found[1].float()

    monkeypatch.setattr("spgen.attend.Attention.__call__", exact)
    one = Case(sp.causal(), rows=(20,), keys=(20,), seed=3)
    if error:
        with pytest.raises(Disagreement, match="output"):
            check(one, "cpu")
    else:
        check(one, "cpu")


def test_shrinking() -> None:
    """What remains is what fails: here, a diagonal and two heads."""

    def fails(one: Case) -> bool:
        return "diagonals" in repr(one.pattern) and one.q_heads > 1 and one.call.kv_len > 3

    number = next(n for n in range(10_000) if fails(case(0, n)) and case(0, n).packed)
    small = shrink(case(0, number), fails)
    assert repr(small.pattern).startswith("diagonals(")
    assert small.batch == 1
    assert max(small.keys) == 4
    assert (small.layout, small.plan, small.dtype, small.bias) == ("contiguous", False, "float32", "none")
    assert small.pattern.data[0].numel() <= 1


@pytest.mark.parametrize("jobs", [0, 1])
def test_campaigns(jobs: int) -> None:
    result = campaign.run("none", 0, VARIANTS, first=VARIANTS, jobs=jobs, threads=1, seconds=600)
    assert (result.cases, result.groups, result.failures) == (VARIANTS, 1, [])


def test_what_was_found_is_recorded() -> None:
    record = json.loads(Path("docs/fuzz.json").read_text(encoding="utf-8"))
    assert {failure["test"] for failure in record["failures"]} == set(FOUND)


def test_failures_come_back_from_processes() -> None:
    result = campaign.run("abacus", 0, VARIANTS, jobs=1, threads=1, seconds=600, shrinking=0)
    assert [failure.number for failure in result.failures] == list(range(VARIANTS))
    assert "'abacus' is none of" in str(result.failures[0])


def test_products_of_a_short_campaign() -> None:
    done, failed = products.run(20261122, 0, 60, "cpu")
    assert done == 60
    assert not failed, "\n".join(failed)
