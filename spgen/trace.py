"""Tracing: `where(f)` calls `f` once on symbols, and what comes back is the predicate.

The symbols behave like integers: + - * // % & | ^ ~ << >>, abs, comparisons, the functions `select`, `minimum` and
`maximum` of this file, and those of torch (`spgen/trace_torch.py`). What would need a value (`if`, `and`, indexing)
raises an error that says what to write.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

from spgen.errors import DtypeError, PatternError, UnsupportedError
from spgen.ir import expr
from spgen.ir.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

Value: TypeAlias = "Traced | int | bool"


@dataclass
class Tracing:
    """What is being traced: its name in errors, and the tensors it looks up, if it may (`tensor_0`, `tensor_1`, …)."""

    subject: str = "where"
    lookups: list[Tensor] | None = field(default=None)


_tracing: ContextVar[Tracing] = ContextVar("_tracing")


def tracing() -> Tracing:
    """What is being traced now."""
    return _tracing.get(Tracing())


@contextmanager
def _traced_as(what: Tracing) -> Iterator[None]:
    token = _tracing.set(what)
    try:
        yield
    finally:
        _tracing.reset(token)


class Traced:
    """A symbolic integer or condition. Unlike `Expr`, `==` and `!=` build conditions, as they do for integers."""

    __slots__ = ("expr",)
    __array_ufunc__ = None  # numpy's scalars leave the operator to us

    def __init__(self, node: Expr) -> None:
        self.expr = node

    def __repr__(self) -> str:
        return str(self.expr)

    def __bool__(self) -> NoReturn:
        raise PatternError(
            f"{tracing().subject}: the truth value of `{self.expr}`, which is only known in the kernel",
            allowed="one symbolic condition",
            remedy="write & | ~ instead of and/or/not, (a <= x) & (x < b) instead of a <= x < b, "
            "and sp.select(condition, a, b) instead of if",
        )

    def _no_value(self, *_: object) -> NoReturn:
        raise PatternError(
            f"{tracing().subject}: the number behind `{self.expr}`, which is only known in the kernel",
            allowed="+ - * // % & | ^ ~ << >>, abs, comparisons, sp.select, sp.minimum, sp.maximum",
            remedy="lookup tables cannot be captured: pass them as data, with block, columns, top_k or n_of_m",
        )

    __index__ = __int__ = __float__ = __iter__ = __getitem__ = __len__ = _no_value

    def _no_division(self, _: object) -> NoReturn:
        raise PatternError(
            f"{tracing().subject}: `/` on `{self.expr}`", allowed="integer arithmetic", remedy="write //"
        )

    __truediv__ = __rtruediv__ = _no_division

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from spgen.trace_torch import call

        return call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        from spgen.trace_torch import method

        return method(self, name)

    def __add__(self, other: Value) -> Traced:
        return _arithmetic("+", operator.add, self, other)

    def __radd__(self, other: Value) -> Traced:
        return _arithmetic("+", operator.add, other, self)

    def __sub__(self, other: Value) -> Traced:
        return _arithmetic("-", operator.sub, self, other)

    def __rsub__(self, other: Value) -> Traced:
        return _arithmetic("-", operator.sub, other, self)

    def __mul__(self, other: Value) -> Traced:
        return _arithmetic("*", operator.mul, self, other)

    def __rmul__(self, other: Value) -> Traced:
        return _arithmetic("*", operator.mul, other, self)

    def __floordiv__(self, other: Value) -> Traced:
        return _divide("//", operator.floordiv, self, other)

    def __rfloordiv__(self, other: Value) -> Traced:
        return _divide("//", operator.floordiv, other, self)

    def __mod__(self, other: Value) -> Traced:
        return _divide("%", operator.mod, self, other)

    def __rmod__(self, other: Value) -> Traced:
        return _divide("%", operator.mod, other, self)

    def __lshift__(self, other: Value) -> Traced:
        return _shift("<<", operator.lshift, self, other)

    def __rlshift__(self, other: Value) -> Traced:
        return _shift("<<", operator.lshift, other, self)

    def __rshift__(self, other: Value) -> Traced:
        return _shift(">>", operator.rshift, self, other)

    def __rrshift__(self, other: Value) -> Traced:
        return _shift(">>", operator.rshift, other, self)

    def __neg__(self) -> Traced:
        return Traced(-_integer("-", self))

    def __pos__(self) -> Traced:
        return Traced(_integer("+", self))

    def __abs__(self) -> Traced:
        return Traced(abs(_integer("abs", self)))

    def __and__(self, other: Value) -> Traced:
        return _same_kind("&", operator.and_, self, other)

    def __rand__(self, other: Value) -> Traced:
        return _same_kind("&", operator.and_, other, self)

    def __or__(self, other: Value) -> Traced:
        return _same_kind("|", operator.or_, self, other)

    def __ror__(self, other: Value) -> Traced:
        return _same_kind("|", operator.or_, other, self)

    def __xor__(self, other: Value) -> Traced:
        return _same_kind("^", operator.xor, self, other)

    def __rxor__(self, other: Value) -> Traced:
        return _same_kind("^", operator.xor, other, self)

    def __invert__(self) -> Traced:
        return Traced(~self.expr)

    def __lt__(self, other: Value) -> Traced:
        return _arithmetic("<", operator.lt, self, other)

    def __le__(self, other: Value) -> Traced:
        return _arithmetic("<=", operator.le, self, other)

    def __gt__(self, other: Value) -> Traced:
        return _arithmetic(">", operator.gt, self, other)

    def __ge__(self, other: Value) -> Traced:
        return _arithmetic(">=", operator.ge, self, other)

    def __eq__(self, other: object) -> Traced:  # type: ignore[override]
        return _same_kind("==", lambda a, b: ~(a ^ b) if a.is_bool else a.eq(b), self, other)

    def __ne__(self, other: object) -> Traced:  # type: ignore[override]
        return _same_kind("!=", lambda a, b: a ^ b if a.is_bool else a.ne(b), self, other)

    __hash__ = None  # type: ignore[assignment]


def _expr(sign: str, value: object) -> Expr:
    """The expression behind a traced value or a closed-over integer."""
    if isinstance(value, Traced):
        return value.expr
    if isinstance(value, int):
        return expr.const(value)
    tensor = cast(Any, value) if hasattr(value, "requires_grad") else None
    if tensor is None and hasattr(value, "__index__"):  # a numpy integer
        return expr.const(operator.index(cast(Any, value)))
    if tensor is not None and tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex()):
        return expr.const(tensor.item())  # read once, now: a constant as a closed-over integer is
    given = f"{value!r} of type {type(value).__name__}"
    raise DtypeError(
        f"{tracing().subject}: operand of {sign}",
        given=given if tensor is None else f"a tensor of shape {list(tensor.shape)}, {tensor.dtype}",
        allowed="the arguments of the predicate, integers, and integer tensors of no axes",
        remedy="tensors are data: pass them with block, columns, top_k or n_of_m",
    )


def _integer(sign: str, value: object) -> Expr:
    node = _expr(sign, value)
    if node.is_bool:
        raise PatternError(
            f"{tracing().subject}: operand of {sign}",
            given=f"the condition `{node}`",
            allowed="an integer",
            remedy="write sp.select(condition, 1, 0) to count with it",
        )
    return node


def _arithmetic(sign: str, build: Callable[[Expr, Expr], Expr], a: object, b: object) -> Traced:
    return Traced(build(_integer(sign, a), _integer(sign, b)))


def _divide(sign: str, build: Callable[[Expr, Expr], Expr], a: object, b: object) -> Traced:
    if _integer(sign, b) is expr.const(0):
        raise PatternError(f"{tracing().subject}: `{a!r} {sign} 0`", allowed="a divisor other than 0")
    return _arithmetic(sign, build, a, b)


def _shift(sign: str, build: Callable[[Any, Any], Any], a: object, b: object) -> Traced:
    count = _integer(sign, b)
    if count.op == "const" and not 0 <= count.args[0] < 63:
        raise PatternError(f"{tracing().subject}: `{a!r} {sign} {count}`", allowed="a shift by 0 to 62 bits")
    return _arithmetic(sign, build, a, b)


def _same_kind(sign: str, build: Callable[[Expr, Expr], Expr], a: object, b: object) -> Traced:
    left, right = _expr(sign, a), _expr(sign, b)
    if left.is_bool != right.is_bool:
        condition, integer = (left, right) if left.is_bool else (right, left)
        raise PatternError(
            f"{tracing().subject}: operands of {sign}",
            given=f"the condition `{condition}` and the integer `{integer}`",
            allowed="two conditions or two integers",
            remedy="comparisons bind weaker than & | ^: write (a < b) & (c < d), and (x & 1) == 1",
        )
    return Traced(build(left, right))


def select(condition: Value, a: Value, b: Value) -> Traced:
    """`a` where `condition` holds, else `b` (both integers or both conditions), inside `where`."""
    test = _expr("select", condition)
    if not test.is_bool:
        raise PatternError("select: condition", given=f"the integer `{test}`", allowed="a condition, such as i < 8")
    return _same_kind("select", lambda x, y: expr.select(test, x, y), a, b)


def minimum(a: Value, b: Value) -> Traced:
    """The smaller of two integers, inside `where`."""
    return _arithmetic("minimum", expr.minimum, a, b)


def maximum(a: Value, b: Value) -> Traced:
    """The larger of two integers, inside `where`."""
    return _arithmetic("maximum", expr.maximum, a, b)


def trace(f: Callable[..., Any], what: Tracing | None = None) -> Expr:
    """The condition that `f(i, j)` or `f(b, h, i, j)` computes; raises PatternError when there is none.

    `what` names it in errors, and collects the tensors that it looks up.
    """
    what = what or Tracing()
    names = {2: ("i", "j"), 4: ("b", "h", "i", "j")}.get(_arity(what.subject, f))
    if names is None:
        given = f"a function of {_arity(what.subject, f)} arguments"
        raise PatternError(f"{what.subject}: f", given=given, allowed="f(i, j) or f(b, h, i, j)")
    with _traced_as(what):
        try:
            result = f(*(Traced(expr.var(name)) for name in names))
        except AttributeError as error:
            if not isinstance(error.obj, Traced):
                raise
            remedy = "write it with integer arithmetic, comparisons and & | ~"
            raise UnsupportedError(what.subject, given=str(error), remedy=remedy) from None
    if isinstance(result, Traced):
        if result.expr.is_bool:
            return result.expr
        raise PatternError(what.subject, given=f"the integer `{result}`", allowed="a condition, such as i - j < 8")
    if isinstance(result, bool):
        return expr.const(result)
    given = f"{result!r} of type {type(result).__name__}"
    raise PatternError(what.subject, given=given, allowed="a condition, such as i - j < 8")


def _arity(subject: str, f: Callable[..., Any]) -> int:
    """How many positional arguments `f` needs (those with defaults are constants)."""
    if not callable(f):
        raise DtypeError(f"{subject}: f", given=f, allowed="a function f(i, j) or f(b, h, i, j)")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(f).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters)
