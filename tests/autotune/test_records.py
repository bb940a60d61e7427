"""Records: what is written is read back, the nearest is found, and files that are no records say so."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.autotune import measure
from spgen.autotune.measure import Sample
from spgen.autotune.records import EFFORTS, SHIPPED, Bucket, Device, Key, Record, Records, Trial, files
from spgen.errors import RecordError, SpgenError
from spgen.ir.config import Config

H200 = Device("cuda", "NVIDIA H200", "sm_90")
KEY = Key("before", "bfloat16", 128, 128)
DEFAULT = Config(128, 64, ("warps=8", "stages=2"))

powers = st.integers(0, 20).map(lambda n: 2**n)
configs = st.builds(
    Config, powers, powers,
    st.dictionaries(st.sampled_from(["warps", "stages", "tma"]), st.integers(0, 9)).map(
        lambda options: tuple(f"{name}={value}" for name, value in options.items())
    ),
)  # fmt: skip
buckets = st.builds(Bucket, powers, powers, powers, st.one_of(st.just(0), powers))
keys = st.builds(
    Key, st.text(), st.sampled_from(["bfloat16", "float32"]), powers, powers, st.booleans(), st.just("attention")
)
trials = st.one_of(
    st.builds(Trial, st.floats(1e-6, 10), st.floats(0, 1)),
    st.builds(lambda text: Trial(fault=text), st.text(min_size=1)),
)
records = st.builds(
    Record, keys, buckets, st.text(), configs, configs, st.text(), st.sampled_from(["", *EFFORTS]), st.text(),
    st.floats(1, 9), st.dictionaries(configs, trials), st.just({"flops": 1.5}), st.just({"name": "x"}),
)  # fmt: skip


def record(bucket: Bucket, **changes: object) -> Record:
    done = Record(KEY, bucket, "one", DEFAULT, DEFAULT, "triton 3.6", effort="standard", when="2026-01-01")
    return replace(done, **changes)


def test_processes_that_save_into_one_file_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits while the first has read the file and not yet written it; neither record is lost."""
    path, real = tmp_path / "mine.json", Records.load
    Records(H200).save(path)
    has_read, may_write = threading.Event(), threading.Event()

    def load(path: Path) -> Records:
        found = real(path)
        if threading.current_thread() is first:
            has_read.set()
            assert may_write.wait(30)
        return found

    monkeypatch.setattr(Records, "load", staticmethod(load))
    first, second = (
        threading.Thread(target=Records(H200).update, args=(path, record(Bucket(rows, 1, 1)))) for rows in (1, 2)
    )
    first.start()
    assert has_read.wait(30)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    may_write.set()
    for thread in (first, second):
        thread.join(30)
    assert {one.bucket.rows for one in real(path)} == {1, 2}


def test_an_update_keeps_its_own_records_and_the_better_ones_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    others = Records(H200)
    for rows in (1, 2):
        others.add(record(Bucket(rows, 1, 1), effort="thorough"))
    others.save(path)
    mine = Records(H200)
    mine.add(record(Bucket(1, 1, 1), effort="quick"))
    mine.update(path, record(Bucket(2, 1, 1), effort=""))
    for found in (mine, Records.load(path)):
        assert {one.bucket.rows: one.effort for one in found} == {1: "thorough", 2: ""}


def test_an_update_of_a_file_that_cannot_be_locked_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="choose another with --records"):
        Records(H200).update(tmp_path / "file" / "mine.json")


@given(configs)
def test_a_configuration_reads_back(config: Config) -> None:
    assert Config.read(str(config)) == config


@pytest.mark.parametrize("text", ["", "128", "128x", "128x64 warps", "128x64  warps=8", "128x64 warps=8 "])
def test_other_text_is_no_configuration(text: str) -> None:
    with pytest.raises(SpgenError, match="config: got"):
        Config.read(text)


def test_options_are_set_and_left_out() -> None:
    assert DEFAULT.having(stages=None, tma=0, block_n=32) == Config(128, 32, ("warps=8", "tma=0"))
    assert (DEFAULT.option("stages"), DEFAULT.option("tma", 1)) == (2, 1)


@given(st.lists(records, max_size=4))
def test_a_file_reads_back(tmp_path_factory: pytest.TempPathFactory, some: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "one.json"
    written = Records(H200)
    for one in some:
        written.add(one)
    written.save(path)
    read = Records.load(path)
    assert read.device == H200
    assert read.found.keys() == written.found.keys()
    for own, other in ((written.found[k], read.found[k]) for k in written.found):
        assert own.trials.keys() == other.trials.keys()
        assert replace(own, gain=1, trials={}) == replace(other, gain=1, trials={})
        for config, trial in own.trials.items():
            assert (other.trials[config].fault, other.trials[config].resources) == (trial.fault, trial.resources)
            assert trial.fault or math.isclose(other.trials[config].seconds, trial.seconds, rel_tol=1e-4)
    read.save(path)
    assert Records.load(path).found == read.found  # nothing is rounded twice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "device": {}, "records": []}', "TypeError"),
        ('{"schema": 1, "device": {"kind": "cpu", "name": "a", "arch": "b"}, "records": [{}]}', "KeyError"),
    ],
)
def test_a_file_that_holds_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=f"(?s)bad.json: got .*{message}.*allowed"):
        Records.load(path)
    with pytest.raises(RecordError, match=r"none\.json: got No such file"):
        Records.load(tmp_path / "none.json")


