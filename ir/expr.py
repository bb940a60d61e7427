"""Integer and boolean expressions: bounds, membership predicates, addresses.

One small language serves all three levels and every backend: an expression is an interned tree that prints as
Python-like text, reads back to the same object, evaluates on integers or on tensors, and is printed as source by the
templates. Integer `//` and `%` are floored everywhere.

    leaf     var(name) · const(5) · const(True)
    integer  + - * // % min max abs << >> & | ^ · select(c, a, b)
    boolean  < <= == != & | ~
    heads    heads(v0, v1, ...)    the value that belongs to the program's head
    tables   load(t, row, col)      the integer at [row, col] of table `t`
             bit(t, row, x)         bit `x % 32` of the word at [row, x // 32]
             word(t, row, x)        the 32 bits from bit `x` on, the first lowest, as a signed integer
             count_le(t, row, x)    how many entries of the ascending list at row `row` are <= x

Tables are the plan's tensors. Their batch and head are those of the kernel's program, hence not written. Outside a
table `load` gives -1, `bit` false, `word` 0 for each bit and `count_le` 0: an index is never read out of bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from typing import Any, TypeAlias

from spgen.errors import TextError
from spgen.ir.interned import Interned
from spgen.ir.text import Tree, parse


class Expr(metaclass=Interned):
    """One node. `op` is "const", "var" or an operation; `args` are a constant, a name or operands."""

    __slots__ = ("__weakref__", "args", "op")
    op: str
    args: tuple[Any, ...]

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args

    def __reduce__(self) -> tuple[Any, ...]:
        return read, (str(self),)

    def __repr__(self) -> str:
        return f"Expr({str(self)!r})"

    def __str__(self) -> str:
        return _print(self)[0]

    def __bool__(self) -> bool:
        raise TypeError(
            f"`{self}` has no truth value while it is traced: write & | ~ instead of and/or/not, "
            "and select(condition, a, b) instead of if"
        )

    @property
    def is_bool(self) -> bool:
        """Whether the value is a truth value rather than an integer."""
        if self.op == "const":
            return isinstance(self.args[0], bool)
        if self.op in _BOOLEAN:
            return True
        return self.op in _SAME_AS_OPERANDS and operands(self)[-1].is_bool

    def __add__(self, other: ExprLike) -> Expr:
        return add(self, as_expr(other))

    def __radd__(self, other: ExprLike) -> Expr:
        return add(as_expr(other), self)

    def __sub__(self, other: ExprLike) -> Expr:
        return sub(self, as_expr(other))

    def __rsub__(self, other: ExprLike) -> Expr:
        return sub(as_expr(other), self)

    def __mul__(self, other: ExprLike) -> Expr:
        return mul(self, as_expr(other))

    def __rmul__(self, other: ExprLike) -> Expr:
        return mul(as_expr(other), self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return floordiv(self, as_expr(other))

    def __rfloordiv__(self, other: ExprLike) -> Expr:
        return floordiv(as_expr(other), self)

    def __mod__(self, other: ExprLike) -> Expr:
        return mod(self, as_expr(other))

    def __rmod__(self, other: ExprLike) -> Expr:
        return mod(as_expr(other), self)

    def __neg__(self) -> Expr:
        return sub(const(0), self)

    def __abs__(self) -> Expr:
        return fold("abs", self)

    def __lshift__(self, other: ExprLike) -> Expr:
        return fold("shl", self, as_expr(other))

    def __rshift__(self, other: ExprLike) -> Expr:
        return fold("shr", self, as_expr(other))

    def __and__(self, other: ExprLike) -> Expr:
        return and_(self, as_expr(other))

    def __rand__(self, other: ExprLike) -> Expr:
        return and_(as_expr(other), self)

    def __or__(self, other: ExprLike) -> Expr:
        return or_(self, as_expr(other))

    def __ror__(self, other: ExprLike) -> Expr:
        return or_(as_expr(other), self)

    def __xor__(self, other: ExprLike) -> Expr:
        return fold("xor", self, as_expr(other))

    def __invert__(self) -> Expr:
        return not_(self)

    def __lt__(self, other: ExprLike) -> Expr:
        return fold("lt", self, as_expr(other))

    def __le__(self, other: ExprLike) -> Expr:
        return fold("le", self, as_expr(other))

    def __gt__(self, other: ExprLike) -> Expr:
        return fold("lt", as_expr(other), self)

    def __ge__(self, other: ExprLike) -> Expr:
        return fold("le", as_expr(other), self)

    def eq(self, other: ExprLike) -> Expr:
        """`self == other` as an expression (`==` itself compares nodes)."""
        return fold("eq", self, as_expr(other))

    def ne(self, other: ExprLike) -> Expr:
        """`self != other` as an expression."""
        return fold("ne", self, as_expr(other))


ExprLike: TypeAlias = "Expr | int | bool"

_BOOLEAN = {"lt", "le", "eq", "ne", "bit"}
_SAME_AS_OPERANDS = {"and", "or", "xor", "not", "select"}
_TABLE = {"load", "bit", "word", "count_le"}
COMMUTATIVE = {"add", "mul", "min", "max", "and", "or", "xor", "eq", "ne"}


def const(value: int | bool) -> Expr:
    """A constant."""
    return Expr("const", (value,))


def var(name: str) -> Expr:
    """A variable."""
    return Expr("var", (name,))


TRUE, FALSE = const(True), const(False)


def as_expr(value: ExprLike) -> Expr:
    """`value` as an expression; raises TypeError when it is neither a number nor one already."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, int):
        return const(value)
    raise TypeError(f"an integer expression cannot contain {value!r} of type {type(value).__name__}")


