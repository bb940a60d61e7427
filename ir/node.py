"""Operations: the interned nodes of all three levels, their text form and their verifier.

An `Op` has a name such as "pattern.window", operands (other ops) and attributes. Each level is a `Dialect`: a table of
`OpDef`s. The text is MLIR's generic form, one operation per line, and the last operation is the result:

    %0 = "pattern.causal"() : () -> !pattern.value
    %1 = "pattern.window"() {left = 1024, right = 0} : () -> !pattern.value
    %2 = "pattern.and"(%0, %1) : (!pattern.value, !pattern.value) -> !pattern.value

Expressions and slots are written as strings, so generic MLIR tools can read every level.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from spgen.errors import SpgenError, TextError, VerifyError
from spgen.ir import expr
from spgen.ir.expr import Expr
from spgen.ir.interned import Interned
from spgen.ir.text import Parser, Tree, float_text, parse

Attribute: TypeAlias = "int | float | bool | str | Expr | Slot | tuple[Any, ...] | None"


class Slot(metaclass=Interned):
    """A typed place for a tensor: its index among the pattern's tensors, dtype name and dims (sizes or symbols)."""

    __slots__ = ("__weakref__", "dims", "dtype", "index")

    def __init__(self, index: int, dtype: str, dims: tuple[int | str, ...]) -> None:
        self.index, self.dtype, self.dims = index, dtype, dims

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.index, self.dtype, self.dims)

    def __str__(self) -> str:
        return f"${self.index}: {self.dtype}[{', '.join(map(str, self.dims))}]"

    def __repr__(self) -> str:
        return f"Slot({str(self)!r})"

    @staticmethod
    def from_tree(tree: Tree) -> Slot:
        """The slot that a parsed text such as `$0: int32[1, 8, K]` means."""
        dtype, *dims = tree.items
        return Slot(int(tree.head), dtype.head, tuple(int(d.head) if d.kind == "int" else d.head for d in dims))


class Op(metaclass=Interned):
    """One operation. `attrs` holds (name, value) pairs in the order of the operation's definition."""

    __slots__ = ("__weakref__", "attrs", "name", "operands")
    name: str
    operands: tuple[Op, ...]
    attrs: tuple[tuple[str, Attribute], ...]

    def __init__(self, name: str, operands: tuple[Op, ...], attrs: tuple[tuple[str, Attribute], ...]) -> None:
        self.name, self.operands, self.attrs = name, operands, attrs

    def __reduce__(self) -> tuple[Any, ...]:
        return Op, (self.name, self.operands, self.attrs)

    def __getitem__(self, attribute: str) -> Any:
        for name, value in self.attrs:
            if name == attribute:
                return value
        raise KeyError(f"{self.name} has no attribute {attribute!r}")

    @property
    def kind(self) -> str:
        """The name without its dialect."""
        return self.name.partition(".")[2]

    def __repr__(self) -> str:
        return f"<{self.name} with {len(self.operands)} operands>"

    def __str__(self) -> str:
        return print_op(self)


@dataclass(frozen=True)
class OpDef:
    """What an operation may look like.

    `attrs` maps attribute names to kinds: int, float, bool, str, expr, slot, ints, strs, exprs or slots
    (tuples), with "?" for one that may be absent (None). `operands` is a count, or None for any. `check` returns what
    is wrong, if anything.
    """

    attrs: Mapping[str, str] = field(default_factory=dict)
    operands: int | None = 0
    check: Callable[[Op], SpgenError | None] = lambda op: None


