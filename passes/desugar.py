"""desugar: every named pattern becomes half-lines, stripes, predicates and lists.

    window(1024)                     ->  ~before(i - 1023) & before(i + 1)
    columns($0) / top_k($0, cols=16) ->  listed(rows=0, cols=1, indices=$0) / listed(rows=1, cols=16, …)
    per_head([window(8), window(9)]) ->  ~before(i - heads(7, 8)) & before(i + 1)
    cover(causal(), 64, 16)          ->  before((i // 64 * 64 + 64 + 15) // 16 * 16)

Heads of a mixture that differ only in constants of half-lines share one body (a per-head table of constants); the
others are told apart by a condition on the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spgen.ir import expr
from spgen.ir.expr import Expr, const, substitute, var
from spgen.ir.node import Op, rewrite
from spgen.ir.pattern import PATTERN, conjunction, disjunction, negation

_I = var("i")
_make = PATTERN.make


def desugar(node: Op) -> Op:
    """`node` in the core operations."""
    return rewrite(node, lambda op: _RULES[op.kind](op) if op.kind in _RULES else op)


def before(bound: Expr) -> Op:
    """j < bound."""
    return _make("before", bound=bound)


def _window(op: Op) -> Op:
    return conjunction(negation(before(_I - op["left"] + 1)), before(_I + op["right"] + 1))


def _documents(op: Op) -> Op:
    """Rows of one document share an interval: its bounds are looked up by the row's position."""
    slot = op["cu_seqlens"].index
    document = expr.count_le(f"document_starts_{slot}", 0, _I)
    low = expr.load(f"document_lows_{slot}", 0, document)
    high = expr.load(f"document_highs_{slot}", 0, document)
    return conjunction(negation(before(low)), before(high))


def _listed(op: Op) -> Op:
    """block, columns, top_k and n_of_m are lists of units of rows x cols."""
    if op.kind == "columns":
        return _make("listed", rows=0, cols=1, indices=op["index"])
    if op.kind == "top_k":
        return _make("listed", rows=op["rows"], cols=op["cols"], indices=op["index"])
    if op.kind == "n_of_m":
        return _make("listed", rows=1, cols=1, mask=op["mask"])
    return _make(
        "listed", rows=op["rows"], cols=op["cols"], mask=op["mask"], indices=op["indices"], indptr=op["indptr"]
    )


def _vertical_slash(op: Op) -> Op:
    columns = _make("listed", rows=0, cols=1, indices=op["columns"])
    return disjunction(columns, _make("diagonals", offsets=op["offsets"]))


def _per_head(op: Op) -> Op:
    """One body for each kind of head; constants that differ within a kind come from a per-head table."""
    kinds: dict[Op, list[int]] = {}
    for head, pattern in enumerate(op.operands):
        kinds.setdefault(_skeleton(pattern), []).append(head)
    members = list(kinds.values())
    kind_of = {head: number for number, heads in enumerate(members) for head in heads}
    which = expr.heads(kind_of[head] for head in range(len(op.operands)))
    bodies = []
    for number, heads in enumerate(members):
        body = _shared_body(op.operands, heads)
        if len(members) > 1:
            body = conjunction(_make("where", predicate=which.eq(number)), body)
        bodies.append(body)
    return disjunction(*bodies)


def _tunable(op: Op) -> bool:
    return op.kind == "before" and not expr.tables(op["bound"])


def _shape_of(bound: Expr) -> Expr:
    """The bound with the constant made explicit and blanked: i + 1 and i both become i + 0, a constant becomes 0."""
    base, _ = expr.split_constant(bound)
    return base


def _skeleton(pattern: Op) -> Op:
    """`pattern` with the additive constants of its half-lines blanked: equal skeletons can share one body."""

    def blank(op: Op) -> Op:
        return before(_shape_of(op["bound"])) if _tunable(op) else op

    return rewrite(pattern, blank)


def _half_lines(pattern: Op) -> list[Op]:
    """The half-lines of `pattern`, an entry for each place of the tree (shared ones repeat)."""
    if _tunable(pattern):
        return [pattern]
    return [leaf for operand in pattern.operands for leaf in _half_lines(operand)]


def _shared_body(patterns: Sequence[Op], heads: Sequence[int]) -> Op:
    """The body that serves all `heads`, whose skeletons are equal."""
    columns = [[expr.split_constant(leaf["bound"])[1] for leaf in _half_lines(patterns[h])] for h in heads]
    table: list[list[int]] = []
    for place in range(len(columns[0])):
        values = dict(zip(heads, (row[place] for row in columns), strict=True))
        # Heads of other kinds never read their entry; any value of this kind keeps the table simple.
        table.append([values.get(h, columns[0][place]) for h in range(len(patterns))])
    places = iter(table)

    def rebuild(op: Op) -> Op:
        if _tunable(op):
            return before(_shape_of(op["bound"]) + expr.heads(next(places)))
        return Op(op.name, tuple(rebuild(operand) for operand in op.operands), op.attrs)

    return rebuild(patterns[heads[0]])


def _cover(op: Op) -> Op:
    """Unions cover part by part; intervals have closed forms; the rest is found by looking (level 2)."""
    from spgen.passes.normalize import normalize  # the covered pattern needs its normal form first

    rows, cols = op["rows"], op["cols"]
    terms = [_cover_interval(term, rows, cols) for term in normalize(op.operands[0]).operands]
    if any(term is None for term in terms):
        return op
    return disjunction(*(term for term in terms if term is not None))


def _cover_interval(term: Op, rows: int, cols: int) -> Op | None:
    """The tiles of rows x cols that a conjunction of half-lines touches, or None if it is not one.

    On a tile of rows [a, b] bounds of slope 0 and 1 are met together iff each lower bound at `a` and each upper bound
    at `b` reaches the tile, and each constant lower (upper) bound lies below (above) the moving upper (lower) one.
    """
    first = _I // rows * rows
    last = first + (rows - 1)
    lowers: list[Expr] = []
    uppers: list[Expr] = []
    for literal in term.operands:
        leaf = literal.operands[0] if literal.kind == "not" else literal
        if leaf.kind != "before" or not _is_affine(leaf["bound"]):
            return None
        (lowers if literal.kind == "not" else uppers).append(leaf["bound"])
    fixed_low = [e for e in lowers if not _moves(e)]
    fixed_high = [e for e in uppers if not _moves(e)] + [var("kv_len")]
    parts = []
    for bound in uppers:
        reach = substitute(bound, {"i": last})
        end = (reach + (cols - 1)) // cols * cols
        for low in fixed_low if _moves(bound) else []:
            end = expr.select(low < reach, end, 0)
        parts.append(before(end))
    for bound in lowers:
        reach = substitute(bound, {"i": first})
        start = reach // cols * cols
        for high in fixed_high:
            start = expr.select(reach < high, start, var("kv_len"))
        parts.append(negation(before(start)))
    return conjunction(*parts)


def _moves(bound: Expr) -> bool:
    return "i" in expr.free_variables(bound)


def _is_affine(bound: Expr) -> bool:
    """i + c or c."""
    base, _ = expr.split_constant(bound)
    return base in (_I, const(0))


_RULES: dict[str, Callable[[Op], Op]] = {
    "causal": lambda op: before(_I + 1),
    "sink": lambda op: before(const(op["n"])),
    "window": _window,
    "documents": _documents,
    "block": _listed,
    "columns": _listed,
    "top_k": _listed,
    "n_of_m": _listed,
    "vertical_slash": _vertical_slash,
    "per_head": _per_head,
    "cover": _cover,
}
