"""Records that are shipped: legal where they are for, used by the calls they were measured on, and right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from spgen import reference, tuned
from spgen.autotune.model_cpu import tile_rows
from spgen.autotune.records import SHIPPED, Record, Records, files
from spgen.autotune.work import Work, fits
from spgen.autotune.workloads import Case, ProductCase
from spgen.backends.triton_compile import Variant, compile_variant, source_path, wants_tensor_maps
from spgen.compile import compiled, default_config, lower
from spgen.errors import DeviceError
from spgen.ir.kernel import parts
from spgen.ir.tiles import table_ops
from spgen.ops import sizes_of
from spgen.patterns import pattern
from spgen.settings import override
from spgen.target import Target
from spgen.tuned import choice, request_for, toolchain
from spgen.tuning.compilers import Compilers
from spgen.tuning.fit import reported
from spgen.tuning.measured import Place
from spgen.tuning.product import TunedProduct
from spgen.tuning.session import Tuned
from spgen.tuning.subject import Subject
from spgen.weights.compile import Sizes, config_of

TARGETS = {"nvidia-h200-sm-90": "h200", "avx512-x86-64-v4": "cpu", "avx2-x86-64-v3": "cpu:avx2"}
FILES = {path.stem: Records.load(path) for path in files([SHIPPED])}


def records(stem: str, operation: str = "attention") -> list[Record]:
    return [record for record in FILES[stem] if record.key.operation == operation]


def test_every_file_has_a_target() -> None:
    assert FILES.keys() == TARGETS.keys()


@pytest.mark.parametrize("stem", FILES)
def test_records_are_finished_and_no_slower_than_the_default(stem: str) -> None:
    for record in FILES[stem]:
        assert record.effort
        assert record.gain >= 1
        assert (record.config == record.default) == (record.gain == 1)
        assert not record.trials[record.config].fault
        if stem == "nvidia-h200-sm-90" and record.facts:
            target = Target.of("h200")
            assert fits(record.config, Work.of(record.facts, record.config), target) is None


MEASURED_ON = {  # two cores of a Xeon
    "avx512-x86-64-v4": replace(
        Target.of("x86-64-v4"), cores=2, l1_bytes=48 << 10, bandwidth=40e9, peaks=(("float32", 294.4e9),)
    ),
    "avx2-x86-64-v3": replace(
        Target.of("x86-64-v3"), cores=2, l1_bytes=48 << 10, bandwidth=40e9, peaks=(("float32", 147.2e9),)
    ),
    "nvidia-h200-sm-90": Target.of("h200"),
}


@pytest.mark.parametrize("stem", FILES)
def test_five_tries_hold_a_good_configuration_in_nine_of_ten_calls(stem: str) -> None:
    """In the order in which a tuning tries, which other calls' trials correct, and in that of the model alone."""
    alone, corrected = reported(MEASURED_ON[stem], SHIPPED / f"{stem}.json")
    assert min(alone.near, corrected.near) > 0.9
    assert corrected.spread < 1.3


@pytest.mark.parametrize("stem", ["avx512-x86-64-v4", "avx2-x86-64-v3"])
def test_no_kernel_of_a_cpu_was_tried_twice(stem: str) -> None:
    for record in records(stem):
        made = [
            (config.block_m, config.block_n, *tile_rows(config, MEASURED_ON[stem], record.key.value_dim))
            for config in record.trials
        ]
        assert len(set(made)) == len(made)


@pytest.fixture
def shipped() -> Iterator[None]:
    """The shipped records alone."""
    tuned.forget()
    with override(records=SHIPPED / "none of the user's"):
        yield
    tuned.forget()


