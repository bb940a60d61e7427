"""The suites: which cases are measured, beside which peers.

A case is a name, a workload and a maker of its pattern; a suite is a list of cases and of peers. To add one: a function
that lists its cases, and a line in `SUITES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spgen.bench import cases, neurons, weights
from spgen.bench.peers import AnyProblem
from spgen.bench.weights import Rows
from spgen.bench.workloads import Workload, eight_heads, llama3_8b, short
from spgen.errors import DeviceError, SpgenError

SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
_K = 1024


@dataclass(frozen=True)
class Case:
    """One pattern over a workload's tensors, made when its turn comes: index data can take gigabytes.

    `section` is the table that it belongs to; `sparsity` is set in sections that vary it.
    """

    name: str
    section: str
    work: Any
    make: Callable[[Any], AnyProblem]
    sparsity: float | None = None

    def problem(self) -> AnyProblem:
        """The pattern over the workload."""
        return self.make(self.work)


@dataclass(frozen=True)
class Suite:
    """`cases(quick)` lists the cases, `device` is where they run: cpu or cuda."""

    name: str
    about: str
    device: str
    cases: Callable[[bool], Iterator[Case]]
    peers: tuple[str, ...]


def swept(section: str, work: Workload, size: int, sparsities: tuple[float, ...] = SPARSITIES) -> Iterator[Case]:
    """Causal blocks of one size at several sparsities."""
    for sparsity in sparsities:
        name = f"blocks of {size}, {sparsity:.0%} left out, {short(work.length)}, {_type(work)}"
        yield Case(name, section, work, partial(cases.block_list, size=size, sparsity=sparsity), sparsity)


def _named(section: str, name: str, work: Workload, make: Callable[[Workload], AnyProblem]) -> Case:
    return Case(f"{name}, {short(work.length)}", section, work, make)


def _type(work: Workload) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[work.dtype]


def _attention(quick: bool) -> Iterator[Case]:
    prefill, long = llama3_8b(32 * _K), llama3_8b(128 * _K)
    section = "block lists"
    if quick:
        yield from swept(section, prefill, 128, (0.0, 0.9))
    else:
        yield from swept(section, prefill, 128)
        yield from swept(section, long, 128)
    section = "patterns"
    bands = "vertical-slash, 1000 columns and 95 bands of 64"
    yield _named(section, bands, prefill, cases.vertical_slash)
    yield _named(section, "window 1024 and sink 64", prefill, cases.streaming)
    if quick:
        return
    yield _named(section, "2048 columns a head", prefill, cases.columns)
    for size in (64, 32, 16):
        yield _named(section, f"blocks of {size}, 90% left out", prefill, partial(cases.block_list, size=size))
    yield _named(section, "2048 keys for every 64 rows", prefill, cases.tokens)
    yield _named(section, "64 keys for each row", prefill, partial(cases.tokens, count=64, rows=1))
    permuted = "blocks of 128 over keys permuted"
    yield _named(section, f"{permuted} within 256", prefill, partial(cases.permuted_keys, sort=256))
    yield _named(section, f"{permuted} freely", prefill, cases.permuted_keys)
    yield _named(section, bands, long, cases.vertical_slash)
    yield _named(section, "window 1024 and sink 64", long, cases.streaming)


def _cpu(quick: bool) -> Iterator[Case]:
    work = replace(eight_heads(_K), heads=2, kv_heads=2) if quick else eight_heads(4 * _K)
    sparsities = (0.0, 0.9) if quick else SPARSITIES
    yield from swept("block lists, float32", work, 64, sparsities)
    yield from swept("block lists, bfloat16", replace(work, dtype=torch.bfloat16), 64, sparsities)
    section, count = "tokens and diagonals, float32", work.length // 4
    yield _named(section, f"{count} columns a head", work, partial(cases.columns, count=count))
    few = partial(cases.tokens, count=count // 4, rows=64)
    yield _named(section, f"{count // 4} keys for every 64 rows", work, few)
    for width in (64, 256):
        bands = partial(cases.diagonals, bands=count // width, width=width)
        many = count // width
        yield _named(section, f"{many} band{'s' * (many > 1)} of {width} diagonals", work, bands)


def _mlp(quick: bool) -> Iterator[Case]:
    prefill = Rows(4 * _K, 14336, 4096, torch.bfloat16, "cuda")
    section = "blocks of 128"
    for sparsity in (0.0, 0.9) if quick else (0.0, 0.25, 0.5, 0.8, 0.9, 0.95):
        yield _weights(section, prefill, f"blocks of 128, {sparsity:.0%} left out", sparsity, size=128)
    section = "other weights"
    for rows in (1, 64) if quick else (1, 16, 64, 512, 4 * _K):
        yield _weights(section, replace(prefill, rows=rows), "2 of 4", kind="n_of_m")
    if quick:
        return
    for size in (64, 32):
        yield _weights(section, prefill, f"blocks of {size}, 90% left out", size=size)
    yield _weights(section, prefill, "blocks of 128, 90% left out, gate and up", size=128, kind="gated")
    yield _weights(section, prefill, "blocks of 128, 90% left out, both gradients", size=128, kind="gradients")
    for rows in (1, 16, 64):
        few = replace(prefill, rows=rows)
        yield _weights(section, few, "blocks of 64, 90% left out", size=64)
        yield _weights(section, few, "2 of 4, float8", kind="n_of_m", values="float8_e4m3fn")
    for rows in (1, 16, 64):
        narrow = replace(prefill, rows=rows, inputs=prefill.outputs, outputs=prefill.inputs)
        yield _weights(section, narrow, "2 of 4, 14336 features to 4096", kind="n_of_m")
    one = replace(prefill, rows=1)
    yield _weights(section, one, "groups of 16, 50% left out, int4", size=(1, 16), sparse=0.5, values="int4")
    for sparse in (0.5, 0.9):
        yield _weights(section, one, f"any {1 - sparse:.0%}", kind="bitmap", sparse=sparse)
    section = "active neurons"
    for rows, share in ((1, 0.1), (1, 0.3), (16, 0.1)):
        few = replace(prefill, rows=rows)
        for name, whole in (("up", False), ("gate, up and down", True)):
            make = partial(neurons.problem, share=share, whole=whole)
            yield Case(f"{name}, {share:.0%} of the neurons, {_rows(rows)}", section, few, make)


def _mlp_cpu(quick: bool) -> Iterator[Case]:
    work = Rows(1, 8192, 2048, torch.float32, "cpu")
    section = "weights on a CPU, float32"
    for rows in (1, 128) if quick else (1, 16, 128, 512):
        yield _weights(section, replace(work, rows=rows), "blocks of 64, 90% left out", size=64)
    if quick:
        return
    for size in (32, 16):
        yield _weights(section, replace(work, rows=128), f"blocks of {size}, 90% left out", size=size)
    yield _weights(section, work, "blocks of 64, all stored", sparse=0.0)
    for rows in (1, 16, 128):
        yield _weights(section, replace(work, rows=rows), "2 of 4", kind="n_of_m")
    yield _weights(section, work, "any 50%", kind="bitmap", sparse=0.5)
    yield _weights(section, work, "groups of 16, 50% left out, int4", size=(1, 16), sparse=0.5, values="int4")


def _weights(
    section: str, work: Rows, name: str, sparsity: float | None = None, *, kind: str = "blocks",
    size: int | tuple[int, int] = 64, sparse: float = 0.9, values: str | None = None,
) -> Case:  # fmt: skip
    left_out = sparse if sparsity is None else sparsity
    make = partial(weights.problem, kind=kind, size=size, sparsity=left_out, values=values)
    return Case(f"{name}, {_rows(work.rows)}", section, work, make, sparsity)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "attention", "attention on a GPU: block lists, and other patterns", "cuda", _attention,
            ("cudnn", "flash", "flex", "flash-attn-4", "flashinfer", "minference"),
        ),
        Suite(
            "cpu", "attention on the CPU: block lists, tokens and diagonals", "cpu", _cpu,
            ("sdpa", "sdpa-mask", "flex"),
        ),
        Suite(
            "mlp", "sparse weights on a GPU: blocks, n of m, groups", "cuda", _mlp,
            ("dense", "torch-bsr", "cusparselt"),
        ),
        Suite(
            "mlp-cpu", "sparse weights on the CPU: blocks, n of m, groups", "cpu", _mlp_cpu,
            ("dense", "onednn", "torch-bsr"),
        ),
    )
}  # fmt: skip


def find(name: str | None = None) -> Suite:
    """The suite of this name, by default the one for this machine.

    Raises SpgenError for a name that is none, DeviceError for the suite of a GPU without one.
    """
    there = torch.cuda.is_available()
    name = ("attention" if there else "cpu") if name is None else name
    if name not in SUITES:
        raise SpgenError(
            "bench", given=f"suite {name!r}", remedy="leave it out for this machine's",
            allowed="; ".join(f"{suite.name} ({suite.about})" for suite in SUITES.values()),
        )  # fmt: skip
    suite = SUITES[name]
    if suite.device == "cuda" and not there:
        others = ", ".join(other.name for other in SUITES.values() if other.device == "cpu")
        raise DeviceError(
            f"bench {name}", given="no GPU", allowed="a GPU that torch sees", remedy=f"without one there is: {others}"
        )  # fmt: skip
    return suite


def selected(suite: Suite, quick: bool = False, only: str = "") -> list[Case]:
    """The suite's cases whose name contains `only`, in their order; raises SpgenError if there are none."""
    every = list(suite.cases(quick))
    found = [case for case in every if only.lower() in case.name.lower()]
    if not found:
        names = "\n    ".join(case.name for case in every)
        raise SpgenError("--only", given=repr(only), allowed=f"text from the name of a case:\n    {names}")
    return found