def operands(node: Expr) -> tuple[Expr, ...]:
    """The children that are expressions (a table's name is not)."""
    if node.op in ("const", "var"):
        return ()
    return node.args[1:] if node.op in _TABLE else node.args


def rebuild(node: Expr, children: Iterable[Expr]) -> Expr:
    """`node` over other children, simplified again."""
    if node.op in ("const", "var"):
        return node
    if node.op in _TABLE:
        return Expr(node.op, (node.args[0], *children))
    smart = _SMART.get(node.op)
    return smart(*children) if smart else fold(node.op, *children)


def heads(values: Iterable[int]) -> Expr:
    """One integer per head (query or key head, by their number); a plain constant when they are all equal."""
    known = tuple(values)
    return const(known[0]) if len(set(known)) == 1 else Expr("heads", tuple(map(const, known)))


def load(table: str, row: ExprLike, col: ExprLike) -> Expr:
    """The integer at [row, col] of a table."""
    return Expr("load", (table, as_expr(row), as_expr(col)))


def bit(table: str, row: ExprLike, x: ExprLike) -> Expr:
    """Bit `x` of a table's row."""
    return Expr("bit", (table, as_expr(row), as_expr(x)))


def word(table: str, row: ExprLike, x: ExprLike) -> Expr:
    """The 32 bits of a table's row from bit `x` on."""
    return Expr("word", (table, as_expr(row), as_expr(x)))


def count_le(table: str, row: ExprLike, x: ExprLike) -> Expr:
    """How many entries of the ascending list at `row` are at most `x`."""
    return Expr("count_le", (table, as_expr(row), as_expr(x)))


def contains(table: str, row: ExprLike, x: ExprLike) -> Expr:
    """Whether `x` >= 0 is in the ascending list at row `row`."""
    return load(table, row, count_le(table, row, x) - 1).eq(x)


def _value(node: Expr) -> Any:
    return node.args[0] if node.op == "const" else None


def fold(op: str, *args: Expr) -> Expr:
    """The node, or its value when all operands are known."""
    values = [_value(arg) for arg in args]
    if None not in values and not (op in ("floordiv", "mod") and values[1] == 0):
        return const(_PYTHON[op](*values))
    return Expr(op, args)


