"""Passes tested on text: every case of tests/passes/text/*.txt is run and matched by FileCheck.

A case is a pattern, the passes to run, and CHECK lines about what they print:

    // PATTERN: window(1024)
    // RUN: desugar
    // CHECK: "pattern.before"() {bound = "i - 1023"}

Cases are separated by `// -----`. Options follow the passes as name=value: heads=8x2 (query x key heads), rows (of a
row tile), block_m, block_n, pack.
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

from spgen.compile import LEVEL_1
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.ir.pattern import PATTERN, read_short, slots
from spgen.ir.tiles import TILES
from spgen.passes.hoist import hoist
from spgen.passes.schedule import Call, schedule
from spgen.passes.tile import Shape, tile

TEXTS = Path(__file__).parent / "text"
_LEVELS = {"pattern": PATTERN, "tiles": TILES, "kernel": KERNEL}


@dataclass(frozen=True)
class Case:
    file: str
    number: int
    text: str

    def directive(self, name: str) -> str:
        lines = [line.split(f"// {name}:")[1].strip() for line in self.text.splitlines() if f"// {name}:" in line]
        assert len(lines) == 1, f"{self}: expected one // {name}: line"
        return lines[0]

    def __str__(self) -> str:
        return f"{self.file}-{self.number}"


def cases() -> Iterator[Case]:
    for path in sorted(TEXTS.glob("*.txt")):
        for number, text in enumerate(path.read_text().split("// -----")):
            yield Case(path.stem, number, text)


def run(case: Case) -> Op:
    """The operation that the case's passes make of its pattern."""
    node = read_short(case.directive("PATTERN"))
    words = case.directive("RUN").split()
    options = dict(word.split("=") for word in words if "=" in word)
    q_heads, kv_heads = map(int, options.get("heads", "8x2").split("x"))
    block_m, block_n = int(options.get("block_m", 64)), int(options.get("block_n", 64))
    pack = int(options.get("pack", 1))
    shape = Shape(q_heads, kv_heads, block_m // pack, block_m, block_n)
    passes = {one.__name__: one for one in LEVEL_1}
    op = node
    for name in (word for word in words if "=" not in word):
        if name == "level_1":
            for one in LEVEL_1:
                op = one(op)
        elif name in passes:
            op = passes[name](op)
        elif name == "tile":
            op = tile(op, slots(node), shape)
        elif name == "schedule":
            op = schedule(op, Call("float32", 64, 64), pack, ())
        else:
            assert name == "hoist", f"unknown pass {name}"
            op = hoist(op)
    return op


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_text(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    op = run(case)
    options = Options(match_filename=str(case))
    checks = Parser(options, io.StringIO(case.text), *pattern_for_opts(options))
    code = Matcher(options, FInput(str(case), str(op)), checks).run()
    assert code == 0, f"{capsys.readouterr().err}\n{op}"


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_every_result_reads_back(case: Case) -> None:
    op = run(case)
    level = _LEVELS[op.name.partition(".")[0]]
    level.verify(op)
    assert level.read(str(op)) is op
