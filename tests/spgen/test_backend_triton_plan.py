"""Plans by kernels without a GPU: binaries made ahead of time, and the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import spgen as sp
from spgen.backends.triton_binary import Specialised, compile_ahead
from spgen.backends.triton_plan import Planner, planner, source_path
from spgen.errors import CompileError
from spgen.settings import override
from spgen.tables import Builder
from spgen.target import Target
from spgen.templates.triton import plan
from spgen.templates.triton.plan import COLLECT, ENTRIES, SPLIT, Planning
from tests.interpreted import run_interpreted
from tests.kinds import KINDS, LENGTH
from tests.lowering import Lengths, lowered_builder
from tests.plans import packed_lengths

CALL = Lengths(LENGTH, LENGTH, 4, 2, block_m=128, block_n=64)


def test_agrees_with_tensor_operations_in_the_interpreter() -> None:
    run_interpreted("test_backend_triton_plan_interpreted.py")


PACKED = packed_lengths(q_offset=torch.zeros(5, dtype=torch.int64), block_m=128, block_n=64)


def planning_of(kind: str, call: Lengths = CALL, arch: str = "sm_90") -> Planning:
    """What the kernels of a kind make on a GPU."""
    levels, builder = lowered_builder(KINDS[kind], call)
    return planner(levels.program, Target.of(arch)).planning(builder)


@pytest.mark.parametrize(
    ("kind", "call", "arch"),
    [
        ("odd blocks", CALL, "sm_80"), ("vertical and slash", CALL, "sm_90"), ("documents", CALL, "gfx942"),
        ("vertical and slash", PACKED, "sm_80"), ("tokens", PACKED, "sm_90"), ("everything", PACKED, "gfx942"),
        ("tokens", CALL, "gfx942"), ("tokens", CALL, "sm_80"), ("lists", CALL, "sm_90"), ("blocks", CALL, "sm_80"),
    ],
)  # fmt: skip
def test_compiles_ahead_of_time(kind: str, call: Lengths, arch: str) -> None:
    planning = planning_of(kind, call, arch)
    for entry in ENTRIES:
        if not planning.of(entry):
            continue
        kinds = {"*index": "*i64", "unit": "constexpr"}
        types = {p.name: kinds.get(p.type, p.type) for p in plan.parameters(planning, entry)}
        constants = {name: 1 for name, kind in types.items() if kind == "constexpr"}
        function = Specialised(source_path(planning), entry, types, constants, warps=plan.WARPS)
        built = compile_ahead(function, Target.of(arch))
        assert built.metadata.shared + planning.shared(entry) <= 48 * 1024  # what a block may use without asking


def test_what_no_kernel_makes_is_left_to_tensor_operations() -> None:
    made = {work.name for work in planning_of("everything").works}
    levels, builder = lowered_builder(KINDS["everything"], CALL)
    assert made == set(builder.tables) - {op["name"] for op in levels.program.operands if op.kind == "constants"}


def test_bounds_are_made_behind_what_they_read() -> None:
    planning = planning_of("lists")
    assert {work.op.kind for work in planning.of(SPLIT)} == {"splits", "groups"}
    assert set(plan.reads(planning)) <= {work.name for work in planning.works}


def test_groups_are_made_beside_the_bitmap_of_their_units() -> None:
    planning = planning_of("tokens")
    assert {work.op.kind for work in planning.of(SPLIT)} == {"splits"}
    assert [work.partner for work in planning.works if work.method == "marked"] == ["groups_0"]


@pytest.mark.parametrize(("arch", "shared"), [("sm_80", True), ("sm_90", True), ("gfx942", False)])
def test_bitmaps_lie_in_shared_memory_where_ptx_reaches_it(arch: str, shared: bool) -> None:
    planning = planning_of("tokens", arch=arch)
    assert [work.bitmap > 0 for work in planning.works if work.method == "marked"] == [shared]
    assert (planning.shared(COLLECT) > 0) is shared
    assert planning.shared(SPLIT) == 0
    assert ("red.shared.or" in source_path(planning).read_text()) is shared


@pytest.mark.parametrize("units", [1, 2048, 2049, 2**15, 2**17, 2**20])
@pytest.mark.parametrize("entries", [3, 300, 5000])
@pytest.mark.parametrize("words", [0, 1, 2, 8])
def test_lists_fit_shared_memory(units: int, entries: int, words: int) -> None:
    op = next(work.op for work in planning_of("tokens").works if work.method == "marked")
    work = plan.method_of(op, entries, -(-units // 32), shared=True)
    assert work is not None
    work = plan.with_width(replace(work, words=words), entries)
    assert work.shared <= plan.STATIC_SHARED
    assert work.method == "sorted" or work.bitmap >= min(-(-units // 32), plan.BITMAPS[-1])
    assert work.chunk % work.width == 0
    assert work.places % work.copied == 0


class Refusing:
    """A planner whose kernels are not in the cache."""

    def ready(self, builder: Builder) -> None:
        raise CompileError("kernel", given="one that is not in the cache")


def test_torch_makes_the_tables_where_compiling_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.zeros(1, 4, LENGTH, 16), torch.zeros(1, 2, LENGTH, 16)
    attend = sp.attention(KINDS["blocks"])
    wanted = attend.plan(q, k).tables
    monkeypatch.setattr("spgen.ops.planner_of", lambda *_: Refusing())
    monkeypatch.setattr("spgen.ops._makers", {})
    with override(no_compile=True):
        assert all(torch.equal(a, b) for a, b in zip(attend.plan(q, k).tables, wanted, strict=True))
    with pytest.raises(CompileError):
        attend.plan(q, k)


def test_a_program_has_one_planner() -> None:
    levels, _ = lowered_builder(KINDS["blocks"], CALL)
    first = planner(levels.program, Target.of("sm_90"))
    assert isinstance(first, Planner)
    assert planner(levels.program, Target.of("sm_90")) is first
