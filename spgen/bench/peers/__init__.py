"""What else computes the same: a plug-in for each peer, and the table they are found in.

A plug-in is a function `(problem, *tensors) -> Contender` in a file of this folder: q, k and v for attention, x for
products with sparse weights. It imports its library inside,
raises :class:`Unserved` for a problem that the library cannot say, and lays out the tensors as the library wants them,
which is not timed. To add a peer: its file, and a line in `PEERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from spgen.errors import SpgenError, ToolchainError

if TYPE_CHECKING:
    from torch import Tensor


SAME, CAUSAL, MORE = "same", "causal", "more"


class Unserved(Exception):
    """The library cannot say this problem; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A way to compute a problem: `run(plan)` gives [batch, heads, length, head_dim].

    `plan` makes what can be made before and reused; None if nothing can. `whole` is both at once where that is a call
    of its own. `plans_inside` says that every run plans, which cannot be timed apart. `pairs` are those that are
    computed: the `same` as the problem's, all `causal` ones, or `more` than the problem's.
    """

    run: Callable[[Any], Tensor]
    plan: Callable[[], Any] | None = None
    whole: Callable[[], Tensor] | None = None
    plans_inside: bool = False
    pairs: str = SAME

    def made(self) -> Any:
        """The plan, or None."""
        return None if self.plan is None else self.plan()

    def with_plan(self) -> Tensor:
        """Planning and running."""
        return self.run(self.made()) if self.whole is None else self.whole()


class AnyProblem(Protocol):
    """What is measured: attention (spgen/bench/cases.py) or a product with sparse weights (spgen/bench/weights.py).

    `density` is the share of what a dense contender computes; `flops` and `bytes` are needed.
    """

    @property
    def work(self) -> Any:
        """Sizes, type and device."""

    @property
    def pattern(self) -> Any:
        """What is declared."""

    @property
    def density(self) -> float:
        """Share of the pairs that dense contenders compute."""

    @property
    def flops(self) -> int:
        """Floating-point operations that are needed."""

    @property
    def bytes(self) -> int:
        """Bytes that must be moved at least once."""

    @property
    def ours(self) -> Callable[..., Contender]:
        """The kernel that spgen compiles, for the tensors."""

    @property
    def largest_error(self) -> Callable[..., float]:
        """How far a result is from the oracle's, for the result and the tensors."""


@dataclass(frozen=True)
class Peer:
    """`where` is `file:function` in this folder, `needs` the module of another package that `install` brings."""

    name: str
    title: str
    where: str
    needs: str = ""
    install: str = ""

    def contender(self, problem: AnyProblem, *tensors: Tensor) -> Contender:
        """The plug-in's contender; raises whatever the plug-in or its library raises."""
        file, _, function = self.where.partition(":")
        made: Contender = getattr(import_module(f"{__name__}.{file}"), function)(problem, *tensors)
        return made


PEERS = {
    peer.name: peer
    for peer in (
        Peer("cudnn", "cuDNN dense", "sdpa:cudnn"),
        Peer("flash", "flash dense", "sdpa:flash"),
        Peer("sdpa", "SDPA causal", "sdpa:chosen"),
        Peer("sdpa-mask", "SDPA + mask", "sdpa:masked"),
        Peer("flex", "FlexAttention", "flex:contender"),
        Peer("dense", "dense", "weights:dense"),
        Peer("onednn", "oneDNN dense", "weights:onednn"),
        Peer("torch-bsr", "torch BSR", "weights:bsr"),
        Peer("cusparselt", "cuSPARSELt", "weights:cusparselt"),
        Peer("flash-attn-4", "FlashAttention-4", "flash_attn_4:contender", "flash_attn.cute", "flash-attn-4"),
        Peer("flashinfer", "FlashInfer", "flashinfer:contender", "flashinfer", "flashinfer-python"),
        Peer("minference", "MInference", "minference:contender", "minference", "minference"),
    )
}


def chosen(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The peers that `a,b`, `all` or `none` names, of those that are known; raises SpgenError for another."""
    known = tuple(known)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SpgenError(
            "--peers", given=repr(unknown[0] if unknown else text), allowed=f"all, none, or of {', '.join(known)}",
            remedy="write several with commas: --peers " + ",".join(known[:2]),
        )  # fmt: skip
    return tuple(name for name in known if name in names)


def available(name: str, problem: AnyProblem, *tensors: Tensor) -> Contender | str:
    """The peer's contender, once it has run, or why there is none."""
    peer = PEERS[name]
    try:
        if peer.needs:
            import_module(peer.needs)
    except ModuleNotFoundError as fault:
        if fault.name is not None and f"{peer.needs}.".startswith(f"{fault.name}."):
            return f"not installed (pip install {peer.install})"
        return failure(fault)
    except Exception as fault:  # another library may fail in any way; that is its result
        return failure(fault)
    return attempt(lambda: peer.contender(problem, *tensors))


def attempt(make: Callable[[], Contender]) -> Contender | str:
    """The contender, once it has run, or why there is none; raises ToolchainError."""
    try:
        contender = make()
        contender.with_plan()
    except Unserved as fault:
        return f"does not serve this: {fault}"
    except ToolchainError:
        raise
    except Exception as fault:
        return failure(fault)
    return contender


def failure(fault: Exception) -> str:
    """The first line of what went wrong."""
    text = str(fault).strip().splitlines()
    return f"failed: {type(fault).__name__}: {text[0] if text else ''}"[:200]
