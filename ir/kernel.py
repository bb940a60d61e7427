"""Level 3, KERNEL: one loop over segments with its schedule attached; the templates print it and decide nothing.

`attention` follows; `linear`, `sampled` and `neurons`, products with sparse weights, stand at the end.

A kernel program owns one row tile of one query head (or of a packed group of heads) and visits its segments in order.
A segment is a run of *positions* `[start, stop)`. Position `p` stands for the column `column(p)` and the key
`key(column)`. Tiles of `block_n` positions inside `[full_start, full_stop)` hold only wanted pairs and run without a
mask; the rest of the run is masked. The bounds satisfy start <= full_start <= full_stop <= stop.

Expressions speak of these variables (scalars per program unless said otherwise):

    b, hk, h        sequence, key head, query head (`h` does not exist when heads are packed)
    tile            index of the row tile in its sequence
    q_len, kv_len   rows of the call; keys of this sequence
    q_offset        position of row 0
    q_start, k_start   the sequence's first row and key in a packed batch, else 0
    n_heads, group  query heads; query heads per key head
    s, r, i         vectors over the tile's rows: slot, row of the call, position
    p, c, j         vectors over the tile's columns: position in the run, column, key
    any let         defined earlier, a scalar or a vector over rows

and of tables, whose axes are [batch, head, row, column] with batch and head broadcast.

The score of a pair is s = scale * (q . k), where q, k and v of dtype float8_e4m3fn are values times the scales of their
rows (q) or heads (k and v), then softcap * tanh(s / softcap), then s + bias[b, h, j] ("key") or
s - slope[b, h] * |i - j| ("alibi"); with `sinks` the denominator of the softmax, whose logarithm is the log-sum-exp,
also holds exp(sink[h]).

With `cu_seqlens` the batch is packed: q is [1, Hq, T, D], k and v [1, Hk, Tk, .], and sequence `b` has the rows
cu_q[b] ... cu_q[b + 1] - 1, likewise its keys. All variables are local to the sequence. The row tiles are numbered by
slots: with R = block_m // pack, tile `tile` of sequence `b` is slot q_start // R + b + 1 + tile, and there are
T // R + N + 2 of them. What lies before cu_q[0] is sequence -1, what lies behind cu_q[N] sequence N; neither has keys.
Boundaries are clamped to 0 ... T before use.

A `linear` kernel computes y [M, N] from x [M, K] and weights [N, K] of which some are stored (spgen/weights/storage.py
says how each storage lies in memory):

    y = activation(scale * (x . stored weights) + bias)           gated:  y = activation(x . gate + bias) * (x . up)

or, transposed, y [M, K] from x [M, N]. Storages: "blocks" of `rows` x `cols`, with one list per block row; "n_of_m"
with at most `rows` (n) of each `cols` (m) consecutive columns; "bitmap" with any. Products add up in float32. `sampled`
computes the stored blocks of the gradient g [M, N], x [M, K] -> g^T x. `height` says for how many rows of x a kernel is
made: "few", whose time goes into reading weights, or "many".

`neurons` kernels multiply with rows of a weight that lists [G, F] name, each for `rows` rows of x; their lengths [G]
are on the device. The parts: "union", flags of neurons that any of a list's rows finds active by its scores [M, F];
"compact", the ascending lists of scores or (dtype uint8) of flags; "up", for the a-th neuron i of the list

    h[., a] = activation(x . w[i] + bias[i])        gated:  h[., a] = activation(gate[., i]) * (x . w[i])

and "down", y = sum over a of h[., a] w[i] + bias.
"""

from __future__ import annotations

from spgen.errors import SpgenError
from spgen.ir.expr import Expr, free_variables, tables
from spgen.ir.node import Dialect, Op, OpDef

PROGRAM_VARIABLES = ("b", "hk", "h", "tile", "q_len", "kv_len", "q_offset", "q_start", "k_start", "n_heads", "group")
ROW_VARIABLES = ("s", "r", "i")
COLUMN_VARIABLES = ("p", "c", "j")
HEAD_KINDS = ("one", "kv", "q")
FLOAT8 = "float8_e4m3fn"  # the dtype of q, k and v that come with scales; the output is bfloat16
OFFSETS = ("default", "scalar", "tensor")
BIASES = ("none", "key", "alibi")
STORAGES = ("blocks", "n_of_m", "bitmap")
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
HEIGHTS = ("few", "many")
NEURON_PARTS = ("union", "compact", "up", "down")


def _check_table(op: Op) -> SpgenError | None:
    if op["heads"] not in HEAD_KINDS:
        return SpgenError(f"table {op['name']}: heads", given=op["heads"], allowed=", ".join(HEAD_KINDS))
    return None


