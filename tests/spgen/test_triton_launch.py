"""The launcher over the CUDA driver, with a driver that only writes down what it is asked for."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spgen.backends import triton_bound, triton_counters, triton_launch
from spgen.backends.extras import Extras, Operands
from spgen.backends.triton_bound import Launch, SplitLaunch
from spgen.backends.triton_counters import Counters
from spgen.backends.triton_launch import Box, Call, Driver, Function, TensorMap, float_bits

DEVICE = 3
PAGE = 1 << 32  # where the fake driver's memory begins


class FakeDriver(Driver):
    """Launches are (stream, grid, values of the arguments); `order` says what came behind what on which stream."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, list[int]]] = []
        self.order: list[tuple[str, int, int]] = []
        self.moved: list[int] = []
        self.pages = 0
        self.status: list[int] = []  # of the next launches; then 0
        self.contexts: list[int] = []

    def launch(self, config: Any, handle: Any, addresses: Any, extra: None) -> int:
        if self.status and (status := self.status.pop(0)):
            return status
        fields = config._obj
        values = [ctypes.c_uint64.from_address(address).value for address in addresses]
        self.launches.append((fields.stream or 0, fields.grid_x, values))
        return 0

    def clear(self, target: int, words: int, stream: int, device: int) -> None:
        assert (words, device) == (1, DEVICE)
        self.order.append(("clear", target, stream))

    def allocate(self, size: int, device: int) -> int:
        self.pages += 1
        return PAGE * self.pages

    def encode(self, target: int, *_: Any) -> bool:
        ctypes.memset(target, 7, 128)
        return True

    def point(self, target: int, pointer: int) -> None:
        self.moved.append(pointer)

    def _use_device(self, device: int) -> None:
        self.contexts.append(device)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver, torch's current device and stream, and whether the stream is being captured."""
    found = SimpleNamespace(driver=FakeDriver(), device=DEVICE, stream=0, capturing=False, entered=[])

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, found.device = found.device, index
        found.entered.append(index)
        yield
        found.device = before

    for module in (triton_launch, triton_counters):
        monkeypatch.setattr(module, "driver", lambda: found.driver)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: found.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: found.stream, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: found.capturing, raising=False)
    return found


def function(*kinds: str, scratch: int = 0) -> Function:
    return Function(0x1234, DEVICE, 128, 1000, kinds, scratch)


def test_arguments_come_in_the_order_of_the_kernel(state: SimpleNamespace) -> None:
    call = Call(function("changing", "fixed", "changing", "fixed", scratch=1), 5, [-1, 8])
    call([10, 20])
    call([11, 21])
    assert state.driver.launches == [(0, 5, [10, 2**64 - 1, 20, 8, 0]), (0, 5, [11, 2**64 - 1, 21, 8, 0])]


def test_nothing_is_launched_for_no_tiles(state: SimpleNamespace) -> None:
    Call(function("changing"), 0, [])([1])
    assert not state.driver.launches


def test_maps_follow_their_tensors(state: SimpleNamespace) -> None:
    box = Box((1, 1, 64, 64), 3)
    maps = [TensorMap(at, 100 + at, "bfloat16", 2, (1, 2, 3, 4), (24, 12, 4, 1), box) for at in (1, 0)]
    call = Call(function("changing", "changing", "map", "fixed", "map"), 1, [9], maps)
    call([100, 101])
    assert not state.driver.moved
    call([100, 555])
    call([100, 555])
    assert state.driver.moved == [555]
    call([777, 555])
    assert state.driver.moved == [555, 777]
    sizes = [1, 2, 3, 4, 24, 12, 4, 1]
    filled = int.from_bytes(b"\x07" * 8, "little")
    assert state.driver.launches[0][2] == [100, 101, filled, *sizes, 9, filled, *sizes]


def test_another_device_becomes_current_and_streams_are_those_of_the_moment(state: SimpleNamespace) -> None:
    call = Call(function("changing"), 1, [])
    state.device = 0
    call([1])
    assert (state.entered, state.device) == ([DEVICE], 0)
    state.device, state.stream = DEVICE, 2**40 + 16
    call([1])
    assert state.entered == [DEVICE]
    assert [stream for stream, _, _ in state.driver.launches] == [0, 2**40 + 16]


def test_a_thread_without_a_context_gets_one(state: SimpleNamespace) -> None:
    state.driver.status = [201]
    Call(function("changing"), 1, [])([1])
    assert state.driver.contexts == [DEVICE]
    assert len(state.driver.launches) == 1


def test_clearing_in_a_thread_without_a_context() -> None:
    driver, used = object.__new__(Driver), []
    driver._clear = lambda *_: 0 if used else 201
    driver._use_device = used.append  # type: ignore[method-assign]
    driver.clear(0, 1, 0, DEVICE)
    assert used == [DEVICE]


def test_faults_are_said(state: SimpleNamespace) -> None:
    state.driver.status = [700]
    state.driver.library = SimpleNamespace(cuGetErrorString=lambda *_: 0)
    with pytest.raises(RuntimeError, match=r"launching a kernel: unknown error \(700\)"):
        Call(function("changing"), 1, [])([1])


