"""What `spgen autotune` does: the calls of a workload, their kernels, and the search over them.

The search itself (spgen/autotune) knows neither patterns nor kernels; here it is given a call as a `Problem`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.arguments import Arguments
from spgen.autotune.measure import Sample, Timer, on_gpu, samples, wall
from spgen.autotune.model import Prediction, Work, predict
from spgen.autotune.records import Record, Records
from spgen.autotune.search import tune
from spgen.autotune.space import Kernel, Space, space_of
from spgen.autotune.workloads import Case
from spgen.compile import Lowered, Request, compiled, default_config, lower
from spgen.errors import SpgenError, WorkloadError
from spgen.explain import tiles_of_programs, work_of
from spgen.ir.config import Config
from spgen.ir.kernel import parts
from spgen.ir.pattern import read_short, slots
from spgen.ir.tiles import table_ops
from spgen.ops import request_of, sizes_of
from spgen.patterns import pattern
from spgen.precompile import compile_request
from spgen.samples import Sizes, random_data
from spgen.sequences import Sequences
from spgen.settings import override, settings
from spgen.tables import Builder
from spgen.target import Target
from spgen.tuned import bucket_of, key_of, toolchain

_MILLISECONDS = 20  # of one reading on a GPU
_WALLS = 3  # calls behind one reading on a CPU
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of the largest value, between two schedules


@dataclass(frozen=True)
class Place:
    """Where a call is tuned: a target and the device that runs its kernels."""

    target: Target
    device: torch.device

    @property
    def timer(self) -> Timer:
        """Seconds of a call on the device."""
        return on_gpu(_MILLISECONDS, self.device.index) if self.device.type == "cuda" else _walls


def _walls(call: Callable[[], Any]) -> float:
    return sorted(wall(call) for _ in range(_WALLS))[_WALLS // 2]


class Compilers:
    """Processes that compile kernels into the cache."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Compilers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["spgen.tune"])
        self._pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_start, initargs=(asdict(settings()),)
        )
        return self

    def __exit__(self, *fault: object) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)

    def compile(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """Each as it is done, with the fault or an empty text."""
        assert self._pool is not None
        waiting = {self._pool.submit(_compile, request): request for request in requests}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _start(chosen: Mapping[str, Any]) -> None:
    override(**chosen).__enter__()
    torch.set_num_threads(1)


def _compile(request: Request) -> str:
    """The fault, or an empty text."""
    try:
        compile_request(request)
    except Exception as fault:  # a configuration that does not compile is a result
        return _first_line(fault)
    return ""


def _first_line(fault: Exception) -> str:
    text = str(fault).strip() or type(fault).__name__
    return ("" if isinstance(fault, SpgenError) else f"{type(fault).__name__}: ") + text.splitlines()[0][:200]


class Tuned:
    """One case as the search's Problem. Making it draws the tensors of the call on the device."""

    def __init__(self, case: Case, place: Place, compilers: Compilers, known: Record | None = None) -> None:
        self.case, self.place, self.compilers = case, place, compilers
        self._call = _tensors(case, place.device)
        with override(records=False):
            self.request = request_of(self._call)
        self.default = default_config(self.request)
        self._programs: dict[tuple[int, int], tuple[Lowered, list[Tensor]]] = {}
        self._works: dict[tuple[int, int], Work] = {}
        self._expected: Tensor | None = None
        self._known = known

    @cached_property
    def record(self) -> Record:
        """What is known so far."""
        key, bucket = key_of(self.request), bucket_of(self.request, sizes_of(self._call))
        made_by = toolchain(self.place.target)
        known = self._known
        if known is not None and known.toolchain == made_by and known.default == self.default:
            return replace(known, facts=self.facts)
        return Record(
            key, bucket, self.case.name, self.default, self.default, made_by, case=asdict(self.case), facts=self.facts
        )

    @cached_property
    def space(self) -> Space:
        """Everything that could be tried."""
        case, kernel = self.case, self._lowered(self.default)[0].kernel
        listed = any(not op["contiguous"] or parts(kernel, "table") for op in parts(kernel, "segment"))
        group = case.q_heads // case.kv_heads if self.request.packed else 1
        shape = Kernel(case.dtype, case.head_dim, case.value_dim, group, case.q_len, listed)
        return space_of(shape, self.place.target, self.default)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the cost model is told, for every size of tiles."""
        case = self.case
        tiles = dict.fromkeys((config.block_m, config.block_n) for config in self.space)
        works = {size: self._work(Config(*size)) for size in tiles}
        least = min(works, key=lambda size: size[0] * size[1] * works[size].tiles)
        pairs = least[0] * least[1] * works[least].tiles
        return {
            "dtype": case.dtype, "head_dim": case.head_dim, "value_dim": case.value_dim,
            "flops": 2.0 * pairs * (case.head_dim + case.value_dim), "bytes": self._bytes(),
            "tiles": {
                f"{m}x{n}": [work.programs, work.full, work.masked, work.gathered, work.longest]
                for (m, n), work in works.items()
            },
        }  # fmt: skip

    def predicted(self, config: Config) -> Prediction:
        """The model's time."""
        return predict(self._work(config), config, self.place.target)

    def configs(self) -> list[Config]:
        """The space, best predicted first."""
        return self._by_prediction(self.space)

    def neighbours(self, config: Config) -> list[Config]:
        """One axis changed, best predicted first."""
        return self._by_prediction(self.space.neighbours(config))

    def compiled(self, configs: Sequence[Config]) -> Iterator[tuple[Config, str]]:
        """Compile side by side. On a CPU all are compiled before the first is handed out and measured."""
        requests = {replace(self.request, config=config): config for config in configs}
        found = ((requests[request], fault) for request, fault in self.compilers.compile(list(requests)))
        return iter(list(found)) if self.place.target.kind == "cpu" else found

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        """Readings in turns; results are compared with that of the default."""
        prepared = {config: self._prepared(config) for config in configs}
        faults = {config: found for config, found in prepared.items() if isinstance(found, str)}
        calls = {str(config): found for config, found in prepared.items() if not isinstance(found, str)}
        try:
            taken = samples(calls, rounds=rounds, timer=self.place.timer, warm_up=0)
        except torch.OutOfMemoryError as fault:
            return dict.fromkeys(configs, self._fault(fault))
        return {**faults, **{Config.read(text): sample for text, sample in taken.items()}}

    def _prepared(self, config: Config) -> Callable[[], None] | str:
        """A launch of the bare kernel, whose result was compared, or the fault."""
        try:
            return self._launch(config)
        except (SpgenError, torch.OutOfMemoryError) as fault:
            return self._fault(fault)

    def _fault(self, fault: Exception) -> str:
        if isinstance(fault, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return "out of memory"
        return _first_line(fault)

    def _launch(self, config: Config) -> Callable[[], None]:
        call = self._call
        kernel = compiled(replace(self.request, config=config)).kernel
        levels, tables = self._lowered(config)
        names = [op["name"] for op in table_ops(levels.program)]
        read = [tables[names.index(op["name"])] for op in parts(levels.kernel, "table")]
        out = call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1]))
        scale = 1 / math.sqrt(self.case.head_dim)
        launch = partial(kernel, call.q, call.k, call.v, out, None, read, None, None, scale)
        launch()
        if config == self.default:
            self._expected = out.clone()
        elif self._expected is None:
            self._launch(self.default)
        assert self._expected is not None
        largest = self._expected.float().abs().max().clamp(min=1e-30)
        off = float((out.float() - self._expected.float()).abs().max() / largest)
        if not off <= _TOLERANCE[self.case.dtype]:
            raise SpgenError(f"config {config}", given=f"results that are {off:.1e} off those of {self.default}")
        return launch

    def _by_prediction(self, configs: Any) -> list[Config]:
        return sorted(configs, key=lambda config: self.predicted(config).seconds)

    def _lowered(self, config: Config) -> tuple[Lowered, list[Tensor]]:
        size = config.block_m, config.block_n
        if size not in self._programs:
            levels = lower(self.request, Config(*size))
            self._programs[size] = levels, self._builder().build(levels.program)
        return self._programs[size]

    def _builder(self) -> Builder:
        call = self._call
        sequences = Sequences(call.q.shape[0], call.q.shape[2], call.k.shape[2], call.q.device)
        return Builder(call.data, sequences, self.request.q_heads, self.request.kv_heads)

    def _work(self, config: Config) -> Work:
        size = config.block_m, config.block_n
        if size not in self._works:
            levels = lower(self.request, Config(*size))
            builder = self._builder()
            builder.build(levels.program)
            self._works[size] = _work_of(levels, builder, self.case, self._bytes())
        return self._works[size]

    def _bytes(self) -> float:
        call = self._call
        return float(sum(x.numel() * x.element_size() for x in (call.q, call.k, call.v, call.q)))


