"""The README's Python is run, in order, as one program; its commands and tables are compared with the code."""

import re
from pathlib import Path

import pytest

import spgen as sp
from spgen import settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), namespace)


def test_every_constructor_is_listed() -> None:
    table = README[README.index("| constructor |") : README.index("They combine with")]
    listed = set(re.findall(r"`(\w+)\(", table)) - {"f"}
    assert listed == set(sp._HOMES["spgen.patterns"].split()) - {"Pattern", "pattern"}


def test_every_variable_is_listed() -> None:
    documented = set(re.findall(r"^\| `(SPGEN_\w+)`", README, flags=re.MULTILINE))
    assert documented == set(re.findall(r"^\| `(SPGEN_\w+)`", settings.__doc__ or "", flags=re.MULTILINE))
    source = Path(settings.__file__).read_text(encoding="utf-8")
    assert documented == set(re.findall(r"SPGEN_\w+", source))


def test_the_first_commands_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    first = re.search(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert first
    for target in re.findall(r"^make (\w+)", first[1], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
