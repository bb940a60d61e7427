"""Layers of active neurons as GPUs compute them: Triton's interpreter, in a process of its own (TRITON_INTERPRET=1).

Started by test_neurons.py.
"""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen.settings import triton_interpreted
from spgen.weights import neuron_ops, neurons
from tests.spgen.weights.test_neurons import ACTIVITIES, LAYERS, D, oracle, random

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize(
    ("name", "activity"),
    [(name, activity) for name in LAYERS for activity in ("magnitude", "chunks of 4")] + [("gate", "top 7")],
)
def test_layers(name: str, activity: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "neurons", neuron_ops._neurons_cuda)
    mlp, x = LAYERS[name](ACTIVITIES[activity]), random(m, D, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x).double(), oracle(mlp, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_channels(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sp.ChannelLinear(random(30, D), sp.Activity(0.5, positive=False, rows=rows), random(30))
    x = random(6, D)
    with torch.no_grad():
        wanted = layer(x)
        monkeypatch.setattr(neurons, "channels", neuron_ops._channels_cuda)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
