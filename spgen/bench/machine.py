"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from spgen.target import Target

_PACKAGES = ("spgen", "torch", "triton", "apache-tvm", "apache-tvm-ffi")


def hardware(device: str) -> dict[str, Any]:
    """What the processor is, and what it is stated to reach."""
    target = Target.of(device)
    found: dict[str, Any] = {"name": target.name, "kind": target.kind, "arch": target.isa or target.arch}
    if target.kind == "cpu":
        return {**found, "cores": target.cores, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "multiprocessors": target.cores,
        "memory_gb": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    """Python, and of the packages that decide speed those that are there."""
    found = {package: _version(package) for package in _PACKAGES}
    there = {package: version for package, version in found.items() if version}
    return {"python": platform.python_version(), **there, "torch": torch.__version__}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """The version of NVIDIA's driver, or an empty text."""
    try:
        import ctypes

        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
