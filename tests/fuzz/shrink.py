"""Making a failing case smaller, greedily: simpler patterns, fewer options, heads, rows, keys and data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spgen.data import places, role_of
from spgen.errors import SpgenError
from spgen.ir.node import Op, rewrite, walk
from spgen.ir.pattern import PATTERN
from spgen.patterns import Pattern
from tests.fuzz.cases import Case
from tests.fuzz.data import fitted

_SIMPLEST: tuple[dict[str, Any], ...] = (
    {"plan": False}, {"nan_row": False}, {"layout": "contiguous"}, {"gain": 1.0}, {"sinks": False}, {"softcap": None},
    {"bias": "none", "bias_shape": ()}, {"bias_shape": ()}, {"scale": None}, {"kv_lengths": None}, {"q_offset": None},
    {"margins": (0, 0)}, {"head_dim": 16, "value_dim": 16}, {"value_dim": 16}, {"head_dim": 16},
    {"dtype": "float32"}, {"seed": 0},
)  # fmt: skip


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 60) -> Case:
    """The simplest case found within `seconds` that still fails."""
    stop = time.monotonic() + seconds
    found = True
    while found and time.monotonic() < stop:
        found = False
        for smaller in _smaller(case):
            if time.monotonic() >= stop:
                break
            if fails(smaller):
                case, found = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Simpler cases, the boldest first; what does not fit together is left out."""
    for candidate in _candidates(case):
        with suppress(SpgenError):
            yield candidate()


