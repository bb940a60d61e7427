"""Operations of all three levels: text, reader, verifier, interning."""

from __future__ import annotations

import copy
import gc
import pickle
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spgen.errors import PatternError, SpgenError, TextError, VerifyError
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Dialect, Op, Slot, print_op, rewrite, walk
from spgen.ir.pattern import PATTERN, short_text
from spgen.ir.tiles import TILES
from tests.ir.programs import programs

LEVELS = [PATTERN, TILES, KERNEL]
FEW = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("dialect", LEVELS, ids=lambda d: d.name)
@FEW
@given(st.data())
def test_every_level_reads_back_to_the_same_object(dialect: Dialect, data: st.DataObject) -> None:
    op = data.draw(programs(dialect))
    text = print_op(op)
    assert str(op) == text
    assert dialect.read(text) is op
    assert dialect.read(f"// a comment\n\n{text}\n") is op
    dialect.verify(op)
    assert pickle.loads(pickle.dumps(op)) is op
    assert copy.deepcopy(op) is op
    assert rewrite(op, lambda same: same) is op


def causal() -> Op:
    return PATTERN.make("causal")


def test_the_text_is_generic_mlir() -> None:
    op = PATTERN.make("and", causal(), PATTERN.make("window", left=4, right=0))
    assert str(op) == (
        '%0 = "pattern.causal"() : () -> !pattern.value\n'
        '%1 = "pattern.window"() {left = 4, right = 0} : () -> !pattern.value\n'
        '%2 = "pattern.and"(%0, %1) : (!pattern.value, !pattern.value) -> !pattern.value\n'
    )
    assert repr(op) == "<pattern.and with 2 operands>"
    assert op.kind == "and"
    assert op.operands[1]["left"] == 4
    with pytest.raises(KeyError, match=r"pattern\.and has no attribute 'left'"):
        op["left"]


@pytest.mark.parametrize("dialect", LEVELS, ids=lambda d: d.name)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_xdsl_reads_every_level(dialect: Dialect, data: st.DataObject) -> None:
    """A tool that knows nothing of spgen can parse its text (xDSL is no dependency: install it to run this)."""
    context = pytest.importorskip("xdsl.context")
    parser = pytest.importorskip("xdsl.parser")
    op = data.draw(programs(dialect))
    module = parser.Parser(context.Context(allow_unregistered=True), print_op(op)).parse_module()
    assert len(list(module.body.block.ops)) == len(list(walk(op)))


def test_equal_nodes_are_one_object() -> None:
    assert causal() is causal()
    assert PATTERN.make("sink", n=1) is not PATTERN.make("sink", n=2)
    assert Slot(0, "int32", (1, "K")) is Slot(0, "int32", (1, "K"))
    assert Slot(0, "int32", (1, "K")) is not Slot(0, "int32", ("1", "K"))
    assert Op("a.b", (), (("x", True),)) is not Op("a.b", (), (("x", 1),))


def test_unused_nodes_are_freed() -> None:
    PATTERN.make("sink", n=987654321)
    gc.collect()
    assert not [key for key in Op._nodes if "987654321" in str(key)]  # type: ignore[attr-defined]


def test_deep_shared_graphs_are_quick() -> None:
    """Each level doubles the tree: 2^200 leaves, 401 operations."""

    def build() -> Op:
        op = causal()
        for n in range(200):
            op = PATTERN.make("or" if n % 2 else "and", op, PATTERN.make("not", op))
        return op

    start = time.perf_counter()
    op = build()
    assert op is build()
    text = print_op(op)
    assert len(text.splitlines()) == 401
    assert PATTERN.read(text) is op
    PATTERN.verify(op)
    assert rewrite(op, lambda same: same) is op
    assert time.perf_counter() - start < 5


def test_long_chains_have_short_text() -> None:
    op = causal()
    for n in range(500):
        op = PATTERN.make("or", op, PATTERN.make("sink", n=n))
    assert short_text(op).startswith("causal() | sink(0) | sink(1)")


@pytest.mark.parametrize(
    ("dialect", "kind", "attrs", "error", "message"),
    [
        (PATTERN, "window", {"left": -1, "right": 0}, PatternError, "window: left: got -1"),
        (PATTERN, "window", {"left": 1}, SpgenError, r"pattern\.window: right: got None"),
        (PATTERN, "window", {"left": True, "right": 0}, SpgenError, r"pattern\.window: left: got True"),
        (PATTERN, "cover", {"rows": 1, "cols": 1}, SpgenError, r"pattern\.cover: got 0 operands"),
        (PATTERN, "per_head", {}, PatternError, "per_head: got no patterns"),
        (KERNEL, "table", {"name": "t", "heads": "some"}, SpgenError, "table t: heads: got some"),
    ],
)
def test_making_checks(
    dialect: Dialect, kind: str, attrs: dict[str, Any], error: type[SpgenError], message: str
) -> None:
    with pytest.raises(error, match=message):
        dialect.make(kind, **attrs)


