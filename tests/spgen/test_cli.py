"""The command line: arguments reach the compiler, errors are shown without a traceback."""

import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from spgen import cli
from spgen.cache import Cache, key
from spgen.cli import cache as cache_commands
from spgen.cli import patterns
from spgen.doctor import Finding
from spgen.errors import PatternError
from spgen.settings import override


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["spgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the compiler, and keeps what it was asked."""
    seen: list[dict[str, Any]] = []

    def explain_text(pattern_text: str, **options: Any) -> str:
        if pattern_text == "windw(64)":
            raise PatternError("[pattern]", given="windw", remedy="did you mean window?")
        seen.append({"pattern_text": pattern_text, **options})
        return "explained"

    def compile_text(pattern_text: str, **options: Any) -> Path:
        seen.append({"pattern_text": pattern_text, **options})
        return Path("/kernels/1")

    monkeypatch.setitem(sys.modules, "spgen.explain", types.SimpleNamespace(explain_text=explain_text))
    monkeypatch.setitem(sys.modules, "spgen.precompile", types.SimpleNamespace(compile_text=compile_text))
    return seen


def test_explain_passes_every_option_on(calls, monkeypatch, capsys) -> None:
    arguments = "explain causal() --q 2x8x100x32 --kv-heads 4 --kv-length 300 --v-dim 16 --dtype bfloat16"
    assert run(*arguments.split(), "--target", "sm_90", "--ir", "--source", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "explained\n"
    assert calls == [
        {
            "pattern_text": "causal()",
            "q_shape": (2, 8, 100, 32),
            "kv_heads": 4,
            "kv_len": 300,
            "v_dim": 16,
            "dtype": "bfloat16",
            "target": "sm_90",
            "ir": True,
            "source": True,
            "data": (),
        }
    ]


def test_what_is_left_out_follows_from_q(calls, monkeypatch) -> None:
    assert run("explain", "causal()", "--q", "1x12x77x64", monkeypatch=monkeypatch) == 0
    assert (calls[0]["kv_heads"], calls[0]["kv_len"], calls[0]["v_dim"]) == (12, 77, 64)


def test_compile_prints_where_the_kernel_is(calls, monkeypatch, capsys) -> None:
    assert run("compile", "causal()", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "/kernels/1\n"
    assert calls[0]["target"] == "cpu"


def test_an_error_is_shown_whole_without_a_traceback(calls, monkeypatch, capsys) -> None:
    assert run("explain", "windw(64)", monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "[pattern]: got windw\n  remedy: did you mean window?\n"


@pytest.mark.parametrize("shape", ["8x4096x64", "1x8x-1x64", "1x0x16x64", "x", "1x8x4096x64x"])
def test_a_bad_shape_is_named(shape: str, calls, monkeypatch, capsys) -> None:
    assert run("explain", "causal()", f"--q={shape}", monkeypatch=monkeypatch) == 2
    assert "--q: got" in capsys.readouterr().err


def test_data_fill_the_slots(calls, tmp_path: Path, monkeypatch) -> None:
    pattern, file = "causal() & columns($0: int64[K]) | diagonals($1: int32[K])", tmp_path / "offsets.pt"
    torch.save(torch.tensor([1, 2], dtype=torch.int32), file)
    arguments = ("explain", pattern, "--q", "1x2x50x16", "--random", "0.1/3", "--data", f"1={file}")
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    columns, offsets = calls[0]["data"]
    assert (columns.dtype, columns.shape, offsets.tolist()) == (torch.int64, (5,), [1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "much"], "--random: got 'much'"),
        (["--random", "2"], "density: got 2.0"),
        (["--data", "mask.pt"], "--data: got 'mask.pt'"),
        (["--data", "0=mask.pt"], "mask.pt: got No such file"),
        (["--random", "0.5", "--data", "3=ones.pt"], "--data: got a file for $3"),
        (["--data", "1=ones.pt"], "--data: got nothing for $0"),
        ([], "pattern: data: got 0 tensors"),
    ],
)
def test_data_that_do_not_fit(arguments, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(2, 2, dtype=torch.bool), "ones.pt")
    pattern = "block(8, mask=$0: bool[R, C]) & block(8, mask=$1: bool[R, C])"
    assert run("show", pattern, "--q", "1x1x16x16", *arguments, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith(message)


def test_show_draws(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    pattern = "causal() & block(16, mask=$0: bool[2, R, C])"
    arguments = ["show", pattern, "--random", "1", "--q", "1x2x64x32", "--heads", "--tile-size", "16x16"]
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "64 rows x 64 keys: 50.8% of the pairs, in tiles of 16 x 16" in out
    assert "head 0" in out
    assert "A/a s0 gather: 12 whole, 8 masked tiles" in out or "A/a s0 list: 12 whole, 8 masked tiles" in out
    assert all(len(line) <= 60 for line in out.splitlines())
    assert run(*arguments, "-o", str(tmp_path / "a.svg"), monkeypatch=monkeypatch) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert run("show", "causal()", "--tiles", "--target", "sm_90", monkeypatch=monkeypatch) == 0
    assert run("show", "causal()", "--tile-size", "0x8", monkeypatch=monkeypatch) == 2
    assert "--tile-size: got '0x8'" in capsys.readouterr().err
    assert run("show", "causal()", "--head", "8", monkeypatch=monkeypatch) == 2
    assert "head: got 8" in capsys.readouterr().err


def test_commands_of_a_pattern_share_the_options_of_the_call() -> None:
    names = [
        set(inspect.signature(one).parameters) for one in (patterns.explain, patterns.compile_pattern, patterns.show)
    ]
    call = {"pattern", "q", "kv_heads", "kv_length", "v_dim", "dtype", "target"}
    assert all(call <= own for own in names)
    assert all({"random", "data"} <= own for own in (names[0], names[2]))


def test_cache_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    with override(cache_dir=tmp_path / "cache"):
        Cache().get_or_build(key(n=1), lambda d: None, meta={"target": "cpu"})
        assert run("cache", "list", monkeypatch=monkeypatch) == 0
        assert run("cache", "size", monkeypatch=monkeypatch) == 0
        assert run("cache", "clear", monkeypatch=monkeypatch) == 0
        assert run("cache", "list", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(key(n=1)[:12])
    assert lines[0].endswith("target=cpu")
    assert lines[1].startswith("1 kernel in ")
    assert lines[3].startswith("removed 1 kernel from ")
    assert lines[4].startswith("0 kernels in ")


def test_kernels_travel_and_go(tmp_path: Path, monkeypatch, capsys) -> None:
    archive = str(tmp_path / "kernels.tar")
    with override(cache_dir=tmp_path / "cache"):
        for n in range(3):
            Cache().get_or_build(key(n=n), lambda d: (d / "kernel.so").write_bytes(bytes(1000)), meta={"n": n})
        assert run("cache", "export", archive, "--key", key(n=1)[:9], "--key", key(n=2), monkeypatch=monkeypatch) == 0
    with override(cache_dir=tmp_path / "other"):
        assert run("cache", "import", archive, monkeypatch=monkeypatch) == 0
        assert run("cache", "import", archive, monkeypatch=monkeypatch) == 0
        assert run("cache", "prune", "--older-than", "30d", monkeypatch=monkeypatch) == 0
        assert run("cache", "prune", "--max-size", "1.5KB", "--dry-run", monkeypatch=monkeypatch) == 0
        assert run("cache", "prune", "--max-size", "0B", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote 2 kernels to {archive}"
    assert lines[1] == f"added 2 kernels to {tmp_path / 'other'}; 0 there already"
    assert lines[2] == f"added 0 kernels to {tmp_path / 'other'}; 2 there already"
    assert lines[3].startswith("removed 0 kernels")
    assert lines[5] == f"1 kernel in {tmp_path / 'other'}, 1.0 KB"
    assert lines[6].startswith("removed 2 kernels")


@pytest.mark.parametrize("arguments", [("--max-size", "2XB"), ("--older-than", "soon"), ("--older-than", "30")])
def test_a_bad_amount_is_named(arguments, monkeypatch, capsys) -> None:
    assert run("cache", "prune", *arguments, monkeypatch=monkeypatch) == 2
    assert f"{arguments[0]}: got {arguments[1]!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (1500, "1.5 KB"), (2_000_000, "2.0 MB"), (3e9, "3.0 GB")])
def test_sizes_are_readable(size: float, text: str) -> None:
    assert cache_commands._bytes(int(size)) == text


def test_doctor_gives_a_verdict(monkeypatch, capsys) -> None:
    code = run("doctor", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "tvm (CPU): " in out
    assert "triton (GPU): " in out
    assert (code == 0) == (": ready" in out)


def test_doctor_speaks_json_and_fails_with_a_kernel(monkeypatch, capsys) -> None:
    broken = [Finding("tvm (CPU) kernel", False, "wrong by 1e+00", "report it"), Finding("torch", True, "2.13")]
    for found, wanted in ((broken, 1), (broken[1:], 0)):
        monkeypatch.setattr("spgen.doctor.findings", lambda run, found=found: found)
        assert run("doctor", "--json", "--run", monkeypatch=monkeypatch) == wanted
        assert [one["name"] for one in json.loads(capsys.readouterr().out)["findings"]] == [one.name for one in found]


def test_help_needs_no_torch() -> None:
    code = "import sys; from spgen import cli; assert not {'torch', 'tvm', 'triton', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run([sys.executable, "-m", "spgen", "--help"], check=True, capture_output=True, text=True).stdout
    for command in ("explain", "compile", "show", "opt", "bench", "cache", "doctor"):
        assert command in shown
