"""What the Triton template that makes float8 of q, k and v needs to know.

`parameters` is also the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spgen.templates.triton.attention import Parameter, padded

PEAKS, QUANTIZE = "peaks", "quantize"
ENTRIES = (PEAKS, QUANTIZE)  # in order
ROWS, PEAK_ROWS = 64, 256  # of a tile; of k and v, whose peak a program finds
KEYS = 16  # that lie in an order of their own among values of v, whose rows are padded to a multiple


@dataclass(frozen=True)
class Quantization:
    """Everything that such kernels are specialised for; lengths, heads and strides are not among it.

    `dtype` is that of q, k and v before.
    """

    dtype: str
    head_dim: int
    value_dim: int
    kv_lengths: bool

    def __str__(self) -> str:
        flags = ["kv_lengths"] if self.kv_lengths else []
        return " ".join(("quantize", self.dtype, str(self.head_dim), str(self.value_dim), *flags))


def key_at(place: int) -> int:
    """The key whose value lies at a place among sixteen."""
    return place // 2 % 2 * 8 + place // 4 * 2 + place % 2


def padded_keys(keys: int) -> int:
    """Columns of the values of v: whole groups of the keys that lie in an order of their own."""
    return -(-keys // KEYS) * KEYS


def parameters(quantization: Quantization, entry: str) -> tuple[Parameter, ...]:
    """The arguments of a rendered kernel, in order; types are those of attention's, "float8" and "scratch"."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(quantization, entry))


def _parameters(quantization: Quantization, entry: str) -> Iterator[tuple[str, str]]:
    """Tensors first: they change from call to call."""
    tensors = ("k", "v") if entry == PEAKS else ("q", "k", "v")
    yield from ((name, "data") for name in tensors)
    if entry == QUANTIZE:
        yield from ((f"{name}_values", "float8") for name in tensors)
        yield from ((f"{name}_scales", "*fp32") for name in tensors)
    yield from (("k_peaks", "*i32"), ("v_peaks", "*i32"))
    if quantization.kv_lengths:
        yield "kv_lengths", "*index"
    yield from ((f"{name}_{axis}", "i64") for name in tensors for axis in ("b", "h", "n"))
    yield from ((f"{name}_d", "unit") for name in tensors)
    if entry == QUANTIZE:
        yield from (("q_len", "i32"), ("n_heads", "i32"), ("n_sequences", "i32"))
    yield from (("k_len", "i32"), ("n_key_heads", "i32"))


def symbols(quantization: Quantization) -> Mapping[str, Any]:
    """Every symbol of quantize.py.jinja; its head comment says what they are."""
    return {
        "text": str(quantization),
        "parameters": {entry: parameters(quantization, entry) for entry in ENTRIES},
        "head_dim": quantization.head_dim,
        "head_lanes": padded(quantization.head_dim),
        "value_dim": quantization.value_dim,
        "value_lanes": padded(quantization.value_dim),
        "rows": ROWS,
        "peak_rows": PEAK_ROWS,
        "kv_lengths": quantization.kv_lengths,
    }