def _work_of(levels: Lowered, builder: Builder, case: Case, moved: float) -> Work:
    found = tiles_of_programs(levels, builder)
    tiles = sum(int((whole + part).sum()) for whole, part in found)
    pairs = tiles * levels.kernel["block_m"] * levels.kernel["block_n"]
    return work_of(levels.kernel, found, 2.0 * pairs * (case.head_dim + case.value_dim), moved)


def _tensors(case: Case, device: torch.device) -> Arguments:
    """Random tensors of a case. Raises WorkloadError for a pattern that cannot be read, naming the case."""
    try:
        node = read_short(case.pattern)
        found = random_data(node, case.density, 0, Sizes(case.batch, case.q_len, case.kv_len), case.run)
        data = [found[slot.index].to(device) for slot in slots(node)]
        text = repr(pattern(case.pattern, *data))
    except SpgenError as fault:
        raise WorkloadError(
            f"workload {case.name}", given=str(fault).replace("\n", "\n  "), allowed="patterns as Python writes them"
        ) from fault
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def random(heads: int, rows: int, channels: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, channels, dtype=dtype, device=device, generator=generator)

    q = random(case.q_heads, case.q_len, case.head_dim)
    k = random(case.kv_heads, case.kv_len, case.head_dim)
    v = random(case.kv_heads, case.kv_len, case.value_dim)
    return Arguments(q, k, v, data, text)


