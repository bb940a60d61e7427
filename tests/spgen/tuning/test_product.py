"""Tuning products with sparse weights on this machine's CPU: small calls, few configurations; no times are tested."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spgen as sp
from spgen.autotune import search, workloads
from spgen.autotune.records import Record, Records
from spgen.autotune.search import Effort
from spgen.autotune.workloads import ProductCase
from spgen.errors import WorkloadError
from spgen.ir.config import Config
from spgen.settings import override
from spgen.target import Target
from spgen.tuned import device_of, forget
from spgen.tuning.compilers import Compilers
from spgen.tuning.measured import Place
from spgen.tuning.product import TunedProduct, around
from spgen.tuning.session import Session
from spgen.weights.compile import Request, Sizes, config_of, default_of
from spgen.weights.storage import Layout

pytest.importorskip("tvm")

CASE = ProductCase("small", "block(16, density=0.3)", 20, 64, 96, dtype="float32")
HERE = Place(Target.of("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.EFFORTS, "quick", Effort(favourites=3, steps=0, around=0, rounds=2))  # type: ignore[arg-type]


def run(path: Path, *cases: ProductCase) -> list[Record | str]:
    found: list[Record | str] = []
    known = Records.load(path) if path.exists() else Records(device_of(HERE.target))
    Session(cases, [HERE], known, path, "quick", lambda *args: None, lambda case, result: found.append(result)).run()
    return found


@pytest.mark.parametrize("form", ["linear", "gated"])
def test_a_record_is_found_by_calls_like_it(tmp_path: Path, form: str) -> None:
    (record,) = run(tmp_path / "mine.json", replace(CASE, form=form))
    assert isinstance(record, Record)
    assert record.effort == "quick"
    assert record.default in record.trials
    other = Config(32, 2)
    known = Records(device_of(HERE.target))
    known.add(replace(record, config=other))
    known.save(tmp_path / "mine.json")
    request = Request("float32", Layout("blocks", 16, 16), "float32", False, HERE.target, gated=form == "gated")
    sizes = Sizes(18, 64, 96, (2 if form == "gated" else 1) * 1843)
    with override(records=tmp_path):
        forget()
        assert config_of(request, sizes) == other
        assert config_of(request, replace(sizes, m=2**18)) != other
        assert config_of(replace(request, layout=Layout("blocks", 32, 32)), sizes) != other
        for m in (17, 1):  # nearest to the record, too: of use where the default is what the record knows
            near, usual = replace(sizes, m=m), default_of(request, replace(sizes, m=m))
            assert config_of(request, near) == (other if usual == record.default else usual)
        assert usual != record.default
    forget()


def test_configurations_that_fail_are_results(compilers: Compilers) -> None:
    problem = TunedProduct(CASE, HERE, compilers)
    found = dict(problem.compiled([problem.default, Config(7, 1)]))
    assert found[problem.default] == ""


def test_around_a_configuration() -> None:
    found = around(Config(64, 32, ("stages=2", "warps=4")))
    assert Config(128, 32, ("stages=2", "warps=4")) in found
    assert Config(64, 32, ("stages=3", "warps=4")) in found
    assert Config(64, 32, ("stages=2", "warps=8")) in found
    assert len(found) == len(set(found)) == 8
    assert all(config.block_m and config.block_n for config in around(Config(1, 1, ("splits=1",))))
    assert {config.options for config in around(Config(8, 8, ("cores=1",)))} == {("cores=1",)}


def test_shipped_workloads_hold_products(compilers: Compilers) -> None:
    cases = [case for name in workloads.named() for case in workloads.load(name) if isinstance(case, ProductCase)]
    assert {case.name.partition(":")[0] for case in cases} >= {"cpu-mlp", "llama3-8b-mlp"}
    kinds = {}
    for case in cases:
        small = replace(case, outputs=128, inputs=256)
        kinds[case.name] = TunedProduct(small, HERE, compilers).record.key
    assert len({key.structure for key in kinds.values()}) > 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(CASE, dtype="float64"), "dtype: got 'float64'"),
        (replace(CASE, form="backward"), "form: got 'backward'"),
        (replace(CASE, pattern="block(16"), "workload small"),
        (replace(CASE, pattern="block(16, density=0.3, scores=pooled())"), "does not rank weights"),
    ],
)
def test_mistakes_are_explained(case: ProductCase, message: str, compilers: Compilers) -> None:
    with pytest.raises(WorkloadError, match=message):
        TunedProduct(case, HERE, compilers)


def test_layers_say_their_configuration() -> None:
    layer = sp.linear(torch.randn(64, 96), sp.block(16, density=0.3))
    assert "x" in str(layer.explain(torch.randn(4, 96))).splitlines()[-1]
