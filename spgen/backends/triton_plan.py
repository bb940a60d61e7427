"""Plans on the device: the tables of a level-2 program by one or two Triton kernels, without reading anything back.

What a call's shapes fix (sizes of the tables, the launches and most of their arguments) is prepared once; a call then
allocates its tables, writes their addresses and launches. Tables that no kernel makes are left to spgen/tables.py,
which is also the definition of all of them: both forms give the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_binary
from spgen.backends.triton_binary import Specialised, compile_ahead, load_source, rendered
from spgen.backends.triton_launch import MAX_GRID, Call, Function
from spgen.errors import ShapeError
from spgen.ir.node import Op
from spgen.ir.tiles import table_ops
from spgen.sequences import Sequences
from spgen.settings import triton_interpreted
from spgen.table_shapes import Shape, Sizes, entries_of, table_shapes
from spgen.tables import Builder
from spgen.target import Target
from spgen.templates.triton import plan
from spgen.templates.triton.plan import ENTRIES, LANES, SPLIT, Parameter, Planning, Work

_CALL = ("kv_lengths", "q_offset", "cu_seqlens_q", "cu_seqlens_k")  # what a call brings beside the pattern's tensors
_MANY_CALLS = 4096
# Lists share the bitmaps of so many programs: as many as run at a time, fewer where they would not fit in 32 MB of L2
_MARKERS, _FEW_MARKERS, _BITMAP_WORDS = 2048, 256, 2**23

_planners: dict[tuple[Any, ...], Planner] = {}
_lock = threading.Lock()


def planner(program: Op, target: Target) -> Planner:
    """What makes the tables of `program`; kernels are compiled when the first call needs them."""
    key = (table_ops(program), target.key, triton_interpreted())
    with _lock:
        if key not in _planners:
            _planners[key] = Planner(table_ops(program), target)
        return _planners[key]


class Planner:
    """Makes the tables of one program: `planner(builder)` gives what `builder.build(program)` gives."""

    def __init__(self, tables: tuple[Op, ...], target: Target) -> None:
        self.tables, self.target = tables, target
        self.driver_launches = target.kind == "cuda" and not triton_interpreted()
        self._ready: dict[tuple[Any, ...], Ready] = {}
        self._functions: dict[tuple[Any, ...], Function] = {}
        self._lock = threading.RLock()

    def __call__(self, builder: Builder) -> list[Tensor]:
        """The tables in the program's order, int32 [batch or 1, heads, rows, columns].

        Asynchronous, on the current stream of the tensors' device.
        """
        one = builder.sequences
        return self.ready(builder)(builder.data, one.q_offset, one.kv_lengths, one.cu_q, one.cu_k)

    def ready(self, builder: Builder) -> Ready:
        """What calls with tensors of the builder's shapes, strides and dtypes share; compiles kernels that are new."""
        sequences = builder.sequences
        offset, lengths = sequences.q_offset, sequences.kv_lengths
        key = (
            sequences.device, sequences.batch, sequences.q_len, sequences.kv_len, builder.q_heads, builder.kv_heads,
            offset.dtype if isinstance(offset, Tensor) else offset is None, None if lengths is None else lengths.dtype,
            None if sequences.cu_q is None else sequences.cu_q.dtype,
            None if sequences.cu_k is None else sequences.cu_k.dtype,
            tuple((tensor.shape, tensor.stride()) for tensor in builder.data),
        )  # fmt: skip
        with self._lock:
            if key not in self._ready:
                if len(self._ready) >= _MANY_CALLS:
                    self._ready.clear()
                self._ready[key] = Ready(self, builder)
            return self._ready[key]

    def planning(self, builder: Builder) -> Planning:
        """What kernels make for calls of these shapes."""
        sizes, sequences = _sizes(builder), builder.sequences
        shapes = table_shapes(self.tables, sizes)
        works = (self._work(op, sizes) for op in self.tables if 0 not in shapes[op["name"]])
        mode = {type(None): "default", int: "scalar"}.get(type(sequences.q_offset), "tensor")
        return Planning(
            plan.together([work for work in works if work is not None]),
            tuple((op["name"], op["heads"]) for op in self.tables), mode, sequences.kv_lengths is not None,
            sequences.packed, self.driver_launches,
        )  # fmt: skip

    def _work(self, op: Op, sizes: Sizes) -> Work | None:
        if op.kind == "diagonal_runs":
            work = plan.method_of(op, sizes.last(op["offsets"]), 0)
            return work and replace(work, partner=plan.ends_beside(op, self.tables))
        if op.kind not in ("units", "bits", "groups") or op["mask"] is not None:
            return plan.method_of(op, 0, 0)
        lists = op["indptr"] is None
        entries = entries_of(op, sizes) if lists and op.kind == "units" else sizes.units(op)
        work = plan.method_of(op, entries, _words(op, sizes), self.driver_launches)
        return plan.with_width(work, sizes.last(op["indices"])) if work and lists and not work.side_by_side else work

    def function(self, entry: str, planning: Planning, types: Mapping[str, str], fixed: Mapping[str, int],
                 device: torch.device) -> Function:  # fmt: skip
        """A loaded kernel with parameters of these types."""
        key = (planning, entry, tuple(types.items()), device.index)
        if key not in self._functions:
            constants = {name: 1 for name, kind in types.items() if kind == "constexpr"}
            one = Specialised(source_path(planning), entry, types, constants, warps=plan.WARPS)
            fields = {"kernel": f"{entry}: {planning}", "variant": dict(types), "warps": plan.WARPS}
            built = triton_binary.binary(fields, self.target, lambda: (one, compile_ahead(one, self.target)))
            with torch.cuda.device(device):
                self._functions[key] = built.load(
                    device.index, ["fixed" if name in fixed else "changing" for name in one.arguments]
                )
        return self._functions[key]


