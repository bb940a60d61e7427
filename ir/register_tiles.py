"""Register tiles of a CPU kernel: the rows that a configuration leaves open.

Kernels are written with them, and the cost model counts them. A register tile has some rows, of keys in K Q and of
channels in V P, beside `vectors` vectors of queries.
"""

from __future__ import annotations

_SPARE = 2  # registers: the broadcast operand, and one for the scheduler
_TALLEST = 16  # rows
_WIDE = 96  # channels, from which each pass over the tile of V costs more than rows of the last one that are missing


def most_rows(vectors: int, registers: int) -> int:
    """As many rows as leave registers for the operands."""
    return max(1, min(_TALLEST, (registers - _SPARE - vectors) // vectors))


def usual_rows(block_n: int, vectors: int, registers: int) -> int:
    """Keys of attention, or outputs of a product: a divisor of the block, so that none is computed for nothing."""
    return _divisor(block_n, most_rows(vectors, registers))


def usual_value_rows(value_dim: int, vectors: int, registers: int) -> int:
    """Channels: for wide heads as many as fit, since each pass reads the tile of V."""
    most = most_rows(vectors, registers)
    return most if value_dim >= _WIDE else _divisor(value_dim, most)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`, unless it leaves more than a third of the registers unused."""
    divisor = max(rows for rows in range(1, most + 1) if size % rows == 0)
    return divisor if 3 * divisor >= 2 * most else most
