"""Targets: what is read from the system, and what is listed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spgen import target as module
from spgen import targets
from spgen.errors import DeviceError, SpgenError
from spgen.target import Target

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


def test_a_processor_can_be_asked_for_less() -> None:
    here = Target.of("cpu")
    assert Target.of("cpu:0") == here
    if here.isa in ("avx512", "avx512_bf16"):
        less = Target.of("cpu:avx2")
        assert (less.isa, less.arch, less.simd, less.triple) == ("avx2", "x86-64-v3", 8, "")
        assert less.cores == here.cores
    with pytest.raises(DeviceError, match=rf"cpu:amx.*(?s:.*)cpu:{here.isa}"):
        Target.of("cpu:amx")


@pytest.mark.parametrize("arch", sorted(targets.table("gpu")))
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
    ("name", "listed"),
    [
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", None),
        ("NVIDIA A1000", None),
    ],
)
def test_devices_are_found_by_their_longest_name(name: str, listed: str | None) -> None:
    found = targets.named(name)
    assert (found["name"] if found else None) == listed


@pytest.mark.parametrize("name", targets.names())
def test_every_described_gpu_has_a_target(name: str) -> None:
    gpu = Target.of(name)
    assert targets.named(gpu.name) == targets.named(name)
    assert gpu.cores > 50
    assert gpu.bandwidth >= 0.3e12
    assert gpu.smem_total >= gpu.smem_bytes
    assert gpu.peak("bfloat16") >= gpu.peak("tf32") >= gpu.peak("float32") > 0
    assert gpu.key == Target.of(gpu.arch).key


def test_an_architecture_is_its_usual_gpu() -> None:
    assert Target.of("sm_90") == Target.of("h200") == Target.of("H200")
    assert Target.of("sm_75").name == "sm_75"
    assert Target.of("sm_75").bandwidth == 0


def described(tmp_path: Path, **changes: object) -> Path:
    """A file like that of a listed GPU, with other fields; None leaves one out."""
    given = {**(targets.named("h200") or {}), "name": "Mine", **changes}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
    return path


def test_a_file_describes_a_gpu(tmp_path: Path) -> None:
    mine = Target.of(described(tmp_path, multiprocessors=7, limits={"smem_bytes": 1000}, model={"launch": 1e-6}))
    assert (mine.name, mine.cores, mine.smem_bytes) == ("Mine", 7, 1000)
    assert mine.smem_total == Target.of("h200").smem_total
    assert mine.model == (("launch", 1e-6),)
    assert mine.key == "cuda:sm_90"


def test_a_file_describes_a_gpu_of_an_unlisted_architecture(tmp_path: Path) -> None:
    limits = {"warp_size": 32, "registers": 65536, "smem_bytes": 1 << 17, "smem_total": 1 << 17, "max_warps": 64}
    path = described(tmp_path, arch="sm_110", limits=limits)
    with pytest.raises(DeviceError, match=r"mine.json: limits: max_programs: got nothing"):
        Target.of(path)
    path = described(tmp_path, arch="sm_110", limits={**limits, "max_programs": 32})
    targets.load.cache_clear()
    assert Target.of(path).key == "cuda:sm_110"


def test_a_file_describes_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    path.write_text(json.dumps({"kind": "cpu", "name": "Server", "isa": "avx512", "cores": 96, "bandwidth": 4e11}))
    server = Target.of(path)
    assert (server.kind, server.cores, server.simd) == ("cpu", 96, 16)
    assert server.key == Target.of("x86-64-v4").key.replace("x86_64-linux-gnu:", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": None}, "arch: got nothing"),
        ({"multiprocessors": "many"}, "multiprocessors: got many"),
        ({"multiprocessors": 1.5}, "multiprocessors: got 1.5"),
        ({"bandwidth": -1}, "bandwidth: got -1"),
        ({"peaks": {"float16": "fast"}}, "peaks: got"),
        ({"arch": "avx9"}, "arch: got avx9"),
        ({"speed": 3}, "speed: got 3"),
    ],
)
def test_a_malformed_description_names_its_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    targets.load.cache_clear()
    with pytest.raises(DeviceError, match=rf"mine\.json: {message}") as caught:
        Target.of(described(tmp_path, **changes))
    assert caught.value.allowed


def test_a_malformed_description_of_a_cpu_names_its_field(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    path.write_text(json.dumps({"kind": "cpu", "name": "Server", "isa": "avx9"}))
    with pytest.raises(DeviceError, match=r"(?s)server\.json: isa: got avx9.*allowed: .*avx512"):
        Target.of(path)


def test_a_file_that_holds_no_description(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"none\.json: got No such file"):
        Target.of(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DeviceError, match=r"list\.json: got list"):
        Target.of(tmp_path / "list.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DeviceError, match=r"text\.json: got no JSON"):
        Target.of(tmp_path / "text.json")


@pytest.mark.parametrize("device", ["xpu", "cuda:x", "meta", "sm_12"])
def test_a_device_without_a_backend_is_named(device: str) -> None:
    with pytest.raises(DeviceError, match=rf"(?s)device: got {device}.*allowed: cpu, cuda.*sm_90.*h200"):
        Target.of(device)


@pytest.mark.parametrize(("given", "near"), [("h20", "h200"), ("RTX-4091", "rtx-4090"), ("sm_9", "sm_90"), ("avx", "")])
def test_a_misspelt_device_is_guessed(given: str, near: str) -> None:
    with pytest.raises(DeviceError) as caught:
        Target.of(given)
    assert (f"did you mean {near}?" in caught.value.remedy) if near else "did you mean" not in caught.value.remedy


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
    code = "import sys, spgen.errors, spgen.settings, spgen.target, spgen.cache; spgen.target.Target.of('h200')"
    code += "; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for heavy in ("torch", "triton", "sympy", "networkx", "jinja2", "filelock", "platformdirs"):
        assert f"'{heavy}'" not in modules
