"""One product with sparse weights, as the search sees it: configurations around the default, measured in turns.

No model orders the space: its axes are halved and doubled from what is best so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from spgen.arguments import DTYPES
from spgen.autotune.records import Record
from spgen.autotune.workloads import ProductCase
from spgen.errors import SpgenError, WorkloadError
from spgen.ir.config import Config
from spgen.patterns import pattern
from spgen.tuned import toolchain
from spgen.tuning.compilers import Compilers
from spgen.tuning.measured import Measured, Place
from spgen.weights.compile import Job, Request, Sizes, default_of, identity_of, kernel_of_job
from spgen.weights.linear import linear
from spgen.weights.storage import Stored, values_dtype

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# options that say which kernel it is, not how it runs
_KINDS = ("cores", "cusparselt", "dense", "dots", "paired", "programs", "splits", "tf32x3", "walk", "warpgroups")
_FORMS = ("linear", "gated", "transposed")


class TunedProduct(Measured[Job]):
    """A case as the search's Problem. Making it draws `x` and the `weights` on the device."""

    def __init__(self, case: ProductCase, place: Place, compilers: Compilers, known: Record | None = None) -> None:
        super().__init__(place, compilers, case.dtype)
        self.case, self._known = case, known
        self.weights = _weights(case, place.device)
        one = self.weights[0]
        stored = sum(weight.values.numel() for weight in self.weights)
        self.sizes = Sizes(case.rows, case.outputs, case.inputs, stored)
        self.request = Request(
            case.dtype, one.layout, values_dtype(one), one.scales is not None, place.target,
            case.form == "transposed", case.form == "gated", activation="silu" if case.form == "gated" else "none",
        )  # fmt: skip
        self.default = default_of(self.request, self.sizes)
        widths = (case.outputs, case.inputs) if case.form == "transposed" else (case.inputs, case.outputs)
        generator = torch.Generator(place.device).manual_seed(0)
        dtype = _DTYPES[case.dtype]
        self.x = torch.randn(case.rows, widths[0], device=place.device, dtype=dtype, generator=generator)
        self._y = self.x.new_empty(case.rows, widths[1])

    @cached_property
    def record(self) -> Record:
        """What is known so far."""
        key, bucket = identity_of(self.request, self.sizes)
        made = toolchain(self._place.target)
        fresh = Record(key, bucket, self.case.name, self.default, self.default, made, case=asdict(self.case))
        if self._known is None or self._known.toolchain != made:
            return fresh
        return self._known if self._known.default == self.default else replace(fresh, trials=self._known.trials)

    def configs(self) -> list[Config]:
        """The default, what differs in one axis, and in two."""
        near = around(self.default)
        pairs = [two for one in near for two in around(one)]
        return list(dict.fromkeys([self.default, *near, *pairs]))

    def neighbours(self, config: Config) -> list[Config]:
        """One axis changed."""
        return around(config)

    def job(self, config: Config) -> Job:
        """The product with this configuration."""
        return Job(self.request, self.sizes, config)

    def launch(self, config: Config) -> tuple[Callable[[], None], Tensor]:
        """A launch of the bare kernel, and where it writes."""
        self._y.fill_(torch.nan)
        return partial(kernel_of_job(self.job(config)), self.x, self.weights, None, self._y), self._y


def around(config: Config) -> list[Config]:
    """Configurations that differ in one axis: tiles and options halved and doubled, stages by one."""
    found = []
    for name in ("block_m", "block_n"):
        size = getattr(config, name)
        found += [replace(config, **{name: other}) for other in (size * 2, size // 2) if other]
    for option in config.options:
        name, _, text = option.partition("=")
        if name in _KINDS:
            continue
        value = int(text)
        steps = (value + 1, value - 1) if name == "stages" else (value * 2, value // 2)
        found += [config.having(**{name: other}) for other in steps if other > 0]
    return found


def _weights(case: ProductCase, device: torch.device) -> tuple[Stored, ...]:
    if case.dtype not in _DTYPES:
        raise WorkloadError(f"workload {case.name}: dtype", given=repr(case.dtype), allowed=", ".join(_DTYPES))
    if case.form not in _FORMS:
        raise WorkloadError(f"workload {case.name}: form", given=repr(case.form), allowed=", ".join(_FORMS))
    generator = torch.Generator(device).manual_seed(1)
    shape, dtype = (case.outputs, case.inputs), _DTYPES[case.dtype]
    try:
        wanted = pattern(case.pattern)
        drawn = [
            torch.randn(shape, device=device, dtype=dtype, generator=generator)
            for _ in range(2 if case.form == "gated" else 1)
        ]
        return tuple(linear(one, wanted, values=case.values or None).weight.stored for one in drawn)
    except SpgenError as fault:
        raise WorkloadError(
            f"workload {case.name}", given=str(fault).replace("\n", "\n  "), allowed="patterns that select weights"
        ) from fault
