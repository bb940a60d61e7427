"""The suites: which cases are measured, beside which peers.

A case is a name, a workload and a maker of its pattern; a suite is a list of cases and of peers. To add one: a function
that lists its cases, and a line in `SUITES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from spgen.bench import cases
from spgen.bench.cases import Problem
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
    work: Workload
    make: Callable[[Workload], Problem]
    sparsity: float | None = None

    def problem(self) -> Problem:
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


def _named(section: str, name: str, work: Workload, make: Callable[[Workload], Problem]) -> Case:
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
