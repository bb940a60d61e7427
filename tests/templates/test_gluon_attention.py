"""The rendered Gluon module: complete, readable, without what a kernel does not need; and which kernels it serves."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.templates.gluon import attention, resources
from spgen.templates.render import render
from tests.kernel_cases import CASES, MORE_CASES, causal, let, program, segment, table

ALL = CASES | MORE_CASES
FORMS = {
    "two warpgroups": (128, 128, ("warps=12", "warpgroups=2", "stages=2", "registers=232")),
    "one warpgroup": (64, 64, ("warps=8", "warpgroups=1", "stages=2", "registers=192")),
}
REFUSED = {
    "packed_causal": "calls of few rows",
    "permuted": "permuted rows",
    "arithmetic": "masks that read tables pair by pair",
    "scalar_offset": "rows that do not begin at multiples of 16 bytes",
    "spilled_list": "masks that read tables pair by pair",
    "biased_keys": "calls of few rows",
    "packed_group": "calls of few rows",
}
SERVED = [name for name in ALL if name not in REFUSED]


def asking(kernel: Op, form: str = "two warpgroups", **attrs: Any) -> Op:
    """The kernel with a schedule that asks for a form."""
    changed = {"dtype": "bfloat16", "options": FORMS[form][2], **attrs}
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), **changed})


def case(name: str, form: str = "two warpgroups", **attrs: Any) -> Op:
    return asking(ALL[name](*FORMS[form][:2]).kernel, form, **attrs)


def source(kernel: Op) -> str:
    return render("gluon/attention.py.jinja", **attention.symbols(kernel))


def own(*parts: tuple[str, dict[str, Any]], **attrs: Any) -> Op:
    return asking(program(*parts, block_m=128, block_n=128, **attrs))


def loops(text: str) -> list[str]:
    """The bodies of the loops over tiles of the warps that multiply."""
    consumer = text.partition("def consumer(")[2].partition("# the first scores of the next row tile")[0]
    return re.split(r"\n +for x in ", consumer)[1:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SERVED)
def test_takes_the_promised_parameters(name: str, form: str) -> None:
    kernel = case(name, form)
    module = ast.parse(source(kernel))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    taken = [argument.arg for argument in functions[attention.ENTRY].args.args]
    assert taken == [parameter.name for parameter in attention.parameters(kernel)]
    assert str(kernel).splitlines()[-1] in source(kernel)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SERVED)
def test_is_tidy(name: str, form: str) -> None:
    text = source(case(name, form))
    assert text.endswith("\n")
    assert "\n\n\n\n" not in text
    code = re.sub(r'""".*?"""', '""""""', text, flags=re.DOTALL)
    assert not re.search(r"\n\n +\S", code)
    for line in code.splitlines():
        assert line == line.rstrip()
        assert len(line) <= 120 or line.startswith("    kept &=")  # the pattern's own mask


@pytest.mark.parametrize("name", SERVED)
def test_every_function_is_used(name: str) -> None:
    text = source(case(name)).partition('"""\n')[2]
    known = {attention.ENTRY, "floor_divide", "floor_modulo"}  # by powers of two these are printed otherwise
    for function in {*re.findall(r"^def (\w+)\(", text, re.MULTILINE)} - known:
        assert len(re.findall(rf"\b{function}\b", text)) > 1, function


def test_helpers_come_only_where_they_are_used() -> None:
    text = source(case("dense"))
    for name in ("load", "bit", "word", "count_le", "floor_divide", "deal", "columns_at", "fill_tail", "capped"):
        assert f"def {name}(" not in text
    assert "def fill_tail(" in source(case("lengths_and_offsets"))
    assert "def tile_of(" in source(case("packed_batch"))
    assert "def capped(" in source(case("capped_scores"))
    assert "def columns_at(" in source(case("block_list"))


def test_the_loop_over_whole_tiles_has_no_mask() -> None:
    masked, whole = loops(source(case("causal")))
    assert "mask_run(" in masked
    assert "limits_run(" in masked
    for name in ("mask", "limits", "where", "kv_len"):
        assert name not in whole
    assert "MASKED" not in whole