def add(a: Expr, b: Expr) -> Expr:
    """Sums keep their constant last, once: (i + 3) + 4 is i + 7."""
    if _value(a) is not None:
        a, b = b, a
    known = _value(b)
    if known is None:
        if a.op == "add" and _value(a.args[1]) is not None:
            return add(add(a.args[0], b), a.args[1])
        if b.op == "add" and _value(b.args[1]) is not None:
            return add(add(a, b.args[0]), b.args[1])
        return Expr("add", (a, b))
    if known == 0:
        return a
    if _value(a) is not None:
        return const(_value(a) + known)
    if a.op == "add" and _value(a.args[1]) is not None:
        return add(a.args[0], const(_value(a.args[1]) + known))
    return Expr("add", (a, b))


def split_constant(node: Expr) -> tuple[Expr, int]:
    """(x, c) with node = x + c; x is the constant 0 when node is a constant."""
    if _value(node) is not None:
        return const(0), int(_value(node))
    if node.op == "add" and _value(node.args[1]) is not None:
        return node.args[0], int(_value(node.args[1]))
    return node, 0


def sub(a: Expr, b: Expr) -> Expr:
    """Difference; what both sides share cancels: (i + 3) - (i - 2) is 5."""
    (x, c), (y, d) = split_constant(a), split_constant(b)
    if x is y:
        return const(c - d)
    if _value(y) is not None:
        return add(x, const(c - d))
    if x.op == "add" and y in x.args:
        return add(x.args[1 - x.args.index(y)], const(c - d))
    return add(Expr("sub", (x, y)), const(c - d))


def mul(a: Expr, b: Expr) -> Expr:
    """Product."""
    if _value(a) is not None:
        a, b = b, a
    if _value(b) == 1:
        return a
    if _value(b) == 0:
        return const(0)
    return fold("mul", a, b)


def floordiv(a: Expr, b: Expr) -> Expr:
    """Quotient rounded down."""
    return a if _value(b) == 1 else fold("floordiv", a, b)


def mod(a: Expr, b: Expr) -> Expr:
    """Remainder with the divisor's sign."""
    return const(0) if _value(b) == 1 else fold("mod", a, b)


def _extremum(op: str, pick: Callable[[int, int], int]) -> Callable[..., Expr]:
    def build(*args: ExprLike) -> Expr:
        """Of terms that differ by a constant only one survives."""
        kept: dict[Expr, int] = {}
        for arg in map(as_expr, args):
            for part in flatten(op, arg):
                base, offset = split_constant(part)
                kept[base] = pick(kept[base], offset) if base in kept else offset
        parts = [add(base, const(offset)) for base, offset in kept.items()]
        return reduce(lambda a, b: Expr(op, (a, b)), parts)

    return build


def flatten(op: str, node: Expr) -> Iterator[Expr]:
    """The operands of a chain of one operation: a, b and c of (a & b) & c."""
    if node.op == op:
        for arg in node.args:
            yield from flatten(op, arg)
    else:
        yield node


minimum = _extremum("min", min)
maximum = _extremum("max", max)


def and_(a: Expr, b: Expr) -> Expr:
    """Conjunction (of integers: bitwise and)."""
    if FALSE in (a, b):
        return FALSE
    if a is TRUE or a is b:
        return b
    if b is TRUE:
        return a
    return fold("and", a, b)


def or_(a: Expr, b: Expr) -> Expr:
    """Disjunction (of integers: bitwise or)."""
    if TRUE in (a, b):
        return TRUE
    if a is FALSE or a is b:
        return b
    if b is FALSE:
        return a
    return fold("or", a, b)


_NEGATED = {"lt": ("le", True), "le": ("lt", True), "eq": ("ne", False), "ne": ("eq", False)}


