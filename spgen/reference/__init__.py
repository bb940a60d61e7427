"""The oracle: what every kernel must agree with, written down as directly as possible.

`mask` decides each pair (row, column) from the pattern; `attention`, `linear` and `mlp` compute from a mask in float64.
Nothing here is shared with the passes or the kernels, and nothing here is fast.
"""

from spgen.reference.attention import attention
from spgen.reference.linear import linear, mlp
from spgen.reference.mask import mask

__all__ = ["attention", "linear", "mask", "mlp"]
