"""What is made of a weight's tensors once and kept as long as their memory, until their values change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

_Made = TypeVar("_Made")
_every: WeakSet[Derived[Any]] = WeakSet()


class Derived(Generic[_Made]):
    """By the tensors that things are made of, and a name where several are made of the same.

    Things go with the memory of the first tensor. Changes in place are noticed as autograd notices them: not those
    through `.data`, nor those of tensors made in inference mode.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[torch.UntypedStorage, dict[object, tuple[object, _Made]]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        _every.add(self)

    def of(self, sources: Sequence[Tensor], make: Callable[[], _Made], name: object = None) -> _Made | None:
        """What is known of `sources`, or is made now, which waits for the device.

        None while a graph is captured, if nothing is known: what is made then is there only when the graph has run.
        """
        first = sources[0]
        key, state = (_place(first), name), [(_place(one), one.data_ptr(), _version(one)) for one in sources]
        found = self._made.get(first.untyped_storage(), {}).get(key)
        if found is not None and found[0] == state:
            return found[1]
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        made = _aside(make, first.device) if first.is_cuda else make()
        with self._lock:
            self._made.setdefault(first.untyped_storage(), {})[key] = state, made
        return made

    def forget(self, tensor: Tensor) -> None:
        """All that was made of a tensor's memory."""
        with self._lock:
            self._made.pop(tensor.untyped_storage(), None)


def forget(tensor: Tensor) -> None:
    """All that anything made of a tensor's memory, as its values are about to change, whoever writes them."""
    for derived in list(_every):
        derived.forget(tensor)


def _aside(make: Callable[[], _Made], device: torch.device) -> _Made:
    """By a thread of its own: torch.compile's warm-up of graphs takes the memory of its own thread for theirs."""

    def made() -> _Made:
        with torch.cuda.device(device), torch.no_grad():
            result = make()
            torch.cuda.current_stream().synchronize()  # calls on any stream may come next
            return result

    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def _place(tensor: Tensor) -> tuple[object, ...]:
    return int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
