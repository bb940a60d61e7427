"""Sums: an expression as constant + the sum of factor * atom, in which equal atoms have met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spgen.ir.expr import Expr, const


@dataclass(frozen=True)
class Linear:
    """constant + the sum of factor * atom; no factor is 0, and no atom is a sum or a product with a constant."""

    terms: Mapping[Expr, int]
    constant: int = 0

    def plus(self, other: Linear) -> Linear:
        """The sum of both."""
        atoms = dict.fromkeys((*self.terms, *other.terms))
        terms = {atom: self.terms.get(atom, 0) + other.terms.get(atom, 0) for atom in atoms}
        return Linear({atom: factor for atom, factor in terms.items() if factor}, self.constant + other.constant)

    def times(self, factor: int) -> Linear:
        """Every part multiplied."""
        if factor == 0:
            return Linear({})
        return Linear({atom: own * factor for atom, own in self.terms.items()}, self.constant * factor)

    def without(self, atom: Expr) -> tuple[int, Linear]:
        """The factor of `atom`, and the rest."""
        rest = {other: factor for other, factor in self.terms.items() if other is not atom}
        return self.terms.get(atom, 0), Linear(rest, self.constant)

    def expression(self) -> Expr:
        """The sum as an expression; equal sums give the same one."""
        total = const(0)
        for atom in sorted(self.terms, key=lambda atom: (self.terms[atom] < 0, str(atom))):
            factor = self.terms[atom]
            total = total - atom * -factor if factor < 0 else total + atom * factor
        return total + self.constant

    def sides(self) -> tuple[Expr, Expr]:
        """(left, right) whose difference is the sum, neither with a negative factor: a comparison with 0 reads well."""
        rising = {atom: factor for atom, factor in self.terms.items() if factor > 0}
        left = Linear(rising, 0 if rising else self.constant)
        return left.expression(), left.plus(self.times(-1)).expression()


def linear(node: Expr) -> Linear:
    """`node` as a sum."""
    if node.op == "const":
        return Linear({}, int(node.args[0]))
    if node.op in ("add", "sub"):
        left, right = map(linear, node.args)
        return left.plus(right if node.op == "add" else right.times(-1))
    factor = node.args[1] if node.op in ("mul", "shl") else None
    if factor is not None and factor.op == "const":
        return linear(node.args[0]).times(factor.args[0] if node.op == "mul" else 2 ** factor.args[0])
    return Linear({node: 1})
