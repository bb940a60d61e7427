"""transformers models over a pattern: the same numbers, nothing ignored in silence, everything put back."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.errors import DtypeError, PatternError, UnsupportedError

pytest.importorskip("tvm_ffi")
transformers = pytest.importorskip("transformers")

from spgen.integrations.transformers import register, use_pattern  # noqa: E402

LENGTHS = [5, 1, 17, 9]
CU_SEQLENS = [0, 5, 6, 23, 32]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def encoder() -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def decoder(**changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaModel(config).eval()


def tokens(length: int = 32) -> torch.Tensor:
    return torch.randint(50, (1, length), generator=torch.Generator().manual_seed(0))


def test_packed_sentences_are_what_they_are_alone() -> None:
    model, row = encoder(), tokens()
    alone = [model(input_ids=part).last_hidden_state[0] for part in row.split(LENGTHS, dim=1)]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with use_pattern(model, sp.documents(CU_SEQLENS)):
        packed = model(input_ids=row, position_ids=positions).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_decoder_with_grouped_queries_and_a_cache() -> None:
    model, row = decoder(), tokens()
    wanted = model(input_ids=row).last_hidden_state
    use_pattern(model, sp.causal())
    torch.testing.assert_close(model(input_ids=row).last_hidden_state, wanted, atol=1e-5, rtol=1e-4)
    first = model(input_ids=row[:, :20], use_cache=True)
    second = model(input_ids=row[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    parts = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    torch.testing.assert_close(parts, wanted, atol=1e-5, rtol=1e-4)


def test_each_layer_may_have_its_own() -> None:
    model, row = decoder(), tokens()
    with use_pattern(model, sp.causal()):
        everywhere = model(input_ids=row).last_hidden_state
        with use_pattern(model.layers[1], sp.causal() & sp.window(4)):
            changed = model(input_ids=row).last_hidden_state
        again = model(input_ids=row).last_hidden_state
    torch.testing.assert_close(changed[:, :4], everywhere[:, :4], atol=1e-5, rtol=1e-4)
    assert (changed[:, 4:] - everywhere[:, 4:]).abs().max() > 1e-3
    assert torch.equal(again, everywhere)


def test_the_context_puts_everything_back() -> None:
    model = encoder()
    before, row = model.config._attn_implementation, tokens()
    wanted = model(input_ids=row).last_hidden_state
    with use_pattern(model, sp.window(2, 2)):
        assert model.config._attn_implementation == "spgen"
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=row).last_hidden_state, wanted)


def test_new_boundaries_need_no_new_kernel() -> None:
    model, row = encoder(), tokens()
    for boundaries in ([0, 5, 32], [0, 11, 20, 32], [0, 32]):
        use_pattern(model, sp.documents(boundaries))
        model(input_ids=row)
        known = sp.compile_count()
    use_pattern(model, sp.documents([0, 8, 16, 31, 32]))
    model(input_ids=tokens(40))
    assert sp.compile_count() == known


def test_a_mask_that_hides_nothing_is_fine() -> None:
    model, row = encoder(), tokens()
    use_pattern(model, sp.dense())
    plain = model(input_ids=row).last_hidden_state
    for mask in (torch.ones(1, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool), torch.zeros(1, 1, 32, 32)):
        assert torch.equal(model(input_ids=row, attention_mask=mask).last_hidden_state, plain)


@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_that_hides_something_is_an_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = encoder()
    use_pattern(model, sp.dense())
    mask = torch.ones(shape, dtype=dtype)
    mask[..., 3] = 0
    with pytest.raises(UnsupportedError, match=r"attention_mask.*\n.*\n.*documents"):
        model(input_ids=tokens(), attention_mask=mask)


def test_an_additive_mask_that_hides_something_is_an_error() -> None:
    model = encoder()
    use_pattern(model, sp.dense())
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 3] = torch.finfo(torch.float32).min
    with pytest.raises(UnsupportedError, match="attention_mask"):
        model(input_ids=tokens(), attention_mask=mask)


def test_a_static_cache() -> None:
    model, row = decoder(), tokens()
    wanted = model(input_ids=row).last_hidden_state
    use_pattern(model, sp.causal())
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    parts = [
        model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in row.split([20, 1, 10, 1], 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-4)


def test_a_static_cache_and_index_data() -> None:
    model, row = decoder(), tokens()
    pattern = sp.causal() & (sp.columns([0, 3, 9, 31]) | sp.window(5))
    use_pattern(model, pattern)
    wanted = model(input_ids=row).last_hidden_state
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    parts = [
        model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in row.split([20, 12], 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-4)


def test_a_static_cache_decodes_in_one_graph() -> None:
    model, row = lm(), tokens()
    use_pattern(model, sp.causal() & (sp.sink(2) | sp.window(9)))
    wanted = model(input_ids=row).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    found = [model(input_ids=row[:, :28], past_key_values=cache).logits]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found += [compiled(input_ids=token, past_key_values=cache).logits for token in row[:, 28:].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-4, rtol=1e-4)


def lm(kind: str = "Llama", **changes: Any) -> Any:
    """A small language model of a kind, with large random weights: its next tokens differ."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None, bos_token_id=1, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts; the first two are of one length."""
    ids, mask = tokens(60).reshape(3, 20) % 49 + 1, torch.ones(3, 20, dtype=torch.long)
    mask[2, :13] = 0
    return ids * mask, mask


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_are_those_of_sdpa(cache: str | None, padded: bool) -> None:
    model = lm(attn_implementation="sdpa")
    ids, mask = left_padded()
    mask = mask if padded else torch.ones_like(mask)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    wanted = model.generate(ids, **options, cache_implementation=cache)
    assert len(wanted[:, 20:].unique()) > 6
    with use_pattern(model, sp.causal()):
        assert torch.equal(model.generate(ids, **options, cache_implementation=cache), wanted)


