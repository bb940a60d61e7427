"""The compiler, read from top to bottom: a pattern's node becomes a kernel in nine passes.

    level 1   recognize -> desugar -> push_permutations -> normalize -> merge_runs -> own
    level 2   tile
    level 3   schedule -> hoist

`lower` runs them; `compiled` hands the kernel to a backend and remembers the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from spgen.errors import UnsupportedError, float8_error
from spgen.ir.config import Config
from spgen.ir.kernel import FLOAT8, parts
from spgen.ir.node import Op, walk
from spgen.ir.pattern import is_selected, read_short, short_text, slots
from spgen.ir.tiles import table_ops
from spgen.passes.desugar import desugar
from spgen.passes.hoist import hoist
from spgen.passes.merge import merge_runs
from spgen.passes.normalize import normalize
from spgen.passes.ownership import own
from spgen.passes.permutation import push_permutations
from spgen.passes.recognize import recognize
from spgen.passes.schedule import Call, schedule
from spgen.passes.tile import Shape, query_head_matters, tile
from spgen.settings import settings
from spgen.target import Target

LEVEL_1: tuple[Callable[[Op], Op], ...] = (recognize, desugar, push_permutations, normalize, merge_runs, own)
# all passes by the level that they read, in order; the last one of a level leads to the next (`spgen opt` runs any)
PIPELINE: Mapping[str, tuple[Callable[..., Op], ...]] = {
    "pattern": (*LEVEL_1, tile), "tiles": (schedule,), "kernel": (hoist,)
}  # fmt: skip

# A row tile is shared by the heads of a group when one head's rows would leave this much of it empty.
_PACK_BELOW = 0.5
# Each row sees a diagonal in another column: short row tiles touch fewer tiles beside it.
_DIAGONAL_ROWS = 64


@dataclass(frozen=True)
class Request:
    """Everything that a kernel is specialised for. Lengths, batch, counts and strides are not among it.

    What follows from a call's sizes is `config` (see spgen/tuned.py).
    """

    pattern: str
    call: Call
    q_heads: int
    kv_heads: int
    packed: bool
    target: Target
    config: Config | None = None  # None: the backend's default


@dataclass(frozen=True)
class Lowered:
    """The three levels of one request, and the pack of query heads that share a row tile."""

    pattern: Op
    terms: Op
    program: Op
    kernel: Op
    pack: int


class Schedules(Protocol):
    """The part of a backend that chooses configurations; Triton's needs neither torch nor Triton."""

    def default_config(
        self, head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None, cols: int | None,
        height: int | None,
    ) -> Config:  # fmt: skip
        """Always a legal choice.

        `rows` and `cols` are how many neighbouring rows and columns share their data, None if all do; `height` is how
        many rows a row tile could be filled with at most, None if many: maybe a symbol, which is only compared.
        """

    def specialised_config(
        self, head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None, height: int | None
    ) -> Config | None:
        """What asks for a faster form of kernels that does not serve all of them, if the target has one."""

    def refusal(self, kernel: Op, target: Target) -> str | None:
        """Why a kernel does not get the form that its schedule asks for; None if it does."""


class Backend(Schedules, Protocol):
    """What `spgen.backends.tvm` and `spgen.backends.triton` provide."""

    def served(self, kernel: Op, target: Target) -> Op:
        """The kernel with the schedule that it gets, which is another one where its form is refused."""

    def build(self, kernel: Op, target: Target) -> Any:
        """The launchable kernel, from the cache or compiled; it is called with Operands (see backends/extras.py).

        `kernel.bind()` is called alike, always with operands of the same shapes, strides, dtypes and device.
        """

    def planner(self, program: Op, target: Target) -> Any | None:
        """What makes the tables of a level-2 program with kernels; None: spgen/tables.py makes them.

        `planner.ready(builder)` is what calls of the same shapes share: a function of data, q_offset and kv_lengths.
        """


def backend_of(target: Target) -> Backend:
    """The backend that serves `target`: TVM on CPUs, Triton on GPUs, or what SPGEN_BACKEND says."""
    return cast(Backend, import_module("spgen.backends.triton" if is_for_triton(target) else "spgen.backends.tvm"))


def _schedules(target: Target) -> Schedules:
    if is_for_triton(target):
        return cast(Schedules, import_module("spgen.backends.triton_schedule"))
    return backend_of(target)


def is_for_triton(target: Target) -> bool:
    """Whether Triton serves `target`, or TVM."""
    name = settings().backend
    return name == "triton" or (name == "auto" and target.kind != "cpu")


def is_packed(pattern: str, q_heads: int, kv_heads: int, q_len: int, block_m: int) -> bool:
    """Whether the query heads of a group should share a row tile: short calls, heads that agree."""
    group = q_heads // kv_heads
    if group == 1 or group > block_m or q_len > block_m * _PACK_BELOW:
        return False
    return not _query_head_matters(pattern, q_heads, kv_heads)


@lru_cache(maxsize=1024)
def _query_head_matters(pattern: str, q_heads: int, kv_heads: int) -> bool:
    node = read_short(pattern)
    return query_head_matters(desugar(node), slots(node), q_heads, kv_heads)


