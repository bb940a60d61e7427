"""What all tests share: private settings and cache, and skipping what this machine cannot run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from spgen.settings import override

# Compiling makes single examples slow; that is no failure.
hypothesis.settings.register_profile(
    "spgen", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("spgen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device; torch is asked only if there is one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache; kernels are shared by the tests of one run (one worker)."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["SPGEN_CACHE_DIR"] = str(directory)  # for the processes that tests start
    # tests say which configurations they mean
    os.environ["SPGEN_RECORDS"] = "off"
    with override(cache_dir=directory, backend="auto", no_compile=False, records=False):
        yield directory
