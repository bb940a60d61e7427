"""spgen opt: what it reads, what pipelines mean, and errors that point at the place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spgen import opt
from spgen.cli import ir
from spgen.compile import LEVEL_1, PIPELINE, Request, lower
from spgen.errors import TextError, UnsupportedError, VerifyError
from spgen.ir.config import Config
from spgen.ir.pattern import read_short
from spgen.passes.schedule import Call
from spgen.target import Target
from tests.spgen.test_cli import run

PATTERNS = [
    "causal() & (sink(64) | window(1024))",
    "causal() & block(128, mask=$0: bool[8, R, C]) | columns($1: int32[2, K])",
    "documents($0: int64[N]) & ~stripe(8, width=2)",
    "permuted(causal(), q=$0: int64[N], k=$1: int64[N])",
    "where(i % 3 == j % 3)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pack", [1, 4])
def test_all_passes_are_the_compiler(pattern: str, pack: int) -> None:
    call = Call("bfloat16", 96, 80, q_offset="tensor", kv_lengths=True, lse=True)
    request = Request(pattern, call, 8, 2, pack > 1, Target("cpu", "test", "generic"))
    wanted = lower(request, Config(64, 32, ("stages=3",)))
    level_1 = ",".join(one.__name__ for one in LEVEL_1)
    tile = f"tile{{q_heads=8,kv_heads=2,block_m=64,block_n=32,pack={pack}}}"
    schedule = (
        "schedule{dtype=bfloat16,head_dim=96,value_dim=80,q_offset=tensor,kv_lengths=true,lse=true,"
        'options=["stages=3"]}'
    )
    assert opt.run(pattern, level_1) is opt.run(pattern, "level_1") is wanted.terms
    assert opt.run(pattern, f"{level_1},{tile}") is wanted.program
    assert opt.run(pattern, f"level_1,{tile},{schedule},hoist") is wanted.kernel


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pipeline_may_be_cut_anywhere(pattern: str) -> None:
    """Printing and reading between two passes changes nothing."""
    names = list(opt.passes())
    assert names == [one.__name__ for functions in PIPELINE.values() for one in functions]
    tensors = pattern.partition("documents(")[2].partition(")")[0]  # half-lines do not describe them
    steps = [f"tile{{slots=[{tensors}]}}" if name == "tile" else name for name in names]
    text = pattern
    for step in steps:
        text = str(opt.run(text, step))
    assert opt.read(text) is opt.run(pattern, ",".join(steps))


def test_comments_and_lines_are_free() -> None:
    text = "// a pattern\n  // and more\ncausal() &\n  where(i // 64 == j // 64)\n// CHECK: nothing\n"
    assert opt.read(text) is read_short("causal() & where(i // 64 == j // 64)")
    level = f"// a level\n\n{opt.read(text)}// end\n"
    assert opt.read(level) is opt.read(text)


def test_after_sees_every_result() -> None:
    seen: list[tuple[str, str]] = []
    result = opt.run("window(8)", "level_1", lambda name, op: seen.append((name, str(op))))
    assert [name for name, _ in seen] == [one.__name__ for one in LEVEL_1]
    assert seen[-1][1] == str(result)


@pytest.mark.parametrize(
    ("text", "error", "line", "message"),
    [
        ("", TextError, 1, "there is no pattern and no operation"),
        ("// only\n// comments", TextError, 1, "there is no pattern and no operation"),
        ("// a\ncausal() & windw(4)", TextError, 2, "unknown pattern 'windw'"),
        ('// a\n%0 = "mlir.constant"() : () -> !mlir.value', TextError, 2, "the text of no level"),
        ("%0 = 4", TextError, 1, "the text of no level"),
        ('// a\n%0 = "pattern.sink"() {n = -1} : () -> !pattern.value', VerifyError, 2, "n: got -1"),
        ('%0 = "tiles.what"() : () -> !tiles.value', TextError, 1, "unknown operation"),
        ('%0 = "kernel.let"(%1) : (!kernel.value) -> !kernel.value', TextError, 1, "%1 is not defined"),
    ],
)
def test_text_that_cannot_be_read(text: str, error: type[TextError], line: int, message: str) -> None:
    with pytest.raises(error, match=message) as found:
        opt.run(text, "")
    assert found.value.text == text
    assert found.value.line == line


@pytest.mark.parametrize(
    ("pipeline", "at", "message"),
    [
        ("desugar,foo", "foo", "unknown pass 'foo': known are recognize"),
        ("desugar normalize", "normalize", "expected ','"),
        ("desugar,", "", "unknown pass ''"),
        ("desugar{a=1}", "a=1", "unknown option 'a': desugar has none"),
        ("level_1,tile{block=1}", "block=1", "tile has q_heads, kv_heads"),
        ("level_1,tile{64}", "64", "write name=value"),
        ("level_1,tile{block_m=64,block_m=32}", "block_m=32", "given twice"),
        ("level_1,tile{block_m=0}", "0", "an integer of at least 1"),
        ("level_1,tile{block_m=true}", "true", "an integer of at least 1"),
        ("level_1,tile{slots=[4]}", "[4]", "a list such as"),
        ("level_1,tile{q_heads=7,kv_heads=2}", "tile{q_heads=7,kv_heads=2}", "(?s)7 query heads.*kv_heads divides"),
        ("level_1,tile{kv_heads=2,pack=3}", "tile{kv_heads=2,pack=3}", "pack is 1, or q_heads / kv_heads"),
        ("level_1,tile,schedule{lse=1}", "1", "true or false"),
        ("level_1,tile,schedule{dtype=4}", "4", "a word"),
        ("level_1,tile{", "", "expected a value"),
        ("level_1,schedule", "schedule", "(?s)schedule reads level 2, and this is level 1.*tile"),
        ("level_1,tile,own", "own", "(?s)own reads level 1, and this is level 2.*leave it out"),
        ("normalize", "normalize", "(?s)does not take this form of level 1.*run recognize,desugar,push_perm"),
        ("desugar,own", "own", "(?s)does not take this form of level 1.*normalize,merge_runs first"),
        ("tile", "tile", "does not take this form"),
    ],
)
def test_a_pipeline_that_cannot_run(pipeline: str, at: str, message: str) -> None:
    with pytest.raises(TextError, match=message) as found:
        opt.run("causal() & permuted(window(4), k=$0: int32[N])", pipeline)
    assert found.value.text == pipeline
    assert pipeline[found.value.start : found.value.end] == at


def test_documents_that_terms_do_not_describe() -> None:
    terms = str(opt.run("documents($3: int64[N])", "level_1"))
    with pytest.raises(TextError, match=r"(?s)documents of tensor \$3.*slots=\[\$3: int32\[N\]\]"):
        opt.run(terms, "tile")
    wanted = opt.run("documents($3: int64[N])", "level_1,tile")
    assert opt.run(terms, "tile{slots=[$3: int64[N]]}") is wanted


def test_a_selection_is_refused_as_everywhere() -> None:
    with pytest.raises(UnsupportedError, match="a selection"):
        opt.run("top_k(4, scores=pooled())", "desugar")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("// a\nwindow(8)\n")
    file = str(tmp_path / "a.txt")
    assert run("opt", file, "--passes", "level_1,tile", "--print-after-all", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert opt.read(shown.out) is opt.run("window(8)", "level_1,tile")
    assert [line.split()[3] for line in shown.err.splitlines() if line.startswith("// -----")] == [
        *(one.__name__ for one in LEVEL_1), "tile",
    ]  # fmt: skip
    assert run("opt", file, "--verify-only", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == ""
    assert run("opt", "--list-passes", monkeypatch=monkeypatch) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in opt.passes())
    assert "block_m=64" in listed


def test_standard_input_is_read() -> None:
    command = [sys.executable, "-m", "spgen", "opt", "-p", "desugar"]
    done = subprocess.run(command, input="causal()", capture_output=True, text=True, check=True)
    assert opt.read(done.stdout) is opt.run("causal()", "desugar")


@pytest.mark.parametrize(
    ("content", "passes", "message"),
    [
        ("// a\nwindow(-1)", "", "{file}:2:1: window: left: got -1"),
        ("window(1)", "level_1,foo", "--passes:1:9: unknown pass 'foo'"),
        (None, "", "{file}: got no such file"),
        (b"\xff\xfe", "", "{file}: got not a text file"),
    ],
)
def test_errors_say_where(content, passes: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("opt", str(file), "--passes", passes, monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message.format(file=file))
    assert shown.out == ""


def test_the_list_of_passes_says_what_each_does() -> None:
    assert all(one.summary for one in opt.passes().values())
    assert ir._listed().count("\n") > len(opt.passes())
