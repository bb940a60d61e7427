"""What is made of a tensor once and kept as long as its memory, until its values change."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_Made = TypeVar("_Made")


class Derived(Generic[_Made]):
    """By tensor, and a name where several things are made of one."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[int, object], tuple[int, _Made]]]
        self._made = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, tensor: Tensor, name: object = None) -> _Made | None:
        """What was kept, if the tensor's values have not changed since."""
        found = self._made.get(tensor.untyped_storage(), {}).get((int(tensor.storage_offset()), name))
        return found[1] if found is not None and found[0] == _version(tensor) else None

    def keep(self, tensor: Tensor, made: _Made, name: object = None) -> _Made:
        """What was made of a tensor; not kept if that was while a graph is captured, whose memory it then is."""
        if tensor.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return made
            torch.cuda.current_stream(tensor.device).synchronize()  # calls on other streams may come next
        with self._lock:
            of_storage = self._made.setdefault(tensor.untyped_storage(), {})
            of_storage[int(tensor.storage_offset()), name] = _version(tensor), made
        return made


def _version(tensor: Tensor) -> int:
    """How often values changed; those made in inference mode do not count it, and are taken to be constant."""
    return 0 if tensor.is_inference() else tensor._version
