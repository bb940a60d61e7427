"""Passes tested on text: every case of tests/passes/text/*.txt is run as `spgen opt` does and matched by FileCheck.

A case is a pipeline, a pattern (or a level's text), and CHECK lines about what comes out:

    // RUN: desugar
    window(1024)
    // CHECK: "pattern.before"() {bound = "i - 1023"}

Cases are separated by `// -----`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

from spgen import opt
from spgen.ir.node import Op

TEXTS = Path(__file__).parent / "text"


@dataclass(frozen=True)
class Case:
    file: str
    number: int
    text: str

    def run(self) -> Op:
        lines = [line.removeprefix("// RUN:") for line in self.text.splitlines() if line.startswith("// RUN:")]
        assert len(lines) == 1, f"{self}: expected one // RUN: line"
        return opt.run(self.text, lines[0].strip())

    def __str__(self) -> str:
        return f"{self.file}-{self.number}"


def cases() -> Iterator[Case]:
    for path in sorted(TEXTS.glob("*.txt")):
        for number, text in enumerate(path.read_text().split("// -----")):
            yield Case(path.stem, number, text)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_text(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    op = case.run()
    options = Options(match_filename=str(case))
    checks = Parser(options, io.StringIO(case.text), *pattern_for_opts(options))
    code = Matcher(options, FInput(str(case), str(op)), checks).run()
    assert code == 0, f"{capsys.readouterr().err}\n{op}"


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_every_result_reads_back(case: Case) -> None:
    op = case.run()
    assert opt.read(str(op)) is op
