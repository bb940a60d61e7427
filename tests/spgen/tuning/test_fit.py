"""The command that fits the cost model: what it prints, draws and writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spgen import targets
from spgen.autotune.coefficients import coefficients_of, guesses
from spgen.autotune.fit import evaluate
from spgen.autotune.model import Work, estimated, terms_of
from spgen.autotune.records import Bucket, Device, Key, Record, Records, Trial
from spgen.errors import RecordError, UnsupportedError
from spgen.ir.config import Config
from spgen.target import Target
from spgen.tuning.fit import break_evens, fitted, main, plot_of, write

H200 = Target.of("h200")


def records(path: Path, *, trials: bool = True, kind: str = "cuda") -> Path:
    """Two calls on a machine whose softmax takes twice as long as is guessed."""
    found = Records(Device(kind, "NVIDIA H200", "sm_90"))
    machine = {**guesses(H200), "score": 2 * guesses(H200)["score"]}
    for number, programs in enumerate((512, 4096)):
        facts = {
            "dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "flops": 1e12, "bytes": 1e7,
            "tiles": {f"{m}x64": [programs * 128 // m, programs * 20, programs, 0, 21] for m in (64, 128)},
        }  # fmt: skip
        options = [("warps=4", "stages=1"), ("warps=4", "stages=2"), ("warps=8", "stages=2")]
        measured = {}
        for config in [Config(m, 64, one) for m in (64, 128) for one in options]:
            work = Work.of(facts, config)
            seconds = terms_of(work, config, H200, machine, estimated(work, config, H200))["total"]
            measured[config] = Trial(seconds)
        default = next(iter(measured))
        key, bucket = Key("before", "bfloat16", 128, 128), Bucket(1 << number, 1, 1)
        found.add(
            Record(key, bucket, f"case {number}", default, default, "", trials=measured if trials else {}, facts=facts)
        )
    found.save(path)
    return path


def test_the_command_writes_coefficients_that_are_then_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = tmp_path / "mine.json"
    description.write_text(json.dumps({**targets.shipped("h200"), "name": "Mine"}, indent=1))
    main([str(records(tmp_path / "found.json")), "--target", "h200", "--write", str(description)])
    assert "fitted, each call by the others" in capsys.readouterr().out
    targets.load.cache_clear()
    found = coefficients_of(Target.of(description))
    assert found.source == "fitted on Mine"
    assert found.values["score"] > guesses(H200)["score"]
    first = description.read_text()
    chosen, _, _ = fitted([tmp_path / "found.json"], H200)
    write(description, chosen)  # the model is replaced, not written a second time
    assert description.read_text() == first


def test_break_evens_say_what_must_be_left_out() -> None:
    """Of Hopper's own form nothing; of a dense kernel that nothing reaches, no share is enough."""
    assert break_evens(replace(H200, dense=(("bfloat16 128", 594e12),))) == (
        "as fast as dense attention, bfloat16, 128 channels: predicted from none left out on, "
        "measured from none left out on"
    )
    some = break_evens(replace(H200, dense=(("bfloat16 128", 900e12),), break_even=(("bfloat16 128", 0.88),)))
    assert re.search(r"predicted from (2|3)\d% left out on, measured from 12% left out on", some), some
    never = break_evens(replace(H200, dense=(("float32 96", 1e18),)))
    assert "predicted never, not measured" in never


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Records.load(records(tmp_path / "found.json"))
    plot_of(evaluate(found, H200, {}), tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    for name in ("model.foo", "none/model.png"):
        with pytest.raises(UnsupportedError, match=f"plot: got .*{name}"):
            plot_of(evaluate(found, H200, {}), tmp_path / name)


def test_records_without_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no record has three measured trials"):
        fitted([records(tmp_path / "empty.json", trials=False)], H200)


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"(?s)records of a cpu device.*allowed: those of a cuda"):
        fitted([records(tmp_path / "cpu.json", kind="cpu")], H200)