def test_a_loop_over_tiles_that_are_never_whole_is_left_out() -> None:
    def counted(longest: int) -> bool:
        last = let("last", f"min(kv_len, {longest})")
        return "(full_stop - full_start)" in source(
            own(last, segment("0", "kv_len", full=("0", "last"), mask="j <= i"))
        )

    assert counted(128)
    assert not counted(127)


def test_bounds_of_a_mask_meet_before_columns_come_in() -> None:
    text = source(case("window_and_sink")).partition("def mask_run(")[2].partition("def ")[0]
    assert re.findall(r"kept &?= (.*)", text) == ["near[None, :] < stop[:, None]", "near[None, :] >= first[:, None]"]


def test_columns_of_lists_come_through_shared_memory() -> None:
    assert "write(columns" not in source(case("causal"))
    assert "write(columns" in source(case("block_list"))


def test_a_list_of_narrow_blocks_has_several_boxes_to_a_tile() -> None:
    wide, narrow = case("dense"), case("block_list")
    assert attention.box_of(wide, "k_blocks") == (128, 64)
    assert attention.box_of(narrow, "k_blocks") == attention.box_of(narrow, "v_blocks") == (32, 64)
    assert "BOXES = tl.constexpr(4)" in source(narrow)
    assert attention.box_of(narrow, "q_blocks") == attention.box_of(narrow, "out_blocks") == (64, 64)


@pytest.mark.parametrize(
    ("channels", "held"),
    [(8, [64]), (64, [64]), (80, [64, 32]), (96, [64, 32]), (104, [128]), (128, [128]), (192, [128, 64]), (256, [256])],
)
def test_channels_lie_in_powers_of_two_of_lanes(channels: int, held: list[int]) -> None:
    kernel = case("causal", head_dim=channels, value_dim=channels)
    for parts in (resources.head_parts(kernel), resources.value_parts(kernel)):
        assert [part.lanes for part in parts] == held
        assert [part.start for part in parts] == [0, *held[:-1]]
    assert resources.lanes(channels) == sum(held)
    for name, tensor, part in attention.descriptors(kernel):
        assert attention.box_of(kernel, name) == (128 if tensor in "kv" else 64, part.lanes)
    text = source(kernel)
    products = re.findall(r"scores = warpgroup_mma\(", loops(text)[0])
    assert len(products) == len(held)


def test_no_product_has_more_lanes_than_registers_on_entry() -> None:
    assert [part.lanes for part in resources.value_parts(case("causal", "one warpgroup", value_dim=256))] == [128, 128]


def test_a_bias_of_keys_comes_with_their_tiles() -> None:
    text = source(case("shared_bias"))
    assert "biases.index(stage).store(added)" in text.partition("def consumer(")[0]
    assert text.count(".load(SCORE_COLUMNS)[None, :]") == 4  # in each loop, and twice in a row tile's first step
    assert "distances" not in text


def test_slopes_come_with_row_tiles() -> None:
    text = source(case("alibi"))
    assert "slope = tl.load(bias" in text.partition("def producer(")[0]
    assert "BROUGHT" not in text
    assert text.count("distances(columns") == 4 + 1  # its definition
    assert "write(columns" in text


@pytest.mark.parametrize("form", FORMS)
def test_two_row_tiles_of_q_need_room(form: str) -> None:
    assert resources.is_staged(case("causal", form, head_dim=128, value_dim=128))
    biased = case("shared_bias", form, head_dim=128, value_dim=128)
    assert resources.is_staged(biased) == (form == "two warpgroups")


