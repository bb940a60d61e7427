"""Loads compiled kernels and launches them through the CUDA driver, without Triton's own front end.

A launch through Triton's front end costs 15 to 50 microseconds of Python, and its first one needs a C compiler. Here
everything that depends on shapes and strides is prepared once (`Call`); a launch writes its pointers and goes.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch

from spgen.errors import ToolchainError

_INVALID_CONTEXT = 201
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_SHARED_SIZE_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 * 1024  # what a block may use without asking
_MAP_BYTES = 128
_MAP_VALUES = 8  # shape and strides of four axes
_MAP_TYPES = {
    "float8_e4m3fn": 0,
    "int32": 3,
    "float16": 6,
    "float32": 7,
    "bfloat16": 9,
}  # CUtensorMapDataType: bytes for float8
_PROMOTE_L2 = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_REPLACE = "cuTensorMapReplaceAddress"
_LAUNCH = "cuLaunchKernelEx"
MAX_GRID = 2**31 - 1
_EARLY_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_Sizes, _Steps, _Extent = ctypes.c_uint64 * 4, ctypes.c_uint64 * 3, ctypes.c_uint32 * 4
_EVERY = _Extent(1, 1, 1, 1)
_Memory = ctypes.c_char * (2 * _MAP_BYTES)


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{extent}_{axis}", ctypes.c_uint) for extent in ("grid", "threads") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("n_attributes", ctypes.c_uint),
    )  # fmt: skip


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which a number is the value."""

    _fields_ = (("id", ctypes.c_uint), ("_pad", ctypes.c_uint), ("value", ctypes.c_uint64 * 8))


_EARLY = _Attribute(_EARLY_ATTRIBUTE, 0, (ctypes.c_uint64 * 8)(1))


class Box:
    """The tile that a tensor map brings at once, axes outermost first, and how it lies in shared memory."""

    def __init__(self, block: Sequence[int], swizzle: int) -> None:
        self.extent, self.swizzle = _Extent(*reversed(block)), swizzle


