"""torch's functions on traced values, as predicates written for FlexAttention use them.

`torch.logical_and(q_idx >= kv_idx, …)`, `torch.where`, `torch.minimum`, `mask.logical_not()`, `b.new_ones((), …)`: each
becomes what it means for integers and conditions. `tensor[h]` becomes a choice among constants; `tensor[q_idx]` stays a
lookup, for what `spgen/convert/` makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from spgen.errors import PatternError, UnsupportedError
from spgen.ir import expr
from spgen.ir.expr import Expr, free_variables
from spgen.trace import Traced, Value, maximum, minimum, select, tracing

# Tensors over heads and sequences with more entries than this are data: a choice among so many would be a slow kernel.
_MAX_CHOICES = 256


def call(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What `function`, a function or method of torch, gives for traced arguments."""
    name = function.__name__
    if name == "__getitem__":
        return _lookup(*args)
    known = _FUNCTIONS.get(name) or _FUNCTIONS.get(name.strip("_"))
    if known is None:
        raise UnsupportedError(
            f"{tracing().subject}: torch.{name}", given="a traced value",
            allowed=", ".join(sorted(_FUNCTIONS)), remedy="write it with integer arithmetic, comparisons and & | ~",
        )  # fmt: skip
    try:
        inspect.signature(known).bind(*args, **options)
    except TypeError:
        given = ", ".join([*(["…"] * len(args)), *(f"{key}=…" for key in options)])
        allowed = f"torch.{name}{inspect.signature(known)}"
        raise UnsupportedError(f"{tracing().subject}: torch.{name}", given=f"({given})", allowed=allowed) from None
    return known(*args, **options)


def method(value: Traced, name: str) -> Any:
    """The method or attribute `name` of a tensor, on a traced value; raises AttributeError when there is none."""
    if name == "device":
        return None
    if name in _METHODS:
        return partial(_METHODS[name], value)
    if name.startswith("__") or name not in _FUNCTIONS:
        raise AttributeError(f"a traced value has no attribute {name!r}", name=name, obj=value)
    return partial(_FUNCTIONS[name], value)


def _condition(value: Any) -> Any:
    """A truth value: integers are true unless they are 0."""
    traced = value if isinstance(value, Traced) else Traced(expr.const(value)) if isinstance(value, int) else value
    return traced if not isinstance(traced, Traced) or traced.expr.is_bool else traced != 0


