"""Random programs of any level, from the level's own table of operations."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from spgen.ir.node import Dialect, Op, Slot
from tests.ir.expressions import CONDITIONS, INTEGERS, with_tables

STRINGS = st.one_of(
    st.sampled_from(["q", "kv", "one", "table", "default", "last_queries(64)"]),
    st.text(string.ascii_letters + string.punctuation + " \t\né×\u2028", max_size=6),
)
_SLOTS = st.builds(
    lambda index, dtype, dims: Slot(index, dtype, tuple(dims)),
    st.integers(0, 12),
    st.sampled_from(["int32", "int64", "bool", "uint8"]),
    st.lists(st.one_of(st.integers(0, 64), st.sampled_from("BRCKN")), max_size=4),
)
_KINDS: dict[str, st.SearchStrategy[Any]] = {
    "int": st.one_of(st.integers(0, 9), st.integers(-(2**40), 2**40)),
    "float": st.floats(allow_nan=False, allow_infinity=False, min_value=0),
    "bool": st.booleans(),
    "str": STRINGS,
    "expr": st.one_of(INTEGERS.map(lambda both: both.node), CONDITIONS.map(lambda both: both.node), with_tables()),
    "slot": _SLOTS,
}


def _attribute(draw: st.DrawFn, kind: str, strings: st.SearchStrategy[str]) -> Any:
    if kind.endswith("?"):
        return _attribute(draw, kind[:-1], strings) if draw(st.booleans()) else None
    if kind not in _KINDS:
        return tuple(draw(st.lists({**_KINDS, "str": strings}[kind[:-1]], max_size=3)))
    return draw({**_KINDS, "str": strings}[kind])


@st.composite
def programs(
    draw: st.DrawFn, dialect: Dialect, kinds: Sequence[str] = (), strings: st.SearchStrategy[str] = STRINGS
) -> Op:
    """A graph of valid operations of one level (of these kinds), with sharing; the last one is its root."""
    pool: list[Op] = []
    for kind in draw(st.lists(st.sampled_from(sorted(kinds or dialect.ops)), min_size=1, max_size=12)):
        definition = dialect.ops[kind]
        count = draw(st.integers(0, 4)) if definition.operands is None else definition.operands
        if count and not pool:
            continue
        operands = tuple(draw(st.sampled_from(pool)) for _ in range(count))
        attrs = tuple((name, _attribute(draw, kind, strings)) for name, kind in definition.attrs.items())
        op = Op(f"{dialect.name}.{kind}", operands, attrs)
        if dialect.problem(op) is None:
            pool.append(op)
    return pool[-1] if pool else draw(programs(dialect, kinds, strings))
