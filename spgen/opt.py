"""Passes on IR text: `spgen opt`.

    run("causal() & window(64)", "desugar,push_permutations,normalize,tile{block_m=64,kv_heads=2}")

The text is a pattern, or the text of one of the three levels; lines that start with `//` are comments. The pipeline
names passes of `spgen/compile.py` in the order in which they run; `level_1` stands for all that lead to disjoint terms.
Everything that is read, and every pass's result, is verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from spgen.compile import LEVEL_1, PIPELINE, refuse_selections
from spgen.errors import TextError
from spgen.ir import expr
from spgen.ir.expr import Expr
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Dialect, Op, Slot, walk
from spgen.ir.pattern import PATTERN, read_short, slots
from spgen.ir.text import Parser, Tree
from spgen.ir.tiles import TILES
from spgen.passes.schedule import Call
from spgen.passes.tile import Shape

LEVELS: Mapping[str, Dialect] = {"pattern": PATTERN, "tiles": TILES, "kernel": KERNEL}
# options that have no default in the compiler itself, where the call decides; those of a pass's dataclass follow
_TILE = {"q_heads": 8, "kv_heads": 8, "block_m": 64, "block_n": 64, "pack": 1, "slots": ()}
_SCHEDULE = {"dtype": "float32", "head_dim": 64, "value_dim": 64, "options": ()}
_CORE = ("dense", "before", "where", "stripe", "listed", "diagonals", "cover", "permuted", "and", "or", "not")


@dataclass(frozen=True)
class Pass:
    """One pass: the level that it reads, its options with their defaults, and what it does."""

    name: str
    level: str
    summary: str
    options: Mapping[str, Any]
    function: Callable[..., Op]


@dataclass(frozen=True)
class Step:
    """A pass with the options of one pipeline; `tree` is its place in the pipeline's text."""

    one: Pass
    options: Mapping[str, Any]
    tree: Tree


def passes() -> dict[str, Pass]:
    """The compiler's passes by name, in the order in which it runs them."""
    return {
        function.__name__: Pass(
            function.__name__, level, _summary(function), _OPTIONS.get(function.__name__, dict)(), function
        )
        for level, functions in PIPELINE.items()
        for function in functions
    }