def _candidates(case: Case) -> Iterator[Callable[[], Case]]:
    pattern = case.pattern
    for node in _simpler_nodes(pattern.node):
        yield lambda node=node: replace(case, pattern=fitted(node, pattern.data))  # type: ignore[misc]
    for change in _SIMPLEST:
        if any(getattr(case, name) != value for name, value in change.items()):
            yield lambda change=change: replace(case, **change)  # type: ignore[misc]
    if case.batch > 1:
        for b in range(case.batch):
            yield lambda b=b: _one_sequence(case, b)  # type: ignore[misc]
    elif case.packed:
        yield lambda: replace(case, packed=False, margins=(0, 0))
    for heads in ((1, 1), (case.q_heads // case.kv_heads, 1), (case.kv_heads, case.kv_heads)):
        if heads != (case.q_heads, case.kv_heads):
            yield lambda heads=heads: _heads(case, *heads)  # type: ignore[misc]
    for part in (2, 4, 8, 16, 64):  # ever smaller cuts
        for axis in ("rows", "keys"):
            lengths = getattr(case, axis)
            fewer = tuple(n - max(1, n // part) if n > 1 else n for n in lengths)
            if fewer != lengths:
                yield lambda axis=axis, fewer=fewer: _shorter(case, axis, fewer)  # type: ignore[misc]
    for index, tensor in enumerate(pattern.data):
        for fewer_data in _less(pattern, index, tensor):
            data = (*pattern.data[:index], fewer_data, *pattern.data[index + 1 :])
            yield lambda data=data: replace(case, pattern=fitted(pattern.node, data))  # type: ignore[misc]


def _simpler_nodes(root: Op) -> Iterator[Op]:
    """The operands of operations in place of these, from the top down."""
    for op in reversed(list(walk(root))):
        for operand in dict.fromkeys(op.operands):
            yield _replaced(root, op, operand)
    for op in walk(root):
        if not op.operands and op.kind not in ("dense", "causal"):
            yield _replaced(root, op, PATTERN.make("dense"))
            yield _replaced(root, op, PATTERN.make("causal"))


def _replaced(root: Op, old: Op, new: Op) -> Op:
    return rewrite(root, lambda op: new if op is old else op)


def _one_sequence(case: Case, b: int) -> Case:
    """Sequence `b` alone."""

    def alone(value: Any) -> Any:
        return (value[b],) if isinstance(value, tuple) else value

    data = list(case.pattern.data)
    for op, name, slot in places(case.pattern.node):
        tensor = data[slot.index]
        if tensor.dim() == len(role_of(op, name).axes) + 2 and len(tensor) > 1:
            data[slot.index] = tensor[b : b + 1]
    shape = case.bias_shape
    if len(shape) == 2:
        shape = (1, shape[1])
    return replace(
        case, pattern=fitted(case.pattern.node, tuple(data)), rows=(case.rows[b],), keys=(case.keys[b],),
        q_offset=alone(case.q_offset), kv_lengths=alone(case.kv_lengths), bias_shape=shape,
    )  # fmt: skip


def _heads(case: Case, q_heads: int, kv_heads: int) -> Case:
    """Fewer heads: data and mixtures of all are cut."""
    data = list(case.pattern.data)
    wanted = {case.q_heads: q_heads, case.kv_heads: kv_heads, 1: 1}
    for op, name, slot in places(case.pattern.node):
        own = len(role_of(op, name).axes)
        tensor = case.pattern.data[slot.index]
        if tensor.dim() > own:
            data[slot.index] = tensor.narrow(-own - 1, 0, wanted[tensor.shape[-own - 1]])

    def rule(op: Op) -> Op:
        return Op(op.name, op.operands[: wanted[len(op.operands)]], op.attrs) if op.kind == "per_head" else op

    pattern = fitted(rewrite(case.pattern.node, rule), tuple(data))
    heads = [wanted[n] for n in case.bias_shape[-1:]]
    return replace(
        case, pattern=pattern, q_heads=q_heads, kv_heads=kv_heads, bias_shape=(*case.bias_shape[:-1], *heads)
    )


def _shorter(case: Case, axis: str, lengths: tuple[int, ...]) -> Case:
    """Fewer rows or keys; data that are as long as these are cut."""
    smaller = replace(case, **{axis: lengths})
    rows, keys = smaller.call.q_len, smaller.call.kv_len
    data = list(case.pattern.data)
    for op, name, slot in places(case.pattern.node):
        data[slot.index] = _cut(op, name, data[slot.index], rows, keys)
    return replace(smaller, pattern=fitted(case.pattern.node, tuple(data)))


def _cut(op: Op, name: str, tensor: Tensor, rows: int, keys: int) -> Tensor:
    if op.kind == "n_of_m":
        return tensor[..., :rows, :keys]
    if op.kind == "permuted":
        length = rows if name == "q" else keys
        order = (tensor >= length).int().argsort(-1, stable=True)  # what is left keeps its order
        return tensor.gather(-1, order)[..., :length]
    if op.kind not in ("block", "top_k"):
        return tensor
    tiles = -(-rows // op["rows"])
    if name == "indptr":
        return tensor[..., : tiles + 1]
    if name == "mask":
        return tensor[..., :tiles, : -(-keys // op["cols"])]
    return tensor if op.kind == "block" and op["indptr"] is not None else tensor[..., :tiles, :]


def _less(pattern: Pattern, index: int, tensor: Tensor) -> Iterator[Tensor]:
    """Data with less in them."""
    op, name, _ = next(place for place in places(pattern.node) if place[2].index == index)
    if tensor.dim() > len(role_of(op, name).axes):
        yield tensor.flatten(0, -1 - len(role_of(op, name).axes))[0]
    if name == "mask":
        if not bool((tensor != 0).all()):
            yield tensor.new_ones(tensor.shape)
    elif op.kind == "permuted":
        if not torch.equal(tensor, tensor.sort(-1).values):
            yield tensor.sort(-1).values
    elif name != "indptr" and tensor.shape[-1] and not (op.kind == "block" and op["indptr"] is not None):
        half = tensor.shape[-1] // 2
        yield tensor[..., :half]
        yield tensor[..., half:]
        if tensor.shape[-1] > 1:
            yield tensor[..., 1:]
            yield tensor[..., :-1]
