"""A decoder over a pattern: prompt, then one token at a time, with the caches of transformers.

A model with Llama's layout and random weights. Over `causal()` it must write the very tokens that it writes with
PyTorch's attention; over a sink and a window, those of the same model with a dense mask of the same pairs, computed
anew for each token. The batch is padded on the left, as batches of prompts are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.integrations.transformers import use_pattern


def main(lengths: tuple[int, ...] = (200, 77, 200, 131), new_tokens: int = 40, layers: int = 4) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=997, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = [torch.randint(1, config.vocab_size, (length,)) for length in lengths]
    tokens, shown = padded(prompts)
    streaming = sp.causal() & (sp.sink(4) | sp.window(32))

    wanted = generated(model, tokens, shown, new_tokens)
    alone = [with_dense_mask(model, prompt, streaming, new_tokens) for prompt in prompts]
    for cache in ("dynamic", "static"):
        with use_pattern(model, sp.causal()):
            found = generated(model, tokens, shown, new_tokens, cache)
        print(f"causal(), {cache} cache: {int((found == wanted).sum())} of {wanted.numel()} tokens as with SDPA")
        assert torch.equal(found, wanted)
        with use_pattern(model, streaming):
            found = generated(model, tokens, shown, new_tokens, cache)
        same = int((found == torch.stack(alone)).sum())
        print(f"{streaming}, {cache} cache: {same} of {found.numel()} as with a dense mask")
        assert torch.equal(found, torch.stack(alone))


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], padded on the left, and which of them are none of the padding."""
    longest = max(map(len, prompts))
    tokens = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    shown = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts])
    return tokens, shown.long()


@torch.inference_mode()
def generated(model: Any, tokens: Tensor, shown: Tensor, count: int, cache: str = "dynamic") -> Tensor:
    """The tokens [B, count] that are most likely, one after the other."""
    from transformers import DynamicCache, StaticCache

    length = tokens.shape[1] + count
    keys = StaticCache(model.config, max_cache_len=length) if cache == "static" else DynamicCache(config=model.config)
    positions = (shown.cumsum(1) - 1).clamp(min=0)
    written: list[Tensor] = []
    for _ in range(count):
        out = model(
            input_ids=tokens, attention_mask=shown, position_ids=positions, past_key_values=keys, logits_to_keep=1
        )  # fmt: skip
        tokens = out.logits[:, -1:].argmax(-1)
        written.append(tokens)
        shown = torch.nn.functional.pad(shown, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


@torch.inference_mode()
def with_dense_mask(model: Any, prompt: Tensor, pattern: sp.Pattern, count: int) -> Tensor:
    """The same for one prompt [L], with PyTorch's attention, a mask of all pairs and no cache."""
    tokens = prompt[None]
    for _ in range(count):
        logits = model(input_ids=tokens, attention_mask=pattern.mask(tokens.shape[1]), use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :]


if __name__ == "__main__":
    main()
