"""Loads compiled kernels and launches them through the CUDA driver, without Triton's own front end.

A launch through Triton's front end costs 15 to 50 microseconds of Python, and its first one needs a C compiler. Here
everything that depends on shapes and strides is prepared once (`Call`); a launch writes its pointers and goes.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

from spgen.errors import ToolchainError

_INVALID_CONTEXT = 201
_SHARED_SIZE_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 * 1024  # what a block may use without asking
_MAP_BYTES = 128
_MAP_VALUES = 8  # shape and strides of four axes
_MAP_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType
_PROMOTE_L2 = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_REPLACE = "cuTensorMapReplaceAddress"
MAX_GRID = 2**31 - 1

_Sizes, _Steps, _Extent = ctypes.c_uint64 * 4, ctypes.c_uint64 * 3, ctypes.c_uint32 * 4
_EVERY = _Extent(1, 1, 1, 1)
_Memory = ctypes.c_char * (2 * _MAP_BYTES)


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
        self.library = library
        pointer, word = ctypes.c_void_p, ctypes.c_uint
        self._launch = library.cuLaunchKernel
        self._launch.argtypes = [pointer, *[word] * 7, pointer, pointer, pointer]
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

    def launch(self, function: Function, grid: int, stream: int) -> None:
        """Run a kernel whose arguments are written."""
        arguments = (function.handle, grid, 1, 1, function.threads, 1, 1, function.shared, stream, function.addresses)
        self._enqueue(lambda: int(self._launch(*arguments, None)), function.device, "launching a kernel")

    def clear(self, target: int, words: int, stream: int, device: int) -> None:
        """Set words of the device's memory to 0, in the stream's order."""
        self._enqueue(lambda: int(self._clear(target, 0, words, stream)), device, "clearing memory")

    def _enqueue(self, doing: Callable[[], int], device: int, name: str) -> None:
        status = doing()
        if status == _INVALID_CONTEXT:  # a thread that has not used the device yet
            self._use_device(device)
            status = doing()
        self._check(status, name)

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

    `source` is the index, among the changing arguments, of the pointer that the map follows.
    """

    def __init__(self, source: int, pointer: int, dtype: str, item: int, shape: Sequence[int], strides: Sequence[int],
                 box: Box) -> None:  # fmt: skip
        self._memory = _Memory()
        self.address = -(-ctypes.addressof(self._memory) // _MAP_BYTES) * _MAP_BYTES
        self._source, self._pointer = source, pointer
        self.values = (*shape, *strides)
        steps = [stride * item for stride in strides]
        self.is_valid = driver().encode(self.address, pointer, dtype, shape, steps, box)

    def follow(self, changing: list[int]) -> None:
        """Point at this call's tensor."""
        pointer = changing[self._source]
        if pointer != self._pointer:
            driver().point(self.address, pointer)
            self._pointer = pointer


class Call:
    """What all calls of the same shapes and strides share: the grid, the arguments that follow from them, the maps.

    `after`, if there is one, is launched next, over the results.
    """

    after: Call | None = None

    def __init__(self, function: Function, grid: int, fixed: Sequence[int], maps: Sequence[TensorMap]) -> None:
        self.function, self.grid, self.maps = function, grid, maps
        self.fixed = [*fixed, *(value for tensor_map in maps for value in tensor_map.values)]

    def __call__(self, changing: list[int], stream: int) -> None:
        """Launch with these values for the arguments that every call brings anew."""
        if self.grid:
            self.function.launch(self, changing, stream)


class Function:
    """A kernel on one device, with the memory from which the driver reads its arguments.

    `kinds` says of each argument, in order, where it comes from: "changing", "fixed" or "map" (a `TensorMap`).
    """

    def __init__(self, handle: int, device: int, threads: int, shared: int, kinds: Sequence[str], scratch: int) -> None:
        self.handle, self.device, self.threads, self.shared = handle, device, threads, shared
        self._lock = threading.Lock()
        self._last: Call | None = None
        self._n_changing = kinds.count("changing")
        n_fixed, n_maps = kinds.count("fixed"), kinds.count("map")
        self._end = self._n_changing + n_fixed + _MAP_VALUES * n_maps
        self._slots = (ctypes.c_uint64 * (self._end + scratch))()  # what follows the end stays 0: no scratch memory
        slots = {"changing": 0, "fixed": self._n_changing, "map": self._n_changing + n_fixed}
        order: list[int | None] = []
        self._maps_at: list[int] = []
        for kind in kinds:
            if kind == "map":
                self._maps_at.append(len(order))
                order.append(None)
            for _ in range(_MAP_VALUES if kind == "map" else 1):
                order.append(slots[kind])
                slots[kind] += 1
        order += range(self._end, self._end + scratch)
        base = ctypes.addressof(self._slots)
        self.addresses = (ctypes.c_void_p * len(order))(*(None if slot is None else base + 8 * slot for slot in order))

    def launch(self, call: Call, changing: list[int], stream: int) -> None:
        """Write the arguments and launch; the driver copies them before it returns."""
        with self._lock:
            if call is not self._last:
                self._slots[self._n_changing : self._end] = call.fixed  # type: ignore[assignment]
                for at, tensor_map in zip(self._maps_at, call.maps, strict=True):
                    self.addresses[at] = tensor_map.address
                self._last = call
            for tensor_map in call.maps:
                tensor_map.follow(changing)
            self._slots[: self._n_changing] = changing  # type: ignore[assignment]
            driver().launch(self, call.grid, stream)


@lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
