"""The command line: arguments reach the compiler, errors are shown without a traceback."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from spgen import cli
from spgen.cache import Cache, key
from spgen.cli import cache as cache_commands
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
    for command in ("explain", "compile", "opt", "bench", "cache", "doctor"):
        assert command in shown
