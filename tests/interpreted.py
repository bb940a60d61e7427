"""Tests of Triton kernels in its interpreter, which a process must choose before it imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(name: str) -> None:
    """Run the tests of tests/spgen/`name` in a process of their own; all of them must run, and pass."""
    tests = Path(__file__).with_name("spgen") / name
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