def _logical(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(input: Any, other: Any) -> Any:
        return build(_condition(input), _condition(other))

    return apply


def _binary(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(input: Any, other: Any) -> Any:
        return build(_traced(input), other)

    return apply


def _reversed(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(input: Any, other: Any) -> Any:
        return build(_traced(other), input)

    return apply


def _traced(value: Any) -> Any:
    """`value` with the operators of a traced one: a tensor would ask us again."""
    if isinstance(value, Traced):
        return value
    return Traced(expr.const(value.item() if hasattr(value, "requires_grad") and value.dim() == 0 else value))


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode != "floor":
        raise UnsupportedError(
            f"{tracing().subject}: torch.div", given=f"rounding_mode={rounding_mode!r}",
            allowed='rounding_mode="floor"', remedy="write //",
        )  # fmt: skip
    return _traced(input) // other


def _clamp(input: Any, min: Value | None = None, max: Value | None = None) -> Any:
    low = input if min is None else maximum(input, min)
    return low if max is None else minimum(low, max)


def _filled(value: int) -> Callable[..., Traced]:
    def fill(self: Any, size: Any = (), dtype: Any = None, **_: Any) -> Traced:
        return Traced(expr.const(bool(value) if str(dtype) == "torch.bool" else value))

    return fill


def _same(self: Any, *_: Any, **__: Any) -> Any:
    return self


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "floor_divide": lambda a, b: a // b, "remainder": lambda a, b: a % b,
    "bitwise_and": lambda a, b: a & b, "bitwise_or": lambda a, b: a | b, "bitwise_xor": lambda a, b: a ^ b,
    "bitwise_left_shift": lambda a, b: a << b, "bitwise_right_shift": lambda a, b: a >> b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
# the operators' own names, and those that torch gives to reversed ones
_ALIASES = {
    "subtract": "sub", "multiply": "mul", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
    "not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _binary(build) for name, build in _OPERATORS.items()},
    **{alias: _binary(_OPERATORS[name]) for alias, name in _ALIASES.items()},
    **{f"r{name}": _reversed(_OPERATORS[name]) for name in ("add", "sub", "mul")},
    **{f"r{alias}": _reversed(_OPERATORS[name]) for alias, name in _ALIASES.items()},
    "div": _divide,
    "divide": _divide,
    "abs": lambda input: abs(input),
    "absolute": lambda input: abs(input),
    "neg": lambda input: -input,
    "negative": lambda input: -input,
    "square": lambda input: input * input,
    "minimum": lambda input, other: minimum(input, other),
    "maximum": lambda input, other: maximum(input, other),
    "min": lambda input, other: minimum(input, other),
    "max": lambda input, other: maximum(input, other),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda input, min: maximum(input, min),
    "clamp_max": lambda input, max: minimum(input, max),
    "where": lambda condition, input, other: select(_condition(condition), input, other),
    "logical_and": _logical(lambda a, b: a & b),
    "logical_or": _logical(lambda a, b: a | b),
    "logical_xor": _logical(lambda a, b: a ^ b),
    "logical_not": lambda input: ~_condition(input),
    "bitwise_not": lambda input: ~input,
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
}
_METHODS: dict[str, Callable[..., Any]] = {
    "new_ones": _filled(1),
    "new_zeros": _filled(0),
    "bool": _condition,
    "where": lambda self, condition, other: select(_condition(condition), self, other),
    **dict.fromkeys(("to", "long", "int", "clone", "detach", "contiguous"), _same),
}


def _lookup(tensor: Any, index: Any) -> Traced:
    """`tensor[index]`: a choice among constants over heads and sequences, else a lookup that is remembered."""
    places = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(place, Traced | int) or isinstance(place, bool) for place in places):
        refuse_lookup(tensor, f"{len(places)} indices that are not all numbers")
    if len(places) != tensor.dim():
        refuse_lookup(tensor, f"{len(places)} indices for {tensor.dim()} axes")
    numbers = [place.expr if isinstance(place, Traced) else expr.const(place) for place in places]
    while len(numbers) > 1 and tensor.shape[0] == 1:  # one entry for all
        tensor, numbers = tensor[0], numbers[1:]
    if all(free_variables(number) <= {"b", "h"} for number in numbers) and 0 < tensor.numel() <= _MAX_CHOICES:
        return Traced(_choice(tensor.tolist(), numbers))
    if len(numbers) > 1 or tensor.is_floating_point():
        refuse_lookup(tensor, f"a lookup of {', '.join(map(str, numbers))}")
    found = expr.load(f"tensor_{_remembered(tensor)}", 0, numbers[0])
    return Traced(found.ne(0) if str(tensor.dtype) == "torch.bool" else found)


def _choice(values: Any, numbers: list[Expr]) -> Expr:
    """The value at an index of heads and sequences."""
    if not numbers:
        if isinstance(values, float):
            raise PatternError(f"{tracing().subject}: tensor", given=f"the number {values}", allowed="integers")
        return expr.const(values)
    cases: list[Expr] = [_choice(value, numbers[1:]) for value in values]
    if numbers[0].op == "const":
        return cases[int(numbers[0].args[0])]
    found: Expr = cases[-1]
    for place in range(len(cases) - 2, -1, -1):
        found = expr.select(numbers[0].eq(place), cases[place], found)
    return found


def _remembered(tensor: Any) -> int:
    lookups = tracing().lookups
    if lookups is None:
        refuse_lookup(tensor, "a lookup")
    for number, known in enumerate(lookups):
        if known is tensor or (known.data_ptr() == tensor.data_ptr() and known.shape == tensor.shape):
            return number
    lookups.append(tensor)
    return len(lookups) - 1


def refuse_lookup(tensor: Any, given: str, subject: str = "") -> NoReturn:
    """Raises UnsupportedError: what `given` asks of a tensor is not captured."""
    raise UnsupportedError(
        f"{subject or tracing().subject}: a tensor of shape {list(tensor.shape)}, {tensor.dtype}", given=given,
        allowed="lookups by head or sequence, and document_id[q_idx] == document_id[kv_idx] for ascending documents",
        remedy="pass its content as data: documents(cu_seqlens), columns(index), block(rows, mask=…), or "
        "from_mask_mod with q_len= and kv_len=, which evaluates the mask",
    )  # fmt: skip
