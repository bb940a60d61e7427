"""spgen doctor: findings are tried, and the verdict follows from them."""

from pathlib import Path

import pytest

from spgen import doctor
from spgen.doctor import Finding, backends, findings
from spgen.settings import override


def test_this_machine_is_reported() -> None:
    found = {finding.name: finding for finding in findings()}
    assert {"python", "torch", "tvm", "triton", "C compiler", "OpenMP", "CPU", "GPU", "cache"} <= set(found)
    assert all(finding.remedy for finding in found.values() if not finding.present)


def test_the_verdict_names_what_is_missing() -> None:
    found = [Finding("torch", True, "2.13"), Finding("tvm", True, "0.27"), Finding("GPU", False, "none", "buy one")]
    tvm, triton = backends(found)
    assert tvm.ready
    assert triton.missing == ("GPU",)


def test_a_missing_package_says_how_to_get_it() -> None:
    finding = doctor._distribution("tvm", "no-such-distribution", "pip install 'spgen[cpu]'")
    assert (finding.present, finding.remedy) == (False, "pip install 'spgen[cpu]'")


def test_a_compiler_that_does_not_work_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho cannot find ld >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert doctor._compiler().found == "cannot find ld"
    assert not doctor._compiler().present
    assert not doctor._openmp().present
    monkeypatch.setenv("CC", "no-such-compiler")
    assert doctor._compiler().found == "none found"


def test_a_cache_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with override(cache_dir=tmp_path / "file"):
        assert not doctor._cache().present
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with override(cache_dir=shared):
        finding = doctor._cache()
    assert not finding.present
    assert "chmod go-w" in finding.remedy
