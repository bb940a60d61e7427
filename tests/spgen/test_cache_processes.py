"""The disk cache under many processes, killed processes and full disks: each scenario of cache_processes.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cache_processes.py")
ROOT = SCRIPT.parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(scenario: str, directory: Path, *before: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, str(SCRIPT), scenario, str(directory)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("scenario", ["crowd", "killed", "killed_with_lock", "starved", "busy"])
def test_scenario(scenario: str, tmp_path: Path) -> None:
    done = run(scenario, tmp_path / "cache")
    assert done.returncode == 0, done.stderr


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 64 KB, in a mount namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k spgen {small} || exit 77; exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = run("full", small / "disk", *mount)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
