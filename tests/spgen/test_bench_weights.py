"""The products with sparse weights, and active neurons, of the benchmarks: what they say of themselves, and errors."""

from __future__ import annotations

import pytest
import torch

from spgen.bench import neurons, weights
from spgen.bench.peers import PEERS, Unserved
from spgen.bench.peers import weights as peers
from spgen.bench.weights import Rows

WORK = Rows(3, 96, 64, torch.float32, "cpu")


@pytest.mark.parametrize("kind", ["blocks", "n_of_m", "bitmap", "gated", "gradients"])
def test_products(kind: str) -> None:
    (x,) = WORK.tensors()
    problem = weights.problem(WORK, kind, 16, 0.5)
    assert problem.density == pytest.approx(0.5, abs=0.02)
    assert problem.largest_error(problem.ours(x).run(None), x) < 1e-5
    for full, dense, one in zip(problem.full, problem.dense, problem.stored, strict=True):
        assert torch.equal(full * one.mask(), dense)
    assert peers.dense(problem, x).run(None).shape == problem.ours(x).run(None).shape
    stored = round(problem.density * 96 * 64) * (2 if kind == "gated" else 1)
    assert problem.flops == 2 * 3 * stored * (2 if kind == "gradients" else 1)


def test_a_layer_of_active_neurons() -> None:
    (x,) = WORK.tensors()
    problem = neurons.problem(WORK, 0.25, whole=True)
    assert len(problem.active) == 24
    assert problem.density == 0.25
    assert problem.flops == 2 * 3 * 24 * 3 * 64
    out = problem.ours(x).run(None)
    assert problem.largest_error(out, x) < 1e-5
    assert problem.largest_error(peers.dense(problem, x).run(None), x) > 1e-2  # it has all neurons
    everything = neurons.problem(WORK, 1.0, whole=True)
    assert everything.largest_error(peers.dense(everything, x).run(None), x) < 1e-5


def test_an_up_projection_of_active_neurons() -> None:
    (x,) = WORK.tensors()
    problem = neurons.problem(WORK, 0.25, whole=False)
    every = peers.dense(problem, x).run(None)
    assert problem.largest_error(every[:, problem.active], x) < 1e-5
    assert problem.largest_error(every, x) > 1e-2
    assert problem.flops == 2 * 3 * 24 * 64


def test_peers_of_stored_weights_take_no_neurons() -> None:
    (x,) = WORK.tensors()
    for peer in (peers.bsr, peers.cusparselt):
        with pytest.raises(Unserved, match="stored"):
            peer(neurons.problem(WORK, 0.5, whole=False), x)
    assert {"dense", "torch-bsr", "cusparselt"} <= {peer.name for peer in PEERS.values()}
