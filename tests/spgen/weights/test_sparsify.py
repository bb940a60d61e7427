"""Models whose linear layers become sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spgen as sp
from tests.spgen.weights.models import batch, model


def masked(dense: nn.Module, sparse: nn.Module) -> nn.Module:
    """The dense model with what the sparse one stores, as the oracle."""
    for name, module in sparse.named_modules():
        if isinstance(module, sp.Linear):
            dense.get_submodule(name).weight.data = module.weight.dense()  # type: ignore[union-attr]
    return dense


@pytest.mark.parametrize("pattern", [sp.block(16, density=0.3), sp.n_of_m(2, 4), sp.block(1, 1, density=0.4)], ids=str)
def test_a_sparse_model_computes_as_the_masked_dense_one(pattern: sp.Pattern) -> None:
    pytest.importorskip("tvm_ffi")
    sparse = sp.sparsify(model(), {"*.mlp.*": pattern, "0.proj": sp.n_of_m(1, 4)})
    assert isinstance(sparse[0].proj, sp.Linear)  # type: ignore[index]
    assert type(sparse[1].proj) is nn.Linear  # type: ignore[index]
    x = batch()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), masked(model(), sparse)(x), rtol=1e-4, atol=1e-5)


def test_the_first_glob_that_matches_counts() -> None:
    sparse = sp.sparsify(model(), {"*.up": sp.n_of_m(2, 4), "*.mlp.*": sp.block(16, density=0.5)})
    assert sparse.get_submodule("0.mlp.up").weight.layout == "n_of_m(2, 4)"
    assert sparse.get_submodule("0.mlp.gate").weight.layout == "blocks(16, 16)"


def test_biases_and_modes_stay() -> None:
    dense = model().eval()
    kept = dense.get_submodule("0.mlp.down").bias.detach().clone()
    sparse = sp.sparsify(dense, {"*": sp.n_of_m(2, 4)}).get_submodule("0.mlp.down")
    assert not sparse.training
    torch.testing.assert_close(sparse.bias, kept, rtol=0, atol=0)


def test_not_in_place() -> None:
    dense = model()
    sparse = sp.sparsify(dense, {"*": sp.n_of_m(2, 4)}, inplace=False)
    assert type(dense[0].proj) is nn.Linear
    assert isinstance(sparse[0].proj, sp.Linear)  # type: ignore[index]


def test_a_layer_by_itself_and_a_layer_in_two_places() -> None:
    assert isinstance(sp.sparsify(nn.Linear(8, 8), {"*": sp.n_of_m(2, 4)}), sp.Linear)
    shared = nn.Linear(8, 8)
    found = sp.sparsify(nn.ModuleList([shared, nn.Sequential(shared)]), {"0": sp.n_of_m(2, 4)})
    assert found[0] is found[1][0]  # type: ignore[index]


@pytest.mark.parametrize("batches", ["tensors", "tuples", "dicts"])
def test_wanda_ranks_by_inputs_of_the_dense_model(batches: str) -> None:
    given = [batch(5, seed=seed) * torch.linspace(0.01, 3, 48) for seed in range(3)]
    forms: dict[str, list[Any]] = {
        "tensors": given, "tuples": [(x,) for x in given], "dicts": [{"input": x} for x in given],
    }  # fmt: skip
    dense = model(1)
    sparse = sp.sparsify(
        dense, {"0.proj": sp.n_of_m(2, 4, scores=sp.wanda())}, calibration=forms[batches], inplace=False
    )
    norms = torch.cat(given).norm(dim=0)
    scores = (dense[0].proj.weight.detach().abs() * norms).view(48, 12, 4)  # type: ignore[union-attr, operator]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True).view(48, 48)
    assert torch.equal(sparse[0].proj.weight.stored.mask(), kept)  # type: ignore[index, union-attr, operator]


def test_calibration_runs_without_dropout_and_leaves_modes() -> None:
    dense = nn.Sequential(nn.Dropout(0.9), nn.Linear(16, 16)).train()
    sparse = sp.sparsify(dense, {"1": sp.n_of_m(2, 4, scores=sp.wanda())}, calibration=[torch.ones(3, 16)])
    assert sparse[0].training  # type: ignore[index]
    alone = sp.linear(dense[1].weight.dense(), sp.n_of_m(2, 4))  # type: ignore[union-attr, operator]
    assert torch.equal(alone.weight.stored.mask(), sparse[1].weight.stored.mask())  # type: ignore[index, union-attr, operator]


def test_values_may_be_quantised() -> None:
    pytest.importorskip("tvm_ffi")
    sparse = sp.sparsify(model(1), {"*.mlp.*": sp.block(16, density=0.5)}, values="int8")
    x = batch()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), masked(model(1), sparse)(x), rtol=1e-4, atol=1e-4)


def test_encoder_layers_of_torch_skip_their_fused_form() -> None:
    pytest.importorskip("tvm_ffi")
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval()
    sparse = sp.sparsify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"*.linear?": sp.n_of_m(2, 4)})
    with torch.no_grad():
        assert sparse(torch.randn(2, 5, 32)).isfinite().all()


def test_conv1d_of_transformers() -> None:
    pytest.importorskip("tvm_ffi")
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    sparse = sp.sparsify(conv, {"*": sp.n_of_m(2, 4)})
    x = batch(3, 8)
    wanted = x @ sparse.weight.dense().T + conv.bias  # type: ignore[union-attr, operator]
    torch.testing.assert_close(sparse(x), wanted)


def test_the_report() -> None:
    sparse = sp.sparsify(model(1, 64, 128), {"*.up": sp.block(32, density=0.25), "*.down": sp.n_of_m(2, 4)})
    report = sp.sparsity(sparse)
    assert [(layer.name, layer.storage, layer.density) for layer in report.layers] == [
        ("0.mlp.up", "blocks(32, 32)", 0.25), ("0.mlp.down", "n_of_m(2, 4)", 0.5),
    ]  # fmt: skip
    up, down = report.layers
    assert up.dense_bytes == down.dense_bytes == 64 * 128 * 4
    assert down.bytes == 64 * 128 * 4 // 2 + 64 * 128 // 8
    assert report.bytes == up.bytes + down.bytes
    assert "0.mlp.up    blocks(32, 32)   25.0%" in str(report)
    weights = (torch.randn(*shape) for shape in ((128, 64), (128, 64), (64, 128)))
    mlp = sp.mlp(*weights, (sp.n_of_m(2, 4),) * 3, values="int4")
    assert [(one.name, one.density) for one in sp.sparsity(mlp).layers][:2] == [("gate", 0.5), ("up", 0.5)]


def test_refusals() -> None:
    pattern, wanda = sp.n_of_m(2, 4), sp.n_of_m(2, 4, scores=sp.wanda())
    with pytest.raises(sp.PatternError, match=r"\*\.mpl\.up.*\n.*0\.mlp\.up"):
        sp.sparsify(model(), {"*.mpl.up": pattern})
    with pytest.raises(sp.PatternError, match="a model with linear layers"):
        sp.sparsify(nn.ReLU(), {"*": pattern})
    with pytest.raises(sp.DataError, match=r"calibration: got nothing"):
        sp.sparsify(model(), {"*": wanda})
    with pytest.raises(sp.DataError, match=r"calibration: got no input for 0\.proj"):
        sp.sparsify(model(), {"*": wanda}, calibration=[])
    with pytest.raises(sp.DtypeError, match=r"patterns\['\*'\]: got float"):
        sp.sparsify(model(), {"*": 0.5})  # type: ignore[dict-item]
    with pytest.raises(sp.DtypeError, match="patterns: got"):
        sp.sparsify(model(), pattern)  # type: ignore[arg-type]
    with pytest.raises(sp.DtypeError, match="model: got"):
        sp.sparsify([model()], {"*": pattern})  # type: ignore[arg-type]
    with pytest.raises(sp.DtypeError, match="train: got"):
        sp.sparsify(model(), {"*": pattern}, train=True)  # type: ignore[arg-type]
    with pytest.raises(sp.DtypeError, match="quantised weights do not train"):
        sp.sparsify(model(), {"*": pattern}, train=sp.Rule(), values="int8")
    with pytest.raises(sp.PatternError, match="density"):
        sp.sparsify(model(), {"*": sp.block(16, density=0.0)})
    with pytest.raises(sp.DtypeError, match=r"weight: got torch\.float64"):
        sp.sparsify(model().double(), {"*": pattern})


def test_what_a_subclass_computes_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(sp.PatternError, match="no linear layer"):
        sp.sparsify(nn.Sequential(Scaled(8, 8)), {"*": sp.n_of_m(2, 4)})
