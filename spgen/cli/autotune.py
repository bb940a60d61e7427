"""The command autotune: search, resume, rank without the device, and say how good the predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spgen.cli.options import CallOptions, with_groups
from spgen.errors import DeviceError, RecordError, ShapeError, UnsupportedError, WorkloadError

if TYPE_CHECKING:
    from spgen.autotune.records import Record, Records
    from spgen.autotune.workloads import AnyCase, Case
    from spgen.ir.config import Config
    from spgen.target import Target
    from spgen.tuning.measured import Place


class Effort(str, Enum):
    """How much is tried."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


@with_groups
def autotune(
    call: CallOptions,
    pattern: Annotated[str | None, typer.Argument(help="One pattern, tuned for --q and the other options.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", "-w", help="A named workload, or a JSON file; may be repeated.")
    ] = None,
    effort: Annotated[Effort, typer.Option(help="How much is tried.")] = Effort.standard,
    density: Annotated[float, typer.Option(help="Share of blocks, columns … drawn for the pattern's slots.")] = 0.1,
    devices: Annotated[str | None, typer.Option(help="GPUs side by side: 0,1 or all; otherwise the first.")] = None,
    records: Annotated[Path | None, typer.Option(help="The file to keep results in.")] = None,
    export: Annotated[Path | None, typer.Option(help="Only write all known records of the target to a file.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Only take over the records of this file.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Compile for a target that is not here, and rank by the cost model.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="How well the cost model predicts the records; nothing is run.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --report: a picture, .png or .svg.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the named workloads.")] = False,
) -> None:
    """Find the fastest configuration of each kernel by measuring, and remember it.

    Later calls of the same kind and about the same sizes use what was found. Interrupted, it goes on where it stopped;
    what is finished is not measured again. Exit codes: 0, 1 if every call failed, 2 for an error, 130 if interrupted.
    """
    from spgen.autotune import workloads
    from spgen.target import Target

    if show:
        for name, about in workloads.named().items():
            print(f"{name:20} {about}")
        return
    target = Target.of(call.target)
    _check_options(target, devices, report, plot)
    if report:
        _report(target, records, plot)
        return
    if export:
        _export(target, export)
        return
    path = records or _own_file(target)
    known = _records(path, target)
    if merge:
        _merge(known, path, merge)
        return
    cases: list[AnyCase] = [case for name in workload or [] for case in workloads.load(name)]
    cases += [_case(pattern, call, density)] if pattern else []
    if not cases:
        raise WorkloadError(
            "autotune", given="nothing to tune", allowed="--workload NAME, or a pattern",
            remedy="spgen autotune --list shows the named workloads",
        )  # fmt: skip
    if offline:
        _offline(_of_attention(cases), target, effort.value)
        return
    states = [(case, _finished(known, case, target, effort)) for case in cases]
    found = [record for _, record in states if record is not None]
    left = [case for case, record in states if record is None]
    if left:
        places = _places(target, devices or "0")
        known.update(path)  # a file that cannot be written is told before minutes of work, not after
        found += _run(left, places, known, path, effort.value)
    _show(found, path)


def _check_options(target: Target, devices: str | None, report: bool, plot: Path | None) -> None:
    """Refuse options that would have no effect."""
    if plot is not None and not report:
        raise UnsupportedError(
            "--plot", given=f"{plot}, without --report", allowed="with --report alone", remedy="add --report"
        )
    if devices is not None and target.kind == "cpu":
        raise DeviceError(
            "--devices", given=f"{devices!r}, for {target.name}", allowed="with GPUs as the target",
            remedy="leave it out, or say --target cuda",
        )  # fmt: skip


def _own_file(target: Target) -> Path:
    from spgen.tuned import device_of, user_records

    return user_records() / f"{device_of(target).slug}.json"


def _records(path: Path, target: Target) -> Records:
    """Those of the file, or none yet. Raises RecordError for a file of another device."""
    from spgen.autotune.records import Records
    from spgen.tuned import device_of, is_same

    device = device_of(target)
    if not path.exists():
        return Records(device)
    found = Records.load(path)
    if not is_same(found.device, device):
        raise _another_device(path, found, Records(device))
    return found


def _another_device(path: Path, theirs: Records, known: Records) -> RecordError:
    return RecordError(
        str(path), given=f"records of {theirs.device.name} ({theirs.device.arch})",
        allowed=f"records of {known.device.name} ({known.device.arch})", remedy="say which with --target",
    )  # fmt: skip


def _export(target: Target, path: Path) -> None:
    """What calls would find: the user's records and the shipped ones, the better of two of the same call."""
    from spgen.autotune.records import Records
    from spgen.tuned import device_of, records_of

    all_of_them = Records(device_of(target))
    for records in records_of(target):
        all_of_them.merge(records)
    all_of_them.save(path)
    print(f"{len(all_of_them)} records of {target.name} written to {path}")


def _merge(known: Records, path: Path, others: Sequence[Path]) -> None:
    from spgen.autotune.records import Records
    from spgen.tuned import is_same

    for other in others:
        theirs = Records.load(other)
        if not is_same(theirs.device, known.device):
            raise _another_device(other, theirs, known)
        print(f"{known.merge(theirs)} of {len(theirs)} records taken from {other}")
    known.update(path)


def _case(pattern: str, call: CallOptions, density: float) -> Case:
    from spgen.autotune.workloads import Case

    batch, heads, rows, channels = call.q_shape
    if not rows or not call.kv_len:
        given = f"{rows} rows and {call.kv_len} keys"
        raise ShapeError("autotune", given=given, allowed="calls with rows and keys", remedy="say --q and --kv-length")
    return Case(
        pattern, pattern, heads, rows, channels, batch, call.kv_heads, call.kv_len, call.v_dim, call.dtype, density
    )


def _finished(known: Records, case: AnyCase, target: Target, effort: Effort) -> Record | None:
    """The record of a case that needs no more work."""
    from dataclasses import asdict

    from spgen.autotune.records import EFFORTS
    from spgen.autotune.workloads import ProductCase
    from spgen.tuned import is_of_form, toolchain

    for record in known:
        enough = record.effort and EFFORTS.index(record.effort) >= EFFORTS.index(effort.value)
        if enough and record.case == asdict(case) and record.toolchain == toolchain(target):
            # only kernels of GPUs have defaults of several forms, and asking for them takes a second
            if target.kind == "cpu":
                return record
            if isinstance(case, ProductCase):
                from spgen.weights.compile import defaults_of_record

                return record if record.default in defaults_of_record(record, target) else None
            return record if is_of_form(record, _default(case, target)) else None
    return None


def _default(case: Case, target: Target) -> Config:
    """What a case is compared with today."""
    from spgen.passes.schedule import Call
    from spgen.tuned import Sizes, default_of, request_for

    call, sizes = Call(case.dtype, case.head_dim, case.value_dim), Sizes(case.batch, case.q_len, case.kv_len, ())
    request = request_for(case.pattern, call, case.q_heads, case.kv_heads, target, sizes)
    return default_of(replace(request, config=None), sizes)


def _run(cases: Sequence[AnyCase], places: list[Place], known: Records, path: Path, effort: str) -> list[Record]:
    """Tune on these devices, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from spgen.tuning.session import Session

    found: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("cases", total=len(cases))
        tasks = {}

        def said(case: AnyCase, what: str, done: int, total: int) -> None:
            if case.name not in tasks:
                tasks[case.name] = progress.add_task(case.name)
            progress.update(tasks[case.name], description=f"{case.name}: {what}", completed=done, total=total)

        def finished(case: AnyCase, result: Record | str) -> None:
            progress.advance(whole)
            if case.name in tasks:
                progress.remove_task(tasks.pop(case.name))
            if isinstance(result, str):
                progress.console.print(f"skipped {case.name}: {result}", markup=False, highlight=False)
            else:
                found.append(result)

        session = Session(cases, places, known, path, effort, said, finished)
        try:
            session.run()
        except KeyboardInterrupt:
            progress.console.print(f"interrupted; what was measured is in {path}, the same command goes on")
            raise typer.Exit(130) from None
    if session.faults and not found:
        raise typer.Exit(1)
    return found


def _places(target: Target, devices: str) -> list[Place]:
    """The devices of this machine that are the target. Raises DeviceError where there is none."""
    import torch

    from spgen.target import Target
    from spgen.tuning.measured import Place

    if target.kind == "cpu":
        if target.triple:
            raise DeviceError("target", given=target.name, allowed="this machine's CPU", remedy="say --offline")
        return [Place(target, torch.device("cpu"))]
    count = torch.cuda.device_count()
    places = [Place(Target.of(f"cuda:{n}"), torch.device("cuda", n)) for n in _numbers(devices, count)]
    fitting = [
        place for place in places if place.target.arch == target.arch and place.target.name.endswith(target.name)
    ]
    if not fitting:
        there = ", ".join(place.target.name for place in places) or "no GPU"
        raise DeviceError(
            "target", given=f"{target.name}, and here is {there}", allowed="a device of this machine",
            remedy="say --offline to compile and rank for a device that is elsewhere",
        )  # fmt: skip
    return fitting


def _numbers(devices: str, count: int) -> list[int]:
    """The GPUs that --devices names; none where there are none at all."""
    if devices == "all":
        return list(range(count))
    numbers = [int(one) if one.strip().isdecimal() else -1 for one in devices.split(",")]
    if min(numbers) < 0 or max(numbers) >= count > 0:
        there = f"0 to {count - 1}" if count else "0, 1 and so on"
        raise DeviceError("--devices", given=repr(devices), allowed=f"all, or numbers between commas: {there}")
    return list(dict.fromkeys(numbers)) if count else []


def _show(found: Sequence[Record], path: Path) -> None:
    from math import exp, log

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("call", "configuration", "time", "noise", "default", "gain", "tried", "effort"):
        table.add_column(name, justify="left" if name in ("call", "configuration") else "right")
    for record in found:
        best = record.trials[record.config]
        time, default = (f"{seconds * 1e3:.3f} ms" for seconds in (best.seconds, best.seconds * record.gain))
        table.add_row(
            record.name, str(record.config), time, f"{best.noise:.1%}", default, f"{record.gain:.3f}",
            str(len(record.trials)), record.effort,
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    if found:
        mean = exp(sum(log(record.gain) for record in found) / len(found))
        console.print(f"{mean:.3f} x the default in geometric mean; kept in {path}", soft_wrap=True)


def _of_attention(cases: Sequence[AnyCase]) -> list[Case]:
    from spgen.autotune.workloads import Case

    found = [case for case in cases if isinstance(case, Case)]
    if len(found) < len(cases):
        raise UnsupportedError(
            "--offline", given="products with sparse weights", allowed="attention, which the cost model knows",
            remedy="tune them on the device",
        )  # fmt: skip
    return found


def _offline(cases: Sequence[Case], target: Target, effort: str) -> None:
    """Rank without the device."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from spgen.tuning.compilers import Compilers
    from spgen.tuning.offline import rank

    console = Console(highlight=False)
    with Compilers() as compilers, Progress(console=Console(stderr=True), transient=True) as progress:
        for case in cases:
            task = progress.add_task(case.name)

            def said(what: str, done: int, total: int, task: Any = task, name: str = case.name) -> None:
                progress.update(task, description=f"{name}: {what}", completed=done, total=total)

            found = rank(case, target, effort, compilers, said)
            progress.remove_task(task)
            table = Table(title=f"{case.name} on {target}", title_justify="left")
            for name in ("configuration", "predicted", "limited by", "registers", "shared", "spilled"):
                table.add_column(name, justify="left" if name == "configuration" else "right")
            for one in found:
                taken = one.resources
                cells = (
                    ["–"] * 3 if taken is None else [str(taken.registers), f"{taken.shared} B", f"{taken.spilled} B"]
                )
                limit = one.prediction.bound if not one.fault else one.fault
                time = "–" if one.fault else f"{one.prediction.seconds * 1e3:.3f} ms"
                table.add_row(str(one.config), time, limit, *cells)
            console.print(table)
            sure = found[0].prediction
            console.print(f"coefficients {sure.sureness}: times lie within a factor of {sure.spread:.2f}")


def _report(target: Target, records: Path | None, plot: Path | None) -> None:
    """The cost model against what was measured."""
    from spgen.tuning.fit import break_evens, plot_of, reported

    alone, corrected = reported(target, records)
    print(f"the cost model alone:\n{alone}\n\ncorrected by the trials of other calls:\n{corrected}\n")
    print(break_evens(target))
    if plot is not None:
        plot_of(alone, plot)
        print(plot)
