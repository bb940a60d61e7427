"""What several commands take: the pattern, the call that it is for, and how texts are read into numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from spgen.errors import ShapeError

Pattern = Annotated[str, typer.Argument(help="A pattern as Python writes it: 'causal() & (sink(64) | window(1024))'.")]


@dataclass(frozen=True)
class CallOptions:
    """The call that a pattern is explained, compiled or drawn for; `q_shape` is [B, Hq, Lq, D]."""

    q_shape: tuple[int, int, int, int]
    kv_heads: int
    kv_len: int
    v_dim: int
    dtype: str
    target: str


def _call(
    q: Annotated[str, typer.Option(help="Shape of q: batch x query heads x rows x head dim.")] = "1x8x4096x64",
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of k and v; as many as q's if left out.")] = None,
    kv_length: Annotated[int | None, typer.Option(min=0, help="Keys; as many as q's rows if left out.")] = None,
    v_dim: Annotated[int | None, typer.Option(min=1, help="Head dim of v; that of q if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    target: Annotated[str, typer.Option(help="cpu, cuda, or an architecture: sm_90, gfx942.")] = "cpu",
) -> CallOptions:
    shape = _shape(q)
    return CallOptions(
        shape, kv_heads or shape[1], shape[2] if kv_length is None else kv_length, v_dim or shape[3], dtype, target
    )


def with_call(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for each part of the call in the place of its argument `call`."""
    parts = inspect.signature(_call, eval_str=True).parameters

    def run(**values: Any) -> None:
        call = _call(**{name: values.pop(name) for name in parts})
        command(call=call, **values)

    own = inspect.signature(command, eval_str=True).parameters
    shown = [part for name in own for part in (parts.values() if name == "call" else [own[name]])]
    parameters = [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in shown]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {part.name: part.annotation for part in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = [int(size) for size in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\d+(x\d+){3}", text) or 0 in (sizes[0], sizes[1], sizes[3]):
        raise ShapeError(
            "--q",
            given=repr(text),
            allowed="BxHxLxD: batch, query heads, rows and head dim",
            remedy="for example --q 1x8x4096x64",
        )
    batch, heads, rows, dim = sizes
    return batch, heads, rows, dim
