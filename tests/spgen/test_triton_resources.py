"""What compiled kernels take, read from their binaries: against NVIDIA's own tool, and against what is known."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spgen.autotune.model import Resources, Work, estimated, fits, occupancy
from spgen.backends.triton_binary import compile_ahead
from spgen.backends.triton_compile import Variant, binary, source_path, specialised
from spgen.backends.triton_resources import resources
from spgen.errors import ToolchainError
from spgen.ir.config import Config
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.target import Target
from tests.kernel_cases import causal

triton = pytest.importorskip("triton")
WORK = Work("bfloat16", 128, 128, programs=1024, full=9000, masked=1024, gathered=0, longest=30, flops=1e9, bytes=1e7)


def kernel_of(config: Config, head_dim: int = 128) -> Op:
    made = causal(config.block_m, config.block_n).kernel
    attrs = {"dtype": "bfloat16", "head_dim": head_dim, "value_dim": head_dim, "options": config.options}
    return KERNEL.make("attention", *made.operands, **{**dict(made.attrs), **attrs})


def built_for(text: str, arch: str, *, tma: bool = False, head_dim: int = 128) -> Any:
    config = Config.read(text)
    kernel = kernel_of(config, head_dim)
    registers, stages = config.option("registers"), config.option("stages", 2)
    made = specialised(kernel, source_path(kernel), Variant(aligned=True, tma=tma), stages, registers)
    return compile_ahead(made, Target.of(arch))


@pytest.mark.parametrize(("arch", "cap"), [("sm_80", 32), ("sm_80", 0), ("sm_90", 96), ("sm_90", 0)])
def test_registers_and_spills_are_those_that_cuobjdump_prints(arch: str, cap: int, tmp_path: Path) -> None:
    built = built_for(f"64x32 warps=4 stages=2 registers={cap}", arch)
    found = resources(built, Target.of(arch))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton brings no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    printed = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], check=True, capture_output=True, text=True
    ).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", printed))
    assert (found.registers, found.spilled) == (int(numbers["REG"]), int(numbers["STACK"]))
    assert found.shared == built.metadata.shared
    if cap:
        assert found.registers == cap
        assert found.spilled > 100
    else:
        assert found.registers > 100


def test_registers_of_amds_kernels() -> None:
    target = Target.of("gfx942")
    roomy = resources(built_for("64x64 warps=4 stages=1", "gfx942"), target)
    full = resources(built_for("128x128 warps=8 stages=1", "gfx942"), target)
    assert 128 < roomy.registers <= 512
    assert roomy.spilled == 0
    assert full.registers == 256
    assert full.spilled > 0


def test_a_binary_without_registers_is_an_error() -> None:
    class Built:
        def __init__(self, built: Any) -> None:
            self.asm = {"cubin": built.asm["cubin"].replace(b"\0.nv.info\0", b"\0.no.info\0")}

    with pytest.raises(ToolchainError, match="names no registers"):
        resources(Built(built_for("64x32 warps=4 stages=2", "sm_80")), Target.of("sm_80"))


def test_the_cache_keeps_the_resources() -> None:
    target = Target.of("sm_80")
    kernel = kernel_of(Config.read("64x32 warps=4 stages=2"), 64)
    made, again = (binary(kernel, source_path(kernel), Variant(aligned=True), target) for _ in range(2))
    assert made.resources == again.resources
    assert Resources(**made.resources).registers > 64
    json.dumps(dict(made.resources))


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("sm_90", "64x64 warps=4 stages=1"),
        ("sm_90", "128x64 warps=8 stages=2 registers=128"),
        ("sm_90", "64x32 warps=4 stages=3"),
        ("sm_80", "128x64 warps=8 stages=2"),
        ("gfx942", "64x64 warps=4 stages=2"),
    ],
)
def test_estimates_are_near_what_is_compiled(arch: str, text: str) -> None:
    target, config = Target.of(arch), Config.read(text)
    real = resources(built_for(text, arch, tma=arch == "sm_90"), target)
    guess = estimated(WORK, config, target)
    # nothing is refused that would run: the estimate never lies above
    assert 0.75 * real.shared <= guess.shared <= real.shared
    assert guess.registers == pytest.approx(real.registers, rel=0.2)
    assert abs(occupancy(config, target, guess) - occupancy(config, target, real)) <= 1
    assert fits(config, WORK, target) is None
