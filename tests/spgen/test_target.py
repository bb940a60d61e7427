"""Targets: what is read from the system, and what is listed."""

import subprocess
import sys
from pathlib import Path

import pytest

from spgen import target as module
from spgen.errors import DeviceError, SpgenError
from spgen.target import GPU_ARCHS, Target

AVX512 = "fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512cd"


def test_this_cpu() -> None:
    cpu = Target.of("cpu")
    assert cpu.kind == "cpu"
    assert cpu.cores >= 1
    assert cpu.simd >= 4
    assert cpu.arch
    assert str(cpu).startswith("cpu ")


def test_a_target_is_a_value() -> None:
    assert Target.of("cpu") == Target.of("cpu")
    assert hash(Target.of("sm_90")) == hash(Target.of("sm_90"))
    assert Target.of("sm_90").key == "cuda:sm_90"


@pytest.mark.parametrize(
    ("machine", "flags", "isa"),
    [
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512.replace("avx512vl", ""), "avx2"),
        ("amd64", "fma avx2 f16c", "avx2"),
        ("x86_64", "avx2", "sse2"),
        ("x86_64", "fma avx2", "sse2"),
        ("aarch64", "asimd", "neon"),
        ("arm64", "", "neon"),
        ("riscv64", "", "none"),
    ],
)
def test_isa(machine: str, flags: str, isa: str) -> None:
    assert module._isa_of(machine, flags) == isa


@pytest.mark.parametrize(("vendor", "isa"), [("AuthenticAMD", "avx512_bf16"), ("GenuineIntel", "avx512")])
def test_pairs_of_bf16_where_they_are_fast(vendor: str, isa: str) -> None:
    assert module._isa_of("x86_64", AVX512 + " avx512_bf16", vendor) == isa
    assert module._isa_of("x86_64", AVX512, vendor) == "avx512"


@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_listed_gpu_architecture_has_a_target(arch: str) -> None:
    gpu = Target.of(arch)
    assert gpu.arch == arch
    assert gpu.smem_bytes >= 64 * 1024


def test_known_figures() -> None:
    h200 = Target.of("sm_90")
    assert h200.name == "H200"
    assert h200.smem_bytes == 227 * 1024
    assert h200.peak("bfloat16") == pytest.approx(989e12)
    assert h200.peak("float8") == 0.0
    assert Target.of("gfx942").kind == "hip"
    assert Target.of("gfx942").simd == 64


@pytest.mark.parametrize(
    ("name", "listed"), [("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA H200", "H200"), ("Tesla T4", None)]
)
def test_devices_are_found_by_their_longest_name(name: str, listed: str | None) -> None:
    found = module._by_name(name)
    assert (found.name if found else None) == listed


@pytest.mark.parametrize("device", ["xpu", "cuda:x", "meta", "sm_12"])
def test_a_device_without_a_backend_is_named(device: str) -> None:
    with pytest.raises(DeviceError, match=rf"(?s)device: got {device}.*allowed: cpu, cuda.*sm_90"):
        Target.of(device)


def test_cuda_without_a_gpu_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SpgenError, match="cuda"):
        Target.of("cuda:0")


@pytest.mark.gpu
def test_this_gpu() -> None:
    gpu = Target.of("cuda")
    assert gpu.kind in ("cuda", "hip")
    assert gpu.smem_bytes >= 48 * 1024
    assert gpu.cores > 1


def test_a_system_without_proc_or_sysfs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_kwargs: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    module._cpu.cache_clear()
    try:
        cpu = Target.of("cpu")
    finally:
        module._cpu.cache_clear()
    assert cpu.peak("float32") == 0.0
    assert cpu.simd >= 4


def test_the_base_modules_import_nothing_heavy() -> None:
    code = "import sys, spgen.errors, spgen.settings, spgen.target, spgen.cache; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for heavy in ("torch", "triton", "sympy", "networkx", "jinja2", "filelock", "platformdirs"):
        assert f"'{heavy}'" not in modules