def test_results_of_wide_heads_go_straight_to_memory() -> None:
    narrow, wide = case("causal"), case("causal", head_dim=192)
    names = [parameter.name for parameter in attention.parameters(wide)]
    assert {"out_b", "out_h", "out_n"} <= {*names}
    assert "out_blocks" not in names
    assert "out_s" not in source(wide)
    assert "out_n" not in {parameter.name for parameter in attention.parameters(narrow)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_refusals(name: str, form: str) -> None:
    assert attention.refusal(case(name, form)) == REFUSED.get(name)


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"dtype": "float32"}, "products of float32"),
        ({"head_dim": 192}, None),
        ({"value_dim": 256}, None),
        ({"head_dim": 264}, "more than 256 channels"),
        ({"value_dim": 320}, "more than 256 channels"),
        ({"head_dim": 20}, "rows that do not begin at multiples of 16 bytes"),
        ({"value_dim": 124}, "rows that do not begin at multiples of 16 bytes"),
        ({"block_m": 64}, "tiles of 64 x 128"),
        ({"block_n": 32}, "tiles of 128 x 32"),
        ({"block_n": 256}, "tiles of 128 x 256"),
        ({"options": ("warps=12",)}, "tiles of 128 x 128"),
        ({"options": ("warpgroups=2", "splits=2")}, "calls of few rows"),
        ({"options": ("warpgroups=3",), "block_m": 192}, "tiles of 192 x 128"),
        ({"options": ("warpgroups=2", "registers=248")}, "248 registers"),
        ({"head_dim": 16, "value_dim": 128}, None),
        ({"dtype": "float16"}, None),
    ],
)
def test_refusals_of_types_and_schedules(attrs: dict[str, Any], reason: str | None) -> None:
    assert attention.refusal(case("causal", **attrs)) == reason


def test_a_kernel_without_segments_is_refused() -> None:
    assert attention.refusal(own()) == "no keys"


def test_narrow_lists_come_row_by_row() -> None:
    def listed(size: int) -> Op:
        column = f"load(blocks, tile, p // {size}) * {size} + p % {size}"
        return own(table("blocks"), segment("0", "kv_len", column=column, contiguous=False))

    assert [attention.gathers(listed(size)) for size in (16, 8, 48)] == [False, True, True]
    assert all(attention.refusal(listed(size)) is None for size in (16, 8, 48))


def test_two_programs_that_bring_rows_leave_no_room_for_results() -> None:
    taller, short = (case("gathered_columns", form, head_dim=128, value_dim=128) for form in FORMS)
    assert resources.is_staged(taller)
    assert not resources.is_staged(short)
    assert "out_s" not in source(short)


def test_what_diagonals_keep_comes_with_their_tiles() -> None:
    mask = "select(r - tile * 64 < 32, word(bits, 0, kv_len - j), word(bits, 0, kv_len - j + 32))"
    run = segment("0", "kv_len", mask=f"({mask} >> (r - tile * 64) % 32 & 1 != 0) & ~bit(columns, 0, j)")
    listed = program(table("bits"), table("columns"), run, block_m=64, block_n=64)
    text = source(asking(listed, "one warpgroup"))
    assert "def marker(" in text
    assert "def tests(" in text
    assert "deal(" not in text
    masked = loops(text)[0]
    assert "limits_run(marks, ready, PART)" in masked
    assert "def marker(" not in source(case("causal"))


@pytest.mark.parametrize("warpgroups", [1, 2])
def test_registers_are_those_of_a_multiprocessor(warpgroups: int) -> None:
    form = "two warpgroups" if warpgroups == 2 else "one warpgroup"
    kernel = asking(causal(64 * warpgroups, 64).kernel, form)
    for options in (kernel["options"], (f"warpgroups={warpgroups}",)):
        chosen = asking(kernel, options=options)
        shared = resources.registers(chosen)
        assert all(count % 8 == 0 for count in shared.values())
        assert min(shared.values()) >= 24  # what setmaxnreg takes at least
        taken = 128 * (warpgroups * shared["multiply"] + shared["bring"])
        assert taken * resources.programs(chosen) <= resources.REGISTERS


@pytest.mark.parametrize("warpgroups", [1, 2])
def test_keys_that_lie_apart_are_brought_one_by_one(warpgroups: int) -> None:
    form = "two warpgroups" if warpgroups == 2 else "one warpgroup"
    kernel = asking(CASES["gathered_columns"](64 * warpgroups, 64).kernel, form)
    assert attention.refusal(kernel) is None
    text = source(kernel)
    assert text.count("async_copy.async_copy_global_to_shared(") == 1
    assert "def gather(" in text
    shared = resources.registers(kernel)
    producers = shared["bring"] if warpgroups == 2 else 0  # two warps bring them beside one warpgroup
    taken = 128 * (warpgroups * shared["multiply"] + producers + shared["schedule"])
    assert taken * resources.programs(kernel) <= resources.REGISTERS
