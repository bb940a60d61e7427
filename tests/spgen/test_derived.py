"""What is made of a weight's tensors and kept as long as its values are the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

import spgen as sp
from spgen.backends.derived import Derived, forget


def numbers() -> Callable[[], int]:
    """One more at each call: what was kept is the number before."""
    made = iter(range(100))
    return lambda: next(made)


def test_kept_until_the_values_change() -> None:
    kept, make, tensor = Derived[int](), numbers(), torch.zeros(4)
    assert [kept.of([tensor], make) for _ in range(3)] == [0, 0, 0]
    tensor[0] = 1
    assert [kept.of([tensor], make) for _ in range(2)] == [1, 1]


def test_kept_by_all_that_it_is_made_of() -> None:
    kept, make = Derived[int](), numbers()
    columns, starts = torch.zeros(4), torch.zeros(2)
    assert kept.of([columns, starts], make) == 0
    starts[0] = 1
    assert kept.of([columns, starts], make) == 1
    assert kept.of([columns, starts.clone()], make) == 2


def test_kept_by_name_and_by_place_in_memory() -> None:
    kept, make, tensor = Derived[int](), numbers(), torch.zeros(8)
    sources = [tensor[:4], tensor[4:], tensor[:2], tensor[:4:2], tensor.view(2, 4), tensor.clone()]
    assert [kept.of([one], make) for one in sources] == [0, 1, 2, 3, 4, 5]
    assert kept.of([tensor[4:]], make, "name") == 6
    assert [kept.of([one], make) for one in sources] == [0, 1, 2, 3, 4, 5]


def test_values_made_in_inference_mode_are_taken_to_be_constant() -> None:
    kept, make = Derived[int](), numbers()
    with torch.inference_mode():
        tensor = torch.zeros(4)
    assert [kept.of([tensor], make) for _ in range(2)] == [0, 0]


def test_of_parameters_kept_if_values_stay_for_some_calls() -> None:
    kept, make, tensor = Derived[int](), numbers(), torch.zeros(4, requires_grad=True)
    assert [kept.of([tensor], make) for _ in range(4)] == [None, None, 0, 0]
    for _ in range(3):
        with torch.no_grad():
            tensor.add_(1)
        assert [kept.of([tensor], make) for _ in range(2)] == [None, None]
    assert kept.of([tensor], make) == 1


def test_freed_with_the_tensor() -> None:
    kept, tensor = Derived[torch.Tensor](), torch.zeros(4)
    found = weakref.ref(kept.of([tensor], lambda: torch.ones(4)))
    assert found() is not None
    del tensor
    gc.collect()
    assert found() is None


def test_forgotten() -> None:
    kept, others, make, tensor = Derived[int](), Derived[int](), numbers(), torch.zeros(4)
    assert [one.of([tensor], make) for one in (kept, others)] == [0, 1]
    forget(tensor.view(2, 2))
    assert [one.of([tensor], make) for one in (kept, others)] == [2, 3]


def test_a_weight_that_is_trained_is_made_again() -> None:
    """Also where what changes it keeps PyTorch's version, as FSDP does when it gathers a parameter."""
    kept, make = Derived[int](), numbers()
    layer = sp.linear(torch.randn(64, 64), sp.block(16, density=0.5))
    (values,) = layer.parameters()
    assert [kept.of([values], make) for _ in range(3)] == [None, None, 0]
    layer(torch.randn(3, 64)).sum().backward()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(values):
        values.mul_(2)
    assert [kept.of([values], make) for _ in range(3)] == [None, None, 1]


class Captured(torch.Tensor):
    """Says that it is on a GPU, where a graph is being captured."""

    is_cuda = True


def test_what_a_graph_reads_stays_with_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, values = Derived[torch.Tensor](), torch.zeros(4)
    found = weakref.ref(kept.of([values], lambda: torch.ones(4)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kept.of([values.as_subclass(Captured)], lambda: torch.ones(4)) is found()
    values.add_(1)
    assert kept.of([values.as_subclass(Captured)], lambda: torch.ones(4)) is None  # made only outside of captures
    assert kept.of([values], lambda: torch.zeros(4)) is not found()
    forget(values)
    gc.collect()
    assert found() is not None
    del values
    gc.collect()
    assert found() is None


def test_graphs_read_nothing_that_training_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, values = Derived[int](), torch.zeros(4, requires_grad=True)
    assert [kept.of([values], lambda: 1) for _ in range(3)] == [None, None, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kept.of([values.as_subclass(Captured)], lambda: 1) is None


@pytest.mark.gpu
def test_nothing_is_made_while_a_graph_is_captured() -> None:
    kept, make, tensor = Derived[int](), numbers(), torch.ones(4, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor.add_(1)  # a graph of nothing warns
        assert kept.of([torch.ones(4, device="cuda")], make) is None
    assert kept.of([tensor], make) == 0
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor.mul(2)
        assert kept.of([tensor], make) == 0


@pytest.mark.gpu
def test_what_is_made_is_not_of_a_pool_in_use() -> None:
    pool, kept, tensor = torch.cuda.MemPool(), Derived[torch.Tensor](), torch.ones(4, device="cuda")
    with torch.cuda.use_mem_pool(pool):
        made = kept.of([tensor], lambda: tensor * 2)
    assert made is not None
    pooled = [block["address"] for segment in pool.snapshot() for block in segment["blocks"]]
    assert made.data_ptr() not in pooled
    assert torch.equal(made, tensor * 2)
