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


def test_a_static_cache_is_an_error() -> None:
    model = decoder()
    use_pattern(model, sp.causal())
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UnsupportedError, match="past_key_values"):
        model(input_ids=tokens(), past_key_values=cache, use_cache=True)


def test_dropout_is_an_error() -> None:
    model = encoder().train()
    use_pattern(model, sp.dense())
    with pytest.raises(UnsupportedError, match="dropout"):
        model(input_ids=tokens())


def test_options_that_change_the_result_are_errors() -> None:
    model = encoder()
    use_pattern(model, sp.dense())
    with pytest.raises(UnsupportedError, match="softcap"):
        model(input_ids=tokens(), softcap=30.0)


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
