"""From a weight's storage and a call's sizes to a launchable kernel: what sparse products are specialised for.

request + sizes -> Config (a record's, else the backend's default) -> level-3 kernel -> backend
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import log2
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor

from spgen.compile import is_for_triton
from spgen.ir.config import Config
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.target import Target
from spgen.weights.storage import Layout, Stored

if TYPE_CHECKING:
    from spgen.autotune.records import Bucket, Key, Record

_PARTS = (0.71, 0.84, 1.0, 1.19, 1.41)  # of a bucket's power of two: its numbers round to that
FEW = 64  # rows of x up to which a kernel's time goes into reading weights


@dataclass(frozen=True)
class Request:
    """Everything that a product's kernel is specialised for; sizes and the number of stored values are not among it.

    `values` is the type of stored values, `scales` whether they have any; `transposed`: y = x W rather than x W^T;
    `gated`: two weights, y = activation(x gate^T + bias) * (x up^T).
    """

    dtype: str
    layout: Layout
    values: str
    scales: bool
    target: Target
    transposed: bool = False
    gated: bool = False
    bias: bool = False
    activation: str = "none"


@dataclass(frozen=True)
class Sizes:
    """Rows of x, and the weight's [N, K] with its number of stored values; they choose configurations."""

    m: int
    n: int
    k: int
    stored: int

    @property
    def height(self) -> str:
        """For how many rows a kernel is made."""
        return "few" if self.m <= FEW else "many"


@dataclass(frozen=True)
class Job:
    """A kernel to make with a configuration of its own, as tuning tries it."""

    request: Request
    sizes: Sizes
    config: Config


class LinearKernel(Protocol):
    """A launchable `linear` kernel."""

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write y.

        x [M, K], whose rows follow each other at any distance and whose columns are contiguous, one weight (two if
        gated), the bias [N] or None, and y [M, N], contiguous. Transposed: x is [M, N] and y [M, K].
        """

    def precompile(self) -> Mapping[str, int]:
        """Bring what contiguous calls need into the cache; no device is needed.

        It gives the fields of Resources (registers, shared, spilled) where they are known.
        """


@runtime_checkable
class ResultKernel(LinearKernel, Protocol):
    """One that makes y itself, since a library does; called, it copies that."""

    def result(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None) -> Tensor:
        """A new y, of the arguments of a call."""


class Backend(Protocol):
    """What `spgen.backends.tvm_linear` and `spgen.backends.triton_linear` provide."""

    def default_config(self, request: Request, sizes: Sizes) -> Config:
        """Always a legal choice: `block_m` rows of x by `block_n` columns of y, and options."""

    def build(self, kernel: Op, target: Target) -> LinearKernel:
        """The launchable `linear` kernel, from the cache or compiled."""

    def sampled_config(self, request: Request, sizes: Sizes) -> Config:
        """Likewise for the gradient of stored blocks."""

    def build_sampled(self, kernel: Op, target: Target) -> Callable[[Tensor, Tensor, Stored, Tensor], None]:
        """The launchable `sampled` kernel: of g [M, N], x [M, K], and blocks whose gradients it writes."""


def backend_of(target: Target) -> Backend:
    """The backend that serves `target`, as for attention."""
    name = "spgen.backends.triton_linear" if is_for_triton(target) else "spgen.backends.tvm_linear"
    return cast(Backend, import_module(name))


def kernel_of(request: Request, sizes: Sizes, config: Config) -> Op:
    """The level-3 kernel."""
    layout = request.layout
    return KERNEL.make(
        "linear", dtype=request.dtype, storage=layout.kind, rows=layout.rows, cols=layout.cols, values=request.values,
        scales=request.scales, transposed=request.transposed, gated=request.gated, bias=request.bias,
        activation=request.activation, height=sizes.height, block_m=config.block_m, block_n=config.block_n,
        options=config.options,
    )  # fmt: skip


def sampled_kernel_of(request: Request, config: Config) -> Op:
    """The level-3 kernel of the stored blocks' gradient."""
    return KERNEL.make(
        "sampled", dtype=request.dtype, rows=request.layout.rows, cols=request.layout.cols, values=request.values,
        block_m=config.block_m, options=config.options,
    )  # fmt: skip


def config_of(request: Request, sizes: Sizes) -> Config:
    """The configuration that a call gets: the record's with the nearest sizes, else the backend's default.

    What was measured for other sizes says nothing where the default is another than it was there.
    """
    from spgen.tuned import record_of

    default = default_of(request, sizes)
    record = record_of(request.target, *identity_of(request, sizes), default).record
    return default if record is None else record.config


def default_of(request: Request, sizes: Sizes) -> Config:
    """The configuration of a call for which there is no record."""
    return backend_of(request.target).default_config(request, sizes)


def identity_of(request: Request, sizes: Sizes) -> tuple[Key, Bucket]:
    """What a record of such calls is found by; bias and activation do not matter."""
    from spgen.autotune.records import Bucket, Key

    form = "transposed" if request.transposed else "gated" if request.gated else "linear"
    structure = f"{request.layout} of {request.values}, {form}, {sizes.height}"
    stored = sizes.stored // max(sizes.k if request.transposed else sizes.n, 1)
    bucket = Bucket(*(1 << max(round(log2(max(size, 1))), 0) for size in (sizes.m, sizes.k, sizes.n, stored)))
    return Key(structure, request.dtype, 0, 0, operation="linear"), bucket


def defaults_of_record(record: Record, target: Target) -> set[Config]:
    """Today's default for the call of a product's record: those of all numbers of stored values in its bucket."""
    text, form, _ = record.key.structure.rsplit(", ", 2)
    layout, values = text.rsplit(" of ", 1)
    rows, outputs, inputs = (int(record.case[name]) for name in ("rows", "outputs", "inputs"))
    dtype = record.key.dtype
    request = Request(
        dtype, Layout.read(layout), values, values != dtype, target, form == "transposed", form == "gated",
        activation="silu" if form == "gated" else "none",
    )  # fmt: skip
    width, lists = record.bucket.width, inputs if form == "transposed" else outputs
    return {default_of(request, Sizes(rows, outputs, inputs, round(width * lists * part))) for part in _PARTS}


def kernel_of_job(job: Job) -> Any:
    """The launchable kernel of a job."""
    return _built(kernel_of(job.request, job.sizes, job.config), job.request.target)


@lru_cache(maxsize=4096)
def linear_kernel(request: Request, sizes: Sizes) -> Any:
    """The launchable kernel of y = activation(x W^T + bias) and its kin."""
    return _built(kernel_of(request, sizes, config_of(request, sizes)), request.target)


@lru_cache(maxsize=4096)
def sampled_kernel(request: Request, sizes: Sizes) -> Any:
    """The launchable kernel of the stored blocks' gradient."""
    backend = backend_of(request.target)
    kernel = sampled_kernel_of(request, backend.sampled_config(request, sizes))
    return backend.build_sampled(kernel, request.target)


@lru_cache(maxsize=4096)
def _built(kernel: Op, target: Target) -> Any:
    return backend_of(target).build(kernel, target)
