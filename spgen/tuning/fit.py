"""Fit the cost model of a target to records of `spgen autotune`, and say how good it is.

    python -m spgen.tuning.fit RECORDS.json --target h200 --plot model.png --write spgen/targets/h200.json

Each call is judged by coefficients that were fitted without it. `--write` puts them into a target's description.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from spgen.autotune.experience import Experience
from spgen.autotune.fit import Fit, Report, evaluate, fit
from spgen.autotune.model import break_even
from spgen.autotune.records import Record, Records
from spgen.compile import Request, default_config
from spgen.errors import RecordError, ToolchainError, UnsupportedError
from spgen.passes.schedule import Call
from spgen.target import Target
from spgen.tuned import records_of

_COLOURS = 20  # of matplotlib's tab20


def reported(target: Target, path: Path | None = None) -> tuple[Report, Report]:
    """How well the target's coefficients rank the trials of a file, by default of all known records of the target.

    The second report is that of the order in which a tuning tries: other calls' trials correct it.

    Raises RecordError where there is none.
    """
    found = [_load(path, target)] if path else records_of(target)
    records = [record for one in found for record in one if record.facts and record.trials]
    if not records:
        raise RecordError(
            "records", given=f"none of {target.name}", allowed="records with trials", remedy="run spgen autotune first"
        )
    values = {name: value for name, value in target.model if name != "spread"}
    corrected = evaluate(records, target, values, experience=Experience(records, target))
    return evaluate(records, target, values), corrected


def break_evens(target: Target) -> str:
    """How many causal blocks must be left out for sparse attention to be as fast: predicted, and as it was measured."""
    lines = []
    for name, _ in target.dense:
        dtype, head_dim = name.split()
        call = Call(dtype, int(head_dim), int(head_dim))
        config = default_config(Request("causal()", call, 32, 8, False, target))
        predicted = break_even(target, dtype, int(head_dim), config)
        measured = dict(target.break_even).get(name)
        seen = "not measured" if measured is None else f"measured {_left_out(measured)}"
        lines.append(
            f"as fast as dense attention, {dtype}, {head_dim} channels: predicted {_left_out(predicted)}, {seen}"
        )
    return "\n".join(lines)


def _left_out(break_even: float) -> str:
    """The share of the blocks that is left out at a break-even."""
    if break_even <= 0:
        return "never"
    return "from none left out on" if break_even >= 1 else f"from {1 - break_even:.0%} left out on"


def fitted(paths: Sequence[Path], target: Target) -> tuple[Fit, Report, Report]:
    """The fit to all records, the report of calls it has not seen, and that of the coefficients known so far.

    Raises RecordError for files without trials, or of another kind of processor.
    """
    records: list[Record] = []
    for path in paths:
        records += [record for record in _load(path, target) if record.facts]
    try:
        chosen = fit(records, target)
    except ValueError as fault:
        names = ", ".join(map(str, paths))
        raise RecordError(names, given=str(fault), allowed="records with trials and facts") from fault
    known = dict(target.model)
    known.pop("spread", None)
    return chosen, evaluate(records, target, chosen), evaluate(records, target, known)


def _load(path: Path, target: Target) -> Records:
    found = Records.load(path)
    if found.device.kind != target.kind:
        raise RecordError(
            str(path), given=f"records of a {found.device.kind} device", allowed=f"those of a {target.kind} device",
            remedy="say whose with --target",
        )  # fmt: skip
    return found


def write(path: Path, chosen: Fit) -> None:
    """Put the coefficients into a description as its "model"; what else it says stays as it is written."""
    text = path.read_text(encoding="utf-8")
    line = f' "model": {json.dumps(chosen.to_json())}'
    text = re.sub(r',\n "model": \{[^}]*\}', "", text)
    path.write_text(text.rstrip().removesuffix("}").rstrip() + f",\n{line}\n}}\n", encoding="utf-8")


def plot_of(report: Report, path: Path) -> None:
    """Predicted against measured seconds, both logarithmic, a colour for each call. Needs the extra `show`.

    Raises UnsupportedError for a name that ends in no picture's format, and for a place that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ToolchainError("matplotlib", given="not installed", remedy="pip install spgen[show]") from None
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    for number, score in enumerate(report.scores):
        predicted, measured = zip(*score.points, strict=True)
        axes.scatter(measured, predicted, s=9, color=f"C{number % _COLOURS}", label=score.name)
    ends = [f(value for score in report.scores for pair in score.points for value in pair) for f in (min, max)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="measured [s]", ylabel="predicted [s]")
    axes.set_title(f"top 5 within 5 %: {report.near:.0%} of the calls; times within x {report.spread:.2f}")
    if len(report.scores) <= _COLOURS:
        axes.legend(fontsize=6)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as fault:
        raise UnsupportedError("plot", given=f"{path}: {fault}", allowed="a file .png, .svg or .pdf") from fault


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m spgen.tuning.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--target", default="h200", help="as for spgen autotune")
    parser.add_argument("--plot", type=Path, help="a picture of predicted against measured")
    parser.add_argument("--write", type=Path, help="the description that gets the coefficients")
    given = parser.parse_args(arguments)
    chosen, after, before = fitted(given.records, Target.of(given.target))
    print(f"with the coefficients known so far:\n{before}\n\nfitted, each call by the others:\n{after}\n")
    print(json.dumps(chosen.to_json(), indent=1))
    if given.plot:
        plot_of(after, given.plot)
    if given.write:
        write(given.write, chosen)


if __name__ == "__main__":
    main()
