"""spgen doctor: findings are tried, and the verdict follows from them."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from spgen import doctor
from spgen.backends import openmp
from spgen.cache import Cache, key
from spgen.doctor import Finding, backends, findings, report
from spgen.errors import CompileError, SpgenError
from spgen.settings import override, settings
from spgen.target import Target


def test_this_machine_is_reported() -> None:
    found = {finding.name: finding for finding in findings()}
    wanted = "python torch triton gluon tvm tvm_ffi matplotlib transformers safetensors linker threads OpenMP CPU GPU"
    assert {*wanted.split(), "C compiler", "CPU products", "cache", "settings"} <= set(found)
    assert all(finding.remedy for finding in found.values() if not finding.present)
    assert found["CPU"].details["cores"] >= 1
    assert found["CPU"].details["cache_bytes"]["L1"] >= 0


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


def test_damaged_entries_are_counted(tmp_path: Path) -> None:
    with override(cache_dir=tmp_path / "cache"):
        path = Cache().get_or_build(key(n=1), lambda d: (d / "kernel.so").write_bytes(b"x"), meta={})
        assert "1 kernels" in doctor._cache().found
        (path / "kernel.so").unlink()
        finding = doctor._cache()
    assert finding.present
    assert "1 damaged" in finding.found
    assert "spgen cache prune" in finding.remedy
    assert finding.details["damaged"] == [key(n=1)]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("0.27.0.post1", ">=0.27,<0.28", True), ("0.26.9", ">=0.27,<0.28", False), ("0.28", ">=0.27,<0.28", False),
        ("2.13.0+cpu", ">=2.8,<3", True), ("3.0.0a1", "<3,>=2.8", False), ("1.0", "", True),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert doctor._satisfies(version, wanted) == fits


def test_a_version_that_spgen_does_not_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required", lambda: {"apache-tvm": ">=0.99"})
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.27")
    finding = doctor._distribution("tvm", "apache-tvm", "")
    assert not finding.present
    assert finding.found == "0.27, and spgen needs >=0.99"
    assert finding.remedy == "pip install 'apache-tvm>=0.99'"


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: "libgomp.so.1: cannot open shared object file")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0")
    finding = doctor._torch_finding()
    assert not finding.present
    assert "libgomp" in finding.found
    assert [gpu.found for gpu in doctor._gpus()] == ["unknown without torch"]


def _fake_torch(gpus: int = 0, cuda_version: str | None = None) -> ModuleType:
    module = ModuleType("torch")
    module.__version__ = "2.13.0"
    module.version = SimpleNamespace(cuda=cuda_version, hip=None)
    module.cuda = SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        get_device_properties=lambda index: SimpleNamespace(total_memory=80 << 30),
    )
    module.get_num_threads = lambda: 4
    return module


def test_a_driver_without_a_build_of_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", _fake_torch)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    (finding,) = doctor._gpus()
    assert not finding.present
    assert "sees none, driver 570.86" in finding.found
    assert "a build of torch for CUDA" in finding.remedy


def test_every_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"cuda:0": Target.of("sm_90"), "cuda:1": Target("cuda", "New", "sm_199", cores=8)}
    monkeypatch.setattr(doctor, "_torch", lambda: _fake_torch(gpus=2, cuda_version="13.0"))
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    monkeypatch.setattr(doctor.Target, "of", gpus.__getitem__)
    known, new = doctor._gpus()
    assert known.present
    assert all(part in known.found for part in ("sm_90", "80 GB", "227 KB of shared memory", "driver 570.86"))
    assert "no kernels are tuned" not in known.found
    assert "no kernels are tuned for sm_199" in new.found
    assert doctor._torch_finding().details["cuda"] == "13.0"


def test_the_cpu_s_products_are_named_by_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cpuinfo", lambda: {"flags": "sse2 fma avx512_bf16 amx_bf16 avx512_vnni"})
    finding = doctor._products()
    assert finding.found == "float32 (fma), bfloat16 (avx512_bf16, amx_bf16), int8 (avx512_vnni)"
    assert finding.details["bfloat16"] == ["avx512_bf16", "amx_bf16"]
    monkeypatch.setattr(doctor, "_cpuinfo", dict)
    assert doctor._products().found.startswith("unknown")


def test_an_environment_that_cannot_be_read_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise SpgenError("SPGEN_BACKEND", given="'x'", remedy="unset SPGEN_BACKEND or correct it")

    monkeypatch.setattr(doctor, "settings", refuse)
    finding = doctor._settings()
    assert (finding.present, finding.remedy) == (False, "unset SPGEN_BACKEND or correct it")
    with override(no_compile=True):
        monkeypatch.undo()
        assert doctor._settings().found == f"cache_dir={settings().cache_dir}, no_compile=True, records=False"


def test_threads_that_cannot_be_shared_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    monkeypatch.setenv("CC", "no-such-compiler")
    openmp._launcher.cache_clear()
    with override(cache_dir=tmp_path / "cache"):
        finding = doctor._threads()
    openmp._launcher.cache_clear()
    assert not finding.present
    assert finding.found == "C compiler: got none found"


def test_a_kernel_is_tried_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi")
    cpu = backends([])[0]
    assert doctor._kernel(cpu).present
    monkeypatch.setattr("spgen.reference.attention", lambda q, k, v, pattern: q.double() + 1)
    assert doctor._kernel(cpu).found.startswith("wrong by")

    def fail(*_arguments: object) -> None:
        raise CompileError("kernel", given="nothing")

    monkeypatch.setattr("spgen.reference.attention", fail)
    broken = doctor._kernel(cpu)
    assert broken.found == "CompileError: kernel: got nothing"
    assert backends([broken])[0].missing == ("tvm (CPU) kernel",)


def test_the_report_is_json() -> None:
    found = [Finding("torch", True, "2.13", details={"version": "2.13"}), Finding("GPU", False, "none", "buy one")]
    read = json.loads(json.dumps(report(found)))
    assert read["findings"][0]["details"] == {"version": "2.13"}
    assert read["backends"][1] == {"name": "triton (GPU)", "ready": False, "missing": ["GPU"]}
