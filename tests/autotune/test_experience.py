"""Experience: trials of similar calls correct the order that the model predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from spgen.autotune.experience import Experience
from spgen.autotune.fit import evaluate
from spgen.autotune.model import Work, predict
from spgen.autotune.records import Bucket, Key, Record, Trial
from spgen.ir.config import Config
from spgen.target import Target

H200 = Target.of("h200")
KEY = Key("before", "bfloat16", 128, 128)
CONFIGS = [Config(m, 64, (f"warps={w}", f"stages={s}")) for m in (64, 128) for w in (4, 8) for s in (1, 2, 3)]
ODD = CONFIGS[4]  # a machine runs it four times as fast as the model thinks


def record(number: int, key: Key = KEY) -> Record:
    facts = {
        "dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "flops": 1e12, "bytes": 1e7,
        "tiles": {f"{m}x64": [number * 512 * 128 // m, number * 10240, number * 512, 0, 21] for m in (64, 128)},
    }  # fmt: skip
    trials = {}
    for config in CONFIGS:
        seconds = predict(Work.of(facts, config), config, H200).seconds
        trials[config] = Trial(seconds / 4 if config == ODD else seconds)
    default = CONFIGS[0]
    return Record(
        key, Bucket(1 << number, 1, 1), f"case {number}", default, default, "", "quick", "", 1.0, trials, facts
    )


def test_similar_calls_correct_the_model() -> None:
    known = Experience([record(1), record(2)], H200)
    asked = replace(record(3), trials={})
    assert known.correction(asked, ODD) < -0.3
    assert 0 < known.correction(asked, CONFIGS[0]) < 0.2  # beside the mean, which the fast one takes down
    near = ODD.having(tma=0)
    assert known.correction(asked, ODD) < known.correction(asked, near) < -0.1
    more = Experience([record(number) for number in (1, 2, 4, 5, 6)], H200)
    assert more.correction(asked, ODD) < known.correction(asked, ODD)


def test_a_call_counts_less_the_further_its_sizes_are() -> None:
    own = record(1)
    found = [Experience([record(number)], H200).correction(own, ODD) for number in (2, 4, 8, 12)]
    assert found == sorted(found)
    assert found[0] < -0.2
    assert found[0] / 4 < found[-1] < 0


def test_slow_trials_hardly_count() -> None:
    """What the model errs by where nobody would go says little about the fast ones."""
    own, other = record(1), record(2)
    slow = CONFIGS[0]
    seconds = max(trial.seconds for trial in other.trials.values())
    odd = replace(other, trials={**other.trials, slow: Trial(50 * seconds)})
    before, after = (Experience([one], H200).correction(own, ODD) for one in (other, odd))
    assert after == pytest.approx(before, rel=0.15)
    assert Experience([odd], H200).correction(own, slow) < 0.05


def test_a_call_does_not_correct_itself_and_strangers_hardly_do() -> None:
    own = record(1)
    assert Experience([own], H200).correction(own, ODD) == 0
    other = record(2, replace(KEY, dtype="float32", head_dim=64))
    assert Experience([other], H200).correction(own, ODD) == 0
    cousin = record(2, replace(KEY, structure="before&listed(64x64)"))
    brother = Experience([record(2)], H200).correction(own, ODD)
    assert brother < Experience([cousin], H200).correction(own, ODD) < brother / 4
    assert Experience([], H200).correction(own, ODD) == 0
    assert Experience([replace(record(2), trials={}), replace(record(2), facts={})], H200).correction(own, ODD) == 0


def test_the_order_improves() -> None:
    records = [record(number) for number in (1, 2, 3, 4)]
    values = {name: value for name, value in H200.model if name != "spread"}
    alone = evaluate(records, H200, values)
    corrected = evaluate(records, H200, values, experience=Experience(records, H200))
    assert corrected.regret(1) == pytest.approx(1)
    assert alone.regret(1) > 1 or math.isclose(alone.regret(1), 1)
    assert corrected.regret(1) <= alone.regret(1)