def not_(a: Expr) -> Expr:
    """Complement; comparisons are turned round."""
    if a.op == "not":
        return a.args[0]  # type: ignore[no-any-return]
    if a.op in _NEGATED:
        op, swap = _NEGATED[a.op]
        return fold(op, *(reversed(a.args) if swap else a.args))
    return fold("not", a)


def select(condition: ExprLike, a: ExprLike, b: ExprLike) -> Expr:
    """`a` where `condition` holds, else `b`."""
    c = as_expr(condition)
    if as_expr(a) is as_expr(b):
        return as_expr(a)
    if _value(c) is not None:
        return as_expr(a) if _value(c) else as_expr(b)
    return Expr("select", (c, as_expr(a), as_expr(b)))


def cases(node: Expr) -> Expr:
    """`xor` or `select` of conditions, written with and, or and not."""
    condition, a, b = node.args if node.op == "select" else (node.args[0], ~node.args[1], node.args[1])
    return or_(and_(condition, a), and_(~condition, b))


_SMART: dict[str, Callable[..., Expr]] = {
    "add": add, "sub": sub, "mul": mul, "floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum,
    "and": and_, "or": or_, "not": not_, "select": select,
}  # fmt: skip


def _python_not(a: Any) -> Any:
    return (not a) if isinstance(a, bool) else ~a


_PYTHON: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "min": min, "max": max, "abs": abs, "shl": operator.lshift, "shr": operator.rshift,
    "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "not": _python_not, "select": lambda c, a, b: a if c else b,
}  # fmt: skip


def free_variables(node: Expr) -> frozenset[str]:
    """The names of the variables in `node`."""
    return frozenset(n.args[0] for n in walk(node) if n.op == "var")


def tables(node: Expr) -> frozenset[str]:
    """The names of the tables that `node` reads."""
    return frozenset(n.args[0] for n in walk(node) if n.op in _TABLE)


def walk(node: Expr) -> Iterator[Expr]:
    """Each distinct node below and including `node`, children first."""
    seen: set[Expr] = set()
    stack = [(node, False)]
    while stack:
        current, done = stack.pop()
        if done:
            yield current
        elif current not in seen:
            seen.add(current)
            stack.append((current, True))
            stack.extend((child, False) for child in reversed(operands(current)))


def substitute(node: Expr, values: Mapping[str, ExprLike]) -> Expr:
    """`node` with variables replaced by expressions, simplified."""
    done: dict[Expr, Expr] = {}
    for current in walk(node):
        if current.op == "var" and current.args[0] in values:
            done[current] = as_expr(values[current.args[0]])
        else:
            done[current] = rebuild(current, [done[child] for child in operands(current)])
    return done[node]


def evaluate(node: Expr, env: Mapping[str, Any], operations: Mapping[str, Callable[..., Any]] = _PYTHON) -> Any:
    """The value of `node`: variables from `env`, each operation (and load, bit, word, count_le) from `operations`.

    With the default operations values are Python integers; tensor libraries pass their own table.
    """
    done: dict[Expr, Any] = {}
    for current in walk(node):
        if current.op == "const":
            done[current] = current.args[0]
        elif current.op == "var":
            done[current] = env[current.args[0]]
        else:
            head = (current.args[0],) if current.op in _TABLE else ()
            done[current] = operations[current.op](*head, *(done[child] for child in operands(current)))
    return done[node]


_INFIX = {
    "lt": ("<", 1), "le": ("<=", 1), "eq": ("==", 1), "ne": ("!=", 1), "or": ("|", 2), "xor": ("^", 3), "and": ("&", 4),
    "shl": ("<<", 5), "shr": (">>", 5), "add": ("+", 6), "sub": ("-", 6), "mul": ("*", 7),
    "floordiv": ("//", 7), "mod": ("%", 7),
}  # fmt: skip
_CALLS = {"min": 2, "max": 2, "abs": 1, "select": 3}