@dataclass(frozen=True)
class Dialect:
    """One level of the IR: its name and its operations."""

    name: str
    ops: Mapping[str, OpDef]

    def make(self, kind: str, /, *operands: Op, **attrs: Attribute) -> Op:
        """A verified operation; raises the definition's own error when it breaks a rule."""
        op = Op(f"{self.name}.{kind}", operands, tuple((name, attrs.get(name)) for name in self.ops[kind].attrs))
        problem = self.problem(op)
        if problem is not None:
            raise problem
        return op

    def problem(self, op: Op) -> SpgenError | None:
        """The first rule that `op` breaks (its operands are not looked at)."""
        definition = self.ops.get(op.kind) if op.name.startswith(f"{self.name}.") else None
        if definition is None:
            known = ", ".join(f"{self.name}.{kind}" for kind in self.ops)
            return SpgenError(op.name, given="an unknown operation", allowed=known)
        if definition.operands is not None and len(op.operands) != definition.operands:
            return SpgenError(op.name, given=f"{len(op.operands)} operands", allowed=str(definition.operands))
        for (name, value), kind in zip(op.attrs, definition.attrs.values(), strict=True):
            if not _fits(value, kind):
                return SpgenError(f"{op.name}: {name}", given=value, allowed=kind)
        return definition.check(op)

    def verify(self, root: Op) -> None:
        """Raises VerifyError, with the text of the level and the faulty line underlined."""
        for number, op in enumerate(walk(root)):
            problem = self.problem(op)
            if problem is not None:
                raise VerifyError(_first_line(problem), text=print_op(root), line=number + 1)

    def read(self, text: str) -> Op:
        """The operation that prints as `text`; raises TextError or VerifyError underlining the place."""
        values: dict[str, Op] = {}
        last = None
        start = 0
        for line in text.split("\n"):
            if line.strip() and not line.lstrip().startswith("//"):
                name, last = _Line(self, text, line, start).read(values)
                values[name] = last
            start += len(line) + 1
        if last is None:
            raise TextError("there is no operation in this text", text=text, start=0, end=1)
        return last


def _first_line(problem: SpgenError) -> str:
    return str(problem).replace("\n  ", "; ")


_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "expr": Expr, "slot": Slot}


def _fits(value: Attribute, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    if kind.endswith("s") and kind[:-1] in _KINDS:
        return isinstance(value, tuple) and all(_fits(item, kind[:-1]) for item in value)
    return isinstance(value, _KINDS[kind]) and (kind != "int" or not isinstance(value, bool))


def walk(root: Op) -> Iterator[Op]:
    """Each distinct operation below and including `root`, operands first, in the order they print."""
    seen: set[Op] = set()
    stack = [(root, False)]
    while stack:
        op, done = stack.pop()
        if done:
            if op not in seen:
                seen.add(op)
                yield op
        elif op not in seen:
            stack.append((op, True))
            stack.extend((operand, False) for operand in reversed(op.operands))


def rewrite(root: Op, rule: Callable[[Op], Op]) -> Op:
    """`root` rebuilt bottom up; `rule` sees each operation after its operands were rewritten."""
    done: dict[Op, Op] = {}
    for op in walk(root):
        done[op] = rule(Op(op.name, tuple(done[operand] for operand in op.operands), op.attrs))
    return done[root]


def print_op(root: Op) -> str:
    """The text of `root` and everything below it, one operation a line."""
    lines: list[str] = []
    names: dict[Op, str] = {}
    for op in walk(root):
        names[op] = f"%{len(names)}"
        inputs = ", ".join(names[operand] for operand in op.operands)
        attrs = ", ".join(f"{name} = {_attribute_text(value)}" for name, value in op.attrs if value is not None)
        lines.append(f'{names[op]} = "{op.name}"({inputs}){f" {{{attrs}}}" if attrs else ""} : {_type(op)}')
    return "\n".join(lines) + "\n"


def _type(op: Op) -> str:
    """The type of an operation: each level has one type of value."""
    kind = f"!{op.name.partition('.')[0]}.value"
    return f"({', '.join([kind] * len(op.operands))}) -> {kind}"


def _attribute_text(value: Attribute) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_attribute_text, value))}]"
    return json.dumps(str(value), ensure_ascii=False)


