"""The reader that every text form shares: tokens, a precedence parser, and errors that underline their place.

Pattern text, expression text and the operations of the three levels are all written in this small grammar; what the
names mean is decided by their readers. Text is never evaluated as code: the parser knows literals, names, operators,
calls, lists and subscripts, and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from spgen.errors import TextError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<float>\d+\.\d+(?:e[-+]?\d+)?)
      | (?P<int>\d+\b)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)
      | (?P<slot>\$\d+)
      | (?P<value>%[A-Za-z0-9_]+)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<op>//|<<|>>|<=|>=|==|!=|->|[-+*%&|^~<>=!?:,(){}\[\]@])
    """,
    re.VERBOSE,
)

# The precedence of Python, so that text copied into a program means the same.
_BINARY = {
    "<": 1, "<=": 1, ">": 1, ">=": 1, "==": 1, "!=": 1,
    "|": 2, "^": 3, "&": 4,
    "<<": 5, ">>": 5, "+": 6, "-": 6, "*": 7, "//": 7, "%": 7,
}  # fmt: skip
_UNARY_LEVEL = 8


@dataclass(frozen=True)
class Token:
    """A word of the text, its kind and its place."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Tree:
    """A parsed piece of text.

    `kind` is one of int, float, name, slot, value, string, list, unary, binary, call, keyword; `head` the literal, name
    or operator; `items` the children; `start` and `end` the place in the text.
    """

    kind: str
    head: str
    items: tuple[Tree, ...]
    start: int
    end: int

    def keywords(self) -> dict[str, Tree]:
        """The values of name=value arguments."""
        return {item.head: item.items[0] for item in self.items if item.kind == "keyword"}

    def positional(self) -> tuple[Tree, ...]:
        """The arguments without a name."""
        return tuple(item for item in self.items if item.kind != "keyword")


def tokens(text: str) -> list[Token]:
    """Splits `text`; raises TextError at the first character that belongs to no token."""
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise TextError("this character has no meaning here", text=text, start=at, end=at + 1)
        if match.lastgroup != "space":
            found.append(Token(str(match.lastgroup), match.group(), at, match.end()))
        at = match.end()
    found.append(Token("end", "", len(text), len(text)))
    return found


class Parser:
    """A cursor over tokens, with one method per piece of grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokens(text)
        self.at = 0

    @property
    def next(self) -> Token:
        """The token under the cursor."""
        return self.tokens[self.at]

    def fail(self, message: str, token: Token | Tree | None = None) -> NoReturn:
        """Raises TextError at a place of the text."""
        where = token or self.next
        raise TextError(message, text=self.text, start=where.start, end=max(where.end, where.start + 1))

    def take(self) -> Token:
        """The token under the cursor, which moves on."""
        token = self.next
        self.at += token.kind != "end"
        return token

    def accept(self, text: str) -> bool:
        """Moves on over `text` if it comes next."""
        if self.next.text == text and self.next.kind != "string":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> Token:
        """Moves on over `text`, which must come next."""
        if self.next.text != text:
            self.fail(f"expected {text!r}")
        return self.take()

    def end(self) -> None:
        """Nothing may follow."""
        if self.next.kind != "end":
            self.fail("expected the end of the text")

    def expression(self, level: int = 0) -> Tree:
        """Precedence climbing; binary operators associate to the left."""
        left = self._unary()
        while self.next.kind == "op" and _BINARY.get(self.next.text, 0) > level:
            operator = self.take()
            right = self.expression(_BINARY[operator.text])
            left = Tree("binary", operator.text, (left, right), left.start, right.end)
        return left

    def _unary(self) -> Tree:
        if self.next.kind == "op" and self.next.text in "-~":
            operator = self.take()
            operand = self.expression(_UNARY_LEVEL)
            return Tree("unary", operator.text, (operand,), operator.start, operand.end)
        return self._atom()

    def _atom(self) -> Tree:
        token = self.take()
        if token.kind in ("int", "float", "value", "string"):
            return Tree(token.kind, token.text, (), token.start, token.end)
        if token.kind == "slot":
            return self._slot(token)
        if token.kind == "name":
            if self.next.text == "(":
                return self._call(token)
            return Tree("name", token.text, (), token.start, token.end)
        if token.text == "(":
            inner = self.expression()
            self.expect(")")
            return inner
        if token.text == "[":
            items = self._sequence("]")
            return Tree("list", "", items, token.start, self.tokens[self.at - 1].end)
        self.fail("expected a value", token)

    def _slot(self, token: Token) -> Tree:
        """`$0: int32[1, 8, K]`: a place for a tensor, with its type."""
        self.expect(":")
        dtype = self.take()
        if dtype.kind != "name":
            self.fail("expected a dtype such as int32", dtype)
        self.expect("[")
        dims = self._sequence("]")
        for dim in dims:
            if dim.kind not in ("int", "name"):
                self.fail("expected a size or a letter", dim)
        kind = Tree("name", dtype.text, (), dtype.start, dtype.end)
        return Tree("slot", token.text[1:], (kind, *dims), token.start, self.tokens[self.at - 1].end)

    def _call(self, name: Token) -> Tree:
        self.expect("(")
        items = self._sequence(")")
        return Tree("call", name.text, items, name.start, self.tokens[self.at - 1].end)

    def _sequence(self, close: str) -> tuple[Tree, ...]:
        items: list[Tree] = []
        while not self.accept(close):
            if items:
                self.expect(",")
                if self.accept(close):
                    break
            items.append(self._argument())
        return tuple(items)

    def _argument(self) -> Tree:
        if self.next.kind == "name" and self.tokens[self.at + 1].text == "=":
            name = self.take()
            self.expect("=")
            value = self.expression()
            return Tree("keyword", name.text, (value,), name.start, value.end)
        return self.expression()


def float_text(value: float) -> str:
    """The shortest text of a float that MLIR and this reader take: 1.0e-05, never 1e-05."""
    digits, e, exponent = repr(value).partition("e")
    return f"{digits if '.' in digits else digits + '.0'}{e}{exponent}"


def parse(text: str) -> Tree:
    """The tree of one complete expression."""
    parser = Parser(text)
    try:
        tree = parser.expression()
    except RecursionError:
        parser.fail("this text is nested too deeply")
    parser.end()
    return tree
