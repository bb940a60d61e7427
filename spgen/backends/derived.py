"""What is made of a weight's tensors once and kept as long as their memory, until their values change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

_Made = TypeVar("_Made")
_PATIENCE = 2  # calls with the same values before what is made of parameters is kept: those of training change
_every: WeakSet[Derived[Any]] = WeakSet()


@dataclass
class _Entry(Generic[_Made]):
    state: object  # of the values
    made: _Made | None = None
    seen: int = 0
    captured: bool = False  # a graph reads it: it lives as long as the values' memory


class Derived(Generic[_Made]):
    """By the tensors that things are made of, and a name where several are made of the same.

    Things go with the memory of the first tensor. Changes in place are noticed as autograd notices them: not those
    through `.data`, nor those of tensors made in inference mode.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[torch.UntypedStorage, dict[object, _Entry[_Made]]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        _every.add(self)

    def of(self, sources: Sequence[Tensor], make: Callable[[], _Made], name: object = None) -> _Made | None:
        """What is known of `sources`, or None. To make what is kept waits for the device.

        While a graph is captured nothing is made, as it would be there only when the graph has run; and nothing is
        known of tensors that require gradients, as the graph outlives their values.
        """
        first = sources[0]
        key, state = (_place(first), name), [(_place(one), one.data_ptr(), _version(one)) for one in sources]
        trained = any(one.requires_grad for one in sources)
        capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and trained:
            return None
        with self._lock:
            entries = self._made.setdefault(first.untyped_storage(), {})
            entry = entries.get(key)
            if entry is None or entry.state != state:
                if entry is not None and entry.captured:
                    entries[object()] = entry
                entry = entries[key] = _Entry(state)
            entry.captured |= capturing and entry.made is not None
        if entry.made is None and not capturing:
            if entry.seen >= _PATIENCE or not trained:
                made = _aside(make, first.device) if first.is_cuda else make()
                with self._lock:
                    entry.made = made if entry.made is None else entry.made
            entry.seen += 1
        return entry.made

    def forget(self, tensor: Tensor) -> None:
        """What was made of a tensor's memory, but for what graphs read."""
        with self._lock:
            entries = self._made.pop(tensor.untyped_storage(), {})
            captured: dict[object, _Entry[_Made]] = {object(): one for one in entries.values() if one.captured}
            if captured:
                self._made[tensor.untyped_storage()] = captured


def forget(tensor: Tensor) -> None:
    """What anything made of a tensor's memory, as its values are about to change, whoever writes them."""
    for derived in list(_every):
        derived.forget(tensor)


def _aside(make: Callable[[], _Made], device: torch.device) -> _Made:
    """By another thread: torch.compile's warm-up of graphs takes the memory of its own thread for theirs."""
    stream = torch.cuda.current_stream(device)

    def made() -> _Made:
        with torch.cuda.stream(stream), torch.no_grad():
            result = make()
            stream.synchronize()  # calls on any stream may come next
            return result

    return _worker(device.index).submit(made).result()


@cache
def _worker(device: int) -> ThreadPoolExecutor:
    """A thread for each device: cuSPARSELt has a handle for each thread."""
    return ThreadPoolExecutor(1, f"spgen-{device}")


def _place(tensor: Tensor) -> tuple[object, ...]:
    return int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
