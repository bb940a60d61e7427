"""`python -m tests.fuzz.products`: random products with sparse weights against the oracle, on any device.

Case n of a seed is the same everywhere; a failing one prints as `SEED:N` with its fields, `--case SEED:N` repeats it.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass
from random import Random
from typing import Annotated

import torch
import typer

import spgen as sp
from spgen import reference
from spgen.ir.kernel import ACTIVATIONS
from spgen.weights import ops
from spgen.weights.linear import Linear
from spgen.weights.select import mask_of, resolved
from spgen.weights.storage import Stored

_PATTERNS = (
    "block(16, density=0.3)", "block(32, density=0.2)", "block(64, density=0.5)", "block(16, cols=8, density=0.4)",
    "block(128, density=0.3)", "block(7, cols=5, density=0.3)", "block(1, cols=16, density=0.5)", "n_of_m(2, 4)",
    "n_of_m(1, 4)", "n_of_m(4, 8)", "n_of_m(2, 8)", "n_of_m(3, 5)", "where((i * 3 + j) % 7 < 3)", "window(9, right=4)",
    "top_k(5, rows=16, cols=4)", "block(32, density=0.4) & n_of_m(2, 4)", "dense()",
)  # fmt: skip
_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_ROWS = (0, 1, 1, 2, 5, 8, 13, 16, 31, 64, 65, 100, 130)
_FORMS = ("linear", "linear", "gated", "gradients")


@dataclass(frozen=True)
class Case:
    """One product: sizes, pattern, type, and what is done."""

    pattern: str
    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    form: str
    activation: str
    bias: bool
    values: str | None
    apart: bool
    seed: int


def case(seed: int, number: int) -> Case:
    """Case `number` of a seed."""
    draw = Random(f"{seed}:{number}")
    form, pattern = draw.choice(_FORMS), draw.choice(_PATTERNS)
    quantised = form == "linear" and not pattern.startswith(("where", "window", "block(7")) and draw.random() < 0.3
    return Case(
        pattern, draw.choice(_ROWS), draw.randint(1, 200), draw.randint(1, 300), draw.choice(_DTYPES), form,
        draw.choice(ACTIVATIONS), draw.random() < 0.5, draw.choice(("int8", "float8_e4m3fn")) if quantised else None,
        draw.random() < 0.2, draw.randrange(2**31),
    )  # fmt: skip


def error(one: Case, device: str) -> float:
    """The largest difference to the oracle over the largest value, as a share of what is tolerated."""
    generator = torch.Generator().manual_seed(one.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(one.dtype).to(device)

    pattern = sp.pattern(one.pattern)
    weights = [random(one.outputs, one.inputs) / one.inputs**0.5 for _ in range(1 + (one.form == "gated"))]
    bias = random(one.outputs) if one.bias else None
    x = random(one.rows, one.inputs * 2)[:, : one.inputs] if one.apart else random(one.rows, one.inputs)
    layers = [sp.linear(weight, pattern, bias, activation=one.activation, values=one.values) for weight in weights]
    stored = [layer.weight.stored for layer in layers]
    dense = [
        part.dense().double() if one.values else _kept(w, pattern) for w, part in zip(weights, stored, strict=True)
    ]
    whole = torch.ones(one.outputs, one.inputs, dtype=torch.bool, device=device)
    if one.form == "gradients":
        return _of_gradients(one, layers[0], x, dense[0], random(one.rows, one.outputs))
    expected = reference.linear(x, dense[0], whole, bias, one.activation)
    if one.form == "gated":
        if stored[0].layout.kind == "bitmap":
            return 0.0  # these are multiplied one after the other
        expected = expected * reference.linear(x, dense[1], whole)
        return _off(ops.product(x, tuple(stored), bias, one.activation), expected, one)
    with torch.no_grad():
        return _off(layers[0](x), expected, one)


def _kept(weight: torch.Tensor, pattern: sp.Pattern) -> torch.Tensor:
    return weight.double().masked_fill(~mask_of(resolved(pattern, weight), weight), 0)


def _of_gradients(one: Case, layer: Linear, x: torch.Tensor, dense: torch.Tensor, g: torch.Tensor) -> float:
    inputs = x.detach().clone().requires_grad_()
    layer(inputs).backward(g)
    kept = layer.weight.stored
    leaves = [inputs.detach().double().requires_grad_(), dense.clone().requires_grad_()]
    bias = None if layer.bias is None else layer.bias.detach().double()
    reference.linear(leaves[0], leaves[1], torch.ones_like(dense, dtype=torch.bool), bias, one.activation).backward(
        g.double()
    )
    found = Stored(kept.layout, kept.shape, layer.weight.values.grad, kept.index).dense()
    expected = leaves[1].grad.masked_fill(~kept.mask(), 0)
    return max(_off(inputs.grad, leaves[0].grad, one), _off(found, expected, one))


def _off(found: torch.Tensor, expected: torch.Tensor, one: Case) -> float:
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    largest = max(1.0, float(expected.abs().max()))
    off = float((found.double() - expected).abs().max()) / largest
    return float("inf") if off != off else off / (_TOLERANCE[one.dtype] * (4 if one.form == "gradients" else 1))


def run(seed: int, first: int, count: int, device: str, seconds: float = 1e9) -> tuple[int, list[str]]:
    """How many cases were run, and those that failed, as texts."""
    failed, end = [], clock.monotonic() + seconds
    for number in range(first, first + count):
        if clock.monotonic() > end:
            return number - first, failed
        one = case(seed, number)
        try:
            share = error(one, device)
            told = f"{share:.1f} of what is tolerated" if share > 1 else ""
        except Exception as fault:
            told = f"{type(fault).__name__}: {str(fault).splitlines()[0]}"
        if told:
            failed.append(f"{seed}:{number} {one}: {told}")
    return count, failed


def main(
    cases: Annotated[int, typer.Option(help="How many cases.")] = 500,
    seed: Annotated[int, typer.Option(help="Which sequence of cases.")] = 0,
    first: Annotated[int, typer.Option(help="The first case.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    time: Annotated[float, typer.Option(help="No case starts after so many seconds.")] = 600,
    replay: Annotated[str, typer.Option("--case", help="SEED:N, that case alone.")] = "",
) -> None:
    """Random products with sparse weights against the oracle."""
    if replay:
        of, _, number = replay.partition(":")
        seed, first, cases = int(of), int(number), 1
    done, failed = run(seed, first, cases, device, time)
    print("\n".join([*failed, f"{device}, seed {seed}: {done} cases, {len(failed)} failed"]))
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
