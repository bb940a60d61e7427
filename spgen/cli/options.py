"""What several commands take: the pattern, the call that it is for, and how texts are read into numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from spgen.errors import PatternError, ShapeError

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
    target: Annotated[str, typer.Option(help="cpu, cuda, h200, sm_90, aarch64, or a description: mine.json.")] = "cpu",
) -> CallOptions:
    shape = _shape(q)
    return CallOptions(
        shape, kv_heads or shape[1], shape[2] if kv_length is None else kv_length, v_dim or shape[3], dtype, target
    )


@dataclass(frozen=True)
class DataOptions:
    """Where the tensors of a pattern's slots come from."""

    random: str | None
    files: tuple[str, ...]

    def tensors(self, pattern: str, call: CallOptions) -> tuple[Any, ...]:
        """The tensors of the pattern's slots in their order; none if nothing was asked for."""
        from spgen.ir.pattern import read_short, slots
        from spgen.samples import Sizes, load_data, random_data

        if self.random is None and not self.files:
            return ()
        node = read_short(pattern)
        found = {}
        if self.random is not None:
            batch, _, q_len, _ = call.q_shape
            found = random_data(node, *_density(self.random), Sizes(batch, q_len, call.kv_len))
        found |= load_data(dict(map(_slot_file, self.files)))
        wanted = [slot.index for slot in slots(node)]
        missing = [n for n in wanted if n not in found]
        unknown = sorted(set(found) - set(wanted))
        if missing or unknown:
            raise PatternError(
                "--data", given=f"nothing for ${missing[0]}" if missing else f"a file for ${unknown[0]}",
                allowed=f"the pattern's slots: {', '.join(f'${n}' for n in wanted) or 'it has none'}",
                remedy="write --data 0=file, or let --random 0.1 fill the slots",
            )  # fmt: skip
        return tuple(found[n] for n in wanted)


def _data(
    random: Annotated[
        str | None,
        typer.Option(
            help="Fill the pattern's slots at random: DENSITY or DENSITY/SEED, such as 0.1/7.", metavar="D[/SEED]"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A slot's tensor: 0=file, a .pt, .npy, .npz or .safetensors (0=file.npz:name).", metavar="N=FILE"
        ),
    ] = None,
) -> DataOptions:
    return DataOptions(random, tuple(data or ()))


_GROUPS: dict[str, Callable[..., object]] = {"call": _call, "data": _data}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a group in the place of each argument named `call` or `data`."""
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: inspect.signature(_GROUPS[name], eval_str=True).parameters for name in own if name in _GROUPS}

    def run(**values: Any) -> None:
        for group, parts in groups.items():
            made = _GROUPS[group](**{name: values.pop(name) for name in parts})
            values[group] = made
        command(**values)

    shown = [part for name in own for part in (groups[name].values() if name in groups else [own[name]])]
    parameters = [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in shown]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {part.name: part.annotation for part in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _density(text: str) -> tuple[float, int]:
    match = re.fullmatch(r"(\d*\.?\d+)(?:/(\d+))?", text)
    if match is None:
        raise PatternError(
            "--random", given=repr(text), allowed="DENSITY or DENSITY/SEED", remedy="for example --random 0.1/7"
        )
    return float(match[1]), int(match[2] or 0)


def _slot_file(text: str) -> tuple[int, str]:
    number, sign, file = text.partition("=")
    if not sign or not number.removeprefix("$").isdecimal() or not file:
        raise PatternError(
            "--data", given=repr(text), allowed="N=FILE for slot $N", remedy="for example --data 0=mask.pt"
        )
    return int(number.removeprefix("$")), file


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
