"""The language: values, their text, their slots, and every mistake one can make in it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.errors import DataError, DtypeError, PatternError, ShapeError, SpgenError, TextError
from spgen.patterns import Pattern


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_importing_spgen_imports_nothing_else() -> None:
    heavy = ["torch", "sympy", "networkx", "jinja2", "triton", "tvm", "tvm_ffi", "numpy", "typer", "rich"]
    code = (
        "import sys, spgen as sp\n"
        f"assert not set({heavy}) & set(sys.modules)\n"
        "sp.causal() & (sp.sink(4) | ~sp.where(lambda i, j: i % 3 == j))\n"
        f"assert not set({heavy}) & set(sys.modules), 'a pattern without data needs no torch'\n"
        "assert sorted(sp.__all__) == sorted(n for n in sp.__all__ if n in dir(sp))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports_are_what_type_checkers_see() -> None:
    import ast
    from pathlib import Path

    tree = ast.parse(Path(sp.__file__).read_text())
    (guarded,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {(n.module, alias.name) for n in guarded.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == {(module, name) for name, module in sp._HOME.items()}


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'casual'"):
        _ = sp.casual


EXAMPLES: list[tuple[Callable[[], Pattern], str]] = [
    (lambda: sp.dense(), "dense()"),
    (lambda: sp.causal() & (sp.sink(64) | sp.window(1024)), "causal() & (sink(64) | window(1024))"),
    (lambda: sp.window(3, right=2), "window(3, right=2)"),
    (lambda: sp.stripe(8, cols=64, shift_per_head=1), "stripe(8, cols=64, shift_per_head=1)"),
    (lambda: sp.stripe(8, 2, -3, relative=True), "stripe(8, width=2, offset=-3, relative=true)"),
    (lambda: sp.block(128, mask=bools(1, 8, 3, 4)), "block(128, mask=$0: bool[1, 8, R, C])"),
    (lambda: sp.block(128, 64, mask=bools(2, 8, 3, 4)), "block(128, cols=64, mask=$0: bool[B, 8, R, C])"),
    (lambda: sp.block(8, mask=bools(3, 4)), "block(8, mask=$0: bool[R, C])"),
    (lambda: sp.block(8, indices=ints(8, 3, 4)), "block(8, indices=$0: int32[8, R, C])"),
    (
        lambda: sp.block(8, indptr=ints(9), indices=ints(5, dtype=torch.int64)),
        "block(8, indices=$0: int64[NNZ], indptr=$1: int32[P])",
    ),
    (lambda: sp.block(8, density=0.1, scores=sp.pooled()), "block(8, density=0.1, scores=pooled())"),
    (lambda: sp.block(8, density=1e-7, scores=sp.pooled()), "block(8, density=1.0e-07, scores=pooled())"),
    (lambda: sp.columns(ints(1, 8, 5)), "columns($0: int32[1, 8, K])"),
    (lambda: sp.columns([0, 3]), "columns($0: int32[K])"),
    (lambda: sp.diagonals(ints(8, 5, dtype=torch.int64)), "diagonals($0: int64[8, K])"),
    (
        lambda: sp.vertical_slash(ints(8, 5), ints(8, 6)),
        "vertical_slash(columns=$0: int32[8, K], offsets=$1: int32[8, K])",
    ),
    (
        lambda: sp.vertical_slash(vertical=1000, slash=6096, scores=sp.last_queries(64)),
        "vertical_slash(vertical=1000, slash=6096, scores=last_queries(64))",
    ),
    (lambda: sp.top_k(ints(8, 3, 4), cols=16), "top_k($0: int32[8, R, K], cols=16)"),
    (lambda: sp.top_k(64, cols=16, scores=sp.page_bounds()), "top_k(64, cols=16, scores=page_bounds())"),
    (
        lambda: sp.top_k(512, scores=sp.column_mass(), among=~sp.window(512)),
        "top_k(512, scores=column_mass(), among=~window(512))",
    ),
    (lambda: sp.n_of_m(2, 4, mask=bools(7, 9)), "n_of_m(2, 4, mask=$0: bool[R, C])"),
    (lambda: sp.n_of_m(2, 4, scores=sp.column_mass()), "n_of_m(2, 4, scores=column_mass())"),
    (lambda: sp.n_of_m(2, 4), "n_of_m(2, 4, scores=magnitude())"),
    (lambda: sp.block(64, density=0.1), "block(64, density=0.1, scores=magnitude())"),
    (lambda: sp.top_k(8, rows=64, scores=sp.wanda()), "top_k(8, rows=64, scores=wanda())"),
    (lambda: sp.documents([0, 5, 12]), "documents($0: int32[N])"),
    (lambda: sp.permuted(sp.causal(), q=ints(7)), "permuted(causal(), q=$0: int32[N])"),
    (
        lambda: sp.permuted(sp.columns(ints(4)), q=ints(7), k=ints(1, 2, 7)),
        "permuted(columns($0: int32[K]), q=$1: int32[N], k=$2: int32[1, 2, N])",
    ),
    (
        lambda: sp.permuted(sp.dense(), k=sp.sort_within(256, scores=sp.last_queries(128))),
        "permuted(dense(), k=sort_within(256, scores=last_queries(128)))",
    ),
    (lambda: sp.cover(sp.causal() - sp.sink(3), 64, 16), "cover(causal() & ~sink(3), 64, 16)"),
    (lambda: sp.per_head([sp.causal()] * 2 + [sp.dense()]), "per_head([causal(), causal(), dense()])"),
    (lambda: sp.where(lambda i, j: (i - j) % 7 == 0), "where((i - j) % 7 == 0)"),
    (lambda: ~(sp.causal() | ~sp.dense()), "~(causal() | ~dense())"),
    (lambda: sp.causal() | (sp.sink(1) | sp.sink(2)), "causal() | (sink(1) | sink(2))"),
]


@pytest.mark.parametrize(("build", "text"), EXAMPLES, ids=[text for _, text in EXAMPLES])
def test_repr_is_short_and_reads_back(build: Callable[[], Pattern], text: str) -> None:
    pattern = build()
    assert repr(pattern) == text
    assert sp.pattern(text, *pattern.data) == pattern
    assert build() == pattern
    assert hash(build()) == hash(pattern)


@pytest.mark.parametrize(("build", "text"), EXAMPLES, ids=[text for _, text in EXAMPLES])
def test_patterns_copy_and_pickle_to_the_same_structure(build: Callable[[], Pattern], text: str) -> None:
    pattern = build()
    for other in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern), copy.copy(pattern)):
        assert other.node is pattern.node
        assert all(map(torch.equal, other.data, pattern.data))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("window( 4,right = 1 )", "window(4, right=1)"),
        ("window(4, 1)", "window(4, right=1)"),
        ("window(left=4)", "window(4)"),
        ("causal()-sink(1)", "causal() & ~sink(1)"),
        ("causal()|sink(1)&sink(2)", "causal() | sink(1) & sink(2)"),
        ("top_k(4, scores=last_queries( 3 ))", "top_k(4, scores=last_queries(3))"),
        ("where(not_there(i) == 0)", None),
        ("where(j >= i)", "where(i <= j)"),
    ],
)
def test_pattern_text_is_read_like_python(text: str, canonical: str | None) -> None:
    if canonical is None:
        with pytest.raises(TextError):
            sp.pattern(text)
    else:
        assert repr(sp.pattern(text)) == canonical


def test_equality_is_structure() -> None:
    assert sp.columns(ints(3)) == sp.columns(torch.ones(7, dtype=torch.int32))
    assert sp.columns(ints(3)) != sp.columns(ints(3, dtype=torch.int64))
    assert sp.columns(ints(2, 3)) != sp.columns(ints(4, 3))
    assert sp.causal() != "causal()"
    assert len({sp.causal(), sp.causal(), sp.sink(1), sp.sink(True + 1)}) == 3


def test_patterns_are_immutable() -> None:
    with pytest.raises(AttributeError):
        sp.causal().node = sp.dense().node  # type: ignore[misc]


def test_slots_are_numbered_in_order_and_shared() -> None:
    a, b, c = ints(3), ints(3), ints(4)
    p = sp.columns(a) & (sp.diagonals(b) | sp.columns(c))
    assert repr(p) == "columns($0: int32[K]) & (diagonals($1: int32[K]) | columns($2: int32[K]))"
    assert [id(x) for x in p.data] == [id(a), id(b), id(c)]
    shared = sp.per_head([sp.columns(c) | sp.columns(a), sp.diagonals(a), sp.columns(b)])
    assert [id(x) for x in shared.data] == [id(c), id(a), id(b)]
    assert "diagonals($1" in repr(shared)
    assert (p | shared).data == (a, b, c)


def test_a_tensor_in_two_roles_keeps_two_slots() -> None:
    mask = bools(4, 4)
    p = sp.block(1, mask=mask) | sp.documents(ints(3)) | sp.block(2, mask=mask)
    assert len(p.data) == 2
    numbers = ints(4)
    p = sp.columns(numbers) | sp.documents(numbers)
    assert repr(p) == "columns($0: int32[K]) | documents($1: int32[N])"
    assert p.data[0] is p.data[1] is numbers


def test_to_moves_the_data() -> None:
    p = sp.columns([1]) | sp.causal()
    assert p.to("meta").data[0].device.type == "meta"
    assert p.to("meta") == p


def test_where_traces_what_python_offers() -> None:
    def written(f: Callable[..., Any]) -> str:
        return repr(sp.where(f)).removeprefix("where(")[:-1]

    w = 8
    assert written(lambda i, j: (i == j) | (i != j + 1)) == "(i == j) | (i != j + 1)"
    assert written(lambda i, j: 3 == i) == "i == 3"  # noqa: SIM300
    assert written(lambda i, j: w > i - j) == "i - j < 8"
    assert written(lambda i, j, s=4: 100 // (j + 1) % s == 2 << (j & 3)) == "100 // (j + 1) % 4 == 2 << (j & 3)"
    assert written(lambda b, h, i, j: (h >> 1 == b) & ~(abs(i - j) >= 5)) == "(h >> 1 == b) & (abs(i - j) < 5)"
    assert written(lambda i, j: (i < j) == (j < 9)) == "~((i < j) ^ (j < 9))"
    assert written(lambda i, j: (i < j) != (j < 9)) == "(i < j) ^ (j < 9)"
    assert written(lambda i, j: (sp.select(i < j, -i, +j) ^ ~i) == 1 | j) == "select(i < j, 0 - i, j) ^ ~i == 1 | j"
    assert written(lambda i, j: sp.minimum(i, 3) <= sp.maximum(2, j)) == "min(i, 3) <= max(2, j)"
    assert written(lambda i, j: 7 - i < 3 * j + (5 & j) + (1 ^ j) + (2 | j)) == (
        "0 - i + 7 < j * 3 + (5 & j) + (1 ^ j) + (2 | j)"
    )


def test_where_accepts_numpy_integers() -> None:
    numpy = pytest.importorskip("numpy")
    assert repr(sp.where(lambda i, j: numpy.int64(3) + i < j)) == "where(i + 3 < j)"


@pytest.mark.parametrize(
    "f", [lambda i, j: True, lambda i, j: i - i < 8, lambda i, j: sp.select(i - i < 8, True, i < j)]
)
def test_a_constant_predicate_is_all_or_nothing(f: Callable[..., Any]) -> None:
    assert sp.where(f) == sp.dense()
    assert sp.where(lambda i, j: not isinstance(f(i, j), object)) == ~sp.dense()


MISTAKES: list[tuple[str, Callable[[], Any], type[SpgenError], str]] = [
    ("negative window", lambda: sp.window(-1), PatternError, r"window: left: got -1\n.*at least 0\n.*remedy"),
    ("negative window right", lambda: sp.window(1, -1), PatternError, "window: right: got -1"),
    ("float window", lambda: sp.window(1.5), DtypeError, "window: left: got 1.5 of type float"),
    ("bool sink", lambda: sp.sink(True), DtypeError, "sink: n: got True"),
    ("tensor sink", lambda: sp.sink(torch.tensor(3)), DtypeError, "sink: n: .*an int"),
    ("negative sink", lambda: sp.sink(-2), PatternError, "sink: n: got -2"),
    ("stride 0", lambda: sp.stripe(0), PatternError, "stripe: stride: got 0"),
    ("width 0", lambda: sp.stripe(2, 0), PatternError, "stripe: width: got 0"),
    ("relative 1", lambda: sp.stripe(2, relative=1), DtypeError, "stripe: relative: got 1"),
    ("no data", lambda: sp.block(8), PatternError, "block: data: got nothing.*density.*remedy: pass mask="),
    ("two data", lambda: sp.block(8, mask=bools(1, 1), indices=ints(1, 1)), PatternError, "got mask and indices"),
    ("indptr alone", lambda: sp.block(8, indptr=ints(3)), PatternError, "block: indices: got indptr without"),
    ("rows 0", lambda: sp.block(0, mask=bools(1, 1)), PatternError, "block: rows: got 0"),
    ("cols 0", lambda: sp.block(8, 0, mask=bools(1, 1)), PatternError, "block: cols: got 0"),
    ("float mask", lambda: sp.block(8, mask=torch.ones(1, 1)), DtypeError, "mask: got dtype float32.*bool or uint8"),
    ("1-d mask", lambda: sp.block(8, mask=bools(4)), ShapeError, r"mask: got shape \[4\].*\[R, C\] or \[H, R, C\]"),
    ("5-d mask", lambda: sp.block(8, mask=bools(1, 1, 1, 1, 1)), ShapeError, "block: mask"),
    ("list mask", lambda: sp.block(8, mask="no"), DtypeError, "block: mask: got str"),
    ("density 0", lambda: sp.block(8, density=0, scores=sp.pooled()), PatternError, "block: density: got 0"),
    ("density 2", lambda: sp.block(8, density=2.0, scores=sp.pooled()), PatternError, "block: density: got 2.0"),
    ("density text", lambda: sp.block(8, density="x", scores=sp.pooled()), DtypeError, "block: density"),
    (
        "no score", lambda: sp.vertical_slash(vertical=3, slash=3), PatternError,
        "vertical_slash: scores: got nothing.*vertical=.*remedy",
    ),
    ("score is text", lambda: sp.top_k(8, scores="pooled()"), DtypeError, "top_k: scores: got pooled"),
    ("score with data", lambda: sp.top_k(ints(2, 2), scores=sp.pooled()), PatternError, "top_k: scores: .* with data"),
    ("among with data", lambda: sp.block(8, mask=bools(1, 1), among=sp.causal()), PatternError, "block: among"),
    ("among no pattern", lambda: sp.top_k(8, scores=sp.pooled(), among=3), DtypeError, "among: got int"),
    ("float columns", lambda: sp.columns(torch.zeros(3)), DtypeError, "index: got dtype float32.*int32 or int64"),
    ("int16 columns", lambda: sp.columns(ints(3, dtype=torch.int16)), DtypeError, r"\.to\(torch\.int32\)"),
    ("4-d columns", lambda: sp.columns(ints(1, 1, 1, 1)), ShapeError, r"\[K\] or \[H, K\] or \[B, H, K\]"),
    ("list of floats", lambda: sp.columns([1.0]), DtypeError, "columns: index: got 1.0"),
    ("list of large", lambda: sp.columns([0, 2**31]), DataError, "columns: index at 1: got 2147483648"),
    ("nothing", lambda: sp.vertical_slash(), PatternError, "vertical_slash: data: got nothing"),
    ("half", lambda: sp.vertical_slash(ints(3)), PatternError, "data: got columns\n.*\n.*columns\\(\\) or"),
    ("mixed", lambda: sp.vertical_slash(ints(3), slash=3), PatternError, "got columns and slash"),
    ("no slash", lambda: sp.vertical_slash(vertical=3, scores=sp.pooled()), PatternError, "got vertical"),
    ("k 0", lambda: sp.top_k(0, scores=sp.pooled()), PatternError, "top_k: index: got 0"),
    ("index list", lambda: sp.top_k([[1]]), DtypeError, "top_k: index: got .*list"),
    ("1-d top_k", lambda: sp.top_k(ints(3)), ShapeError, r"top_k: index.*\[R, K\]"),
    ("n > m", lambda: sp.n_of_m(5, 4, mask=bools(1, 1)), PatternError, "n_of_m: n: got 5.*at most m = 4"),
    (
        "n_of_m twice", lambda: sp.n_of_m(2, 4, mask=bools(4, 4), scores=sp.magnitude()), PatternError,
        "n_of_m: data: got mask and scores",
    ),
    ("2-d cu_seqlens", lambda: sp.documents(ints(1, 3)), ShapeError, r"cu_seqlens: got shape \[1, 3\].*\[N\]"),
    ("no order", lambda: sp.permuted(sp.causal()), PatternError, "permuted: order"),
    ("rule for q", lambda: sp.permuted(sp.causal(), q=sp.sort_within(4, scores=sp.pooled())), DtypeError, ": q"),
    ("score for k", lambda: sp.permuted(sp.causal(), k=sp.pooled()), DtypeError, r"sort_within\(n, scores=pooled"),
    ("permuted tensor", lambda: sp.permuted(ints(3), k=ints(3)), DtypeError, "permuted: p: got Tensor"),
    ("cover 0", lambda: sp.cover(sp.causal(), 0, 4), PatternError, "cover: rows: got 0"),
    ("empty per_head", lambda: sp.per_head([]), PatternError, "per_head: got no patterns"),
    ("per_head of ints", lambda: sp.per_head([sp.causal(), 3]), DtypeError, "per_head: pattern 1: got int"),
    ("uncalled", lambda: sp.causal & sp.sink(3), DtypeError, r"operand of &: got function\n.*\n.*call it: causal\("),
    ("or with a mask", lambda: sp.causal() | bools(3, 3), DtypeError, r"wrap a mask as sp\.block\(1, mask"),
    ("mask or", lambda: bools(3, 3) | sp.causal(), DtypeError, r"wrap a mask as sp\.block\(1, mask"),
    ("minus int", lambda: 3 - sp.causal(), DtypeError, "operand of -: got int"),
    ("and/or", lambda: sp.causal() and sp.dense(), PatternError, r"truth value of `causal\(\)`.*remedy: write &"),
    ("chain", lambda: sp.where(lambda i, j: 0 <= i - j < 3), PatternError, r"where: the truth value of.*sp\.select"),
    ("if", lambda: sp.where(lambda i, j: i if i < j else j), PatternError, "truth value"),
    ("not", lambda: sp.where(lambda i, j: not i), PatternError, "truth value"),
    ("in", lambda: sp.where(lambda i, j: i in (1, 2)), PatternError, "truth value"),
    ("lookup", lambda: sp.where(lambda i, j: [1, 2][i] == j), PatternError, "the number behind `i`.*pass them as data"),
    ("range", lambda: sp.where(lambda i, j: j in range(i)), PatternError, "the number behind `i`"),
    ("float()", lambda: sp.where(lambda i, j: float(i) < 3), PatternError, "the number behind"),
    ("division", lambda: sp.where(lambda i, j: i / 2 < j), PatternError, "remedy: write //"),
    ("by zero", lambda: sp.where(lambda i, j: i % 0 == j), PatternError, "divisor other than 0"),
    ("shift", lambda: sp.where(lambda i, j: i << -1 == j), PatternError, "shift by 0 to 62"),
    ("float const", lambda: sp.where(lambda i, j: i * 0.5 < j), DtypeError, r"operand of \*: got 0.5 of type float"),
    ("tensor", lambda: sp.where(lambda i, j: i < torch.ones(3)), DtypeError, "tensors are data"),
    ("integer", lambda: sp.where(lambda i, j: i - j), PatternError, "where: got the integer `i - j`"),
    ("None", lambda: sp.where(lambda i, j: None), PatternError, "where: got None"),
    ("arity", lambda: sp.where(lambda i: i < 3), PatternError, r"function of 1 arguments\n.*f\(b, h, i, j\)"),
    ("no function", lambda: sp.where(3), DtypeError, "where: f: got 3"),
    ("mixed &", lambda: sp.where(lambda i, j: i & (j < 3)), PatternError, "the condition `j < 3` and the integer `i`"),
    ("bool +", lambda: sp.where(lambda i, j: (i < 3) + j < 2), PatternError, "sp.select"),
    ("select int", lambda: sp.where(lambda i, j: sp.select(i, i, j) < 3), PatternError, "select: condition"),
    ("last_queries 0", lambda: sp.last_queries(0), PatternError, "last_queries: n: got 0"),
    ("last_queries 1.0", lambda: sp.last_queries(1.0), DtypeError, "last_queries: n"),
    ("sort_within text", lambda: sp.sort_within(4, scores="x"), DtypeError, "sort_within: scores"),
    ("missing data", lambda: sp.pattern("columns($0: int32[K])"), PatternError, r"got 0 tensors\n.*each of \$0"),
    ("surplus data", lambda: sp.pattern("causal()", ints(3)), PatternError, "got 1 tensors\n.*none"),
    ("slot gap", lambda: sp.pattern("columns($1: int32[K])", ints(3)), PatternError, "without gaps"),
    ("no tensor", lambda: sp.pattern("columns($0: int32[K])", 3), DtypeError, r"columns: index \(\$0\): got int"),
    ("slot dtype", lambda: sp.pattern("columns($0: int32[K])", ints(3, dtype=torch.int64)), DtypeError, "dtype int64"),
    ("slot rank", lambda: sp.pattern("columns($0: int32[8, K])", ints(3)), ShapeError, r"shape \[3\].*\[8, 'K'\]"),
    ("slot heads", lambda: sp.pattern("columns($0: int32[8, K])", ints(4, 3)), ShapeError, r"shape \[4, 3\]"),
    ("heads letter", lambda: sp.pattern("columns($0: int32[H, K])", ints(4, 3)), ShapeError, "number of heads"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "act", "error", "message"), MISTAKES, ids=[case[0] for case in MISTAKES])
def test_mistakes_are_explained(name: str, act: Callable[[], Any], error: type[SpgenError], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        act()


@pytest.mark.parametrize(
    ("text", "underlined"),
    [
        ('__import__("os").system("ls")', "."),
        ('__import__("os")', '__import__("os")'),
        ("causal() and dense()", "and"),
        ("(lambda: causal())()", ":"),
        ("causal().node", "."),
        ("casual()", "casual()"),
        ("causal", "causal"),
        ("window(4", None),
        ("window()", "window()"),
        ("window(1, 2, 3)", "3"),
        ("window(-1)", "window(-1)"),
        ("window(4, left=4)", "4"),
        ("window(4, wide=4)", "4"),
        ("window(1.5)", "1.5"),
        ("sink(n=1, n=2)", "2"),
        ("cover(4, 4)", "4"),
        ("cover()", "cover()"),
        ("permuted(k=$0: int32[N])", "permuted(k=$0: int32[N])"),
        ("per_head(causal())", "per_head(causal())"),
        ("per_head([])", "per_head([])"),
        ("where(i - j)", "where(i - j)"),
        ("where(x < 3)", "where(x < 3)"),
        ("where(i.__class__ == 3)", "where(i.__class__ == 3)"),
        ("where(open(i) == 3)", "open(i)"),
        ("where(load(t, i, j) == 3)", "where(load(t, i, j) == 3)"),
        ("block(4)", "block(4)"),
        ("block(4, mask=$0: float32[R, C])", None),
        ("block(4, mask=$0: bool[R])", None),
        ("columns($0: int32[K + 1])", "K + 1"),
        ("columns($0: int32[-1])", "-1"),
        ("columns([1, 2])", "[1, 2]"),
        ("top_k(4, scores=run(4))", "run(4)"),
        ("top_k(4, scores=last_queries(0))", "last_queries(0)"),
        ("top_k(4, scores=pooled)", "pooled"),
        ("causal() &", None),
        ("", None),
        ("causal(); dense()", ";"),
        ("causal()\n& sink(x)", "x"),
        ("(" * 5000, None),
    ],
)  # fmt: skip
def test_bad_text_is_refused_and_underlined(text: str, underlined: str | None) -> None:
    with pytest.raises(TextError) as caught:
        sp.pattern(text)
    error = caught.value
    if underlined is not None:
        assert error.text[error.start : error.end] == underlined
    assert "^" in str(error) or not text