class _Line:
    """The reader of one line of a level's text."""

    def __init__(self, dialect: Dialect, text: str, line: str, start: int) -> None:
        self.dialect, self.text, self.start = dialect, text, start
        self.line = line
        try:
            self.parser = Parser(self.line)
        except TextError as error:
            self.fail(error.subject, error.start, error.end)

    def fail(self, message: str, start: int = 0, end: int | None = None) -> NoReturn:
        end = len(self.line) if end is None else end
        raise TextError(message, text=self.text, start=self.start + start, end=self.start + end)

    def read(self, values: Mapping[str, Op]) -> tuple[str, Op]:
        try:
            return self._read(values)
        except TextError as error:
            if error.text == self.text:
                raise
            inside = error.text == self.line
            self.fail(error.subject, error.start if inside else 0, error.end if inside else None)

    def _read(self, values: Mapping[str, Op]) -> tuple[str, Op]:
        p = self.parser
        result = p.take()
        if result.kind != "value":
            p.fail("expected a result such as %0", result)
        if result.text in values:
            p.fail(f"{result.text} is defined twice", result)
        p.expect("=")
        head = p.take()
        name = json.loads(head.text) if head.kind == "string" else p.fail('expected an operation such as "a.b"', head)
        operands = tuple(self._operand(values, tree) for tree in self._parenthesised())
        attrs = self._attributes() if p.next.text == "{" else {}
        p.expect(":")
        op = self._build(name, operands, attrs)
        written, wanted = self.line[p.next.start :], _type(op)
        if written.split() != wanted.split():
            self.fail(f"expected the type {wanted}", p.next.start)
        return result.text, op

    def _parenthesised(self) -> tuple[Tree, ...]:
        self.parser.expect("(")
        return self.parser._sequence(")")

    def _operand(self, values: Mapping[str, Op], tree: Tree) -> Op:
        if tree.kind != "value" or tree.head not in values:
            self.fail(f"{tree.head} is not defined above", tree.start, tree.end)
        return values[tree.head]

    def _attributes(self) -> dict[str, Tree]:
        self.parser.expect("{")
        found: dict[str, Tree] = {}
        for tree in self.parser._sequence("}"):
            if tree.kind != "keyword":
                self.fail("expected name = value", tree.start, tree.end)
            if tree.head in found:
                self.fail(f"{tree.head} is given twice", tree.items[0].start, tree.end)
            found[tree.head] = tree.items[0]
        return found

    def _build(self, name: str, operands: tuple[Op, ...], attrs: dict[str, Tree]) -> Op:
        dialect, _, kind = name.partition(".")
        definition = self.dialect.ops.get(kind) if dialect == self.dialect.name else None
        if definition is None:
            self.fail(f"unknown operation {name!r}: this level has {', '.join(self.dialect.ops)}")
        unknown = set(attrs) - set(definition.attrs)
        if unknown:
            self.fail(f"{name} has no attribute {sorted(unknown)[0]!r}: it has {', '.join(definition.attrs)}")
        given = tuple((key, self._value(attrs.get(key), kind)) for key, kind in definition.attrs.items())
        op = Op(name, operands, given)
        problem = self.dialect.problem(op)
        if problem is not None:
            end = self.start + len(self.line)
            raise VerifyError(_first_line(problem), text=self.text, start=self.start, end=end)
        return op

    def _value(self, tree: Tree | None, kind: str) -> Attribute:
        if tree is None:
            return None
        kind = kind.rstrip("?")
        if tree.kind == "list" and kind.endswith("s"):
            return tuple(self._value(item, kind[:-1]) for item in tree.items)
        if tree.kind == "int" and kind == "int":
            return int(tree.head)
        if tree.kind == "float" and kind == "float":
            return float(tree.head)
        if tree.kind == "unary" and tree.head == "-" and kind == "int":
            return -int(tree.items[0].head)
        if tree.kind == "name" and kind == "bool" and tree.head in ("true", "false"):
            return tree.head == "true"
        if tree.kind == "string":
            text = json.loads(tree.head)
            if kind == "str":
                return str(text)
            if kind == "expr":
                return expr.read(text)
            if kind == "slot":
                slot = parse(text)
                if slot.kind == "slot":
                    return Slot.from_tree(slot)
                self.fail("expected a slot such as $0: int32[K]", tree.start, tree.end)
        self.fail(f"expected {kind}", tree.start, tree.end)