def source_path(planning: Planning) -> Path:
    """The file of the rendered source, from the cache or rendered now."""
    return rendered("triton/plan.py.jinja", str(planning), lambda: plan.symbols(planning))


@lru_cache(maxsize=256)
def _module(path: Path) -> ModuleType:
    return load_source(path)


class _Launch:
    """One kernel of a call. `order` says which of the call's values are its arguments that change."""

    def __init__(self, owner: Planner, entry: str, planning: Planning, order: Sequence[int], fixed: Mapping[str, int],
                 types: Mapping[str, str], grid: int, device: torch.device) -> None:  # fmt: skip
        self._entry, self._planning, self._fixed, self._grid = entry, planning, fixed, grid
        self._order = order
        self._call: Call | None = None  # None: through Triton's own front end
        if owner.driver_launches:
            values = [fixed[name] for name, kind in types.items() if name in fixed and kind != "constexpr"]
            self._call = Call(owner.function(entry, planning, types, fixed, device), grid, values)

    def __call__(self, values: Sequence[Any], addresses: Sequence[int]) -> None:
        """Launch with a call's values; `addresses` are the same as numbers."""
        if self._call is None:
            self._portable(values)
        else:
            self._call([addresses[at] for at in self._order])

    def _portable(self, values: Sequence[Any]) -> None:
        found = (_viewed(values[at]) for at in self._order)
        arguments = {
            parameter.name: next(found) if parameter.changes else self._fixed[parameter.name]
            for parameter in plan.parameters(self._planning, self._entry)
        }
        options = {} if triton_interpreted() else {"num_warps": plan.WARPS}
        getattr(_module(source_path(self._planning)), self._entry)[self._grid,](**arguments, **options)