def _print(node: Expr) -> tuple[str, int]:
    """Text and precedence of `node`."""
    if node.op == "const":
        value = node.args[0]
        return (str(value).lower(), 9) if isinstance(value, bool) else (str(value), 9 if value >= 0 else 8)
    if node.op == "var":
        return node.args[0], 9
    if node.op in _TABLE:
        return f"{node.op}({', '.join([node.args[0], *(str(a) for a in node.args[1:])])})", 9
    if node.op == "not":
        return "~" + _within(node.args[0], 8), 8
    if node.op in _INFIX:
        sign, level = _INFIX[node.op]
        left, right = node.args
        if node.op == "add" and (_value(right) or 0) < 0:
            return f"{_within(left, level)} - {-_value(right)}", level
        return f"{_within(left, level + (level == 1))} {sign} {_within(right, level + 1)}", level
    return f"{node.op}({', '.join(map(str, node.args))})", 9


def _within(node: Expr, level: int) -> str:
    text, own = _print(node)
    return text if own >= level else f"({text})"


@lru_cache(maxsize=4096)
def read(text: str) -> Expr:
    """The expression that prints as `text`; raises TextError with the faulty part underlined."""
    return from_tree(parse(text), text)


def from_tree(tree: Tree, text: str) -> Expr:
    """The expression a parsed text means."""

    def fail(message: str, where: Tree) -> TextError:
        return TextError(message, text=text, start=where.start, end=where.end)

    def convert(t: Tree) -> Expr:
        if t.kind == "int":
            return const(int(t.head))
        if t.kind == "name":
            return {"true": TRUE, "false": FALSE}[t.head] if t.head in ("true", "false") else var(t.head)
        if t.kind == "unary":
            (inner,) = map(convert, t.items)
            return -inner if t.head == "-" else ~inner
        if t.kind == "binary":
            return _binary(t.head, *map(convert, t.items))
        if t.kind == "call":
            return call(t)
        raise fail("this cannot stand in an integer expression", t)

    def call(t: Tree) -> Expr:
        if t.head in _TABLE:
            if len(t.items) != 3 or t.items[0].kind != "name":
                raise fail(f"{t.head} takes a table, a row and a column", t)
            return Expr(t.head, (t.items[0].head, convert(t.items[1]), convert(t.items[2])))
        if t.head == "heads":
            return Expr("heads", tuple(map(convert, t.items)))
        if t.head not in _CALLS:
            raise fail(f"unknown function {t.head!r}: known are {', '.join([*_CALLS, *sorted(_TABLE)])}", t)
        if len(t.items) != _CALLS[t.head]:
            raise fail(f"{t.head} takes {_CALLS[t.head]} operands", t)
        return rebuild(Expr(t.head, ()), [convert(item) for item in t.items])

    return convert(tree)


_OPS = {sign: op for op, (sign, _) in _INFIX.items()}


def _binary(sign: str, a: Expr, b: Expr) -> Expr:
    if sign in (">", ">="):
        return fold("lt" if sign == ">" else "le", b, a)
    op = _OPS[sign]
    return rebuild(Expr(op, ()), (a, b))


def to_sympy(node: Expr) -> Any:
    """The same expression in sympy (integer symbols), for counts and as the oracle of the rules here."""
    import sympy

    def minus_one_if_false(c: Any, a: Any, b: Any) -> Any:
        return sympy.Piecewise((a, c), (b, True))

    operations: dict[str, Callable[..., Any]] = {
        **_PYTHON, "floordiv": lambda a, b: sympy.floor(sympy.sympify(a) / b), "mod": sympy.Mod, "min": sympy.Min,
        "max": sympy.Max, "lt": sympy.Lt, "le": sympy.Le, "eq": sympy.Eq, "ne": sympy.Ne, "and": sympy.And,
        "or": sympy.Or, "not": sympy.Not, "select": minus_one_if_false,
    }  # fmt: skip
    names = free_variables(node)
    return evaluate(node, {name: sympy.Symbol(name, integer=True) for name in names}, operations)
