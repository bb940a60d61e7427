"""One call of a workload, as the search and the model see it: its space, and the work that tiles make of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spgen.arguments import DTYPES, Arguments, check
from spgen.autotune.experience import Experience
from spgen.autotune.model import Prediction, Work, predict
from spgen.autotune.records import Record
from spgen.autotune.space import Kernel, Space, space_of
from spgen.autotune.work import Resources
from spgen.autotune.workloads import Case
from spgen.compile import Lowered, lower
from spgen.errors import SpgenError, WorkloadError
from spgen.explain import tiles_of_programs
from spgen.ir.config import Config
from spgen.ir.kernel import parts
from spgen.ir.pattern import read_short, slots
from spgen.ops import request_of, sizes_of
from spgen.patterns import pattern
from spgen.samples import Sizes, random_data
from spgen.sequences import Sequences
from spgen.tables import Builder
from spgen.target import Target
from spgen.tuned import bucket_of, default_of, key_of, toolchain

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Subject:
    """A case on a target. Its pattern's data lie on `device`; q, k and v have shapes alone unless `values` are asked.

    Raises WorkloadError for a pattern that cannot be read and for a call that cannot be made, naming the case.
    """

    def __init__(
        self, case: Case, target: Target, device: torch.device, *, values: bool = False,
        experience: Experience | None = None,
    ) -> None:  # fmt: skip
        self.case, self.target = case, target
        self.call = _arguments(case, device, values)
        self.request = replace(request_of(self.call, target=target), config=None)  # whatever records say
        self.default = default_of(self.request, sizes_of(self.call))
        self._experience = experience
        self._programs: dict[tuple[int, int], tuple[Lowered, list[Tensor], Work]] = {}

    @cached_property
    def empty_record(self) -> Record:
        """What is known before anything is measured."""
        return Record(
            key_of(self.request), bucket_of(self.request, sizes_of(self.call)), self.case.name, self.default,
            self.default, toolchain(self.target), facts=self.facts, case=asdict(self.case),
        )  # fmt: skip

    @cached_property
    def space(self) -> Space:
        """Everything that could be tried."""
        case, kernel = self.case, self.lowered(self.default)[0].kernel
        listed = any(not op["contiguous"] or parts(kernel, "table") for op in parts(kernel, "segment"))
        group = case.q_heads // case.kv_heads if self.request.packed else 1
        shape = Kernel(case.dtype, case.head_dim, case.value_dim, group, case.q_len, listed)
        plain = default_of(self.request, sizes_of(self.call), plain=True)
        return space_of(shape, self.target, self.default, self.work, plain)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the cost model is told, for every size of tiles."""
        case = self.case
        tiles = dict.fromkeys((config.block_m, config.block_n) for config in self.space)
        works = {size: self.work(Config(*size)) for size in tiles}
        least = min(work.flops for work in works.values())
        return {
            "dtype": case.dtype, "head_dim": case.head_dim, "value_dim": case.value_dim, "flops": least,
            "bytes": self._bytes,
            "tiles": {
                f"{m}x{n}": [work.programs, work.full, work.masked, work.gathered, work.longest, work.columns]
                for (m, n), work in works.items()
            },
        }  # fmt: skip

    def predicted(self, config: Config, resources: Resources | None = None) -> Prediction:
        """The model's time."""
        return predict(self.work(config), config, self.target, resources)

    def expected(self, configs: Iterable[Config]) -> dict[Config, float]:
        """Seconds by the model, and by what trials of other calls say."""
        found = {config: self.predicted(config).seconds for config in configs}
        if self._experience is None:
            return found
        return {
            config: seconds * math.exp(self._experience.correction(self.empty_record, config))
            for config, seconds in found.items()
        }

    def lowered(self, config: Config) -> tuple[Lowered, list[Tensor]]:
        """The levels for a size of tiles, and the plan's tables."""
        return self._program(config)[:2]

    def work(self, config: Config) -> Work:
        """What a size of tiles makes of the call."""
        return self._program(config)[2]

    def _program(self, config: Config) -> tuple[Lowered, list[Tensor], Work]:
        size = config.block_m, config.block_n
        if size not in self._programs:
            call = self.call
            levels = lower(replace(self.request, config=None), Config(*size))
            sequences = Sequences(call.q.shape[0], call.q.shape[2], call.k.shape[2], call.q.device)
            builder = Builder(call.data, sequences, self.request.q_heads, self.request.kv_heads)
            tables = builder.build(levels.program)
            self._programs[size] = levels, tables, self._counted(levels, builder)
        return self._programs[size]

    def _counted(self, levels: Lowered, builder: Builder) -> Work:
        case, found = self.case, tiles_of_programs(levels, builder)
        runs = parts(levels.kernel, "segment")
        full, masked, columns = (int(sum(one[n].sum() for one in found)) for n in range(3))
        gathered = sum(
            int((one.full + one.masked).sum()) for op, one in zip(runs, found, strict=True) if not op["contiguous"]
        )
        each = sum((one.full + one.masked for one in found), torch.zeros((), dtype=torch.int64))
        pairs = (full + masked) * levels.kernel["block_m"] * levels.kernel["block_n"]
        return Work(
            case.dtype, case.head_dim, case.value_dim, each.numel(), full, masked, gathered, int(each.max()),
            2.0 * pairs * (case.head_dim + case.value_dim), self._bytes, columns,
        )  # fmt: skip

    @property
    def _bytes(self) -> float:
        call = self.call
        rows = call.q[..., 0].numel() * (self.case.head_dim + self.case.value_dim)
        return float((rows + call.k.numel() + call.v.numel()) * call.q.element_size())


def _arguments(case: Case, device: torch.device, values: bool) -> Arguments:
    try:
        node = read_short(case.pattern)
        found = random_data(node, case.density, 0, Sizes(case.batch, case.q_len, case.kv_len), case.run)
        data = [found[slot.index].to(device) for slot in slots(node)]
        text = repr(pattern(case.pattern, *data))
    except SpgenError as fault:
        raise WorkloadError(
            f"workload {case.name}", given=str(fault).replace("\n", "\n  "), allowed="patterns as Python writes them"
        ) from fault
    if case.dtype not in _DTYPES:
        raise WorkloadError(f"workload {case.name}: dtype", given=repr(case.dtype), allowed=", ".join(_DTYPES))
    generator = torch.Generator(device).manual_seed(0)
    dtype = _DTYPES[case.dtype]

    def tensor(heads: int, rows: int, channels: int) -> Tensor:
        shape = (case.batch, heads, rows, channels)
        if values:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return torch.empty(1, dtype=dtype, device=device).expand(shape)

    q = tensor(case.q_heads, case.q_len, case.head_dim)
    k = tensor(case.kv_heads, case.kv_len, case.head_dim)
    v = tensor(case.kv_heads, case.kv_len, case.value_dim)
    call = Arguments(q, k, v, data, text)
    try:
        check(call)
    except SpgenError as fault:
        raise WorkloadError(
            f"workload {case.name}", given=str(fault).replace("\n", "\n  "), allowed="calls that attention accepts"
        ) from fault
    return call
