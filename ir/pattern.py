"""Level 1, PATTERN: sets of (head, row, column) triples; no tiles, no target.

The node of a pattern has two texts. The level's text is one operation per line, as at every level. The short text is
what users see and what the PyTorch op carries; it reads back to the same node:

    causal() & (sink(64) | window(1024))
    causal() & block(128, mask=$0: bool[1, 8, R, C])

Positions: row `r` of the call stands at `i = r + q_offset`; `j` is the key, `b` the sequence, `h` the query head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from spgen.errors import PatternError, SpgenError, TextError
from spgen.ir.expr import free_variables, from_tree, tables
from spgen.ir.node import Dialect, Op, OpDef, Slot, rewrite, walk
from spgen.ir.text import Tree, float_text, parse

PREDICATE_VARIABLES = ("b", "h", "i", "j")
INTEGERS = ("int32", "int64")
MASKS = ("bool", "uint8")
MAGNITUDE = "magnitude()"  # the score of selections that name none: the size of weights


def by_weights(kind: str, attrs: Mapping[str, Any]) -> bool:
    """Whether these attributes are a selection without a score, which then ranks weights by their size."""
    if attrs.get("scores") is not None:
        return False
    if kind == "n_of_m":
        return attrs.get("mask") is None
    return kind in ("block", "top_k") and attrs.get("density" if kind == "block" else "k") is not None


def _at_least(op: Op, **floors: int) -> SpgenError | None:
    for name, floor in floors.items():
        if op[name] is not None and op[name] < floor:
            return PatternError(f"{op.kind}: {name}", given=op[name], allowed=f"an integer of at least {floor}")
    return None


def _floors(**floors: int) -> Any:
    return lambda op: _at_least(op, **floors)


def _one_of(op: Op, *names: str, remedy: str) -> SpgenError | None:
    given = [name for name in names if op[name] is not None]
    if len(given) == 1:
        return None
    found = "nothing" if not given else " and ".join(given)
    return PatternError(f"{op.kind}: data", given=found, allowed=f"exactly one of {', '.join(names)}", remedy=remedy)


def _slot(op: Op, name: str, dtypes: tuple[str, ...], *ranks: int) -> SpgenError | None:
    slot = op[name]
    if slot is None:
        return None
    if slot.dtype not in dtypes:
        return PatternError(f"{op.kind}: {name}", given=f"dtype {slot.dtype}", allowed=" or ".join(dtypes))
    if len(slot.dims) not in ranks:
        allowed = "rank " + " or ".join(map(str, ranks))
        return PatternError(f"{op.kind}: {name}", given=f"rank {len(slot.dims)}", allowed=allowed)
    return None


def _check_stripe(op: Op) -> SpgenError | None:
    return _at_least(op, stride=1, width=1, cols=1)


def _check_where(op: Op) -> SpgenError | None:
    predicate = op["predicate"]
    unknown = free_variables(predicate) - set(PREDICATE_VARIABLES)
    if unknown or tables(predicate):
        name = sorted(unknown or tables(predicate))[0]
        return PatternError("where", given=f"a predicate of {name!r}", allowed="f(i, j) or f(b, h, i, j)")
    if not predicate.is_bool:
        return PatternError("where", given=f"the integer `{predicate}`", allowed="a condition, such as i - j < 8")
    return None


def _check_block(op: Op) -> SpgenError | None:
    return (
        _at_least(op, rows=1, cols=1)
        or _one_of(op, "mask", "indices", "density", remedy="pass mask=, indices=, or density= with scores=")
        or _slot(op, "mask", MASKS, 2, 3, 4)
        or _slot(op, "indices", INTEGERS, *((1, 2, 3) if op["indptr"] is not None else (2, 3, 4)))
        or _slot(op, "indptr", INTEGERS, 1, 2, 3)
        or _check_selection(op, "density")
    )  # fmt: skip


def _check_selection(op: Op, count: str) -> SpgenError | None:
    """A selection needs a score; a density lies in (0, 1]; given data need neither a score nor candidates."""
    if op[count] is None and op["scores"] is not None:
        return PatternError(f"{op.kind}: scores", given="a score together with data", allowed=f"a score with {count}=")
    if len(op.operands) > (op[count] is not None):
        return PatternError(f"{op.kind}: among", given=f"{len(op.operands)} patterns", allowed=f"one, with {count}=")
    if op[count] is not None and op["scores"] is None:
        return PatternError(f"{op.kind}: scores", given="nothing", allowed=f"a score, because {count}= was given")
    if count == "density" and op[count] is not None and not 0 < op[count] <= 1:
        return PatternError(f"{op.kind}: density", given=op[count], allowed="a fraction in (0, 1]")
    return None


def _check_top_k(op: Op) -> SpgenError | None:
    return (
        _at_least(op, k=1, rows=1, cols=1)
        or _one_of(op, "index", "k", remedy="pass an index tensor, or a count with scores=")
        or _slot(op, "index", INTEGERS, 2, 3, 4)
        or _check_selection(op, "k")
    )


def _check_vertical_slash(op: Op) -> SpgenError | None:
    given = tuple(name for name in ("columns", "offsets", "vertical", "slash") if op[name] is not None)
    if given not in (("columns", "offsets"), ("vertical", "slash")):
        return PatternError(
            "vertical_slash: data",
            given=" and ".join(given) or "nothing",
            allowed="columns and offsets, or vertical, slash and scores",
            remedy="use columns() or diagonals() for one of the two alone",
        )
    return (
        _slot(op, "columns", INTEGERS, 1, 2, 3)
        or _slot(op, "offsets", INTEGERS, 1, 2, 3)
        or _at_least(op, vertical=0, slash=0)
        or _check_selection(op, "vertical")
    )


def _check_n_of_m(op: Op) -> SpgenError | None:
    problem = _at_least(op, n=1, m=1)
    if problem is None and op["n"] > op["m"]:
        problem = PatternError("n_of_m: n", given=op["n"], allowed=f"at most m = {op['m']}")
    return (
        problem
        or _one_of(op, "mask", "scores", remedy="pass mask=, or scores=")
        or _slot(op, "mask", MASKS, 2, 3, 4)
        or _check_selection(op, "scores")
    )


def _check_permuted(op: Op) -> SpgenError | None:
    if op["q"] is None and op["k"] is None and op["k_rule"] is None:
        return PatternError("permuted: order", given="neither q= nor k=", allowed="an order of rows, of keys, or both")
    if op["k"] is not None and op["k_rule"] is not None:
        return PatternError("permuted: k", given="an order and a rule", allowed="one of the two")
    return _slot(op, "q", INTEGERS, 1, 2, 3) or _slot(op, "k", INTEGERS, 1, 2, 3)


def _check_per_head(op: Op) -> SpgenError | None:
    return None if op.operands else PatternError("per_head", given="no patterns", allowed="one pattern for each head")


PATTERN = Dialect(
    "pattern",
    {
        "dense": OpDef(),
        "causal": OpDef(),
        "sink": OpDef({"n": "int"}, check=_floors(n=0)),
        "window": OpDef({"left": "int", "right": "int"}, check=_floors(left=0, right=0)),
        "stripe": OpDef(
            {
                "stride": "int", "width": "int", "offset": "int", "cols": "int", "relative": "bool",
                "shift_per_head": "int",
            },
            check=_check_stripe,
        ),
        "where": OpDef({"predicate": "expr"}, check=_check_where),
        "block": OpDef(
            {
                "rows": "int", "cols": "int", "mask": "slot?", "indices": "slot?", "indptr": "slot?",
                "density": "float?", "scores": "str?",
            },
            operands=None,
            check=_check_block,
        ),
        "columns": OpDef({"index": "slot"}, check=lambda op: _slot(op, "index", INTEGERS, 1, 2, 3)),
        "diagonals": OpDef({"offsets": "slot"}, check=lambda op: _slot(op, "offsets", INTEGERS, 1, 2, 3)),
        "vertical_slash": OpDef(
            {"columns": "slot?", "offsets": "slot?", "vertical": "int?", "slash": "int?", "scores": "str?"},
            operands=None,
            check=_check_vertical_slash,
        ),
        "top_k": OpDef(
            {"index": "slot?", "k": "int?", "rows": "int", "cols": "int", "scores": "str?"},
            operands=None,
            check=_check_top_k,
        ),
        "n_of_m": OpDef(
            {"n": "int", "m": "int", "mask": "slot?", "scores": "str?"}, operands=None, check=_check_n_of_m
        ),
        "documents": OpDef({"cu_seqlens": "slot"}, check=lambda op: _slot(op, "cu_seqlens", INTEGERS, 1)),
        "permuted": OpDef({"q": "slot?", "k": "slot?", "k_rule": "str?"}, operands=1, check=_check_permuted),
        "cover": OpDef({"rows": "int", "cols": "int"}, operands=1, check=_floors(rows=1, cols=1)),
        "per_head": OpDef(operands=None, check=_check_per_head),
        # The core, into which passes bring everything above. `before` is the half-line j < bound, with a bound that
        # never falls as i grows; `listed` is every kind of listed block (rows = 0: one list for all rows); `union`
        # and `term` are the disjunctive normal form.
        "before": OpDef({"bound": "expr"}),
        "listed": OpDef(
            {"rows": "int", "cols": "int", "mask": "slot?", "indices": "slot?", "indptr": "slot?"},
        ),
        "union": OpDef(operands=None),
        "term": OpDef(operands=None),
        "and": OpDef(operands=2),
        "or": OpDef(operands=2),
        "not": OpDef(operands=1),
    },
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """How an operation is written in the short text: positional attributes, then keywords with their defaults.

    "index|k" is a slot or, in the same place, what a selection has instead; "=rows" repeats another attribute; `among`
    says that an operand may follow as among=.
    """

    positional: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = ()  # type: ignore[assignment]
    pattern: bool = False
    among: bool = False


SIGNATURES: dict[str, Signature] = {
    "dense": Signature(),
    "causal": Signature(),
    "sink": Signature(("n",)),
    "window": Signature(("left",), {"right": 0}),
    "stripe": Signature(
        ("stride",), {"width": 1, "offset": 0, "cols": 1, "relative": False, "shift_per_head": 0}
    ),
    "where": Signature(("predicate",)),
    "block": Signature(
        ("rows",), {"cols": "=rows", "mask": None, "indices": None, "indptr": None, "density": None, "scores": None},
        among=True,
    ),
    "columns": Signature(("index",)),
    "diagonals": Signature(("offsets",)),
    "vertical_slash": Signature(
        (), {"columns": None, "offsets": None, "vertical": None, "slash": None, "scores": None}, among=True
    ),
    "top_k": Signature(("index|k",), {"rows": 1, "cols": 1, "scores": None}, among=True),
    "n_of_m": Signature(("n", "m"), {"mask": None, "scores": None}, among=True),
    "documents": Signature(("cu_seqlens",)),
    "permuted": Signature((), {"q": None, "k|k_rule": None}, pattern=True),
    "cover": Signature(("rows", "cols"), pattern=True),
}  # fmt: skip
_SIGNS = {"or": ("|", 1), "and": ("&", 2)}


def short_text(node: Op) -> str:
    """One line that `read_short` turns into the same node."""
    done: dict[Op, tuple[str, int]] = {}
    for op in walk(node):
        done[op] = _short(op, [done[operand] for operand in op.operands])
    return done[node][0]


def _short(op: Op, inner: list[tuple[str, int]]) -> tuple[str, int]:
    """Text and precedence of `op`, given those of its operands."""

    def within(at: int, level: int) -> str:
        text, own = inner[at]
        return text if own >= level else f"({text})"

    if op.kind in _SIGNS:
        sign, level = _SIGNS[op.kind]
        return f"{within(0, level)} {sign} {within(1, level + 1)}", level
    if op.kind == "not":
        return f"~{within(0, 3)}", 3
    if op.kind == "per_head":
        return f"per_head([{', '.join(text for text, _ in inner)}])", 4
    return f"{op.kind}({', '.join(_arguments(op, [text for text, _ in inner]))})", 4


def _arguments(op: Op, inner: list[str]) -> Iterator[str]:
    signature = SIGNATURES[op.kind]
    if signature.pattern:
        yield inner[0]
    for name in signature.positional:
        yield next(_value_text(op[n]) for n in name.split("|") if op[n] is not None)
    for names, default in dict(signature.keywords).items():
        for name in names.split("|"):
            if op[name] != (op[default[1:]] if isinstance(default, str) else default):
                yield f"{names.partition('|')[0]}={_value_text(op[name])}"
    if signature.among and inner:
        yield f"among={inner[0]}"


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return float_text(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@lru_cache(maxsize=1024)
def read_short(text: str) -> Op:
    """The node that prints as `text`; raises TextError with the faulty part underlined."""
    try:
        return _Reader(text).node(parse(text))
    except RecursionError:
        raise TextError("this text is nested too deeply", text=text, start=0, end=1) from None


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, message: str, where: Tree) -> TextError:
        return TextError(message, text=self.text, start=where.start, end=where.end)

    def node(self, tree: Tree) -> Op:
        if tree.kind == "binary" and tree.head in "|&-":
            left, right = map(self.node, tree.items)
            right = PATTERN.make("not", right) if tree.head == "-" else right
            return PATTERN.make("or" if tree.head == "|" else "and", left, right)
        if tree.kind == "unary" and tree.head == "~":
            return PATTERN.make("not", self.node(tree.items[0]))
        if tree.kind != "call":
            raise self.fail("expected a pattern such as causal()", tree)
        if tree.head not in (*SIGNATURES, "per_head"):
            raise self.fail(f"unknown pattern {tree.head!r}: known are {', '.join([*SIGNATURES, 'per_head'])}", tree)
        try:
            return self._per_head(tree) if tree.head == "per_head" else self._call(tree, SIGNATURES[tree.head])
        except PatternError as error:
            raise self.fail(str(error), tree) from None

    def _per_head(self, tree: Tree) -> Op:
        if [item.kind for item in tree.items] != ["list"]:
            raise self.fail("per_head takes one list of patterns", tree)
        return PATTERN.make("per_head", *map(self.node, tree.items[0].items))

    def _call(self, tree: Tree, signature: Signature) -> Op:
        kinds = PATTERN.ops[tree.head].attrs
        places = {n.partition("|")[0]: n.split("|") for n in (*signature.positional, *dict(signature.keywords))}
        attrs = {part: value for names, value in dict(signature.keywords).items() for part in names.split("|")}
        operands: list[Op] = []
        given = list(tree.positional())
        if signature.pattern:
            if not given:
                raise self.fail(f"{tree.head} needs a pattern", tree)
            operands.append(self.node(given.pop(0)))
        if len(given) > len(places):
            raise self.fail(f"{tree.head} takes at most {len(places)} arguments", given[-1])
        seen = set()
        keywords = [(item.head, item.items[0]) for item in tree.items if item.kind == "keyword"]
        for name, value in [*zip(places, given, strict=False), *keywords]:
            if name in seen:
                raise self.fail(f"{tree.head} has {name} twice", value)
            seen.add(name)
            if name == "among" and signature.among:
                operands.append(self.node(value))
            elif name in places:
                attribute = places[name][0 if value.kind == "slot" else -1]
                attrs[attribute] = self._value(value, kinds[attribute])
            else:
                raise self.fail(f"{tree.head} has no argument {name!r}: it has {', '.join(places)}", value)
        missing = [n for n in signature.positional if not any(attrs.get(part) is not None for part in n.split("|"))]
        if missing:
            raise self.fail(f"{tree.head} needs {missing[0].replace('|', ' or ')}", tree)
        resolved = {
            name: attrs[value[1:]] if isinstance(value, str) and value.startswith("=") else value
            for name, value in attrs.items()
        }
        if by_weights(tree.head, resolved):
            resolved["scores"] = MAGNITUDE
        return PATTERN.make(tree.head, *operands, **resolved)

    def _value(self, tree: Tree, kind: str) -> Any:
        kind = kind.rstrip("?")
        if kind == "expr":
            return from_tree(tree, self.text)
        if kind == "slot" and tree.kind == "slot":
            return Slot.from_tree(tree)
        if kind == "int" and tree.kind == "int":
            return int(tree.head)
        if kind == "int" and tree.kind == "unary" and tree.head == "-" and tree.items[0].kind == "int":
            return -int(tree.items[0].head)
        if kind == "float" and tree.kind in ("int", "float"):
            return float(tree.head)
        if kind == "bool" and tree.head in ("true", "false"):
            return tree.head == "true"
        if kind == "str" and tree.kind == "call":
            return self.text[tree.start : tree.end]
        raise self.fail(f"expected {kind}", tree)


def slots(node: Op) -> tuple[Slot, ...]:
    """The distinct tensors the pattern needs, in the order of their index."""
    found = {value for op in walk(node) for _, value in op.attrs if isinstance(value, Slot)}
    return tuple(sorted(found, key=lambda slot: slot.index))


def renumber(node: Op, index: Mapping[int, int]) -> Op:
    """`node` with slot n renamed to slot index[n]."""

    def rule(op: Op) -> Op:
        attrs = tuple(
            (name, Slot(index[v.index], v.dtype, v.dims) if isinstance(v, Slot) else v) for name, v in op.attrs
        )
        return Op(op.name, op.operands, attrs)

    return rewrite(node, rule)


def is_selected(op: Op) -> bool:
    """Whether the operation's data are still to be computed by a selection."""
    return any(name in ("scores", "k_rule") and value is not None for name, value in op.attrs)


def conjunction(*ops: Op) -> Op:
    """The pairs in all of `ops`."""
    return reduce(lambda a, b: PATTERN.make("and", a, b), ops) if ops else PATTERN.make("dense")


def disjunction(*ops: Op) -> Op:
    """The pairs in any of `ops`."""
    return reduce(lambda a, b: PATTERN.make("or", a, b), ops) if ops else negation(PATTERN.make("dense"))


def negation(op: Op) -> Op:
    """The pairs not in `op`."""
    return op.operands[0] if op.kind == "not" else PATTERN.make("not", op)
