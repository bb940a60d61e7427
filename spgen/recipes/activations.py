"""Methods that compute only the neurons, or read only the input channels, that a token makes active.

Weights are those of linear layers: `w_gate` and `w_up` [F, D], `w_down` [D, F].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spgen.errors import PatternError, ShapeError
from spgen.weights.neurons import Activity, ChannelLinear, NeuronMLP

_ANY = 2.0**-24  # the smallest positive number of float16


def cats(
    w_gate: Tensor, w_up: Tensor, w_down: Tensor, sample: Tensor, *, sparsity: float = 0.5, rows: int | None = 1
) -> NeuronMLP:
    """Neurons whose |SiLU(gate)| is large: the threshold is its quantile `sparsity` over inputs `sample` [S, D]
    (Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", 2024).
    """  # fmt: skip
    gates = nn.functional.silu(sample @ w_gate.T).abs().float()
    return NeuronMLP(w_gate, w_up, w_down, Activity(_quantile(gates, sparsity), positive=False, rows=rows))


def turbo_sparse(w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, rows: int | None = 1) -> NeuronMLP:
    """dReLU, relu(x gate^T) * relu(x up^T), of neurons with a positive gate, which changes nothing of the result
    (Song et al., "Turbo Sparse: Achieving LLM SOTA Performance with Minimal Activated Parameters", 2024).
    """  # fmt: skip
    return NeuronMLP(w_gate, w_up, w_down, Activity(rows=rows), activation="relu", up_activation="relu")


def low_rank_router(features: int, neurons: int, rank: int) -> nn.Sequential:
    """The predictor of which neurons matter, untrained: two linear layers (DejaVu; Polar Sparsity)."""
    return nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, neurons))


def deja_vu(
    w_up: Tensor, w_down: Tensor, router: nn.Module, *, top_k: int, w_gate: Tensor | None = None,
    hidden_bias: Tensor | None = None, bias: Tensor | None = None, activation: str = "relu",
) -> NeuronMLP:  # fmt: skip
    """The `top_k` neurons that a predictor scores highest, for each token
    (Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time", 2023).
    """  # fmt: skip
    return NeuronMLP(
        w_gate, w_up, w_down, Activity(top_k=top_k), activation=activation, router=router, hidden_bias=hidden_bias,
        bias=bias,
    )  # fmt: skip


def polar(
    w_up: Tensor, w_down: Tensor, router: nn.Module, *, threshold: float = 0.0, hidden_bias: Tensor | None = None,
    bias: Tensor | None = None,
) -> NeuronMLP:  # fmt: skip
    """Neurons of a ReLU MLP that the router scores above a threshold for any token of the batch
    (Shrestha et al., "Polar Sparsity: High Throughput Batched LLM Inferencing with Scalable Contextual Sparsity",
    2025).
    """  # fmt: skip
    return NeuronMLP(
        None, w_up, w_down, Activity(threshold, rows=None), activation="relu", router=router, hidden_bias=hidden_bias,
        bias=bias,
    )  # fmt: skip


class ReLURouter(nn.Module):
    """RMSNorm(ReLU(x router^T)): x [M, D], `weight` [experts, D], `scale` [experts]; inactive experts stay 0."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(torch.ones(len(weight)) if scale is None else scale.detach().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The experts' weights [M, experts]."""
        return nn.functional.rms_norm(torch.relu(x @ self.weight.T), self.scale.shape, self.scale, self.eps)


def block_ffn(
    w_up: Tensor, w_down: Tensor, router: Tensor, *, scale: Tensor | None = None, activation: str = "silu",
    rows: int | None = 1,
) -> NeuronMLP:  # fmt: skip
    """Experts of F / E consecutive neurons, weighted by a ReLU router `router` [E, D] and its norm's `scale` [E]
    (Song et al., "BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation
    Sparsity", 2025). `rows` tokens of a speculative chunk share their list of experts.
    """  # fmt: skip
    if len(w_up) % max(1, len(router)):
        raise ShapeError("router", given=f"{len(router)} experts", allowed=f"a divisor of {len(w_up)} neurons")
    return NeuronMLP(
        None, w_up, w_down, Activity(_ANY, positive=False, rows=rows), activation=activation,
        router=ReLURouter(router, scale), block=len(w_up) // len(router), weighted=True,
    )  # fmt: skip


class _Shared(nn.Module):
    """One layer's part of the scores; the first layer has them computed."""

    def __init__(
        self, predictor: nn.Module, sizes: Sequence[int], scores: dict[str, tuple[Tensor, ...]], at: int
    ) -> None:
        super().__init__()
        self.predictor = predictor if at == 0 else None
        self.sizes, self.at, self.scores = list(sizes), at, scores

    def forward(self, x: Tensor) -> Tensor:
        if self.predictor is not None:
            found = self.predictor(x)
            if found.shape[-1] != sum(self.sizes):
                allowed = f"{sum(self.sizes)}, the neurons of all layers"
                raise ShapeError("predictor", given=f"{found.shape[-1]} scores", allowed=allowed)
            self.scores["now"] = found.split(self.sizes, -1)
        return self.scores["now"][self.at]


def shadow_routers(predictor: nn.Module, neurons: Sequence[int]) -> list[nn.Module]:
    """Routers of all layers over one predictor, which reads the first layer's inputs [M, D] and scores all layers'
    neurons [M, sum] (Akhauri et al., "ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models", 2024).

    Each goes to its layer, as the router of `deja_vu`; layers must run in their order.
    """  # fmt: skip
    scores: dict[str, tuple[Tensor, ...]] = {}
    return [_Shared(predictor, neurons, scores, at) for at in range(len(neurons))]


def q_sparse(layer: nn.Linear, *, density: float = 0.4) -> ChannelLinear:
    """The inputs of largest magnitude of each token, with gradients straight through
    (Wang et al., "Q-Sparse: All Large Language Models can be Fully Sparsely-Activated", 2024).
    """  # fmt: skip
    top_k = max(1, round(density * layer.in_features))
    return ChannelLinear(layer.weight, Activity(top_k=top_k, positive=False), layer.bias)


def r_sparse(
    layer: nn.Linear, sample: Tensor, *, sparsity: float = 0.5, rank: int = 32, scale: Tensor | None = None
) -> ChannelLinear:
    """Inputs with |x * scale| above its quantile `sparsity` over `sample` [S, K] go through W, the rest through its
    largest `rank` singular values
    (Zhang et al., "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", 2025).
    """  # fmt: skip
    weight = layer.weight.detach()
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    low_rank = (u[:, :rank] * s[:rank]).to(weight.dtype), v[:rank].to(weight.dtype)
    sizes = (sample if scale is None else sample * scale).abs().float()
    activity = Activity(_quantile(sizes, sparsity), positive=False)
    return ChannelLinear(weight, activity, layer.bias, scale=scale, low_rank=low_rank)


def _quantile(values: Tensor, share: float) -> float:
    """The value that a share of all values does not reach."""
    if not values.numel() or not 0 <= share < 1:
        raise PatternError(
            "sparsity", given=f"{share} of {values.numel()} values", allowed="a share in [0, 1) of at least one value"
        )
    flat = values.flatten()
    return float(flat.kthvalue(min(len(flat), int(share * len(flat)) + 1)).values)
