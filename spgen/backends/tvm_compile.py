"""From builder code to machine code: a short lowering pipeline, LLVM, and the system's linker.

The only file that imports tvm; none of it runs once a kernel is in the disk cache.
"""

from __future__ import annotations

import gc
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from spgen.errors import CompileError, ToolchainError
from spgen.settings import c_compiler
from spgen.target import Target


def compile_source(source: str, path: Path, name: str, target: Target) -> Any:
    """The runtime module of the PrimFunc that `name()` of `source` builds; `path` is where its lines are found."""
    namespace: dict[str, Any] = {"__name__": "spgen.rendered"}
    tvm = _tvm()
    exec(compile(source, str(path), "exec"), namespace)
    return _machine_code(tvm, namespace[name](), target)


def write_object(module: Any, directory: Path) -> Path:
    """Writes the object file of a runtime module."""
    compiled = directory / "kernel.o"
    module.write_to_file(str(compiled), "o")
    return compiled


def link(module: Any, directory: Path) -> Path:
    """Writes the shared library of a runtime module; raises ToolchainError if there is no linker."""
    command = linker()
    if command is None:
        raise ToolchainError("linker", given="neither ld nor a C compiler", remedy="install binutils or gcc")
    library = directory / "kernel.so"
    compiled = write_object(module, directory)
    done = subprocess.run([*command, str(compiled), "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"linking with {shlex.join(command)}", given=done.stderr.strip())
    compiled.unlink()
    return library


def linker() -> list[str] | None:
    """The command that makes a shared library of an object file, or None."""
    if sys.platform.startswith("linux") and shutil.which("ld"):
        return ["ld", "-shared", "--strip-debug"]
    compiler = c_compiler()
    return None if compiler is None else [compiler, "-shared"]


def _tvm() -> Any:
    collecting = gc.isenabled()
    gc.disable()  # it would walk all of torch several times while tvm makes its classes
    try:
        import tvm
        import tvm.tirx
    except ImportError as fault:
        raise ToolchainError(
            "tvm", given=f"not installed ({fault})", allowed="apache-tvm 0.27", remedy="pip install 'spgen[cpu]'"
        ) from fault
    finally:
        if collecting:
            gc.enable()
    return tvm


def _llvm(target: Target) -> dict[str, Any]:
    """What LLVM is told of the processor."""
    told: dict[str, Any] = {"kind": "llvm", "mcpu": target.arch, "mattr": target.features.split()}
    if target.triple:
        told["mtriple"] = target.triple
    if target.triple.startswith("riscv64"):
        told["mabi"] = "lp64d"  # floating-point arguments in registers, as Linux has it
    return told


def _machine_code(tvm: Any, function: Any, target: Target) -> Any:
    """TVM's own pipelines spend most of their time on passes that these kernels do not need."""
    machine = tvm.target.Target(_llvm(target))
    module = tvm.IRModule.from_expr(function)
    passes = tvm.tirx.transform
    pipeline = [
        passes.BindTarget(machine.with_host(machine)),
        passes.FlattenBuffer(),
        passes.StmtSimplify(),
        passes.AnnotateEntryFunc(),
        passes.SplitHostDevice(),
        passes.MakePackedAPI(),
        passes.BF16StorageLegalize(),  # LLVM is given 16 bits; the tensor's own type is checked above
        passes.LowerTVMBuiltin(),
        passes.LowerIntrin(),
    ]
    with tvm.transform.PassContext(opt_level=3):
        for one_pass in pipeline:
            module = one_pass(module)
        return tvm.get_global_func("target.build.llvm")(module, machine)
