"""Attention of Hugging Face transformers models over a pattern.

    from spgen.integrations.transformers import use_pattern

    use_pattern(model, sp.documents(cu_seqlens))     # from now on; call it again for the next batch
    with use_pattern(model, sp.causal() & sp.window(1024)):
        model(input_ids)                             # only here

The pattern replaces the model's own mask, whatever that is: a decoder's pattern says `causal()` itself. Sliding windows
of the model's layers are kept on request (`keep_windows=True`); capped scores and learned sinks are passed on.

Caches may grow (DynamicCache) or be allocated once (StaticCache). In a padded batch each sequence is computed by
itself, at the positions it has alone: padded keys are never read, padded rows give 0. Other masks of the caller are
never dropped in silence: one that hides anything is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.attend import Attention, attention
from spgen.errors import DtypeError, PatternError, UnsupportedError
from spgen.ir.pattern import slots
from spgen.patterns import Pattern, window
from spgen.plan import Plan

if TYPE_CHECKING:
    from torch.nn import Module

NAME = "spgen"
_HOLDER = "_spgen_attention"
# options of models that change what attention computes, and that no argument of ours stands for
_CHANGES = ("position_bias", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k")


def register() -> None:
    """Make `attn_implementation="spgen"` known to transformers; calling it again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)


class use_pattern:  # reads as a function, as torch.no_grad does
    """Let `model`, or any part of it, attend over `pattern`; as a context manager, until the block ends.

    Sets the model's attention implementation to spgen. The index tables are made by the first layer that meets a
    shape, and the other layers and later calls reuse them: after changing the pattern's tensors in place, call
    `use_pattern` again. Per-layer patterns: call it on the layers. With `keep_windows`, layers that have a sliding
    window of their own attend over its part of the pattern.
    """

    def __init__(self, model: Module, pattern: Pattern, *, keep_windows: bool = False) -> None:
        if not isinstance(pattern, Pattern):
            raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.causal()")
        register()
        held = _Held(pattern, keep_windows)
        self._model = model
        self._before = [(module, module.__dict__.get(_HOLDER)) for module in model.modules()]
        self._implementations = _choose_spgen(model)
        for module, _ in self._before:
            module.__dict__[_HOLDER] = held

    def __enter__(self) -> use_pattern:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for module, held in self._before:
            module.__dict__.pop(_HOLDER, None)
            if held is not None:
                module.__dict__[_HOLDER] = held
        for model, implementation in self._implementations:
            model.set_attn_implementation(implementation)


def _choose_spgen(model: Module) -> list[tuple[Any, str]]:
    """Switch the transformers models in `model` to spgen; returns what they used before, outermost first."""
    from transformers import PreTrainedModel

    before = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            before.append((module, module.config._attn_implementation))
            module.set_attn_implementation(NAME)
            if module.config._attn_implementation != NAME:
                raise UnsupportedError(
                    "model", given=f"{type(module).__name__}, which brings its own attention",
                    allowed="models that use transformers' AttentionInterface",
                    remedy="a later version of transformers may know this model; 5.0 is the oldest that spgen supports",
                )  # fmt: skip
    return before


@dataclass(frozen=True)
class _Options:
    """What a layer asks for besides the pattern; `window` is (left, right)."""

    scale: float | None = None
    softcap: float | None = None
    window: tuple[int, int] | None = None


class _Held:
    """A pattern with the plans of the calls it has met; shared by all layers."""

    def __init__(self, pattern: Pattern, keep_windows: bool = False) -> None:
        self.pattern = pattern
        self.keep_windows = keep_windows
        self._attend: dict[tuple[_Options, int, int], Attention] = {}
        self._plans: dict[_Options, tuple[tuple[Any, ...], Plan]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held(self.pattern, self.keep_windows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, (self.pattern, self.keep_windows)

    def attend(self, options: _Options, first: int = 0, last: int = 0) -> Attention:
        """The operation, for the sequences `first` to `last` of a batch (0 and 0: all)."""
        key = (options, first, last)
        if key not in self._attend:
            pattern = self.pattern if options.window is None else self.pattern & window(*options.window)
            pattern = _of_sequences(pattern, first, last) if last else pattern
            self._attend[key] = attention(pattern, scale=options.scale, softcap=options.softcap)
        return self._attend[key]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, options: _Options, sinks: Tensor | None, kv_lengths: Tensor | None
    ) -> Tensor:
        attend = self.attend(options)
        if kv_lengths is not None:
            return attend(q, k, v, kv_lengths=kv_lengths, sink_logits=sinks)
        if torch.compiler.is_compiling() or not self.pattern.data:
            return attend(q, k, v, sink_logits=sinks)
        key = (q.shape, k.shape, q.dtype, q.device)
        if options not in self._plans or self._plans[options][0] != key:
            self._plans[options] = (key, attend.plan(q, k))  # the last shape only: plans can be large
        return attend(q, k, v, plan=self._plans[options][1], sink_logits=sinks)

    def in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, options: _Options, sinks: Tensor | None, parts: list[_Part]
    ) -> Tensor:
        """A padded batch, part by part."""
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        for part in parts:
            batch, rows, keys = slice(part.first, part.last), slice(*part.rows), slice(*part.keys)
            attend = self.attend(options, part.first, part.last)
            out[batch, :, rows] = attend(q[batch, :, rows], k[batch, :, keys], v[batch, :, keys], sink_logits=sinks)
        return out


def _of_sequences(pattern: Pattern, first: int, last: int) -> Pattern:
    """The pattern of some sequences of a batch."""
    data = [
        pattern.data[slot.index][first:last] if slot.dims[0] == "B" else pattern.data[slot.index]
        for slot in slots(pattern.node)
    ]
    return Pattern(pattern.node, tuple(data))