def test_the_verifier_underlines_the_operation() -> None:
    bad = Op("pattern.sink", (), (("n", -3),))
    root = Op("pattern.or", (causal(), Op("pattern.not", (bad,), ())), ())
    with pytest.raises(VerifyError, match="sink: n: got -3; allowed: an integer of at least 0") as caught:
        PATTERN.verify(root)
    assert caught.value.line == 2
    assert '  2 | %1 = "pattern.sink"() {n = -3}' in str(caught.value)
    with pytest.raises(VerifyError, match="unknown operation"):
        KERNEL.verify(root)


GOOD = '%0 = "pattern.causal"() : () -> !pattern.value\n'


@pytest.mark.parametrize(
    ("line", "underlined", "message"),
    [
        ('%1 = "pattern.sink"() {n = -3} : () -> !pattern.value', ..., "sink: n: got -3"),
        ('%1 = "pattern.sunk"() : () -> !pattern.value', ..., "unknown operation 'pattern.sunk'"),
        ('%1 = "kernel.let"() : () -> !kernel.value', ..., "unknown operation 'kernel.let'"),
        ('%1 = "pattern.not"(%7) : (!pattern.value) -> !pattern.value', "%7", "%7 is not defined above"),
        ('%1 = "pattern.not"(3) : (!pattern.value) -> !pattern.value', "3", "3 is not defined above"),
        ('%1 = "pattern.not"() : () -> !pattern.value', ..., "got 0 operands"),
        ('%1 = "pattern.sink"() {m = 3} : () -> !pattern.value', ..., "no attribute 'm'"),
        ('%1 = "pattern.sink"() {3} : () -> !pattern.value', "3", "expected name = value"),
        ('%1 = "pattern.sink"() {n = 1, n = 2} : () -> !pattern.value', "2", "n is given twice"),
        ('%1 = "pattern.sink"() {n = "x"} : () -> !pattern.value', '"x"', "expected int"),
        ('%1 = "pattern.sink"() {n = 1.5} : () -> !pattern.value', "1.5", "expected int"),
        ('%1 = "pattern.sink"() {n = 1 : () -> !pattern.value', ":", "expected ','"),
        ('%1 = "pattern.where"() {predicate = "i <"} : () -> !pattern.value', ..., "expected a value"),
        ('%1 = "pattern.where"() {predicate = "exec(i)"} : () -> !pattern.value', ..., "unknown function 'exec'"),
        ('%1 = "pattern.columns"() {index = "$0"} : () -> !pattern.value', ..., "expected ':'"),
        ('%1 = "pattern.columns"() {index = "i"} : () -> !pattern.value', '"i"', "expected a slot"),
        ('%1 = "pattern.columns"() {index = "$0: float32[K]"} : () -> !pattern.value', ..., "got dtype float32"),
        ('%1 = pattern.causal() : () -> !pattern.value', "pattern.causal", "expected an operation"),
        ('"pattern.causal"() : () -> !pattern.value', '"pattern.causal"', "expected a result"),
        ('%1 = "pattern.causal"()', None, "expected ':'"),
        ('%1 = "pattern.causal"() : () -> !kernel.value', None, "expected the type"),
        ('%1 = "pattern.not"(%0) : () -> !pattern.value', None, "expected the type"),
        ('%1 = "pattern.causal"() : () -> !pattern.value; import os', ";", "no meaning"),
        ('%1 = "pattern.causal"() : () -> !pattern.value import os', None, "expected the type"),
        ('%0 = "pattern.dense"() : () -> !pattern.value', "%0", "%0 is defined twice"),
        ("import os", "import", "expected a result"),
        ('%1 = "pattern.cau\\', '"', "no meaning"),
    ],
)  # fmt: skip
def test_bad_text_is_underlined(line: str, underlined: Any, message: str) -> None:
    """`...` stands for the whole line."""
    text = f"{GOOD}{line}\n"
    with pytest.raises(TextError) as caught:
        PATTERN.read(text)
    error = caught.value
    assert message in str(error)
    assert error.text == text
    assert error.line == 2
    if underlined is not None:
        assert text[error.start : error.end] == (line if underlined is ... else underlined)


@pytest.mark.parametrize("text", ["", "\n\n", "// nothing\n"])
def test_empty_text_is_no_program(text: str) -> None:
    with pytest.raises(TextError, match="no operation"):
        PATTERN.read(text)


def test_names_of_a_kernel_are_defined_before_use() -> None:
    head = '%0 = "kernel.let"() {name = "x", per = "row", value = "i + 1"} : () -> !kernel.value\n'
    body = (
        '%1 = "kernel.segment"() {name = "s", contiguous = true, column = "p", start = "0", stop = "STOP"}'
        " : () -> !kernel.value\n"
        '%2 = "kernel.attention"(%0, %1) {dtype = "float32", head_dim = 64, value_dim = 64, block_m = 64, block_n = 64,'
        ' pack = 1, q_offset = "default", kv_lengths = false, cu_seqlens = false, softcap = false,'
        ' sinks = false, bias = "none", lse = true, options = []}'
        " : (!kernel.value, !kernel.value) -> !kernel.value\n"
    )
    assert KERNEL.read(head + body.replace("STOP", "x + q_len")).kind == "attention"
    for stop, name in (("y", "y"), ("p", "p"), ("load(t, 0, 0)", "t")):
        with pytest.raises(VerifyError, match=f"s: stop: got undefined '{name}'") as caught:
            KERNEL.read(head + body.replace("STOP", stop))
        assert caught.value.line == 3
