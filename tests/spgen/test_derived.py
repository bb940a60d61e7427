"""What is made of a tensor and kept as long as its values are the same."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from spgen.backends.derived import Derived


def test_kept_until_the_values_change() -> None:
    kept: Derived[str] = Derived()
    tensor = torch.zeros(4)
    assert kept.get(tensor) is None
    assert kept.keep(tensor, "made") == kept.get(tensor) == kept.get(tensor.view(2, 2)) == "made"
    tensor[0] = 1
    assert kept.get(tensor) is None
    kept.keep(tensor, "again")
    assert kept.get(tensor) == "again"


def test_kept_by_name_and_by_place_in_memory() -> None:
    kept: Derived[int] = Derived()
    tensor = torch.zeros(8)
    kept.keep(tensor[:4], 1)
    kept.keep(tensor[4:], 2)
    kept.keep(tensor[4:], 3, "name")
    assert [kept.get(tensor[:4]), kept.get(tensor[4:]), kept.get(tensor[4:], "name")] == [1, 2, 3]
    assert kept.get(tensor[2:]) is None
    assert kept.get(tensor.clone()) is None


def test_values_made_in_inference_mode_are_taken_to_be_constant() -> None:
    kept: Derived[int] = Derived()
    with torch.inference_mode():
        tensor = torch.zeros(4)
    kept.keep(tensor, 1)
    assert kept.get(tensor) == 1


def test_freed_with_the_tensor() -> None:
    kept: Derived[torch.Tensor] = Derived()
    tensor, made = torch.zeros(4), torch.ones(4)
    found = weakref.ref(made)
    kept.keep(tensor, made)
    del made, tensor
    gc.collect()
    assert found() is None


@pytest.mark.gpu
def test_what_is_made_while_a_graph_is_captured_is_the_graphs() -> None:
    kept: Derived[torch.Tensor] = Derived()
    tensor = torch.ones(4, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept.keep(tensor, tensor * 2)
    assert kept.get(tensor) is None
    kept.keep(tensor, tensor * 2)
    assert kept.get(tensor) is not None
