"""The search space: which configurations a kernel can have, before any is compiled.

A space is a set of axes. Those named `block_m` and `block_n` are tiles, all others options of the backend; an option's
value of `UNSET` leaves it out. What cannot fit the target is not in the space at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from spgen.autotune.model_cpu import tile_rows
from spgen.autotune.work import Work, fits, padded, threads_of
from spgen.ir.config import Config
from spgen.target import Target

UNSET = -1
_TILES = ("block_m", "block_n")
_FORM = "warpgroups"  # the option by which kernels take a form of their own
_MOST_REGISTERS = 255  # of a thread
_OTHERS = 24  # registers beside accumulators and scores


@dataclass(frozen=True)
class Kernel:
    """What a space depends on, beside the target: types and sizes of a call, and what its segments are made of.

    `group` query heads share a row tile (1: none do); `rows` are those of a sequence; `listed`: columns come from
    tables.
    """

    dtype: str
    head_dim: int
    value_dim: int
    group: int = 1
    rows: int = 4096
    listed: bool = False


@dataclass(frozen=True)
class Space:
    """Axes and what they must obey together. Iterating gives every legal configuration, the default first.

    Axes vary `plain`; the default may be of another form, of which only single choices are varied. Of configurations
    that make the same kernel `canonical` gives one: that is in the space, the others are not.
    """

    default: Config
    axes: Mapping[str, tuple[int, ...]]
    is_legal: Callable[[Config], bool]
    plain: Config
    special: tuple[Config, ...] = ()
    canonical: Callable[[Config], Config] = lambda config: config

    def __iter__(self) -> Iterator[Config]:
        yield self.default
        seen = {self.default}
        for config in self.special:
            if config not in seen:
                seen.add(config)
                yield config
        for values in product(*self.axes.values()):
            config = self._made(dict(zip(self.axes, values, strict=True)))
            if config not in seen and self.is_legal(config):
                seen.add(config)
                yield config

    def neighbours(self, config: Config) -> list[Config]:
        """The legal configurations that differ from this one in a single axis."""
        if config in (self.default, *self.special) and config.option(_FORM):
            return [other for other in (self.default, *self.special) if other != config]
        own = {name: self._value(config, name) for name in self.axes}
        found = [
            self._made({**own, name: value})
            for name, values in self.axes.items() for value in values if value != own[name]
        ]  # fmt: skip
        return [other for other in dict.fromkeys(found) if other != config and self.is_legal(other)]

    def _value(self, config: Config, name: str) -> int:
        return int(getattr(config, name)) if name in _TILES else config.option(name, UNSET)

    def _made(self, values: Mapping[str, int]) -> Config:
        options = {name: None if value == UNSET else value for name, value in values.items() if name not in _TILES}
        return self.canonical(self.plain.having(block_m=values["block_m"], block_n=values["block_n"], **options))


def space_of(
    kernel: Kernel, target: Target, default: Config, work: Callable[[Config], Work], plain: Config | None = None
) -> Space:
    """The space of attention kernels on a target; `default` is in it whatever the rules say.

    `work` counts what a configuration makes of the call. `plain` is the configuration whose choices the axes vary, if
    it is not the default.
    """
    plain = plain or default
    axes = _cpu_axes(kernel, target) if target.kind == "cpu" else _gpu_axes(kernel, target)
    axes = {name: _with(values, plain, name) for name, values in axes.items()}
    if target.kind == "cpu":
        canonical = _cpu_canonical(kernel, target, default)
        return Space(default, axes, lambda config: fits(config, work(config), target) is None, plain, (), canonical)
    special = _special(default, target, work) if default.option(_FORM) else ()
    return Space(default, axes, _gpu_rule(kernel, target, work), plain, special)


def _special(default: Config, target: Target, work: Callable[[Config], Work]) -> tuple[Config, ...]:
    """The other configurations of the default's form: as many stages as fit, registers as they can be shared out."""
    registers = {1: (192, 208, 216), 2: (224, 232, 240)}[default.option(_FORM)]
    found = (default.having(stages=stages, registers=most) for stages in (2, 3, 4) for most in registers)
    return tuple(one for one in found if one != default and fits(one, work(one), target) is None)