def refuse_selections(node: Op) -> None:
    """Raises UnsupportedError where data are still to be selected by a score."""
    for op in walk(node):
        if is_selected(op):
            of_weights = op.kind != "permuted" and op["scores"] in ("magnitude()", "wanda()")
            raise UnsupportedError(
                f"pattern: {short_text(op)}",
                given="a selection by the size of weights" if of_weights else "a selection that is not computed yet",
                allowed="patterns whose data are given as tensors",
                remedy=f"compute the indices yourself and pass them to {op.kind}(…)",
            )


@lru_cache(maxsize=1024)
def level_1(node: Op) -> Op:
    """The disjoint terms of a pattern."""
    for one_pass in LEVEL_1:
        node = one_pass(node)
    return node


def lower(request: Request, config: Config) -> Lowered:
    """All levels of a request for one configuration."""
    node = read_short(request.pattern)
    terms = level_1(node)
    pack = request.q_heads // request.kv_heads if request.packed else 1
    cu_seqlens = request.call.cu_seqlens
    rows, block_m, block_n = config.block_m // pack, config.block_m, config.block_n
    align = config.option("align", 1)
    shape = Shape(request.q_heads, request.kv_heads, rows, block_m, block_n, cu_seqlens, align)
    program = tile(terms, slots(node), shape)
    kernel = hoist(schedule(program, request.call, pack, config.options))
    return Lowered(node, terms, program, kernel, pack)


def shared_rows(node: Op) -> int | None:
    """How many neighbouring rows share what the pattern's data list for them; None if the data do not tell rows apart.

    A taller row tile walks the union of their lists and masks it.
    """
    rows = [op["rows"] for op in walk(level_1(node)) if op.kind == "listed" and op["rows"]]
    rows += [_DIAGONAL_ROWS for op in walk(level_1(node)) if op.kind == "diagonals"]
    return min(rows, default=None)


def shared_cols(node: Op) -> int | None:
    """How many neighbouring columns the pattern's data name together; None if the data do not tell columns apart."""
    cols = [op["cols"] for op in walk(level_1(node)) if op.kind == "listed"]
    cols += [1 for op in walk(level_1(node)) if op.kind in ("diagonals", "permuted")]
    return min(cols, default=None)


@dataclass(frozen=True)
class Compiled:
    """A request with its levels and its launchable kernel; `read` are the tables of the plan that the kernel takes."""

    request: Request
    lowered: Lowered
    kernel: Any
    needs_tables: bool
    read: tuple[int, ...]


def default_config(request: Request, q_len: int | None = None, *, plain: bool = False) -> Config:
    """The configuration of the request's backend where nothing was measured; `q_len` rows if they are known.

    `plain`: that of the form which serves every kernel.
    """
    node, call = read_short(request.pattern), request.call
    refuse_selections(node)
    pack = request.q_heads // request.kv_heads if request.packed else 1
    height = None if q_len is None else max(q_len, 1) * pack
    special = None if plain else _specialised(request, height)
    refused = None if special is None else _refusal(_as_planned(request), special)
    if special is not None and refused is None:
        return special
    if call.dtype == FLOAT8:
        raise float8_error(request.target.arch, refused)
    return _schedules(request.target).default_config(
        call.head_dim,
        call.value_dim,
        call.dtype,
        request.target,
        rows=shared_rows(node),
        cols=shared_cols(node),
        height=height,
    )


def _as_planned(request: Request) -> Request:
    """The request without what a plan does not know: plans and calls agree on tiles."""
    call = replace(request.call, lse=False, softcap=False, sinks=False, bias="none")
    return replace(request, call=call, config=None)


def _specialised(request: Request, height: int | None) -> Config | None:
    call, rows = request.call, shared_rows(read_short(request.pattern))
    backend = _schedules(request.target)
    return backend.specialised_config(
        call.head_dim, call.value_dim, call.dtype, request.target, rows=rows, height=height
    )


@lru_cache(maxsize=1024)
def _refusal(request: Request, config: Config) -> str | None:
    return _schedules(request.target).refusal(lower(request, config).kernel, request.target)


def why_plain(request: Request) -> str | None:
    """What keeps a request from the faster form that its target has; None where there is no such form, or nothing."""
    special = _specialised(request, None)
    return None if special is None else _refusal(replace(request, config=None), special)


@lru_cache(maxsize=4096)
def lowered(request: Request) -> Lowered:
    """The levels of a request with its configuration."""
    return lower(request, request.config or default_config(request))


_kernels: dict[tuple[Op, Target], Any] = {}


@lru_cache(maxsize=4096)
def compiled(request: Request) -> Compiled:
    """The launchable kernel of a request; equal kernels of different requests are built once."""
    levels = lowered(request)
    key = (levels.kernel, request.target)
    if key not in _kernels:
        _kernels[key] = backend_of(request.target).build(levels.kernel, request.target)
    names = [op["name"] for op in table_ops(levels.program)]
    read = tuple(names.index(op["name"]) for op in parts(levels.kernel, "table"))
    return Compiled(request, levels, _kernels[key], bool(names), read)


@lru_cache(maxsize=4096)
def planner_of(program: Op, target: Target) -> Any | None:
    """The backend's planner for a level-2 program, None if it has none."""
    return backend_of(target).planner(program, target)


def compile_count() -> int:
    """How many different kernels this process has built or loaded."""
    return len(_kernels)
