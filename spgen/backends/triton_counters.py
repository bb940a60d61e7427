"""Counters from which running kernels draw numbers: words of device memory that are 0 before a kernel and after it.

A kernel that draws from one resets it when its last program draws its last number (templates/gluon/scheduler.py.jinja),
so that a launch neither allocates nor clears anything:

- Kernels of one stream run one behind the other: they may share a word, whichever threads launch them.
- Every stream has a word of its own, cleared on that stream before the first kernel that draws from it.
- Nodes of a CUDA graph run on whatever stream replays it, beside what runs on the stream where it was captured. While
  a stream is captured each launch takes a word from the graph's own memory; the graph clears it before each use.
- The words belong to the process and not to torch's allocator, whose private pools must not keep memory that a call
  took before a capture. A stream's handle stands for one stream at a time, as that allocator assumes, too.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from spgen.backends.triton_launch import driver

_WORDS = 512  # that are taken at once
_APART = 128  # bytes, a line of the cache: kernels on several streams draw at the same time


class Counters:
    """The counters of one device."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._words: dict[int, int] = {}  # by stream
        self._unused: list[int] = []
        self._lock = threading.Lock()

    def of(self, stream: int) -> int:
        """The address of a word for the next kernel on `stream`, the current one of the current device."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._captured(stream)
        return self._words.get(stream) or self._first(stream)

    def _first(self, stream: int) -> int:
        with self._lock:
            if stream not in self._words:
                if not self._unused:
                    start = driver().allocate(_WORDS * _APART, self._device)
                    self._unused = [start + _APART * word for word in range(_WORDS)]
                word = self._unused.pop()
                driver().clear(word, 1, stream, self._device)
                self._words[stream] = word
            return self._words[stream]

    def _captured(self, stream: int) -> int:
        # memory that is free again at once may only be taken by what follows on this stream
        word = torch.empty(1, dtype=torch.int32, device=torch.device("cuda", self._device)).data_ptr()
        driver().clear(word, 1, stream, self._device)
        return word


@cache
def counters(device: int) -> Counters:
    """The counters of a device, which live as long as the process."""
    return Counters(device)


_lock = threading.Lock()
_POOL = 2**20  # counters that captured launches share out

_arrivals: dict[tuple[int, int], Tensor] = {}
_pools: dict[int, tuple[Tensor, int]] = {}


def arrivals(like: Tensor, count: int) -> Tensor:
    """Int32 counters that are 0, for a kernel on the current stream of `like`'s device that leaves them so.

    A captured launch gets counters of its own, for good: graphs may run beside each other, and one that had to clear
    its counters first would take longer. They come from what the first call outside a capture set aside.
    """
    if not like.is_cuda:
        return torch.zeros(count, dtype=torch.int32)
    device = like.get_device()
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            pool, taken = _pools.get(device, (None, 0))
            if pool is not None and taken + count <= len(pool):
                _pools[device] = pool, taken + count
                return pool[taken : taken + count]
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (device, torch._C._cuda_getCurrentRawStream(device))
    known = _arrivals.get(key)
    if known is None or len(known) < count:
        with _lock:
            if device not in _pools:
                _pools[device] = torch.zeros(_POOL, dtype=torch.int32, device=like.device), 0
        known = torch.zeros(max(count, _WORDS), dtype=torch.int32, device=like.device)
        _arrivals[key] = known
    return known