def _check_attention(op: Op) -> SpgenError | None:
    if op["q_offset"] not in OFFSETS:
        return SpgenError("q_offset", given=op["q_offset"], allowed=", ".join(OFFSETS))
    if op["bias"] not in BIASES:
        return SpgenError("bias", given=op["bias"], allowed=", ".join(BIASES))
    return _check_names(op)


def _check_linear(op: Op) -> SpgenError | None:
    for name, allowed in (("storage", STORAGES), ("activation", ACTIVATIONS), ("height", HEIGHTS)):
        if op[name] not in allowed:
            return SpgenError(name, given=op[name], allowed=", ".join(allowed))
    return None


def _check_neurons(op: Op) -> SpgenError | None:
    for name, allowed in (("part", NEURON_PARTS), ("activation", ACTIVATIONS)):
        if op[name] not in allowed:
            return SpgenError(name, given=op[name], allowed=", ".join(allowed))
    return None


def _check_names(op: Op) -> SpgenError | None:
    """Every variable and table is defined before it is used."""
    program = set(PROGRAM_VARIABLES) - ({"h"} if op["pack"] > 1 else set())
    known = program | set(ROW_VARIABLES)
    names = {child["name"] for child in op.operands if child.kind == "table"}
    for child in op.operands:
        for attribute, value in child.attrs:
            if not isinstance(value, Expr):
                continue
            columns = set(COLUMN_VARIABLES) if attribute in ("column", "key", "mask") else set()
            missing = (free_variables(value) - known - columns) | (tables(value) - names)
            if missing:
                return SpgenError(f"{child['name']}: {attribute}", given=f"undefined {sorted(missing)[0]!r}")
        if child.kind == "let":
            known.add(child["name"])
    return None


KERNEL = Dialect(
    "kernel",
    {
        # A tensor of the plan: int32, [B or 1, heads, rows, columns], innermost contiguous.
        "table": OpDef({"name": "str", "heads": "str"}, check=_check_table),
        # A named value. `per` is "program" (a scalar) or "row" (a vector over the tile's rows).
        "let": OpDef({"name": "str", "per": "str", "value": "expr"}),
        # A run of positions. `contiguous`: within a tile columns follow each other, column(p + x) = column(p) + x.
        "segment": OpDef(
            {
                "name": "str", "contiguous": "bool", "column": "expr", "key": "expr?", "start": "expr",
                "full_start": "expr?", "full_stop": "expr?", "stop": "expr", "mask": "expr?",
            }
        ),
        # The whole kernel over tables, lets and segments, in this order. `row` maps a slot `s` to a row of the call.
        # `options` are the schedule's further choices as "name=value", known to the backend.
        "attention": OpDef(
            {
                "dtype": "str", "head_dim": "int", "value_dim": "int", "block_m": "int", "block_n": "int",
                "pack": "int", "q_offset": "str", "kv_lengths": "bool", "cu_seqlens": "bool", "softcap": "bool",
                "sinks": "bool", "bias": "str", "lse": "bool", "row": "expr?", "options": "strs",
            },
            operands=None,
            check=_check_attention,
        ),
        # A product with sparse weights. `dtype` is that of x and y, `values` that of what is stored; with `scales`
        # stored values are multiplied by their row's or group's. Tiles: block_m rows of x, block_n of y's columns.
        "linear": OpDef(
            {
                "dtype": "str", "storage": "str", "rows": "int", "cols": "int", "values": "str", "scales": "bool",
                "transposed": "bool", "gated": "bool", "bias": "bool", "activation": "str", "height": "str",
                "block_m": "int", "block_n": "int", "options": "strs",
            },
            check=_check_linear,
        ),
        # The gradient of stored blocks, tile by tile: block_m rows of x and g a step.
        "sampled": OpDef(
            {"dtype": "str", "rows": "int", "cols": "int", "values": "str", "block_m": "int", "options": "strs"}
        ),
        # A part of a product with active neurons. `positive`, `known`: active is what is above the threshold, else what
        # is no smaller in magnitude; the threshold is a number, else a tensor. `gathered`: h has its values where the
        # list says, else one behind the other. `gated`: the gate's values are given; `twofold`: its weights. Tiles:
        # block_a active neurons by block_n columns.
        "neurons": OpDef(
            {
                "dtype": "str", "part": "str", "rows": "int", "positive": "bool", "known": "bool", "gated": "bool",
                "twofold": "bool", "bias": "bool", "gathered": "bool", "activation": "str", "block_a": "int",
                "block_n": "int", "options": "strs",
            },
            check=_check_neurons,
        ),
    },
)  # fmt: skip


def parts(kernel: Op, kind: str) -> tuple[Op, ...]:
    """The tables, lets or segments of a kernel."""
    return tuple(op for op in kernel.operands if op.kind == kind)


def option(kernel: Op, name: str, default: int) -> int:
    """One integer choice of the schedule."""
    return next((int(text.partition("=")[2]) for text in kernel["options"] if text.startswith(f"{name}=")), default)