class Ready:
    """What all calls of the same shapes share: the tables' sizes and the launches. Call it with what changes."""

    def __init__(self, owner: Planner, builder: Builder) -> None:
        sizes, planning = _sizes(builder), owner.planning(builder)
        shapes = table_shapes(owner.tables, sizes)
        self._tables = owner.tables
        self._heads = builder.q_heads, builder.kv_heads
        self._sequences = replace(builder.sequences, q_offset=None, kv_lengths=None, cu_q=None, cu_k=None)
        self._device = builder.sequences.device
        self._constants = {op["name"]: builder.make(op) for op in owner.tables if op.kind == "constants"}
        empty = {name for name, shape in shapes.items() if 0 in shape}
        by_kernels = {name for work in planning.works for name in (work.name, work.partner) if name}
        self._made = by_kernels | set(self._constants) | empty
        self._late = {work.name for work in planning.of(SPLIT)}
        filled = {"rank": -1} | ({"diagonal_bits": 0} if sizes.packed else {})
        self._filled = [(at, filled[op.kind]) for at, op in enumerate(owner.tables) if op.kind in filled]
        scratch = [_scratch(work, shapes[work.name], sizes) for work in planning.works if work.scratch]
        self._scratch = [((words,), (1,)) for words in scratch]
        self._sizes = [
            None if op["name"] in self._constants else (shapes[op["name"]], _contiguous(shapes[op["name"]]))
            for op in owner.tables
        ]
        self._all_made = len(self._made) == len(owner.tables)
        self._collect, self._split = (self._launch(owner, entry, planning, shapes, builder) for entry in ENTRIES)

    def _launch(self, owner: Planner, entry: str, planning: Planning, shapes: Mapping[str, Shape], builder: Builder,
                ) -> _Launch | None:  # fmt: skip
        """One kernel of a call, None if it has nothing to make."""
        fixed, grid = _fixed(entry, planning, shapes, builder)
        if not grid:
            return None
        if grid > MAX_GRID:
            raise ShapeError("plan", given=f"{grid} parts", allowed=f"at most {MAX_GRID}", remedy="split the batch")
        marked = (f"{work.name}_words" for work in planning.works if work.scratch)
        data = (f"data_{at}" for at in range(len(builder.data)))
        tables = (op["name"] for op in self._tables)
        places = {name: at for at, name in enumerate([*_CALL, *data, *tables, *marked])}
        wanted = plan.parameters(planning, entry)
        order = [places[parameter.name.removesuffix("_table")] for parameter in wanted if parameter.changes]
        types = _types(wanted, fixed, dict(zip(_CALL, _call_of(builder.sequences), strict=True)))
        return _Launch(owner, entry, planning, order, fixed, types, grid, self._device)

    def __call__(
        self, data: Sequence[Tensor], q_offset: int | Tensor | None, kv_lengths: Tensor | None,
        cu_q: Tensor | None = None, cu_k: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The tables of a call; `cu_q` and `cu_k` are the boundaries of a packed batch."""
        int32, device = torch.int32, self._device
        tables = [
            self._constants[op["name"]] if size is None else torch.empty_strided(*size, dtype=int32, device=device)
            for op, size in zip(self._tables, self._sizes, strict=True)
        ]
        for at, value in self._filled:
            tables[at].fill_(value)
        scratch = [torch.empty_strided(*size, dtype=int32, device=device) for size in self._scratch]
        if cu_q is not None and cu_k is not None:
            cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
        call = (kv_lengths, q_offset, cu_q, cu_k)
        if not self._all_made:
            return self._mixed(data, call, tables, scratch)
        self._run((self._collect, self._split), [*call, *data, *tables, *scratch])
        return tables

    def _run(self, launches: Sequence[_Launch | None], values: Sequence[Any]) -> None:
        addresses: list[int] = []
        if self._device.type == "cuda":
            addresses = [value.data_ptr() if isinstance(value, Tensor) else (value or 0) & 0xFFFFFFFF
                         for value in values]  # fmt: skip
        for launch in launches:
            if launch is not None:
                launch(values, addresses)

    def _mixed(
        self, data: Sequence[Tensor], call: Sequence[Any], tables: list[Tensor], scratch: Sequence[Tensor]
    ) -> list[Tensor]:
        """Tables that no kernel makes are made by tensor operations; these may read the others, but for the bounds."""
        self._run((self._collect,), [*call, *data, *tables, *scratch])
        kv_lengths, q_offset, cu_q, cu_k = call
        sequences = replace(self._sequences, q_offset=q_offset, kv_lengths=kv_lengths, cu_q=cu_q, cu_k=cu_k)
        builder = Builder(data, sequences, *self._heads)
        for at, op in enumerate(self._tables):
            builder.heads[op["name"]] = op["heads"]
            if op["name"] not in self._made:
                tables[at] = builder.make(op)
            if op["name"] not in self._late:
                builder.tables[op["name"]] = tables[at]
        self._run((self._split,), [*call, *data, *tables, *scratch])
        return tables


def _call_of(sequences: Sequences) -> tuple[Any, ...]:
    """What a call brings beside data, in the order of _CALL."""
    return sequences.kv_lengths, sequences.q_offset, sequences.cu_q, sequences.cu_k


def _contiguous(shape: Shape) -> tuple[int, int, int, int]:
    _, heads, rows, cols = shape
    return heads * rows * cols, rows * cols, cols, 1


def _sizes(builder: Builder) -> Sizes:
    one = builder.sequences
    return Sizes(
        one.batch, one.q_len, one.kv_len, builder.q_heads, builder.kv_heads,
        tuple(tuple(tensor.shape) for tensor in builder.data), one.kv_lengths is not None,
        isinstance(one.q_offset, Tensor) or (one.q_offset is None and one.kv_lengths is not None), one.packed,
    )  # fmt: skip


def _words(op: Op, sizes: Sizes) -> int:
    """Words of a bitmap with one bit for each unit."""
    return -(-sizes.units(op) // 32)


def _scratch(work: Work, shape: Shape, sizes: Sizes) -> int:
    """Words of memory beside a table: bitmaps with the ranks of their words, or offsets and their order."""
    words = sizes.last(work.op["offsets"]) if work.method == "runs" else _words(work.op, sizes)
    return _programs(work, shape, sizes) * 2 * words


def _programs(work: Work, shape: Shape, sizes: Sizes) -> int:
    """How many programs of a kernel work for one table."""
    batch, heads, rows, cols = shape
    lists = batch * heads * rows
    if work.method == "marked" and not work.bitmap:
        return min(lists, _MARKERS, max(_FEW_MARKERS, _BITMAP_WORDS // max(_words(work.op, sizes), 1)))
    if work.side_by_side:
        return -(-lists // work.list_rows)
    if work.method == "runs":
        return 2 * lists
    if work.method == "packed":
        return -(-lists * cols // plan.WORDS)
    if work.method == "transposed":
        return batch * heads * cols * -(-rows // plan.WORDS)
    if work.method in ("documents", "order", "rank"):
        return lists * -(-cols // LANES)
    if work.method == "splits":
        return batch * heads * -(-rows // plan.TILES)
    if work.method == "diagonal_bits" and sizes.packed:
        return heads * sizes.batch
    return 1 if work.method == "capacity" else lists


def _fixed(entry: str, planning: Planning, shapes: Mapping[str, Shape], builder: Builder) -> tuple[dict[str, int], int]:
    """The arguments that follow from shapes and strides, and the number of programs."""
    sizes = _sizes(builder)
    found = {
        "q_len": sizes.q_len, "k_len": sizes.kv_len, "n_heads": sizes.q_heads,
        "group": sizes.q_heads // sizes.kv_heads, "n_sequences": sizes.batch,
    }  # fmt: skip
    for work in planning.of(entry):
        for slot in work.slots:
            found |= _tensor_sizes(f"data_{slot.index}", builder.data[slot.index], work.core(slot))
    for name in plan.reads(planning) if entry == SPLIT else ():
        batch, heads, rows, cols = shapes[name]
        steps = (heads * rows * cols if batch > 1 else 0, rows * cols if heads > 1 else 0, cols if rows > 1 else 0)
        found |= dict(zip((f"{name}_table_{axis}" for axis in ("b", "h", "r", "rows", "cols")), (*steps, rows, cols),
                          strict=True))  # fmt: skip
    end = 0
    for work in planning.of(entry):
        batch, heads, rows, cols = shapes[work.name]
        programs = _programs(work, shapes[work.name], sizes)
        end += programs
        known = {"heads": heads, "rows": rows, "cols": cols, "lists": batch * heads * rows, "end": end}
        if work.scratch:
            known["step"] = programs if work.method == "marked" else 2 * sizes.last(work.op["offsets"])
        found |= {f"{work.name}_{size}": value for size, value in known.items()}
    return found, end


def _tensor_sizes(name: str, tensor: Tensor, core: int) -> dict[str, int]:
    """Strides (0 where there is one element, but the last) and sizes of a tensor with `core` axes of its own."""
    missing = core + 2 - tensor.dim()
    shape = (1,) * missing + tuple(tensor.shape)
    steps = (0,) * missing + tuple(tensor.stride())
    if core == 1:
        shape, steps = (*shape[:2], 1, shape[2]), (*steps[:2], 0, steps[2])
    step_b, step_h, step_r = (step if size > 1 else 0 for size, step in zip(shape[:3], steps[:3], strict=True))
    last = steps[3] if shape[3] > 1 else 1
    return {
        f"{name}_b": step_b, f"{name}_h": step_h, f"{name}_r": step_r, f"{name}_c": last, f"{name}_rows": shape[2],
        f"{name}_cols": shape[3],
    }  # fmt: skip


def _types(wanted: Sequence[Parameter], fixed: Mapping[str, int], call: Mapping[str, Any]) -> dict[str, str]:
    """Triton's types of a kernel's parameters; a last stride of 1 is a constant."""
    types = {}
    for parameter in wanted:
        kind = parameter.type
        if kind == "*index":
            kind = "*i64" if call[parameter.name].dtype == torch.int64 else "*i32"
        elif kind == "unit":
            kind = "constexpr" if fixed[parameter.name] == 1 else "i64"
        types[parameter.name] = kind
    return types


def _viewed(value: Any) -> Any:
    """Booleans as bytes: Triton's pointers to single bits are not what torch stores."""
    return value.view(torch.uint8) if isinstance(value, Tensor) and value.dtype == torch.bool else value