def test_a_padded_sequence_is_what_it_is_alone() -> None:
    model = lm()
    ids, mask = left_padded()
    use_pattern(model, sp.causal() & (sp.sink(2) | sp.window(4)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for n, start in enumerate((0, 0, 13)):
        alone = model(input_ids=ids[n : n + 1, start:]).logits
        torch.testing.assert_close(together[n : n + 1, start:], alone, atol=1e-4, rtol=1e-4)


def test_an_encoders_batch_is_padded_on_the_right() -> None:
    model, ids = encoder(), tokens(64).reshape(2, 32)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 11:] = 0
    use_pattern(model, sp.window(5, 5) | sp.sink(1))
    together = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for n, length in enumerate((32, 11)):
        alone = model(input_ids=ids[n : n + 1, :length]).last_hidden_state
        torch.testing.assert_close(together[n : n + 1, :length], alone, atol=1e-5, rtol=1e-4)


def test_padded_sequences_keep_their_own_data() -> None:
    model = lm()
    ids, mask = left_padded()
    index = torch.tensor([[[0, 3]], [[1, 2]], [[0, 1]]])
    use_pattern(model, sp.causal() & (sp.columns(index) | sp.window(3)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    use_pattern(model, sp.causal() & (sp.columns(index[2:]) | sp.window(3)))
    alone = model(input_ids=ids[2:, 13:]).logits
    torch.testing.assert_close(together[2:, 13:], alone, atol=1e-4, rtol=1e-4)


def test_a_sequence_of_padding_gives_zeros() -> None:
    model = lm()
    ids, mask = left_padded()
    mask[2] = 0
    use_pattern(model, sp.causal())
    assert model(input_ids=ids, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_windows_of_the_model_are_kept_on_request(kind: str) -> None:
    changes = {"use_sliding_window": True, "max_window_layers": 1} if kind == "Qwen2" else {}
    model, row = lm(kind, sliding_window=6, attn_implementation="sdpa", **changes), tokens()
    wanted = model(input_ids=row, use_cache=False).logits
    with use_pattern(model, sp.causal(), keep_windows=True):
        torch.testing.assert_close(model(input_ids=row, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    with use_pattern(model, sp.causal()):
        assert (model(input_ids=row, use_cache=False).logits - wanted).abs().max() > 1e-2


def test_windows_to_both_sides_are_kept() -> None:
    model = lm("Mistral", sliding_window=4)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    row = tokens()
    use_pattern(model, sp.dense(), keep_windows=True)
    found = model(input_ids=row, use_cache=False).logits
    use_pattern(model, sp.window(4, 3))
    assert torch.equal(model(input_ids=row, use_cache=False).logits, found)


def test_attention_to_an_encoder_is_an_error() -> None:
    config = transformers.BartConfig(
        vocab_size=50, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    use_pattern(model, sp.dense())
    with pytest.raises(UnsupportedError, match="no attention to the keys of an encoder"):
        model(input_ids=tokens(), attention_mask=torch.ones(1, 32), decoder_input_ids=tokens(5))


def test_a_cache_that_drops_keys_is_an_error() -> None:
    model = lm("Mistral", sliding_window=6)
    use_pattern(model, sp.causal(), keep_windows=True)
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=tokens(), past_key_values=cache)
    with pytest.raises(
        UnsupportedError, match=r"past_key_values.*27 to 33 for 1 rows from 32(.*\n)*.*DynamicCache\(\)"
    ):
        model(input_ids=tokens(1), past_key_values=cache)


def test_dropout_is_an_error() -> None:
    model = encoder().train()
    use_pattern(model, sp.dense())
    with pytest.raises(UnsupportedError, match="dropout"):
        model(input_ids=tokens())


def test_options_that_change_the_result_are_errors() -> None:
    model = encoder()
    use_pattern(model, sp.dense())
    with pytest.raises(UnsupportedError, match="position_bias"):
        model(input_ids=tokens(), position_bias=torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize("padded", [False, True])
def test_capped_scores(padded: bool) -> None:
    """Gemma 2: the scores of every layer are capped, every other layer has a window."""
    model = lm("Gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=16, sliding_window=6)
    ids, mask = left_padded()
    mask = mask if padded else torch.ones_like(mask)
    options = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    wanted = model(**options).logits
    with use_pattern(model, sp.causal(), keep_windows=True):
        found = model(**options).logits
    kept = mask.bool()
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-4, rtol=1e-4)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with use_pattern(model, sp.causal(), keep_windows=True):
        assert (model(**options).logits - found)[kept].abs().max() > 1e-2


def test_learned_sinks() -> None:
    """GPT-OSS: a learned logit of each head takes its share of every row; every other layer has a window."""
    model = lm("GptOss", sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    row = tokens()
    wanted = model(input_ids=row, use_cache=False).logits
    with use_pattern(model, sp.causal(), keep_windows=True):
        torch.testing.assert_close(model(input_ids=row, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    for layer in model.model.layers:
        layer.self_attn.sinks.sub_(3.0)
    assert (model(input_ids=row, use_cache=False).logits - wanted).abs().max() > 1e-2


def test_spgen_without_a_pattern_is_an_error() -> None:
    register()
    model = encoder()
    model.set_attn_implementation("spgen")
    with pytest.raises(PatternError, match="use_pattern"):
        model(input_ids=tokens())


def test_a_pattern_is_a_pattern() -> None:
    with pytest.raises(DtypeError, match="pattern: got Tensor"):
        use_pattern(encoder(), torch.ones(3, 3))  # type: ignore[arg-type]


def test_a_model_with_its_own_attention_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.BertModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UnsupportedError, match="model: got BertModel"):
        use_pattern(encoder(), sp.dense())


def test_a_copy_keeps_the_pattern() -> None:
    model, row = encoder(), tokens()
    use_pattern(model, sp.window(3, 3))
    assert torch.equal(copy.deepcopy(model)(input_ids=row)[0], model(input_ids=row)[0])


def test_importing_needs_no_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, spgen.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