def read(text: str) -> Op:
    """The operation that `text` means: a pattern in one line, or a level's text. Raises TextError or VerifyError."""
    # a comment keeps its length, so that errors point at the place
    plain = re.sub(r"^[ \t]*//.*$", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    first = plain.strip()
    if not first.startswith("%"):
        return _read_pattern(text, plain)
    named = re.match(r'%\w+\s*=\s*"(\w+)\.', first)
    level = LEVELS.get(named[1]) if named else None
    if level is None:
        start = plain.index("%")
        raise TextError(
            "this is the text of no level", text=text, start=start, end=start + len(first.partition("\n")[0]),
            allowed=" or ".join(f'"{name}.…"' for name in LEVELS),
        )  # fmt: skip
    return level.read(text)


def _read_pattern(text: str, plain: str) -> Op:
    if not plain.strip():
        raise TextError("there is no pattern and no operation in this text", text=text, start=0)
    try:
        return read_short(plain)
    except TextError as error:
        error.text = text
        raise


def run(text: str, pipeline: str, after: Callable[[str, Op], None] = lambda name, op: None) -> Op:
    """The result of the passes that `pipeline` names on `text`; `after` sees the result of each.

    Raises TextError or VerifyError pointing at `text` or at `pipeline`, and the errors of the passes.
    """
    steps = read_pipeline(pipeline)
    op = read(text)
    given = slots(op) if op.name.startswith("pattern.") else ()
    for step in steps:
        op = _run_step(step, op, given, pipeline)
        level_of(op).verify(op)
        after(step.one.name, op)
    return op


def level_of(op: Op) -> Dialect:
    """The level that an operation belongs to."""
    return LEVELS[op.name.partition(".")[0]]


def read_pipeline(text: str) -> list[Step]:
    """The steps of `name{option=value,…},name,…`; raises TextError at what is unknown or of the wrong kind."""
    known = passes()
    steps: list[Step] = []
    parser = Parser(text)
    while parser.next.kind != "end":
        if steps:
            parser.expect(",")
        token = parser.take()
        names = [one.__name__ for one in LEVEL_1] if token.text == "level_1" else [token.text]
        if token.kind != "name" or names[0] not in known:
            parser.fail(f"unknown pass {token.text!r}: known are {', '.join([*known, 'level_1'])}", token)
        given = parser._sequence("}") if parser.accept("{") else ()
        tree = Tree("call", token.text, given, token.start, parser.tokens[parser.at - 1].end)
        steps += [Step(known[name], _options(known[name], tree, text), tree) for name in names]
    return steps


def _options(one: Pass, tree: Tree, text: str) -> dict[str, Any]:
    """The pass's options: its defaults, and what was written."""
    found = dict(one.options)
    seen: set[str] = set()
    for item in tree.items:
        known = f"{one.name} has {', '.join(one.options) or 'none'}" if item.kind == "keyword" else "write name=value"
        if item.kind != "keyword" or item.head not in one.options:
            raise TextError(f"unknown option {item.head!r}: {known}", text=text, start=item.start, end=item.end)
        if item.head in seen:
            raise TextError(f"{item.head} is given twice", text=text, start=item.start, end=item.end)
        seen.add(item.head)
        found[item.head] = _value(item.items[0], one.options[item.head], item.head, text)
    return found


def _value(tree: Tree, default: Any, name: str, text: str) -> Any:
    """The value of an option, of the kind of its default."""
    if isinstance(default, bool):
        if tree.kind == "name" and tree.head in ("true", "false"):
            return tree.head == "true"
    elif isinstance(default, int):
        if tree.kind == "int" and int(tree.head) > 0:
            return int(tree.head)
    elif isinstance(default, str):
        if tree.kind in ("name", "string"):
            return tree.head if tree.kind == "name" else json.loads(tree.head)
    elif tree.kind == "list" and all(item.kind == ("slot" if name == "slots" else "string") for item in tree.items):
        return tuple(Slot.from_tree(item) if name == "slots" else json.loads(item.head) for item in tree.items)
    wanted = {bool: "true or false", int: "an integer of at least 1", str: "a word"}
    lists = "a list such as [$0: int32[K]]" if name == "slots" else 'a list such as ["stages=3"]'
    raise TextError(
        f"{name} is {wanted.get(type(default), lists)}", text=text, start=tree.start, end=max(tree.end, tree.start + 1)
    )


def _run_step(step: Step, op: Op, given: Sequence[Slot], pipeline: str) -> Op:
    def refuse(message: str, remedy: str) -> TextError:
        return TextError(message, text=pipeline, start=step.tree.start, end=step.tree.end, remedy=remedy)

    one = step.one
    names = list(LEVELS)
    if level_of(op) is not LEVELS[one.level]:
        found = names.index(op.name.partition(".")[0]) + 1
        raise refuse(
            f"{one.name} reads level {names.index(one.level) + 1}, and this is level {found}",
            f"its place is behind {_before(one)}" if found <= names.index(one.level) else "leave it out",
        )
    if not _FORMS.get(one.name, _any)(op):
        raise refuse(f"{one.name} does not take this form of level {names.index(one.level) + 1}",
                     f"run {_before(one)} first")  # fmt: skip
    if one.name == "tile":
        return _tile(one, step.options, op, given, refuse)
    if one.name == "schedule":
        return _schedule(one, step.options, op)
    if one.level == "pattern":
        refuse_selections(op)
    return one.function(op)


def _before(one: Pass) -> str:
    names = list(passes())
    return ",".join(names[: names.index(one.name)])


def _tile(
    one: Pass, options: Mapping[str, Any], op: Op, given: Sequence[Slot], refuse: Callable[[str, str], TextError]
) -> Op:
    shape = {name: value for name, value in options.items() if name not in ("pack", "slots")}
    q_heads, kv_heads, pack = shape["q_heads"], shape["kv_heads"], options["pack"]
    if q_heads % kv_heads or pack not in (1, q_heads // kv_heads) or shape["block_m"] % pack:
        raise refuse(
            f"{q_heads} query heads and {kv_heads} key heads with pack {pack} in tiles of {shape['block_m']} rows",
            "kv_heads divides q_heads; pack is 1, or q_heads / kv_heads, and divides block_m",
        )
    tensors = {slot.index: slot for slot in (*given, *options["slots"])}
    for number in sorted(_documents(op)):
        if number not in tensors:
            raise refuse(
                f"the terms read the documents of tensor ${number}, which they do not describe",
                f"start from the pattern, or say tile{{slots=[${number}: int32[N]]}}",
            )
    row_tile = shape["block_m"] // pack
    return one.function(op, tuple(tensors[n] for n in sorted(tensors)), Shape(row_tile=row_tile, **shape))


def _documents(op: Op) -> set[int]:
    """The tensors whose document bounds an expression reads."""
    values = [value for part in walk(op) for _, value in part.attrs if isinstance(value, Expr)]
    named = {name for value in values for name in expr.tables(value)}
    return {int(name.rpartition("_")[2]) for name in named if re.fullmatch(r"document_[a-z]+_\d+", name)}


def _schedule(one: Pass, options: Mapping[str, Any], op: Op) -> Op:
    call = Call(**{name: value for name, value in options.items() if name != "options"})
    return one.function(op, call, op["block_m"] // op["row_tile"], options["options"])


def _summary(function: Callable[..., Op]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def _any(op: Op) -> bool:
    return True


def _is_core(op: Op) -> bool:
    return all(part.kind in _CORE for part in walk(op))


def _is_pushed(op: Op) -> bool:
    inner = ("and", "or", "not", "permuted")
    return _is_core(op) and all(p.operands[0].kind not in inner for p in walk(op) if p.kind == "permuted")


def _is_terms(op: Op) -> bool:
    return op.kind == "union" and all(term.kind == "term" for term in op.operands)


def _has_root(kind: str) -> Callable[[Op], bool]:
    return lambda op: op.kind == kind


# what a pass takes besides its level
_FORMS: Mapping[str, Callable[[Op], bool]] = {
    "push_permutations": _is_core, "normalize": _is_pushed, "merge_runs": _is_terms, "own": _is_terms,
    "tile": _is_terms, "schedule": _has_root("program"), "hoist": _has_root("attention"),
}  # fmt: skip


def _tile_options() -> dict[str, Any]:
    return _TILE | {
        field.name: field.default
        for field in fields(Shape)
        if field.name not in ("row_tile", *_TILE) and field.default is not MISSING
    }


def _schedule_options() -> dict[str, Any]:
    return {
        **{name: value for name, value in _SCHEDULE.items() if name != "options"},
        **{field.name: field.default for field in fields(Call) if field.default is not MISSING},
        "options": (),
    }


_OPTIONS: Mapping[str, Callable[[], dict[str, Any]]] = {"tile": _tile_options, "schedule": _schedule_options}
