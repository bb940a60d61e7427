"""Settings: what each variable means, bad values, and overriding."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from spgen import settings as module
from spgen.errors import SpgenError
from spgen.settings import Settings, c_compiler, cache_home, logger, override, settings, triton_interpreted

NAMES = ("SPGEN_CACHE_DIR", "SPGEN_BACKEND", "SPGEN_NO_COMPILE", "SPGEN_FLOAT32", "SPGEN_RECORDS", "SPGEN_LOG")


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_current", None)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    assert settings() == Settings(cache_dir=None, backend="auto", no_compile=False, log="warning")


def test_every_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("~/kernels", "Triton", "yes", "IEEE", "off", "debug"), strict=True):
        monkeypatch.setenv(name, value)
    assert settings() == Settings(Path("~/kernels").expanduser(), "triton", True, "ieee", False, "debug")


def test_records_have_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPGEN_RECORDS", "~/tuned")
    assert settings().records == Path("~/tuned").expanduser()


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = settings()
    monkeypatch.setenv("SPGEN_BACKEND", "tvm")
    assert settings() is first


@pytest.mark.parametrize(
    ("name", "value"),
    [("SPGEN_BACKEND", "cuda"), ("SPGEN_NO_COMPILE", "2"), ("SPGEN_FLOAT32", "x"), ("SPGEN_LOG", "x")],
)
def test_a_bad_value_names_its_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpgenError, match=f"(?s){name}: got '{value}'.*allowed.*remedy"):
        settings()


def test_override_ends_with_its_block_whatever_happens() -> None:
    before = settings()
    with pytest.raises(KeyError), override(backend="tvm", no_compile=True) as inside:  # noqa: PT012
        assert settings() is inside
        assert (inside.backend, inside.no_compile) == ("tvm", True)
        raise KeyError
    assert settings() is before


def test_triton_interpreter_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_interpreted()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_interpreted()


def test_cache_home_must_be_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/kernels")
    assert cache_home() == Path("/var/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_home() == Path("~/.cache").expanduser()


def test_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_compiler() == str(compiler)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert c_compiler() is None


@pytest.fixture
def _unconfigured() -> Iterator[None]:
    log = logging.getLogger("spgen")
    level, handlers = log.level, log.handlers[:]
    logger.cache_clear()
    yield
    logger.cache_clear()
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.mark.usefixtures("_unconfigured")
@pytest.mark.parametrize(("level", "shown"), [("debug", "di"), ("info", "i"), ("warning", ""), ("off", "")])
def test_the_logger_has_the_level_asked_for(level: str, shown: str, caplog: pytest.LogCaptureFixture) -> None:
    with override(log=level):
        log = logger()
    log.debug("d")
    log.info("i")
    assert "".join(caplog.messages) == shown
    assert log.isEnabledFor(logging.ERROR) == (level != "off")