@pytest.mark.usefixtures("shipped")
def test_the_calls_that_were_tuned_use_their_records() -> None:
    """But for those whose default has taken another form since: they use it until they are tuned again."""
    target = Target.of("h200")
    for record in records("nvidia-h200-sm-90"):
        if record.toolchain != toolchain(target):
            pytest.skip(f"these records are for {record.toolchain}")
        case = Case(**record.case)
        if case.q_len * case.q_heads > 2**18:
            continue  # drawing its data takes long, and the shapes of others tell the same
        subject = Subject(case, target, torch.device("cpu"))
        call, sizes = subject.call, sizes_of(subject.call)
        heads = case.q_heads, case.kv_heads
        request = request_for(call.pattern, subject.request.call, *heads, target, sizes)
        found = choice(request, sizes)
        if record.default.option("warpgroups") == subject.default.option("warpgroups"):
            assert (request.config or subject.default) == record.config, record.name
            assert found.record is not None, record.name
        else:
            assert (request.config or default_config(request)) == subject.default, record.name
            assert "records of another form passed over" in str(found), record.name


@pytest.mark.parametrize("name", ["gpt-oss-prefill: window 128", "llama3-8b-decode: window and sink"])
def test_gpu_records_compile(name: str) -> None:
    pytest.importorskip("triton")
    record = next(record for record in records("nvidia-h200-sm-90") if record.name == name)
    target = Target.of("h200")
    subject = Subject(Case(**record.case), target, torch.device("cpu"))
    kernel = lower(subject.request, record.config).kernel
    variant = Variant(aligned=True, tma=wants_tensor_maps(kernel, target))
    built = compile_variant(kernel, source_path(kernel), variant, target)
    assert built.metadata.shared <= target.smem_bytes


def runs_here(stem: str) -> bool:
    try:
        return Target.of(TARGETS[stem]).isa == FILES[stem].device.name
    except DeviceError:
        return False


@pytest.mark.parametrize("stem", ["avx512-x86-64-v4", "avx2-x86-64-v3"])
def test_cpu_records_agree_with_the_oracle(stem: str) -> None:
    pytest.importorskip("tvm")
    if not runs_here(stem):
        pytest.skip("this processor lacks the extension")
    place = Place(Target.of(TARGETS[stem]), torch.device("cpu"))
    seen = set()
    for record in records(stem):
        case = Case(**record.case)
        kind = record.config, case.dtype, record.key.structure
        if kind in seen:
            continue
        seen.add(kind)
        small = replace(case, q_len=min(case.q_len, 150), kv_len=min(case.kv_len, 170) if case.q_len == 1 else 150)
        with Compilers(1) as compilers:
            problem = Tuned(small, place, compilers)
        call = problem.subject.call
        kernel = compiled(replace(problem.subject.request, config=record.config)).kernel
        levels, tables = problem.subject.lowered(record.config)
        names = [op["name"] for op in table_ops(levels.program)]
        read = [tables[names.index(op["name"])] for op in parts(levels.kernel, "table")]
        out = torch.zeros(*call.q.shape[:-1], case.value_dim, dtype=call.q.dtype)
        kernel(call.q, call.k, call.v, out, None, read, None, None, case.head_dim**-0.5)
        mask = pattern(call.pattern, *call.data).mask(small.q_len, small.kv_len, q_heads=small.q_heads)
        wanted = reference.attention(call.q, call.k, call.v, mask)
        close = 1e-4 if case.dtype == "float32" else 2e-2
        torch.testing.assert_close(out.double(), wanted.double(), atol=close, rtol=close)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("stem", FILES)
def test_products_that_were_tuned_use_their_records_and_are_right(stem: str) -> None:
    target = Target.of(TARGETS[stem]) if runs_here(stem) else MEASURED_ON[stem]
    for record in records(stem, "linear"):
        case = ProductCase(**record.case)
        with Compilers(1) as compilers:
            small = replace(case, outputs=128, inputs=256)
            problem = TunedProduct(small, Place(target, torch.device("cpu")), compilers)
        sizes = Sizes(case.rows, case.outputs, case.inputs, record.bucket.width * case.outputs)
        if record.toolchain == toolchain(target):
            assert config_of(problem.request, sizes) == record.config, record.name
        if runs_here(stem):
            run, y = problem.launch(record.config)
            run()
            first, *others = (
                problem.x @ (weight.dense() if case.form == "transposed" else weight.dense().T)
                for weight in problem.weights
            )
            wanted = torch.nn.functional.silu(first) * others[0] if others else first
            torch.testing.assert_close(y, wanted, atol=1e-3, rtol=1e-3)