class Driver:
    """The few functions of the CUDA driver that loading and launching take."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            library = ctypes.CDLL(name)
        except OSError as fault:
            raise ToolchainError("CUDA driver", given=str(fault), remedy=f"install a driver that has {name}") from fault
        if not hasattr(library, _LAUNCH):
            raise ToolchainError(
                "CUDA driver", given=f"one without {_LAUNCH}", remedy="install one of CUDA 11.8 or later"
            )
        self.library = library
        pointer, word = ctypes.c_void_p, ctypes.c_uint
        self.launch = getattr(library, _LAUNCH)  # takes objects of ctypes alone: to convert others takes longer
        self._clear = library.cuMemsetD32Async
        self._clear.argtypes = [pointer, word, ctypes.c_size_t, pointer]
        # tensor maps are used only where the driver has both of their functions
        self.has_tensor_maps = hasattr(library, "cuTensorMapEncodeTiled") and hasattr(library, _REPLACE)
        if self.has_tensor_maps:
            self._replace, self._encode = getattr(library, _REPLACE), library.cuTensorMapEncodeTiled
            self._replace.argtypes = [pointer, pointer]
            self._encode.argtypes = [pointer, word, word, *[pointer] * 5, *[word] * 4]

    def load(self, code: bytes, entry: str, shared: int, device: int) -> int:
        """The handle of a kernel on one device; its context is made current if this thread has none."""
        self._use_device(device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.library.cuModuleLoadData(ctypes.byref(module), code), "loading a kernel")
        found = self.library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
        self._check(found, "finding a kernel")
        if shared > _STATIC_SHARED:
            allowed = self.library.cuFuncSetAttribute(function, _SHARED_SIZE_ATTRIBUTE, shared)
            self._check(allowed, f"reserving {shared} bytes of shared memory")
        return int(function.value or 0)

    def clear(self, target: int, words: int, stream: int, device: int) -> None:
        """Set words of the device's memory to 0, in the stream's order."""
        status = self._clear(target, 0, words, stream)
        if status:
            self.again(status, lambda: int(self._clear(target, 0, words, stream)), device, "clearing memory")

    def again(self, status: int, doing: Callable[[], int], device: int, name: str) -> None:
        """What failed, once more if the thread had not used the device yet."""
        if status == _INVALID_CONTEXT:
            self._use_device(device)
            status = doing()
        self._check(status, name)

    def allocate(self, size: int, device: int) -> int:
        """Bytes of the device's memory for the rest of the process, also while another thread captures a graph."""
        self._use_device(device)
        pointer, mode = ctypes.c_void_p(), ctypes.c_int(_RELAXED)
        exchange = self.library.cuThreadExchangeStreamCaptureMode
        self._check(exchange(ctypes.byref(mode)), "allowing memory beside a capture")
        status = self.library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
        self._check(exchange(ctypes.byref(mode)), "restoring the mode of captures")
        self._check(status, f"taking {size} bytes of memory")
        return int(pointer.value or 0)

    def encode(self, target: int, pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int],
               box: Box) -> bool:  # fmt: skip
        """Write a tensor map of four axes to `target`; False if the hardware cannot express it. Strides in bytes."""
        sizes, steps = _Sizes(*reversed(shape)), _Steps(strides[2], strides[1], strides[0])
        status = self._encode(
            target, _MAP_TYPES[dtype], 4, pointer, sizes, steps, box.extent, _EVERY, 0, box.swizzle, _PROMOTE_L2, 0
        )
        return int(status) == 0

    def point(self, target: int, pointer: int) -> None:
        """Let the tensor map at `target` start at `pointer`."""
        self._check(self._replace(target, pointer), "moving a tensor map")

    def _use_device(self, device: int) -> None:
        """Make torch's context of `device` current, if this thread has none."""
        current = ctypes.c_void_p()
        self._check(self.library.cuCtxGetCurrent(ctypes.byref(current)), "asking for a context")
        if not current.value:
            context = ctypes.c_void_p()
            self._check(self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "taking a context")
            self._check(self.library.cuCtxSetCurrent(context), "setting a context")

    def _check(self, status: int, doing: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA, {doing}: {(text.value or b'unknown error').decode()} ({status})")


@lru_cache(maxsize=1)
def driver() -> Driver:
    """The process's driver."""
    return Driver()


class TensorMap:
    """What a tensor descriptor argument consists of: 128 aligned bytes, then the tensor's shape and strides.

    `source` is the index, among the changing arguments, of the pointer that the map follows; `pointer` where it points.
    """

    def __init__(self, source: int, pointer: int, dtype: str, item: int, shape: Sequence[int], strides: Sequence[int],
                 box: Box) -> None:  # fmt: skip
        self._memory = _Memory()
        self.address = -(-ctypes.addressof(self._memory) // _MAP_BYTES) * _MAP_BYTES
        self.source, self.pointer = source, pointer
        self.values = (*shape, *strides)
        steps = [stride * item for stride in strides]
        self.is_valid = driver().encode(self.address, pointer, dtype, shape, steps, box)

    def point(self, pointer: int) -> None:
        """Point at another tensor of the same shape and strides."""
        driver().point(self.address, pointer)
        self.pointer = pointer


class Function(NamedTuple):
    """A kernel on one device.

    `kinds` says of each argument, in order, where it comes from: "changing", "fixed" or "map" (a `TensorMap`); then
    come pointers to `scratch` memory, which no kernel of ours uses.
    """

    handle: int
    device: int
    threads: int
    shared: int
    kinds: Sequence[str]
    scratch: int


class Call:
    """What all calls of the same shapes and strides share: the grid, the arguments that follow from them, the maps.

    With `counter`, a function of the stream, its word is the last argument that changes. An `early` kernel may begin
    before the one in front of it has ended, and waits for it itself. Any thread may call.
    """

    def __init__(self, function: Function, grid: int, fixed: Sequence[int], maps: Sequence[TensorMap] = (),
                 counter: Callable[[int], int] | None = None, early: bool = False) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._grid, self._maps, self._counter = grid, maps, counter
        self._device = function.device
        self._n_changing = function.kinds.count("changing")
        constant = [*fixed, *(value for tensor_map in maps for value in tensor_map.values), *[0] * function.scratch]
        self._slots = (ctypes.c_uint64 * (self._n_changing + len(constant)))()
        self._slots[self._n_changing :] = constant  # type: ignore[assignment]
        places = list(_addresses(function.kinds, self._slots, maps, function.scratch))
        addresses = (ctypes.c_void_p * len(places))(*places)
        self._config = _Config(grid, 1, 1, function.threads, 1, 1, function.shared, None, None, 0)
        if early:
            self._config.attributes, self._config.n_attributes = ctypes.addressof(_EARLY), 1
        self._arguments = ctypes.byref(self._config), ctypes.c_void_p(function.handle), addresses, None
        self._launch = driver().launch

    def __call__(self, changing: list[int]) -> None:
        """Launch on the device's current stream, with these values for the arguments that every call brings anew."""
        device = self._device
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(changing)
            return
        if not self._grid:
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        if self._counter is not None:
            changing.append(self._counter(stream))
        with self._lock:  # until the driver has copied the arguments
            for tensor_map in self._maps:
                pointer = changing[tensor_map.source]
                if pointer != tensor_map.pointer:
                    tensor_map.point(pointer)
            self._slots[: self._n_changing] = changing  # type: ignore[assignment]
            self._config.stream = stream
            status = self._launch(*self._arguments)
            if status:
                driver().again(status, lambda: int(self._launch(*self._arguments)), device, "launching a kernel")


def _addresses(
    kinds: Sequence[str], slots: ctypes.Array[ctypes.c_uint64], maps: Sequence[TensorMap], scratch: int
) -> Iterator[int]:
    """Where each argument lies: slots hold those that change, then fixed ones, what maps bring along, scratch."""
    places = iter(range(ctypes.addressof(slots), ctypes.addressof(slots) + ctypes.sizeof(slots), 8))
    changing, fixed = (list(islice(places, kinds.count(kind))) for kind in ("changing", "fixed"))
    queues = {"changing": iter(changing), "fixed": iter(fixed)}
    left = iter(maps)
    for kind in kinds:
        if kind == "map":
            yield next(left).address
            yield from islice(places, _MAP_VALUES)
        else:
            yield next(queues[kind])
    yield from islice(places, scratch)


@lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