def test_a_record_of_an_unknown_effort_is_named(tmp_path: Path) -> None:
    found = Records(H200)
    found.add(record(Bucket(1, 1, 1), effort="heroic"))
    found.save(tmp_path / "bad.json")
    with pytest.raises(RecordError, match="effort 'heroic'"):
        Records.load(tmp_path / "bad.json")


def test_whose_records_they_are_is_in_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    written = Records(H200)
    written.add(record(Bucket(1, 1, 1)))
    written.save(path)
    assert Records.device_in(path) == H200
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # as an editor might leave it
    assert Records.device_in(path) == H200
    path.write_text("{")
    with pytest.raises(RecordError, match="a file that `spgen autotune` wrote"):
        Records.device_in(path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"(?s)file/one\.json: got .*remedy: choose another with --records"):
        Records(H200).save(tmp_path / "file" / "one.json")
    if os.getuid():  # root writes anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(RecordError, match="Permission denied"):
            Records(H200).save(tmp_path / "closed" / "one.json")


@given(buckets, buckets, buckets)
def test_distance_is_a_distance(a: Bucket, b: Bucket, c: Bucket) -> None:
    assert a.distance(a) == 0
    assert a.distance(b) == b.distance(a) >= 0
    if a.width and b.width and c.width:
        assert a.distance(c) <= a.distance(b) + b.distance(c) + 1e-9


def test_the_nearest_finished_record_of_the_kind_and_compiler_wins() -> None:
    near, far = record(Bucket(4096, 4096, 32, 1024)), record(Bucket(16384, 16384, 32, 1024))
    other_kind = replace(near, key=replace(KEY, head_dim=64), bucket=Bucket(8192, 8192, 32, 1024))
    found = Records(H200)
    for one in (near, far, other_kind):
        found.add(one)
    asked = Bucket(4096, 8192, 32, 1024)
    assert found.nearest(KEY, asked, "triton 3.6") == (near, 0)
    assert found.nearest(KEY, Bucket(16384, 16384, 64, 1024), "triton 3.6") == (far, 0)
    assert found.nearest(KEY, Bucket(1, 131072, 256, 16), "triton 3.6") == (None, 0)  # too far
    found.add(replace(near, toolchain="triton 3.5"))
    assert found.nearest(KEY, asked, "triton 3.6") == (far, 1)
    found.add(replace(far, effort=""))
    assert found.nearest(KEY, asked, "triton 3.6") == (None, 1)


def test_merging_keeps_the_better_record() -> None:
    quick = record(Bucket(1, 1, 1), effort="quick")
    later = replace(quick, when="2026-02-01", gain=1.2)
    thorough = replace(quick, effort="thorough", gain=1.3)
    unfinished = replace(quick, effort="")
    elsewhere = replace(quick, bucket=Bucket(2, 2, 2))
    own = Records(H200)
    own.add(quick)
    assert own.merge([unfinished, elsewhere]) == 1
    assert own.merge([later]) == 1
    assert own.merge([thorough, later]) == 1
    assert own.merge([quick, later, thorough, elsewhere]) == 0
    assert own.found[quick.identity] == thorough
    assert len(own) == 2


def test_noise_is_half_the_distance_of_the_quartiles_or_of_few_readings() -> None:
    assert Sample.of([1.0, 2.0, 3.0]) == Sample(2.0, 0.5, 3)
    assert Sample.of([2.0]) == Sample(2.0, 0.0, 1)
    assert Sample.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Sample(3.0, 1 / 3, 5)


def test_the_fastest_of_readings_that_others_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sample.fastest([2.0]) == Sample(2.0, 0.0, 1)
    assert Sample.fastest([3.0, 2.0, 2.5, 8.0, 9.0]) == Sample(2.0, 0.25, 5)
    readings = iter([0.012, 0.003, 0.004, 0.005, 1.0])
    monkeypatch.setattr(measure, "wall", lambda call: next(readings))
    assert measure.on_cpu(20)(lambda: None) == 0.003
    assert next(readings) == 1.0  # four of them fill 20 ms
    turns = iter([3.0, 1.0, 2.0])
    found = measure.samples(
        {"one": lambda: next(turns)}, rounds=3, timer=lambda call: call(), warm_up=0, summary=Sample.fastest
    )
    assert found == {"one": Sample(1.0, 0.5, 3)}


def test_file_names_say_whose_they_are() -> None:
    assert H200.slug == "nvidia-h200-sm-90"
    assert Device("cpu", "avx512", "x86-64-v4").slug == "avx512-x86-64-v4"


def test_shipped_files_are_records() -> None:
    for path in files([SHIPPED]):
        found = Records.load(path)
        assert json.loads(path.read_text())["device"]["name"]
        assert all(one.effort for one in found), f"{path.name} holds unfinished records"
        assert all(one.config in one.trials for one in found)
