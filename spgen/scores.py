"""Scores and rules: by what a selection ranks, and how keys are sorted by it.

They are values with a canonical text, which is what a pattern keeps: `last_queries(64)`. A score says what is computed
from q and k, or from weights; the pattern that carries it says how many units win and over which of them it ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from spgen.errors import DtypeError, PatternError, TextError
from spgen.ir.text import Tree, parse


@dataclass(frozen=True)
class Score:
    """What a selection ranks by; `text` is its canonical form."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Rule:
    """How an order is computed from a score; `text` is its canonical form."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _count(subject: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DtypeError(subject, given=value, allowed="an int")
    if value < 1:
        raise PatternError(subject, given=value, allowed="an integer of at least 1")
    return value


def last_queries(n: int) -> Score:
    """The attention probabilities of the last `n` rows, summed per column or per diagonal.

    For block, column, diagonal and key selections of a prompt (MInference, SnapKV, PBS-Attn).
    """
    return Score(f"last_queries({_count('last_queries: n', n)})")


def pooled() -> Score:
    """The product of the mean query and the mean key of each block (MInference's block heads, FlexPrefill)."""
    return Score("pooled()")


def page_bounds() -> Score:
    """An upper bound of a page's scores: the sum over channels of max(q * smallest key, q * largest key) (Quest)."""
    return Score("page_bounds()")


def column_mass() -> Score:
    """The attention probability each key has received so far, summed over rows (H2O)."""
    return Score("column_mass()")


def magnitude() -> Score:
    """The size of weights: of single ones for n of m, the norm of all their scores for blocks. For weights only."""
    return Score("magnitude()")


def wanda() -> Score:
    """Magnitudes of weights times the norms of the inputs that they meet (Sun et al. 2023). For weights only."""
    return Score("wanda()")


def sort_within(n: int, *, scores: Score) -> Rule:
    """Keys in descending order of their score inside each segment of `n`; a shorter last segment stays in order."""
    if not isinstance(scores, Score):
        raise DtypeError("sort_within: scores", given=scores, allowed="a score, such as last_queries(128)")
    return Rule(f"sort_within({_count('sort_within: n', n)}, scores={scores.text})")


_COUNTED = {"last_queries": last_queries}
_PLAIN = {
    "pooled": pooled, "page_bounds": page_bounds, "column_mass": column_mass, "magnitude": magnitude, "wanda": wanda
}  # fmt: skip


def read(text: str) -> Score | Rule:
    """The score or rule that prints as `text`; raises TextError with the faulty part underlined."""
    return _Reader(text).read(parse(text))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, message: str, where: Tree) -> TextError:
        return TextError(message, text=self.text, start=where.start, end=where.end)

    def read(self, tree: Tree) -> Score | Rule:
        try:
            return self._call(tree)
        except PatternError as error:
            raise self.fail(str(error), tree) from None

    def _call(self, tree: Tree) -> Score | Rule:
        kinds = [item.kind for item in tree.items]
        if tree.kind == "call" and tree.head in _PLAIN and not kinds:
            return _PLAIN[tree.head]()
        if tree.kind == "call" and tree.head in _COUNTED and kinds == ["int"]:
            return _COUNTED[tree.head](int(tree.items[0].head))
        if tree.kind == "call" and tree.head == "sort_within" and kinds == ["int", "keyword"]:
            scores = self.read(tree.items[1].items[0])
            if tree.items[1].head == "scores" and isinstance(scores, Score):
                return sort_within(int(tree.items[0].head), scores=scores)
        known = f"last_queries(n), {', '.join(f'{name}()' for name in _PLAIN)} or sort_within(n, scores=…)"
        raise self.fail(f"expected {known}", tree)
