"""Attention of Hugging Face transformers models over a pattern.

    from spgen.integrations.transformers import use_pattern

    use_pattern(model, sp.documents(cu_seqlens))     # from now on; call it again for the next batch
    with use_pattern(model, sp.causal() & sp.window(1024)):
        model(input_ids)                             # only here

The pattern replaces the model's own mask, whatever that is: a decoder's pattern says `causal()` itself. Masks given by
the caller are never dropped in silence: one that hides anything is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.attend import Attention, Plan, attention
from spgen.errors import DtypeError, PatternError, UnsupportedError
from spgen.patterns import Pattern

if TYPE_CHECKING:
    from torch.nn import Module

NAME = "spgen"
_HOLDER = "_spgen_attention"
# options of models that change what attention computes
_CHANGES = ("softcap", "s_aux", "position_bias", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k")


def register() -> None:
    """Make `attn_implementation="spgen"` known to transformers; calling it again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)


class use_pattern:  # reads as a function, as torch.no_grad does
    """Let `model`, or any part of it, attend over `pattern`; as a context manager, until the block ends.

    Sets the model's attention implementation to spgen. The index tables are made by the first layer that meets a
    shape, and the other layers and later calls reuse them: after changing the pattern's tensors in place, call
    `use_pattern` again. Per-layer patterns: call it on the layers.
    """

    def __init__(self, model: Module, pattern: Pattern) -> None:
        if not isinstance(pattern, Pattern):
            raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.causal()")
        register()
        held = _Held(pattern)
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


class _Held:
    """A pattern with the plans of the calls it has met; shared by all layers."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self._attend: dict[float | None, Attention] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held(self.pattern)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, (self.pattern,)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if scale not in self._attend:
            self._attend[scale] = attention(self.pattern, scale=scale)
        attend = self._attend[scale]
        if torch.compiler.is_compiling() or not self.pattern.data:
            return attend(q, k, v)
        key = (q.shape, k.shape, q.dtype, q.device)
        if key not in self._plans:
            self._plans = {key: attend.plan(q, k)}  # the last shape only: plans can be large
        return attend(q, k, v, plan=self._plans[key])


def _forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: [B, H, L, D] in, [B, L, H, D] out."""
    held: _Held | None = module.__dict__.get(_HOLDER)
    if held is None:
        raise PatternError(
            "attn_implementation", given='"spgen" without a pattern', allowed="a model that has one",
            remedy="call spgen.integrations.transformers.use_pattern(model, pattern)",
        )  # fmt: skip
    _refuse_mask(attention_mask)
    _refuse_options(dropout, options)
    return held(query, key, value, scaling).transpose(1, 2), None


def _refuse_mask(mask: Tensor | None) -> None:
    """Raises UnsupportedError for a mask that hides a pair; reads the mask, so it waits for the device."""
    if mask is None:
        return
    shown = mask == 0 if mask.is_floating_point() else mask != 0  # additive masks hold 0 where a pair counts
    if not bool(shown.all()):
        raise UnsupportedError(
            "attention_mask",
            given="a mask that hides some of the pairs",
            allowed="none, or one that hides nothing",
            remedy="say it as a pattern: sp.documents(cu_seqlens) for packed rows, ~sp.columns(index) for padded keys",
        )


def _refuse_options(dropout: float, options: Mapping[str, Any]) -> None:
    """Options that change the result are errors, unless they are off."""
    if dropout:
        raise UnsupportedError("dropout", given=dropout, allowed="0", remedy="call model.eval()")
    for name in _CHANGES:
        if options.get(name) is not None:
            given, remedy = type(options[name]).__name__, "no kernel takes this option of the model yet"
            raise UnsupportedError(name, given=given, allowed="None", remedy=remedy)


def _mask(
    *, kv_length: int, q_length: int | None = None, q_offset: int | Tensor = 0, kv_offset: int = 0,
    cache_position: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    """What transformers calls once for each forward pass, with the caller's 2-d mask of padded keys: none is made.

    Older versions give `cache_position` in place of `q_length` and `q_offset`.
    """
    _refuse_mask(attention_mask)
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if kv_offset or (q_length is not None and int(q_offset) + q_length != kv_length):
        raise UnsupportedError(
            "past_key_values",
            given=f"keys {kv_offset} to {kv_offset + kv_length} for {q_length} rows from {int(q_offset)} on",
            allowed="a cache that holds all keys so far, and nothing else",
            remedy="use a DynamicCache without sliding layers",
        )