@dataclass(frozen=True)
class _Part:
    """Neighbouring sequences with the same padding: which, and their rows and keys that are no padding."""

    first: int
    last: int
    rows: tuple[int, int]
    keys: tuple[int, int]


class _Padded(Tensor):
    """What a padded batch consists of, in the place of a mask: empty, with the four axes that transformers wants."""

    parts: list[_Part]


def _forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: [B, H, L, D] in, [B, L, H, D] out."""
    held: _Held | None = module.__dict__.get(_HOLDER)
    if held is None:
        raise PatternError(
            "attn_implementation", given='"spgen" without a pattern', allowed="a model that has one",
            remedy="call spgen.integrations.transformers.use_pattern(model, pattern)",
        )  # fmt: skip
    _refuse_options(dropout, options)
    near = None
    if sliding_window is not None and held.keep_windows:
        causal = getattr(module, "is_causal", True)
        near = (sliding_window, 0 if causal else sliding_window - 1)
    asked = _Options(scaling, softcap, near)
    if isinstance(attention_mask, _Padded):
        return held.in_parts(query, key, value, asked, s_aux, attention_mask.parts).transpose(1, 2), None
    kv_lengths = _kv_lengths(attention_mask)
    if kv_lengths is None:
        _refuse_mask(attention_mask)
    return held(query, key, value, asked, s_aux, kv_lengths).transpose(1, 2), None


def _kv_lengths(mask: Tensor | None) -> Tensor | None:
    """How many keys each sequence has, if that is what `_mask` gave: int64 [B, 1, 1, 1].

    A caller's own mask of one key looks the same, and means the same.
    """
    lengths = mask is not None and mask.dtype == torch.int64 and tuple(mask.shape[1:]) == (1, 1, 1)
    return mask.flatten() if mask is not None and lengths else None


def _refuse_mask(mask: Tensor | None) -> None:
    """Raises UnsupportedError for a mask that hides a pair; reads the mask, so it waits for the device."""
    if mask is not None and not _hides_nothing(mask):
        raise UnsupportedError(
            "attention_mask",
            given="a mask that hides some of the pairs",
            allowed="none, one that hides nothing, or padding at the ends of the sequences",
            remedy="say it as a pattern: sp.documents(cu_seqlens) for packed rows, sp.from_mask(mask) for the rest",
        )


def _hides_nothing(mask: Tensor) -> bool:
    shown = mask == 0 if mask.is_floating_point() else mask != 0  # additive masks hold 0 where a pair counts
    return bool(shown.all())


def _refuse_options(dropout: float, options: Mapping[str, Any]) -> None:
    """Options that change the result are errors, unless they are off."""
    if dropout:
        raise UnsupportedError("dropout", given=dropout, allowed="0", remedy="call model.eval()")
    for name in _CHANGES:
        if options.get(name) is not None:
            given, remedy = type(options[name]).__name__, "no kernel takes this option of the model yet"
            raise UnsupportedError(name, given=given, allowed="None", remedy=remedy)


def _mask(
    *, batch_size: int, kv_length: int, q_length: int | None = None, q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0, cache_position: Tensor | None = None, attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu", **options: Any,
) -> Tensor | None:  # fmt: skip
    """What transformers calls once for each forward pass, with the caller's 2-d mask of padded keys.

    None, if all keys count; else the parts of a padded batch, or how many keys of a static cache there are. Older
    versions of transformers give `cache_position` in place of `q_length` and `q_offset`.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    rows = kv_length if q_length is None else q_length
    surplus = kv_length - q_offset - rows if isinstance(q_offset, int) else 0
    both_ways = "allow_is_bidirectional_skip" in options  # more keys than rows are then no cache but an encoder's
    if bool(kv_offset != 0) or surplus < 0 or (surplus and both_ways):
        raise UnsupportedError(
            "past_key_values",
            given=f"keys {int(kv_offset)} to {int(kv_offset) + kv_length} for {rows} rows from {int(q_offset)} on",
            allowed="a cache that holds all keys so far; no attention to the keys of an encoder",
            remedy="use a DynamicCache() or a StaticCache without sliding layers",
        )
    if attention_mask is not None and not _hides_nothing(attention_mask[:, : int(q_offset) + rows]):
        padded = torch.empty(batch_size, 1, 1, 0, device=device).as_subclass(_Padded)
        padded.parts = list(_parts(attention_mask.bool(), int(q_offset), rows))
        return padded
    if isinstance(q_offset, int) and not surplus:
        return None
    lengths = torch.as_tensor(q_offset, dtype=torch.int64, device=device) + rows
    return lengths.expand(batch_size).reshape(batch_size, 1, 1, 1)


def _parts(mask: Tensor, offset: int, rows: int) -> Iterator[_Part]:
    """What of a padded batch is no padding; the rows of the call stand at `offset` and after it."""
    shown = mask[:, : offset + rows].cpu()
    first, count = shown.int().argmax(1), shown.sum(1)
    place = torch.arange(shown.shape[1])
    if not torch.equal(shown, (place >= first[:, None]) & (place < (first + count)[:, None])):
        _refuse_mask(mask)
    ends = list(zip(first.tolist(), (first + count).tolist(), strict=True))
    number = 0
    for (start, stop), alike in groupby(ends):
        begin, number = number, number + len(list(alike))
        if max(start, offset) < stop:
            yield _Part(begin, number, (max(start - offset, 0), stop - offset), (start, stop))
