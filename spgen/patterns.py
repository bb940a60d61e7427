"""The language: patterns as values.

A `Pattern` pairs a structure, an interned node of `spgen.ir.pattern`, with the tensors that fill its slots. It is
immutable; equality, hash and `repr` are those of the structure. Patterns are combined with `|`, `&`, `-` and `~`.

Throughout, `r` is the row of the call, `i` its absolute position, `j` the key, `h` the query head and `b` the sequence.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from spgen import scores as scoring
from spgen.data import ROLES, check_slot, describe, places, role_of
from spgen.errors import DataError, DtypeError, PatternError
from spgen.ir.expr import FALSE, TRUE
from spgen.ir.node import Op, Slot, rewrite
from spgen.ir.pattern import PATTERN, is_selected, read_short, renumber, short_text, slots
from spgen.scores import Rule, Score
from spgen.trace import trace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Indices: TypeAlias = "Tensor | Sequence[int]"


@dataclass(frozen=True, eq=False, repr=False)
class Pattern:
    """A set of (row, column) pairs for each sequence and head.

    `node` is its structure, `data[n]` the tensor of slot `$n`. Two patterns are equal when their structures are,
    whatever values their tensors hold.
    """

    node: Op
    data: tuple[Tensor, ...] = ()

    def __repr__(self) -> str:
        return short_text(self.node)

    def __eq__(self, other: object) -> bool:
        return self.node is other.node if isinstance(other, Pattern) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.node)

    def __reduce__(self) -> tuple[Any, ...]:
        return pattern, (repr(self), *self.data)

    def __bool__(self) -> bool:
        raise PatternError(
            f"the truth value of `{self}`",
            allowed="& | - ~ between patterns",
            remedy="write & | ~ instead of and/or/not; compare with `is None` to see whether one was given",
        )

    def __or__(self, other: Pattern) -> Pattern:
        return _combine("or", self, _operand("|", other))

    def __and__(self, other: Pattern) -> Pattern:
        return _combine("and", self, _operand("&", other))

    def __sub__(self, other: Pattern) -> Pattern:
        return self & ~_operand("-", other)

    def __invert__(self) -> Pattern:
        return _combine("not", self)

    def __ror__(self, other: Any) -> Pattern:
        return _operand("|", other) | self

    def __rand__(self, other: Any) -> Pattern:
        return _operand("&", other) & self

    def __rsub__(self, other: Any) -> Pattern:
        return _operand("-", other) - self

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern with its tensors on `device`."""
        return Pattern(self.node, tuple(tensor.to(device) for tensor in self.data))

    def mask(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        q_heads: int = 1,
        kv_heads: int | None = None,
        batch: int = 1,
        q_offset: int | Tensor | Sequence[int] | None = None,
        q_lengths: Tensor | Sequence[int] | None = None,
        kv_lengths: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The dense mask, bool [batch, q_heads, q_len, kv_len]: what the pattern means.

        `kv_len` defaults to `q_len`, `kv_heads` to `q_heads`. `q_offset` (an int or [batch]) is the position of row
        0, by default the keys of the sequence less its rows; `kv_lengths` and `q_lengths` [batch] say how many keys
        and rows each sequence has. Raises ShapeError when data do not fit, UnsupportedError for a selection.
        """
        from spgen.reference import mask

        return mask(
            self, q_len, kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch, q_offset=q_offset,
            q_lengths=q_lengths, kv_lengths=kv_lengths, device=device,
        )  # fmt: skip


def _operand(sign: str, value: Any) -> Pattern:
    return _pattern(f"operand of {sign}", value)


def _pattern(subject: str, value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    remedy = "wrap a mask as sp.block(1, mask=…)" if _is_tensor(value) else ""
    if callable(value):
        remedy = f"call it: {getattr(value, '__name__', 'f')}(…)"
    raise DtypeError(subject, given=f"{type(value).__name__}", allowed="a pattern such as causal()", remedy=remedy)


def _combine(kind: str, *patterns: Pattern, extra: Sequence[tuple[str, Indices | None]] = (), **attrs: Any) -> Pattern:
    """An operation over patterns and its own data: slots are numbered in order, a tensor that recurs keeps one slot."""
    data: list[Tensor] = []
    known: dict[tuple[Any, ...], int] = {}

    def number(slot: Slot, tensor: Tensor) -> int:
        key = (id(tensor), slot.dtype, slot.dims)
        if key not in known:
            known[key] = len(data)
            data.append(tensor)
        return known[key]

    operands = []
    for given in patterns:
        index = {slot.index: number(slot, given.data[slot.index]) for slot in slots(given.node)}
        same = all(old == new for old, new in index.items())
        operands.append(given.node if same else renumber(given.node, index))
    csr = any(name == "indptr" and value is not None for name, value in extra)
    for name, value in extra:
        if value is not None:
            role = ROLES[kind, "csr indices" if csr and name == "indices" else name]
            subject = f"{kind}: {name}"
            tensor = _tensor(subject, value)
            slot = describe(0, subject, role, tensor)
            attrs[name] = Slot(number(slot, tensor), slot.dtype, slot.dims)
    return Pattern(PATTERN.make(kind, *operands, **attrs), tuple(data))


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")  # a program that has not imported torch has no tensors
    return torch is not None and isinstance(value, torch.Tensor)


def _tensor(subject: str, value: Any) -> Tensor:
    """A tensor as it is; a list of integers as an int32 tensor on the CPU."""
    if _is_tensor(value):
        return cast("Tensor", value)
    if not isinstance(value, list | tuple | range):
        raise DtypeError(subject, given=type(value).__name__, allowed="a tensor, or a list of integers")
    import torch

    numbers = [_integer(subject, number) for number in value]
    for place, number in enumerate(numbers):
        if not -(2**31) <= number < 2**31:
            raise DataError(f"{subject} at {place}", given=number, allowed="integers of 32 bits in a list")
    return torch.tensor(numbers, dtype=torch.int32)


def _integer(subject: str, value: Any, floor: int | None = None, remedy: str = "") -> int:
    """`value` as a Python int of at least `floor`."""
    if isinstance(value, bool) or _is_tensor(value) or not hasattr(value, "__index__"):
        given = f"{value!r} of type {type(value).__name__}"
        raise DtypeError(subject, given=given, allowed="an int", remedy=remedy)
    number = operator.index(value)
    if floor is not None and number < floor:
        raise PatternError(subject, given=number, allowed=f"an integer of at least {floor}", remedy=remedy)
    return number


def _tile(kind: str, rows: Any, cols: Any) -> dict[str, Any]:
    remedy = "one index stands for `rows` consecutive rows and `cols` consecutive columns"
    return {
        "rows": _integer(f"{kind}: rows", rows, 1, remedy),
        "cols": _integer(f"{kind}: cols", cols, 1, remedy),
    }


def dense() -> Pattern:
    """All pairs."""
    return _combine("dense")


def causal() -> Pattern:
    """Keys up to the row's own position: `j <= i`."""
    return _combine("causal")


def sink(n: int) -> Pattern:
    """The first `n` keys: `j < n`."""
    return _combine("sink", n=_integer("sink: n", n, 0, "pass how many of the first keys every row sees"))


def window(left: int, right: int = 0) -> Pattern:
    """Keys near the row: `i - left < j <= i + right`. `window(1024)` is 1024 keys, the row's own included."""
    remedy = "left counts keys up to the row's own, right the keys after it"
    return _combine(
        "window", left=_integer("window: left", left, 0, remedy), right=_integer("window: right", right, 0, remedy)
    )


def stripe(
    stride: int, width: int = 1, offset: int = 0, cols: int = 1, relative: bool = False, shift_per_head: int = 0
) -> Pattern:
    """Every `stride`-th unit of columns, `width` units wide, shifted from head to head (S2-Attention).

    Holds `(x - offset - h * shift_per_head) mod stride < width` for `x = j // cols`, or, if `relative`, for
    `x = i // cols - j // cols`. `h` is the query head.
    """
    if not isinstance(relative, bool):
        raise DtypeError("stripe: relative", given=relative, allowed="True or False")
    remedy = "width of every stride units of cols columns are kept"
    return _combine(
        "stripe",
        stride=_integer("stripe: stride", stride, 1, remedy),
        width=_integer("stripe: width", width, 1, remedy),
        offset=_integer("stripe: offset", offset),
        cols=_integer("stripe: cols", cols, 1, remedy),
        relative=relative,
        shift_per_head=_integer("stripe: shift_per_head", shift_per_head),
    )


def block(
    rows: int,
    cols: int | None = None,
    *,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
    indptr: Tensor | None = None,
    density: float | None = None,
    scores: Score | None = None,
    among: Pattern | None = None,
) -> Pattern:
    """Whole blocks of `rows` x `cols` pairs (`cols` defaults to `rows`).

    Which ones is given in one of three forms, or selected. R = ceil(rows of the call / rows), C = ceil(keys / cols).

    - `mask` bool or uint8 [B|1, H, R, C];
    - `indices` int [B|1, H, R, K]: the column blocks of each row block, padded with -1, in any order;
    - `indptr` int [B|1, H, R + 1] and `indices` int [B|1, H, NNZ]: the same as CSR;
    - `density` in (0, 1] and `scores`: that share of the blocks of `among` (default: causal; of weights all). Without
      `scores` those of weights with the largest norms.

    H is 1, the key heads or the query heads; leading axes may be left out. Indices out of range are ignored.
    """
    tile = _tile("block", rows, rows if cols is None else cols)
    if indptr is not None and indices is None:
        raise PatternError("block: indices", given="indptr without indices", allowed="both, for CSR")
    density = _density(density)
    given = {"mask": mask, "indices": indices, "density": density}
    if sum(value is not None for value in given.values()) != 1:
        found = " and ".join(name for name, value in given.items() if value is not None)
        raise PatternError(
            "block: data",
            given=found or "nothing",
            allowed="exactly one of mask, indices, density",
            remedy="pass mask=, indices= (with indptr= for CSR), or density= with scores=",
        )
    extra = (("mask", mask), ("indices", indices), ("indptr", indptr))
    selection = _selection("block", "density", density, scores, among)
    return _combine("block", *_among(among), extra=extra, **tile, density=density, **selection)


def _density(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError("block: density", given=value, allowed="a number in (0, 1]")
    if not 0 < value <= 1:
        raise PatternError("block: density", given=value, allowed="a fraction in (0, 1]")
    return float(value)


def _selection(kind: str, count: str, value: object, scores: Any, among: Any) -> dict[str, Any]:
    """The `scores` attribute: magnitudes of weights where a count comes without any, refused without a count."""
    if scores is not None and not isinstance(scores, Score):
        raise DtypeError(f"{kind}: scores", given=scores, allowed="a score, such as last_queries(64)")
    for name, part in (("scores", scores), ("among", among)):
        if value is None and part is not None:
            raise PatternError(
                f"{kind}: {name}", given=f"{name}= together with data", allowed=f"{name}= with {count}= only"
            )
    return {"scores": None if value is None else (scores or scoring.magnitude()).text}


def _among(among: Pattern | None) -> tuple[Pattern, ...]:
    return () if among is None else (_pattern("among", among),)


def columns(index: Indices) -> Pattern:
    """The listed keys: `j in index[b, h]`. `index` int [B|1, H, K], or a list; -1 and beyond the end are ignored."""
    return _combine("columns", extra=[("index", index)])


def diagonals(offsets: Indices) -> Pattern:
    """The listed distances: `i - j in offsets[b, h]`. `offsets` int [B|1, H, K], or a list.

    A negative offset means keys after the row. Pad by repeating an offset: -1 is a distance like any other.
    """
    return _combine("diagonals", extra=[("offsets", offsets)])


def vertical_slash(
    columns: Indices | None = None,
    offsets: Indices | None = None,
    *,
    vertical: int | None = None,
    slash: int | None = None,
    scores: Score | None = None,
    among: Pattern | None = None,
) -> Pattern:
    """The union of `columns(columns)` and `diagonals(offsets)` (MInference).

    `columns` and `offsets` int [B|1, H, K], or lists; or select the `vertical` columns and `slash` diagonals with the
    highest `scores` over `among` (default: causal).
    """
    data, counts = (columns, offsets), (vertical, slash)
    if (None in counts or any(x is not None for x in data)) if counts != (None, None) else any(x is None for x in data):
        raise PatternError(
            "vertical_slash: data",
            given=" and ".join(
                name
                for name, value in zip(("columns", "offsets", "vertical", "slash"), data + counts, strict=True)
                if value is not None
            )
            or "nothing",
            allowed="columns and offsets, or vertical, slash and scores",
            remedy="use columns() or diagonals() for one of the two alone",
        )
    if vertical is not None and scores is None:
        raise PatternError(
            "vertical_slash: scores", given="nothing", allowed="a score, because vertical= selects by it",
            remedy="pass scores=last_queries(64), or give the data",
        )  # fmt: skip
    selection = _selection("vertical_slash", "vertical", vertical, scores, among)
    return _combine(
        "vertical_slash",
        *_among(among),
        extra=(("columns", columns), ("offsets", offsets)),
        vertical=None if vertical is None else _integer("vertical_slash: vertical", vertical, 0),
        slash=None if slash is None else _integer("vertical_slash: slash", slash, 0),
        **selection,
    )


def top_k(
    index: Tensor | int,
    rows: int = 1,
    cols: int = 1,
    *,
    scores: Score | None = None,
    among: Pattern | None = None,
) -> Pattern:
    """For each `rows` rows their own list of units of `cols` keys: `j // cols in index[b, h, r // rows]`.

    `index` int [B|1, H, R, K] with R = ceil(rows of the call / rows), padded with -1, in any order; or a count: the
    `index` units with the highest `scores` over `among` (default: causal; of weights all, by their norms).
    """
    tile = _tile("top_k", rows, cols)
    if not _is_tensor(index):
        remedy = "pass an index tensor, or a count with scores="
        k = _integer("top_k: index", index, 1, remedy)
        return _combine("top_k", *_among(among), k=k, **tile, **_selection("top_k", "k", k, scores, among))
    _selection("top_k", "a count, not index", None, scores, among)
    return _combine("top_k", extra=[("index", cast("Tensor", index))], **tile)


def n_of_m(
    n: int, m: int, *, mask: Tensor | None = None, scores: Score | None = None, among: Pattern | None = None
) -> Pattern:
    """At most `n` of each `m` consecutive columns; the last group may be shorter.

    `mask` bool or uint8 [B|1, H, R, C] marks the pairs one by one (R rows of the call, C columns); or the `n` with the
    highest `scores` are selected, without any the `n` largest weights.
    """
    n, m = _integer("n_of_m: n", n, 1), _integer("n_of_m: m", m, 1)
    if n > m:
        raise PatternError("n_of_m: n", given=n, allowed=f"at most m = {m}")
    if mask is not None and scores is not None:
        raise PatternError("n_of_m: data", given="mask and scores", allowed="one of mask, scores, or neither")
    selection = _selection("n_of_m", "scores", None if mask is not None else n, scores, among)
    return _combine("n_of_m", *_among(among), extra=[("mask", mask)], n=n, m=m, **selection)


def documents(cu_seqlens: Indices) -> Pattern:
    """Row and key lie in the same document of one long row.

    `cu_seqlens` int [N]: where each document starts, and the end of the last (0, 5, 12 are two documents). Positions
    before the first and from the last on belong to none.
    """
    return _combine("documents", extra=[("cu_seqlens", cu_seqlens)])


def permuted(p: Pattern, *, q: Indices | None = None, k: Indices | Rule | None = None) -> Pattern:
    """`p` of the ranks: row `q[t]` takes the place of row `t`, key `k[t]` that of key `t`.

    `q` int [B|1, H, rows of the call] and `k` int [B|1, H, keys] list originals by rank, as argsort does; `k` may be a
    rule such as `sort_within(256, scores=…)`. Closed forms and data inside `p` see ranks; a pattern outside, such as
    the causal one in `causal() & permuted(…)`, still sees original positions.
    """
    _pattern("permuted: p", p)
    if q is None and k is None:
        raise PatternError("permuted: order", given="neither q nor k", allowed="an order of rows, of keys, or of both")
    if isinstance(q, Rule | Score):
        raise DtypeError("permuted: q", given=q, allowed="an order of the rows", remedy="rules order keys: pass k=")
    if isinstance(k, Score):
        raise DtypeError("permuted: k", given=k, allowed="an order or a rule", remedy=f"sort_within(n, scores={k})")
    rule = k.text if isinstance(k, Rule) else None
    order = None if isinstance(k, Rule) else k
    return _combine("permuted", p, extra=(("q", q), ("k", order)), k_rule=rule)


def cover(p: Pattern, rows: int, cols: int) -> Pattern:
    """Every whole tile of `rows` positions by `cols` keys that `p` touches.

    Tiles start at multiples of `rows` and `cols`. A closed form in `p` is looked at over the whole tile, even where
    the tile reaches beyond the rows of the call; data that differ by row exist for rows of the call only.
    """
    return _combine("cover", _pattern("cover: p", p), **_tile("cover", rows, cols))


def per_head(patterns: Iterable[Pattern]) -> Pattern:
    """Each query head, or each key head, uses its own pattern: as many patterns as there are heads of either kind."""
    given = [_pattern(f"per_head: pattern {n}", p) for n, p in enumerate(patterns)]
    if not given:
        raise PatternError(
            "per_head", given="no patterns", allowed="one pattern for each head", remedy="per_head([a] * 4 + [b] * 28)"
        )
    return _combine("per_head", *given)


def where(f: Callable[..., Any]) -> Pattern:
    """The pairs for which `f(i, j)` or `f(b, h, i, j)` holds: any integer predicate.

    `f` is called once, on symbols: + - * // % & | ^ ~ << >>, abs and comparisons work as on integers, with `select`,
    `minimum` and `maximum` of this package for the rest. Integers that it closes over become constants.
    """
    predicate = trace(f)
    if predicate in (TRUE, FALSE):
        return dense() if predicate is TRUE else ~dense()
    return _combine("where", predicate=predicate)


def pattern(text: str, *data: Tensor) -> Pattern:
    """The pattern that prints as `text`, with `data[n]` in its slot `$n`.

    The text is read, never run. Raises TextError where it cannot be read, and ShapeError or DtypeError when a tensor
    does not fit its slot.
    """
    node = rewrite(read_short(text), _canonical)
    wanted = {slot.index for slot in slots(node)}
    if wanted != set(range(len(data))):
        raise PatternError(
            "pattern: data",
            given=f"{len(data)} tensors",
            allowed=f"one for each of {', '.join(f'${n}' for n in sorted(wanted))}" if wanted else "none",
            remedy="slots are numbered from $0 without gaps",
        )
    for op, name, slot in places(node):
        subject = f"{op.kind}: {name} (${slot.index})"
        if not _is_tensor(data[slot.index]):
            raise DtypeError(subject, given=type(data[slot.index]).__name__, allowed="a tensor")
        check_slot(subject, slot, role_of(op, name), data[slot.index])
    return Pattern(node, data)


def part(whole: Pattern, node: Op) -> Pattern:
    """The pattern of a node inside another's, with the tensors that it uses."""
    used = sorted({slot.index for slot in slots(node)})
    return Pattern(renumber(node, {old: new for new, old in enumerate(used)}), tuple(whole.data[at] for at in used))


def _canonical(op: Op) -> Op:
    """Scores and rules in their canonical text; raises TextError for an unknown one."""
    if not is_selected(op):
        return op
    attrs = {
        name: scoring.read(str(value)).text if name in ("scores", "k_rule") and value is not None else value
        for name, value in op.attrs
    }
    return PATTERN.make(op.kind, *op.operands, **attrs)


__all__ = [
    "Pattern", "block", "causal", "columns", "cover", "dense", "diagonals", "documents", "n_of_m", "pattern",
    "per_head", "permuted", "sink", "stripe", "top_k", "vertical_slash", "where", "window",
]  # fmt: skip
