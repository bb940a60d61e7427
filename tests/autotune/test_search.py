"""The search finds what is fast, keeps what it measured, and never makes a call slower."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.autotune.measure import Sample
from spgen.autotune.model_cpu import tile_rows
from spgen.autotune.records import Bucket, Key, Record, Trial
from spgen.autotune.search import EFFORTS, tune
from spgen.autotune.space import UNSET, Kernel, Space, space_of
from spgen.autotune.work import Resources, Work, fits
from spgen.ir.config import Config
from spgen.target import Target
from spgen.templates.tvm.schedule import default_tiles

DEFAULT = Config(64, 64, ("warps=4", "stages=2"))
SPACE = Space(
    DEFAULT, {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)},
    lambda config: config.block_m * config.block_n <= 128 * 64, DEFAULT,
)  # fmt: skip


@dataclass
class Fake:
    """A call whose times are known; `likes` is what the model thinks."""

    times: Mapping[Config, float]
    likes: Mapping[Config, float]
    record: Record
    noise: float = 0.0
    faults: Mapping[Config, str] = field(default_factory=dict)
    measured: list[Config] = field(default_factory=list)
    stop_after: int = 10**9
    waits: bool = False

    def configs(self) -> list[Config]:
        return sorted(SPACE, key=lambda config: self.likes[config])

    def neighbours(self, config: Config) -> list[Config]:
        return sorted(SPACE.neighbours(config), key=lambda other: self.likes[other])

    def taken(self, config: Config) -> Resources:
        return Resources(registers=config.block_m)

    def compiled(self, configs: Sequence[Config]) -> Iterator[tuple[Config, str]]:
        return ((config, self.faults.get(config, "")) for config in configs)

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        for config in configs:
            if len(self.measured) >= self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(config)
        return {config: Sample(self.times[config], self.noise, rounds) for config in configs}


def fake(seed: int, **changes: object) -> Fake:
    draw = random.Random(seed)
    every = list(SPACE)
    times = {config: draw.uniform(1, 3) for config in every}
    likes = {config: times[config] * draw.uniform(0.9, 1.1) for config in every}
    record = Record(Key("before", "float32", 64, 64), Bucket(1, 1, 1), "one", DEFAULT, DEFAULT, "x 1")
    return replace(Fake(times, likes, record), **changes)


def run(problem: Fake, effort: str = "standard") -> Record:
    saved: list[Record] = []
    found = tune(problem, effort, saved.append, lambda *args: None)
    assert saved[-1] == found
    return found


@given(st.integers(0, 10**6), st.sampled_from(list(EFFORTS)), st.booleans())
def test_the_winner_is_the_fastest_measured_and_no_slower_than_the_default(seed: int, effort: str, waits: bool) -> None:
    problem = fake(seed, waits=waits)
    found = run(problem, effort)
    assert found.effort == effort
    best = min(found.trials.values(), key=lambda trial: trial.seconds).seconds
    assert problem.times[found.config] <= problem.times[DEFAULT]
    assert problem.times[found.config] == pytest.approx(best, rel=0.006)
    assert all(trial.resources == Resources(registers=config.block_m) for config, trial in found.trials.items())
    assert found.gain == pytest.approx(problem.times[DEFAULT] / problem.times[found.config])


@given(st.integers(0, 10**6))
def test_more_effort_tries_more_and_finds_no_worse(seed: int) -> None:
    found = {effort: run(fake(seed), effort) for effort in EFFORTS}
    tried = [len(found[effort].trials) for effort in EFFORTS]
    assert tried == sorted(tried)
    times = fake(seed).times
    assert times[found["thorough"].config] <= times[found["quick"].config] * 1.006


def test_a_gain_within_the_noise_is_no_gain() -> None:
    problem = fake(1, noise=0.9)
    found = run(problem)
    assert (found.config, found.gain) == (DEFAULT, 1.0)


@given(st.integers(0, 10**6), st.integers(1, 25))
def test_an_interrupted_search_goes_on_where_it_stopped(seed: int, stop: int) -> None:
    saved: list[Record] = []
    first = fake(seed, stop_after=stop)
    try:
        tune(first, "standard", saved.append, lambda *args: None)
    except KeyboardInterrupt:
        second = fake(seed, record=saved[-1])
        found = run(second)
        again = set(first.measured) & set(second.measured)
        assert len(again) <= 5  # the finalists
        whole = run(fake(seed))
        assert found.trials.keys() >= whole.trials.keys()
        assert problem_time(seed, found) == problem_time(seed, whole)


def test_readings_of_a_cooler_machine_are_scaled_to_what_it_does_now() -> None:
    cool = fake(4)
    first = run(cool, "quick")
    warm = fake(4, record=replace(first, effort=""))
    warm.times = {config: 1.5 * seconds for config, seconds in warm.times.items()}
    found = run(warm, "standard")
    for config, trial in found.trials.items():
        assert trial.seconds == pytest.approx(1.5 * cool.times[config])
    assert cool.times[found.config] == pytest.approx(min(cool.times[config] for config in found.trials), rel=0.006)


@dataclass
class Disturbed(Fake):
    """The first of its readings is far too slow."""

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        first = not self.measured
        found = dict(super().measure(configs, rounds))
        if first and rounds < 3:  # else the median does not see it
            found |= {config: Sample(16 * self.times[config], 0.0, rounds) for config in configs}
        return found


def test_one_disturbed_reading_does_not_scale_what_is_known() -> None:
    first = run(fake(4), "quick")
    again = fake(4, record=replace(first, effort=""))
    found = run(Disturbed(again.times, again.likes, again.record), "standard")
    for config, trial in found.trials.items():
        assert trial.seconds == pytest.approx(again.times[config])


@dataclass
class Slowing(Fake):
    """Each time it measures, the machine is half as fast as before."""

    factor: float = 1.0

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        assert rounds > 2  # all take turns, and none is measured by itself
        found = super().measure(configs, rounds)
        slow = {config: replace(one, seconds=one.seconds * self.factor) for config, one in found.items()}
        self.factor *= 2
        return slow


def test_what_takes_turns_is_kept_beside_the_default() -> None:
    even = fake(5, waits=True)
    found = run(Slowing(even.times, even.likes, even.record, waits=True), "thorough")
    assert len(found.trials) == len(run(even, "thorough").trials)
    for config, trial in found.trials.items():
        assert trial.seconds == pytest.approx(even.times[config])


def problem_time(seed: int, found: Record) -> float:
    return fake(seed).times[found.config]


@pytest.mark.parametrize("waits", [False, True])
def test_what_does_not_compile_is_kept_as_a_fault_and_not_tried_again(waits: bool) -> None:
    problem = fake(2, waits=waits)
    faulty = {config: "too large" for config in problem.configs()[:5] if config != DEFAULT}
    found = run(replace(problem, faults=faulty))
    assert found.config not in faulty
    assert [found.trials[config] for config in faulty] == [Trial(fault="too large")] * len(faulty)


@pytest.mark.parametrize("waits", [False, True])
def test_a_default_that_does_not_run_leaves_the_record_open(waits: bool) -> None:
    found = tune(fake(3, faults={DEFAULT: "no"}, waits=waits), "quick", lambda record: None, lambda *args: None)
    assert found.effort == ""
    assert found.trials[DEFAULT].fault == "no"


KERNELS = st.builds(
    Kernel, st.sampled_from(["bfloat16", "float16", "float32"]), st.sampled_from([16, 64, 80, 128, 256]),
    st.sampled_from([16, 64, 128, 256]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 100, 4096]), st.booleans(),
)  # fmt: skip


def work_of(kernel: Kernel, full: int) -> Callable[[Config], Work]:
    return lambda config: Work(
        kernel.dtype, kernel.head_dim, kernel.value_dim, 8, full * 64 // config.block_n, 8, 0, 9, 1e9, 1e7
    )  # fmt: skip


@given(KERNELS, st.sampled_from([0, 100]), st.sampled_from(["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "cpu"]))
def test_spaces_hold_the_default_once_and_nothing_that_cannot_fit(kernel: Kernel, full: int, name: str) -> None:
    target = Target.of(name)
    default = Config(64, 64) if target.kind == "cpu" else Config(64, 64, ("warps=4", "stages=2", "prefetch=1"))
    work = work_of(kernel, full)
    space = space_of(kernel, target, default, work)
    every = list(space)
    assert every[0] == default
    assert len(set(every)) == len(every)
    for config in every[1:]:
        assert space.is_legal(config)
        assert config.block_m >= kernel.group
        assert fits(config, work(config), target) is None
    for other in space.neighbours(default):
        own = {*str(default).split()} ^ {*str(other).split()}
        assert 0 < len(own) <= 2
        assert space.is_legal(other)
    assert UNSET not in {int(text.partition("=")[2]) for config in every for text in config.options}


@pytest.mark.parametrize("name", ["cpu:avx2", "x86-64-v4", "aarch64"])
@pytest.mark.parametrize("channels", [32, 64, 80, 128])
def test_a_kernel_of_a_cpu_is_in_the_space_once(name: str, channels: int) -> None:
    target, kernel = Target.of(name), Kernel("float32", channels, channels)
    default = default_tiles(target)
    space = space_of(kernel, target, default, work_of(kernel, 100))
    made = [(one.block_m, one.block_n, *tile_rows(one, target, channels)) for one in space]
    assert len(made) > 50
    assert len(set(made)) == len(made)
    for one in (default, *space):
        own = (one.block_m, one.block_n, *tile_rows(one, target, channels))
        near = [(other.block_m, other.block_n, *tile_rows(other, target, channels)) for other in space.neighbours(one)]
        assert len({own, *near}) == 1 + len(near)
        assert {*near} < {*made}


FORMS = {
    "two warpgroups": (Config(128, 128, ("warps=12", "warpgroups=2", "stages=2", "registers=232")), 128, 5),
    "two warpgroups, 64 channels": (Config(128, 128, ("warps=12", "warpgroups=2", "stages=4", "registers=232")), 64, 8),
    "one warpgroup": (Config(64, 64, ("warps=8", "warpgroups=1", "stages=2", "registers=192")), 128, 8),
}


@pytest.mark.parametrize("name", FORMS)
def test_spaces_of_a_form_of_its_own_hold_plain_kernels_too(name: str) -> None:
    default, channels, others = FORMS[name]
    target, kernel = Target.of("h200"), Kernel("bfloat16", channels, channels)
    plain = Config(128, 64, ("warps=8", "stages=2", "prefetch=1"))
    work = work_of(kernel, 100)
    space = space_of(kernel, target, default, work, plain)
    every = list(space)
    assert len(set(every)) == len(every)
    special = [config for config in every if config.option("warpgroups")]
    assert every[: len(special)] == special == [default, *space.special]
    assert plain in every
    assert len(space.special) == others
    for config in special:
        assert fits(config, work(config), target) is None
        assert (config.block_m, config.block_n) == (default.block_m, default.block_n)
        assert config.option("warpgroups") == default.option("warpgroups")
        assert sorted(map(str, space.neighbours(config))) == sorted(str(one) for one in special if one != config)
    near = space.neighbours(plain)
    assert near
    assert not any(config.option("warpgroups") for config in near)


def test_warps_that_do_not_multiply_give_registers_away() -> None:
    kernel, target = Kernel("bfloat16", 128, 128), Target.of("h200")
    work = work_of(kernel, 100)
    default, *_ = FORMS["two warpgroups"]
    assert fits(default.having(registers=256), work(default), target) is None
    assert "registers" in (fits(default.having(registers=264), work(default), target) or "")
    assert "shared memory" in (fits(FORMS["two warpgroups"][0].having(stages=4), work(DEFAULT), target) or "")
