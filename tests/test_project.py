"""The layout that everything relies on: the four links, and import contracts that really look through them."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("ir", "passes", "templates", "autotune")


@pytest.mark.parametrize("name", LINKS)
def test_the_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "spgen" / name
    assert str(link.readlink()) == f"../{name}"
    module = importlib.import_module(f"spgen.{name}")
    assert Path(str(module.__file__)).resolve() == ROOT / name / "__init__.py"


def test_every_folder_says_what_it_is_for() -> None:
    for name in LINKS:
        assert (importlib.import_module(f"spgen.{name}").__doc__ or "").strip()


def contracts(root: Path) -> str:
    """What lint-imports says of a copy of the project."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True).stdout


def test_a_forbidden_import_breaks_its_contract(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("spgen", *LINKS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in LINKS:
        (tmp_path / "spgen" / name).symlink_to(f"../{name}")
    for name in ("errors", "settings", "target", "targets", "cache", "compile"):
        (tmp_path / "spgen" / f"{name}.py").touch()
    (tmp_path / "ir" / "expr.py").write_text("import sympy\nfrom spgen import errors\n")
    (tmp_path / "autotune" / "measure.py").write_text("import torch\n")
    assert "5 kept, 0 broken" in contracts(tmp_path)

    (tmp_path / "spgen" / "cache.py").write_text("import spgen.compile\n")
    (tmp_path / "ir" / "tiles.py").write_text("def late():\n    import torch\n")
    (tmp_path / "passes" / "merge.py").write_text("from spgen.templates import render\n")
    (tmp_path / "templates" / "render.py").write_text("import spgen.passes\n")
    (tmp_path / "autotune" / "search.py").write_text("from spgen import compile\n")
    assert "0 kept, 5 broken" in contracts(tmp_path)
