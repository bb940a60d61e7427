"""Workloads: the shipped ones are complete, and a file with a fault says where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spgen.autotune import workloads
from spgen.errors import WorkloadError
from spgen.ir.pattern import read_short


def test_shipped_workloads_are_patterns_in_calls() -> None:
    assert {"llama3-8b-prefill", "llama3-8b-decode", "cpu-encoder"} <= set(workloads.named())
    cases = [case for name in workloads.named() for case in workloads.load(name)]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert str(read_short(case.pattern))
        if isinstance(case, workloads.ProductCase):
            assert min(case.rows, case.inputs, case.outputs) > 0
            continue
        assert case.q_heads % case.kv_heads == 0
        assert min(case.q_len, case.kv_len, case.head_dim, case.value_dim) > 0


def test_sizes_left_out_are_those_of_the_queries() -> None:
    case = workloads.Case("x", "causal()", q_heads=8, q_len=100, head_dim=64, kv_len=300)
    assert (case.kv_heads, case.kv_len, case.value_dim) == (8, 300, 64)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match=r"(?s)got 'llama3-8b-prefil'.*cpu-encoder.*did you mean llama3-8b-prefill"):
        workloads.load("llama3-8b-prefil")
    with pytest.raises(WorkloadError, match=r"none\.json: got No such file"):
        workloads.load("none.json")


CASE = {"name": "a", "pattern": "causal()", "q_heads": 8, "q_len": 128, "head_dim": 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "allowed: JSON"),
        ([], "got list"),
        ({"w": {}}, "w: got no cases"),
        ({"w": {"cases": []}}, "w: got no cases"),
        ({"w": {"cases": [CASE, {**CASE, "heads": 8}]}}, "w: case 1: got the unknown field 'heads'"),
        ({"w": {"cases": [{"name": "a"}]}}, "w: case 0: got no 'pattern'"),
        ({"w": {"call": {"q_len": "long"}, "cases": [{**CASE, "q_len": "long"}]}}, "case 0: q_len: got 'long'"),
        ({"w": {"cases": [{**CASE, "density": 0}]}}, "case 0: density: got 0"),
        ({"w": {"cases": [{**CASE, "batch": True}]}}, "case 0: batch: got True"),
    ],
)
def test_faults_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(WorkloadError) as caught:
        workloads.load(str(path))
    assert message in str(caught.value).replace("'str'", "str")


def test_a_file_may_hold_several(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"a": {"call": CASE, "cases": [{"name": "1"}, {"q_len": 5}]}, "b": {"cases": [CASE]}}))
    found = workloads.load(str(path))
    assert [(case.name, case.q_len) for case in found] == [("a: 1", 128), ("a: a", 5), ("b: a", 128)]
