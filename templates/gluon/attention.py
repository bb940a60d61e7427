"""What the Gluon template of attention forward needs to know about a level-3 kernel, and which kernels it serves.

The kernel's structure is that of FlashAttention-3 (Shah et al. 2024): warps that bring tiles, warpgroups that multiply,
the scores of one step beside the values of the step before; its row tiles are handed out while it runs, and a row
tile's first scores come beside the last values of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spgen.ir.expr import (
    tables,
    var,
    walk,
)
from spgen.ir.kernel import FLOAT8, option, parts
from spgen.ir.node import Op
from spgen.templates.gluon.boxes import box_rows, gathers, load_of, run_of
from spgen.templates.gluon.resources import (
    COLUMNS,
    LANES,
    LEAST_REGISTERS,
    ROWS,
    WARPGROUPS,
    Part,
    head_parts,
    is_fp8,
    is_staged,
    lanes,
    q_buffers,
    registers,
    value_parts,
)
from spgen.templates.gluon.segments import marks, scalars, segment_of, with_bounds
from spgen.templates.triton.attention import (
    HEADS,
    Parameter,
    Printing,
    call_parameters,
    expressions_of,
    is_partial,
    names_of,
    ranges_of,
    reads_per_pair,
    row_vectors,
    score_parameters,
)
from spgen.templates.triton.quantize import KEYS

ENTRY = "attention"
VECTOR = 8  # channels, of which tensor maps take multiples
_FEW_LANES = 128  # up to which rows are brought one by one
_TENSORS = ("q", "k", "v", "out")
ALIGN = "align"  # the option by which tiles begin at multiples of so many keys, where keys are walked in order
RESULT = "bfloat16"  # what becomes of float8
ELEMENTS = {FLOAT8: "float8e4nv"}  # Triton's names, where they differ
SCALES = ("q_scales", "k_scales", "v_scales")
_FLOAT8_LANES = 128  # of float8: channels whose sums of all steps and products of one fit the registers
_ALWAYS = ("alive", "buffer", "b", "hk", "h", "tile", "kv_len", "q_offset")
_PACKED = ("sequence", "q_start", "q_len", "k_start")


def refusal(kernel: Op) -> str | None:
    """Why this template cannot express a kernel; None if it can."""
    if kernel["dtype"] == "float32":
        return "products of float32"
    groups = option(kernel, WARPGROUPS, 0)
    if groups not in (1, 2) or kernel["block_m"] != ROWS * groups or kernel["block_n"] not in COLUMNS:
        return f"tiles of {kernel['block_m']} x {kernel['block_n']}"
    if registers(kernel)["bring"] < LEAST_REGISTERS:
        return f"{registers(kernel)['multiply']} registers"
    if kernel["head_dim"] > LANES[-1] or kernel["value_dim"] > LANES[-1]:
        return f"more than {LANES[-1]} channels"
    if kernel["head_dim"] % VECTOR or kernel["value_dim"] % VECTOR:
        return "rows that do not begin at multiples of 16 bytes"
    if kernel["pack"] > 1 or is_partial(kernel) or option(kernel, "splits", 1) > 1:
        return "calls of few rows"
    if kernel["row"] is not None:
        return "permuted rows"
    if is_fp8(kernel) and _refused_of_fp8(kernel):
        return _refused_of_fp8(kernel)
    segments = parts(kernel, "segment")
    if not segments:
        return "no keys"
    if any(op["key"] is not None for op in segments):
        return "permuted keys"
    if gathers(kernel) and max(lanes(kernel["head_dim"]), lanes(kernel["value_dim"])) > _FEW_LANES:
        return f"keys that lie apart, of more than {_FEW_LANES} channels"
    if reads_per_pair(kernel):
        return "masks that read tables pair by pair"
    return None


def _refused_of_fp8(kernel: Op) -> str | None:
    """Why kernels of float8 cannot be expressed, of what other types can; None if they can."""
    if kernel["cu_seqlens"]:
        return "packed batches of float8"
    if kernel["bias"] != "none":
        return "a bias on scores of float8"
    if kernel["head_dim"] % KEYS or kernel["value_dim"] % KEYS:
        return "rows of float8 that do not begin at multiples of 16 bytes"
    if max(kernel["head_dim"], kernel["value_dim"]) > _FLOAT8_LANES:
        return f"more than {_FLOAT8_LANES} channels of float8"
    if not all(_begins_aligned(kernel, op) for op in parts(kernel, "segment")):
        return f"tiles of float8 that do not begin at multiples of {KEYS} keys, all of them following each other"
    if marks(kernel):
        return "masks of float8 that read tables"
    return None


def _begins_aligned(kernel: Op, segment: Op) -> bool:
    """Whether a segment's tiles are keys that follow each other from a multiple of 16 on."""
    if run_of(segment, kernel["block_n"]) < kernel["block_n"]:
        return False
    if segment["column"] is var("p"):
        return option(kernel, ALIGN, 1) % KEYS == 0
    return load_of(segment["column"]) is not None


def descriptors(kernel: Op) -> Iterator[tuple[str, str, Part]]:
    """The tensor maps that a kernel takes: name, tensor, and which of its channels come with a box."""
    for tensor in _TENSORS if is_staged(kernel) else _TENSORS[:-1]:
        for part in (head_parts if tensor in "qk" else value_parts)(kernel):
            yield f"{tensor}_blocks{part.suffix}", tensor, part


