"""spgen: declare which pairs matter, get the kernel.

Importing the package imports nothing else: torch, the compiler and its backends load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spgen.attend import alibi as alibi
    from spgen.attend import attention as attention
    from spgen.compile import compile_count as compile_count
    from spgen.convert.compressed_tensors import from_compressed_tensors as from_compressed_tensors
    from spgen.convert.compressed_tensors import load_compressed as load_compressed
    from spgen.convert.flex import from_block_mask as from_block_mask
    from spgen.convert.flex import from_mask_mod as from_mask_mod
    from spgen.convert.mask import from_mask as from_mask
    from spgen.convert.minference import from_minference as from_minference
    from spgen.convert.sparse import from_sparse as from_sparse
    from spgen.drawing import show as show
    from spgen.errors import CacheError as CacheError
    from spgen.errors import CacheWarning as CacheWarning
    from spgen.errors import CompileError as CompileError
    from spgen.errors import DataError as DataError
    from spgen.errors import DeviceError as DeviceError
    from spgen.errors import DtypeError as DtypeError
    from spgen.errors import GradientError as GradientError
    from spgen.errors import PatternError as PatternError
    from spgen.errors import PlanError as PlanError
    from spgen.errors import RecordError as RecordError
    from spgen.errors import ShapeError as ShapeError
    from spgen.errors import SpgenError as SpgenError
    from spgen.errors import TextError as TextError
    from spgen.errors import ToolchainError as ToolchainError
    from spgen.errors import UnsupportedError as UnsupportedError
    from spgen.errors import VerifyError as VerifyError
    from spgen.errors import WorkloadError as WorkloadError
    from spgen.float8 import Float8 as Float8
    from spgen.patterns import Pattern as Pattern
    from spgen.patterns import block as block
    from spgen.patterns import causal as causal
    from spgen.patterns import columns as columns
    from spgen.patterns import cover as cover
    from spgen.patterns import dense as dense
    from spgen.patterns import diagonals as diagonals
    from spgen.patterns import documents as documents
    from spgen.patterns import n_of_m as n_of_m
    from spgen.patterns import pattern as pattern
    from spgen.patterns import per_head as per_head
    from spgen.patterns import permuted as permuted
    from spgen.patterns import sink as sink
    from spgen.patterns import stripe as stripe
    from spgen.patterns import top_k as top_k
    from spgen.patterns import vertical_slash as vertical_slash
    from spgen.patterns import where as where
    from spgen.patterns import window as window
    from spgen.plan import Plan as Plan
    from spgen.quantize import quantize as quantize
    from spgen.scores import column_mass as column_mass
    from spgen.scores import last_queries as last_queries
    from spgen.scores import magnitude as magnitude
    from spgen.scores import page_bounds as page_bounds
    from spgen.scores import pooled as pooled
    from spgen.scores import sort_within as sort_within
    from spgen.scores import wanda as wanda
    from spgen.trace import maximum as maximum
    from spgen.trace import minimum as minimum
    from spgen.trace import select as select
    from spgen.weights.linear import MLP as MLP
    from spgen.weights.linear import Linear as Linear
    from spgen.weights.linear import linear as linear
    from spgen.weights.linear import mlp as mlp
    from spgen.weights.neurons import Activity as Activity
    from spgen.weights.neurons import ChannelLinear as ChannelLinear
    from spgen.weights.neurons import NeuronMLP as NeuronMLP
    from spgen.weights.order import concentrated as concentrated
    from spgen.weights.sparsify import freeze as freeze
    from spgen.weights.sparsify import sparsify as sparsify
    from spgen.weights.sparsify import sparsity as sparsity
    from spgen.weights.training import Rule as Rule
    from spgen.weights.training import Schedule as Schedule
    from spgen.weights.training import Trained as Trained

# where each name lives (the same list as above, which is for type checkers and editors)
_HOMES = {
    "spgen.patterns": "Pattern block causal columns cover dense diagonals documents n_of_m pattern per_head permuted "
    "sink stripe top_k vertical_slash where window",
    "spgen.plan": "Plan",
    "spgen.scores": "column_mass last_queries magnitude page_bounds pooled sort_within wanda",
    "spgen.convert.compressed_tensors": "from_compressed_tensors load_compressed",
    "spgen.convert.flex": "from_block_mask from_mask_mod",
    "spgen.convert.mask": "from_mask",
    "spgen.convert.minference": "from_minference",
    "spgen.convert.sparse": "from_sparse",
    "spgen.trace": "maximum minimum select",
    "spgen.attend": "alibi attention",
    "spgen.weights.linear": "Linear MLP linear mlp",
    "spgen.weights.neurons": "Activity ChannelLinear NeuronMLP",
    "spgen.weights.order": "concentrated",
    "spgen.weights.sparsify": "freeze sparsify sparsity",
    "spgen.weights.training": "Rule Schedule Trained",
    "spgen.compile": "compile_count",
    "spgen.drawing": "show",
    "spgen.float8": "Float8",
    "spgen.quantize": "quantize",
    "spgen.errors": "CacheError CacheWarning CompileError DataError DeviceError DtypeError GradientError PatternError "
    "PlanError RecordError ShapeError SpgenError TextError ToolchainError UnsupportedError VerifyError WorkloadError",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spgen")
    if name not in _HOME:
        raise AttributeError(f"module 'spgen' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
