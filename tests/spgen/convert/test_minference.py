"""MInference's head configurations become one pattern for each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.errors import DataError, DtypeError, UnsupportedError

LAYERS = [
    {
        "0": ["vertical_and_slash", 1000, 6096, 336],
        "1": ["stream_llm", 100, 800, 0.98],
        "2": ["block_sparse", 8, 1, 0.5],
        "3": ["vertical_and_slash", 20, 10, 1.0],
    },
    {str(head): ["stream_llm", 4, 16 * (head + 1), 1.0] for head in range(4)},
]


def test_every_kind_of_head() -> None:
    first, second = sp.from_minference(LAYERS)
    best = sp.vertical_slash(vertical=1000, slash=6096, scores=sp.last_queries(64))
    least = sp.vertical_slash(vertical=30, slash=50, scores=sp.last_queries(64))
    assert first == sp.per_head(
        [
            sp.causal() & (best | sp.sink(30) | sp.window(100)),
            sp.causal() & (sp.sink(100) | sp.window(800)),
            sp.causal() & sp.top_k(100, rows=64, cols=64, scores=sp.pooled()),
            sp.causal() & (least | sp.sink(30) | sp.window(100)),
        ]
    )
    assert second == sp.per_head([sp.causal() & (sp.sink(4) | sp.window(16 * n)) for n in (1, 2, 3, 4)])
    assert sp.pattern(repr(first)) == first


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "best_pattern.json"
    path.write_text(json.dumps(LAYERS), encoding="utf-8")
    assert sp.from_minference(path) == sp.from_minference(str(path)) == sp.from_minference(LAYERS)


def test_heads_that_are_not_listed() -> None:
    (found,) = sp.from_minference([{"1": ["stream_llm", 4, 16, 1]}], heads=3)
    default = sp.causal() & (
        sp.vertical_slash(vertical=1000, slash=6096, scores=sp.last_queries(64)) | sp.sink(30) | sp.window(100)
    )
    assert found == sp.per_head([default, sp.causal() & (sp.sink(4) | sp.window(16)), default])


def test_streaming_layers_run_and_selections_say_what_is_missing() -> None:
    pytest.importorskip("tvm_ffi")
    first, second = sp.from_minference(LAYERS)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 70, 32) for _ in range(3))
    mask = second.mask(70, q_heads=4)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(sp.attention(second)(q, k, v), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="a selection"):
        sp.attention(first)(q, k, v)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (3, {}, DtypeError, "config: got int"),
        ([3], {}, DataError, "layer 0: got 3"),
        ([{"a": []}], {}, DataError, "layer 0"),
        ([{}], {}, DataError, "layer 0: got no heads"),
        ([{"4": ["stream_llm", 1, 2, 3]}], {"heads": 4}, DataError, "layer 0: got head 4\n.*4 heads"),
        ([{"0": []}], {}, DataError, "layer 0, head 0"),
        ([{"0": "stream_llm"}], {}, DataError, "layer 0, head 0"),
        ([{"0": ["flash", 1, 2, 3]}], {}, DataError, "layer 0, head 0: got flash"),
        ([LAYERS[1], {"0": ["stream_llm", 1]}], {}, DataError, "layer 1, head 0.*counts"),
        ([{"0": ["stream_llm", -1, 2, 3]}], {}, DataError, ".*counts of at least 0"),
        ([{"0": ["stream_llm", 1.5, 2, 3]}], {}, DataError, ".*counts of at least 0"),
    ],
)
def test_mistakes_are_explained(config: Any, options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"(?s)from_minference: {message}"):
        sp.from_minference(config, **options)