@dataclass
class Session:
    """Cases, where they are tuned, and the file that keeps the results."""

    cases: Sequence[Case]
    places: Sequence[Place]
    records: Records
    path: Path
    effort: str
    said: Callable[[Case, str, int, int], None]
    finished: Callable[[Case, Record | str], None]
    faults: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Tune what is not finished, one case at a time on each place; every new reading is saved at once."""
        waiting = list(self.cases)
        lock = threading.Lock()

        def work(place: Place, compilers: Compilers) -> None:
            while True:
                with lock:
                    if not waiting or stop.is_set():
                        return
                    case = waiting.pop(0)
                try:
                    result: Record | str = self._tuned(case, place, compilers, lock)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    result = "out of memory: the call itself does not fit"
                except SpgenError as fault:
                    result = str(fault)
                if isinstance(result, str):
                    self.faults[case.name] = result
                self.finished(case, result)

        stop = threading.Event()
        with Compilers() as compilers:
            if len(self.places) == 1:
                work(self.places[0], compilers)
                return
            threads = [threading.Thread(target=work, args=(place, compilers), daemon=True) for place in self.places]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:
                stop.set()

    def _tuned(self, case: Case, place: Place, compilers: Compilers, lock: threading.Lock) -> Record | str:
        known = next((record for record in self.records if record.case == asdict(case)), None)

        def save(record: Record) -> None:
            with lock:
                self.records.add(record)
                self.records.save(self.path)

        problem = Tuned(case, place, compilers, known)
        found = tune(problem, self.effort, save, partial(self.said, case))
        return found if found.effort else f"the default does not run: {found.trials[found.default].fault}"