def _with(values: tuple[int, ...], default: Config, name: str) -> tuple[int, ...]:
    """The values of an axis, that of the default among them."""
    own = getattr(default, name) if name in _TILES else default.option(name, UNSET)
    return tuple(dict.fromkeys((*values, int(own))))


def _gpu_axes(kernel: Kernel, target: Target) -> dict[str, tuple[int, ...]]:
    tall = tuple(rows for rows in (16, 32, 64, 128) if rows >= kernel.group and rows < 4 * kernel.group * kernel.rows)
    hopper = target.kind == "cuda" and target.arch in ("sm_90", "sm_100", "sm_120")
    return {
        "block_m": tall or (max(16, kernel.group),),
        "block_n": (32, 64, 128),
        "warps": (4, 8) if target.kind == "cuda" else (2, 4, 8),
        "stages": (1, 2, 3, 4) if target.kind == "cuda" else (1, 2),
        "registers": (UNSET, 80, 96, 128, 168) if target.kind == "cuda" else (UNSET,),
        "prefetch": (0, 1) if kernel.listed else (1,),
        "masked_stages": (UNSET, 1),
        "tma": (UNSET, 0) if hopper else (UNSET,),
        "splits": (UNSET, 2, 4, 8, 16, 32) if _is_short(kernel) else (UNSET,),
    }


def _gpu_rule(kernel: Kernel, target: Target, work: Callable[[Config], Work]) -> Callable[[Config], bool]:
    value_lanes = padded(kernel.value_dim)

    def is_legal(config: Config) -> bool:
        warps, threads = config.option("warps", 4), threads_of(config, target)
        if config.option("masked_stages", UNSET) >= config.option("stages", 2):
            return False
        # a warp multiplies 16 rows; those of a short call share them and divide the keys
        if config.block_m * warps < 64 or (config.block_m < 16 * warps // 2 and not _is_short(kernel)):
            return False
        held = config.block_m * (value_lanes + config.block_n) // threads + _OTHERS  # accumulators, scores, the rest
        cap = config.option("registers", UNSET)
        # a cap is for programs that share a multiprocessor, and no use below what a thread must hold
        if held > _MOST_REGISTERS or (cap != UNSET and (held > cap or 2 * cap * threads > target.registers)):
            return False
        return fits(config, work(config), target) is None

    return is_legal


def _is_short(kernel: Kernel) -> bool:
    """Whether all rows of a sequence fit one row tile."""
    return kernel.rows * kernel.group <= 128


def _cpu_axes(kernel: Kernel, target: Target) -> dict[str, tuple[int, ...]]:
    lanes = target.simd
    return {
        "block_m": tuple(lanes * n for n in (1, 2, 3, 4, 6) if lanes * n <= 96 and lanes * n >= kernel.group),
        "block_n": tuple(n for n in (16, 32, 48, 64, 96) if n % lanes == 0),
        "key_rows": (UNSET, 2, 3, 4, 6, 8, 12, 14),
        "value_rows": (UNSET, 2, 3, 4, 6, 8, 12, 14),
    }


def _cpu_canonical(kernel: Kernel, target: Target, default: Config) -> Callable[[Config], Config]:
    """The default where the register tiles are its own; else rows are left out that are the usual ones."""

    def made(config: Config) -> tuple[Config, tuple[int, int]]:
        return config.having(key_rows=None, value_rows=None), tile_rows(config, target, kernel.value_dim)

    def canonical(config: Config) -> Config:
        bare, (keys, channels) = made(config)
        if (bare, (keys, channels)) == made(default):
            return default
        _, usual = made(bare)
        return bare.having(
            key_rows=None if keys == usual[0] else keys, value_rows=None if channels == usual[1] else channels
        )

    return canonical
