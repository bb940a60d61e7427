"""What is made of a weight's tensors once and kept as long as their memory, until their values change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

_Made = TypeVar("_Made")
_every: WeakSet[Derived[Any]] = WeakSet()


@dataclass
class _Entry(Generic[_Made]):
    state: object  # of the values
    made: _Made | None = None
    seen: int = 0


class Derived(Generic[_Made]):
    """By the tensors that things are made of, and a name where several are made of the same.

    Things go with the memory of the first tensor. Changes in place are noticed as autograd notices them: not those
    through `.data`, nor those of tensors made in inference mode.
    """

    def __init__(self, patience: int = 0) -> None:
        """Things are kept from the call on that has seen the same values `patience` times before."""
        self._patience = patience
        self._made: WeakKeyDictionary[torch.UntypedStorage, dict[object, _Entry[_Made]]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        _every.add(self)

    def of(self, sources: Sequence[Tensor], make: Callable[[], _Made], name: object = None) -> _Made | None:
        """What is known of `sources`, or None. To make what is kept waits for the device.

        Nothing is made while a graph is captured: it would be there only when the graph has run.
        """
        first = sources[0]
        key, state = (_place(first), name), [(_place(one), one.data_ptr(), _version(one)) for one in sources]
        entry = self._made.get(first.untyped_storage(), {}).get(key)
        if entry is None or entry.state != state:
            entry = _Entry(state)
            with self._lock:
                self._made.setdefault(first.untyped_storage(), {})[key] = entry
        if entry.made is None:
            if first.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            if entry.seen >= self._patience:
                entry.made = _aside(make, first.device) if first.is_cuda else make()
            entry.seen += 1
        return entry.made

    def forget(self, tensor: Tensor) -> None:
        """All that was made of a tensor's memory."""
        with self._lock:
            self._made.pop(tensor.untyped_storage(), None)


def forget(tensor: Tensor) -> None:
    """All that anything made of a tensor's memory, as its values are about to change, whoever writes them."""
    for derived in list(_every):
        derived.forget(tensor)


def _aside(make: Callable[[], _Made], device: torch.device) -> _Made:
    """By another thread: torch.compile's warm-up of graphs takes the memory of its own thread for theirs."""

    def made() -> _Made:
        with torch.cuda.device(device), torch.no_grad():
            result = make()
            torch.cuda.current_stream().synchronize()  # calls on any stream may come next
            return result

    torch.cuda.current_stream(device).synchronize()
    return _worker().submit(made).result()


@lru_cache(maxsize=1)
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spgen")


def _place(tensor: Tensor) -> tuple[object, ...]:
    return int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