def test_threads_do_not_mix_their_arguments(state: SimpleNamespace) -> None:
    call = Call(function(*["changing"] * 4), 1, [])

    def work(number: int) -> None:
        for _ in range(300):
            call([number] * 4)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(state.driver.launches) == 1200
    assert all(len(set(values)) == 1 for _, _, values in state.driver.launches)


def test_counters_belong_to_streams(state: SimpleNamespace) -> None:
    counters = Counters(DEVICE)
    first, second = counters.of(0), counters.of(64)
    assert first != second
    assert [counters.of(stream) for stream in (0, 64, 0)] == [first, second, first]
    assert state.driver.order == [("clear", first, 0), ("clear", second, 64)]  # once, on the stream that uses it
    assert state.driver.pages == 1


def test_counters_of_many_streams_lie_apart(state: SimpleNamespace) -> None:
    counters = Counters(DEVICE)
    words = sorted(counters.of(stream) for stream in range(1300))
    assert min(b - a for a, b in pairwise(words)) >= 128
    assert state.driver.pages == 3
    assert words[-1] < 3 * PAGE + 2**16


def test_threads_get_one_counter_for_a_stream(state: SimpleNamespace) -> None:
    counters, found = Counters(DEVICE), []
    threads = [threading.Thread(target=lambda: found.append(counters.of(8))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(state.driver.order) == 1


def test_captured_launches_clear_words_of_the_graph(state: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_counters.torch, "device", lambda kind, index: torch.empty(0).device)
    counters = Counters(DEVICE)
    eager = counters.of(16)
    state.capturing = True
    captured = counters.of(16)
    assert captured != eager
    assert state.driver.order == [("clear", eager, 16), ("clear", captured, 16)]
    assert state.driver.pages == 1
    state.capturing = False
    assert counters.of(16) == eager


def test_a_counter_is_the_last_argument_that_changes(state: SimpleNamespace) -> None:
    call = Call(function("changing", "changing", "fixed"), 1, [5], counter=lambda stream: 1000 + stream)
    state.stream = 8
    call([1])
    assert state.driver.launches == [(8, 1, [1, 1008, 5])]


def operands(**changes: Any) -> Operands:
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    return Operands(q, k, k.clone(), torch.zeros(1, 4, 8, 16), None, (), None, None, 0.5)._replace(**changes)


def addresses(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_launches_are_prepared_once_for_each_alignment_and_sign() -> None:
    prepared, launched = [], []

    def prepare(given: Operands, aligned: bool) -> Any:
        prepared.append((aligned, given.scale < 0))
        return launched.append

    launch = Launch(prepare)
    off = torch.zeros(4 * 8 * 16 + 1)[1:].view(1, 4, 8, 16)
    for _ in range(2):
        for changes in ({}, {"scale": -0.5}, {"q": off}, {"out": off}, {"scale": -2.0, "k": off}):
            launch(*operands(**changes))
    assert prepared == [(True, False), (True, True), (False, False), (False, True)]
    assert [values[-1] for values in launched[:5]] == [float_bits(x) for x in (0.5, 0.5, 0.5, 0.5, 2.0)]


def test_every_operand_has_its_place() -> None:
    launched: list[list[int]] = []
    launch = Launch(lambda given, aligned: launched.append)  # type: ignore[arg-type, return-value]
    numbers = [torch.zeros(2, dtype=torch.int32) for _ in range(6)]
    sinks, bias, lse = torch.zeros(4), torch.zeros(1, 4), torch.zeros(1, 4, 8)
    extras = Extras(numbers[0], numbers[1], 30.0, sinks, bias)
    given = operands(lse=lse, tables=numbers[2:4], q_offset=numbers[4], kv_lengths=numbers[5], extras=extras)
    launch(*given)
    launch(*operands(q_offset=-1, scale=0.0))
    tensors = addresses(given.q, given.k, given.v, given.out, lse, numbers[4], numbers[5], *numbers[:4])
    assert launched[0] == [*tensors, float_bits(0.5), float_bits(30.0), *addresses(sinks, bias)]
    assert launched[1][4:] == [2**32 - 1, float_bits(triton_bound.SMALLEST_SCALE)]


def test_parts_are_written_then_added_up() -> None:
    attended: list[Operands] = []
    combined: list[tuple[Any, ...]] = []
    bound: list[torch.Tensor] = []

    def bind(out: torch.Tensor) -> Any:
        bound.append(out)
        return lambda *results: combined.append(results)

    launch = SplitLaunch(lambda *given: attended.append(Operands(*given)), bind, 3 * 17, 3, gaps=True)
    sinks, lse = torch.zeros(4), torch.zeros(1, 4, 8)
    given = operands(lse=lse, extras=Extras(sink_logits=sinks))
    launch(*given)
    launch(*given)
    parts, out, *rest = combined[1]
    assert len(bound) == 1
    assert out is given.out
    assert rest == [lse, sinks]
    assert (attended[1].out is parts, attended[1].lse, attended[1].extras.sink_logits) == (True, None, None)
    assert parts.shape == (32 * 51,)
    assert parts[-32 * 3 :].isinf().all()