def box_of(kernel: Op, name: str) -> tuple[int, int]:
    """Rows and lanes that a descriptor brings, or takes away, at once; of float8 values, channels and keys."""
    tensor, part = next((tensor, part) for known, tensor, part in descriptors(kernel) if known == name)
    found = box_rows(kernel) if tensor in "kv" else ROWS, part.lanes
    return found[::-1] if is_fp8(kernel) and tensor == "v" else found


def element_of(kernel: Op, name: str) -> str:
    """The element type behind a data argument or a descriptor."""
    return str(RESULT if is_fp8(kernel) and name.startswith("out") else kernel["dtype"])


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    yield from (("q", "data"), ("k", "data"), ("v", "data"), ("out", "data"))
    if kernel["lse"]:
        yield "lse", "*fp32"
    yield from ((name, "desc") for name, _, _ in descriptors(kernel))
    yield from call_parameters(kernel)
    yield "scale", "fp32"
    yield from score_parameters(kernel)
    if is_fp8(kernel):
        yield from ((name, "*fp32") for name in SCALES)
    yield "tickets", "*i32"
    yield from ((size, "i32") for size in ("q_len", "k_len", "n_key_heads", "group"))
    if gathers(kernel):
        for tensor in ("k", "v"):
            yield from ((f"{tensor}_b", "stride"), (f"{tensor}_h", "stride"), (f"{tensor}_n", "step"))
    if kernel["cu_seqlens"]:
        yield "n_sequences", "i32"
    elif not is_staged(kernel):
        yield "out_b", "stride"
    if kernel["cu_seqlens"] or not is_staged(kernel):
        yield from (("out_h", "stride"), ("out_n", "stride"))
    yield "n_tickets", "i32"
    yield "NEGATIVE", "constexpr"


def symbols(kernel: Op) -> dict[str, Any]:
    """Every symbol of attention.py.jinja; its head comment says what they are."""
    sliced = {op["name"]: f"own_{op['name']}_table" for op in parts(kernel, "table")}
    printing = Printing({**names_of(kernel), **sliced}, ranges_of(kernel), row_vectors(kernel))
    segments = [segment_of(kernel, op, printing) for op in parts(kernel, "segment")]
    lets = [op for op in parts(kernel, "let") if op["name"] not in printing.rows]
    columns = [op["column"] for op in parts(kernel, "segment")]
    producer = scalars(kernel, columns, printing)
    packed = _PACKED if kernel["cu_seqlens"] else ()
    slope = ("slope",) if kernel["bias"] == "alibi" else ()
    values = dict.fromkeys(
        (*_ALWAYS, *packed, *slope, *(name for one in segments for name in (*one.bounds, *one.mask_values)), *producer)
    )
    bounds = [name for one in segments for name in one.bounds]
    marked = [one for one in segments if one.bits]
    return {
        "text": str(kernel).rstrip("\n").split("\n"),
        "parameters": parameters(kernel),
        "element": ELEMENTS.get(kernel["dtype"], kernel["dtype"]),
        "element_bytes": 1 if is_fp8(kernel) else 2,
        "fp8": is_fp8(kernel),
        "result_element": RESULT,
        "head_parts": head_parts(kernel),
        "value_parts": value_parts(kernel),
        "q_buffers": q_buffers(kernel),
        "staged": is_staged(kernel),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "box": box_rows(kernel),
        "stages": option(kernel, "stages", 2),
        "warpgroups": option(kernel, WARPGROUPS, 0),
        "registers": registers(kernel),
        "gathers": gathers(kernel),
        "q_offset": kernel["q_offset"],
        "kv_lengths": kernel["kv_lengths"],
        "cu_seqlens": kernel["cu_seqlens"],
        "head_dim": kernel["head_dim"],
        "value_dim": kernel["value_dim"],
        "softcap": kernel["softcap"],
        "sinks": kernel["sinks"],
        "bias": kernel["bias"],
        "lse": kernel["lse"],
        "call": _call(kernel),
        "values": tuple(values),
        "tables": [{"name": f"{op['name']}_table", "head": HEADS[op["heads"]]} for op in parts(kernel, "table")],
        "lets": [
            {"name": printing.names[op["name"]], "value": printing.text(op["value"], printing.names[op["name"]])}
            for op in lets
        ],
        "segments": [
            with_bounds(one, op, printing) for one, op in zip(segments, parts(kernel, "segment"), strict=True)
        ],
        "producer_values": tuple(dict.fromkeys(("b", "hk", "h", "tile", "kv_len", *packed, *bounds, *producer))),
        "marker_values": tuple(
            dict.fromkeys(("b", "hk", "h", *bounds, *(name for one in marked for name in one.mask_values), *producer))
        ),
        "marker_tables": tuple(
            {f"{name}_table" for column in columns for name in tables(column)}.union(
                *(one.mask_tables for one in marked)
            )
        ),
        "producer_tables": tuple({f"{name}_table" for column in columns for name in tables(column)}),
        "operations": {node.op for value in expressions_of(kernel) for node in walk(value)},
    }


def _call(kernel: Op) -> tuple[str, ...]:
    """What the scheduler takes of the call."""
    offset = {"default": (), "scalar": ("q_offset",), "tensor": ("q_offsets",)}[kernel["q_offset"]]
    packed = ("cu_seqlens_q", "cu_seqlens_k", "n_sequences") if kernel["cu_seqlens"] else ()
    return (*offset, *(("kv_lengths",) if kernel["kv_lengths"] else ()), *packed)
