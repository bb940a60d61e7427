"""Results as people read them: on the terminal, and the README's tables and plots, made from docs/bench/*.json."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spgen.bench.peers import PEERS
from spgen.bench.result import OURS, Entry, Result, Row, read

Cells = Sequence[str]

_DENSE = ("cudnn", "flash", "sdpa", "dense", "onednn")  # contenders that leave nothing out
_BUSY = 0.7  # of the load of the last minute: others were at work, too
_MARKS = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NONE = "–"


class Table(NamedTuple):
    """One section of a result."""

    title: str
    head: Cells
    rows: Sequence[Cells]


def title(contender: str) -> str:
    """A contender's name for people."""
    return PEERS[contender].title if contender in PEERS else contender


def unit(result: Result) -> tuple[str, float]:
    """The unit of rates, and how many GFLOP/s it is."""
    return ("GFLOP/s", 1.0) if result.hardware["kind"] == "cpu" else ("TFLOP/s", 1e3)


def sections(result: Result) -> dict[str, list[Row]]:
    """The rows by their section, in order."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        found.setdefault(row.section, []).append(row)
    return found


def peers(rows: Iterable[Row]) -> list[str]:
    """Who else was measured in any of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row.entries if name != OURS))


def tables(result: Result) -> list[Table]:
    """A result as one line for each case, with the peers side by side, and no column that says nothing."""
    return [_section(result, name, rows) for name, rows in sections(result).items()]


def _section(result: Result, name: str, rows: list[Row]) -> Table:
    others, (rate, scale) = peers(rows), unit(result)
    swept = all(row.sparsity is not None for row in rows)
    case = ("length", "sparsity") if swept else ("pattern", "density")
    head = (*case, OURS, rate, "of the floor", "plan", "with plan", *map(title, others), "error")
    lines = [_line(row, swept, others, scale) for row in rows]
    planned = any(entry.plan_ms for row in rows for entry in row.entries.values())
    silent = () if planned else (head.index("plan"), head.index("with plan"))
    told = [n for n in range(len(head)) if n not in silent and (n < 2 or any(line[n] != _NONE for line in lines))]
    return Table(name, [head[n] for n in told], [[line[n] for n in told] for line in lines])


def _line(row: Row, swept: bool, others: list[str], scale: float) -> Cells:
    case = (_length(row), _share(row.sparsity, 0)) if swept else (row.case, _share(row.density, 1))
    own = row.entries.get(OURS, Entry(None))
    return (
        *case, _ms(own.ms), _rate(own.gflops, scale), _share(own.of_floor, 0), _ms(own.plan_ms),
        _ms(own.with_plan_ms), *(_peer(row.entries.get(name), own) for name in others), _error(own.error),
    )  # fmt: skip


def _length(row: Row) -> str:
    length = row.work["length"]
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _peer(entry: Entry | None, own: Entry) -> str:
    """A peer's time, and how often ours fits into it; with planning on both sides where it plans in every call."""
    if entry is None:
        return _NONE
    if entry.ms is not None:
        return _ms(entry.ms) + _times(entry.ms, own.ms)
    return f"{_ms(entry.with_plan_ms)} with plan{_times(entry.with_plan_ms, own.with_plan_ms)}"


def _times(theirs: float | None, own: float | None) -> str:
    return f" ({theirs / own:.1f}×)" if theirs and own else ""


def _ms(value: float | None) -> str:
    if value is None:
        return _NONE
    digits = 0 if value >= 100 or not value else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def _rate(gflops: float | None, scale: float) -> str:
    return _NONE if gflops is None else f"{gflops / scale:.0f}"


def _share(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}%}"


def _error(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}"


def facts(result: Result) -> list[str]:
    """What belongs to the tables: work, machine, versions, ceilings, launch and compile times, who was left out."""
    machine = result.hardware
    size = f"{machine['threads']} threads" if machine["kind"] == "cpu" else f"{machine['multiprocessors']} SMs"
    named = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [*_works(result), f"{machine['name']}, {machine['arch']}, {size}; {named}", *_ceilings(result)]
    if result.launch:
        launch = result.launch
        lines.append(
            f"launch: {launch['attend_us']:.1f} µs a call, {launch['overhead_us']:.1f} µs beyond the bare kernel"
        )
    if result.start:
        first, warm = result.start["first_call_s"], result.start["warm_cache_s"]
        kept = f"{first:.2f} s, {warm:.2f} s if the kernel is in the cache"
        lines.append(f"first call in a fresh process, beyond torch's import: {kept}")
    lines += [*_break_evens(result), *_left_out(result)]
    if result.settings["load"] is not None and machine["kind"] == "cpu" and result.settings["load"] > _BUSY:
        lines.append(f"the machine was busy: its load was {result.settings['load']} before the run")
    if result.settings.get("left"):
        lines.append(f"interrupted: {result.settings['left']} cases were not measured")
    return lines + (["quick: small sizes and few repeats, no figures to quote"] if result.settings["quick"] else [])


def _break_evens(result: Result) -> list[str]:
    """At which sparsity lists of blocks take as long as dense contenders, between the sparsities that were measured."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in result.rows:
        dense = [entry.ms for name, entry in row.entries.items() if name in _DENSE and entry.ms is not None]
        own = row.entries.get("spgen")
        if row.sparsity is not None and dense and own is not None and own.ms is not None:
            call = f"{_length(row)} {row.work['dtype']}"
            found.setdefault(call, []).append((row.sparsity, own.ms, min(dense)))
    lines = []
    what = "attention" if all("heads" in row.work for row in result.rows) else "products"
    for call, rows in found.items():
        rows.sort()
        for (low, slower, limit), (high, faster, _) in itertools.pairwise(rows):
            if faster <= limit < slower:
                share = low + (high - low) * (slower - limit) / (slower - faster)
                lines.append(f"as fast as dense {what} at {share:.0%} of the blocks left out ({call})")
    return lines


def _works(result: Result) -> list[str]:
    """Sizes that the cases share; lengths are in the tables."""
    found = dict.fromkeys(map(_sizes, (row.work for row in result.rows)))
    return [f"{', '.join(found)}; rates count what is needed"]


def _sizes(work: Mapping[str, Any]) -> str:
    if "heads" in work:
        return f"B{work['batch']} H{work['heads']}/{work['kv_heads']} D{work['head_dim']} {work['dtype']}"
    return f"{work['inputs']} to {work['outputs']} features {work['dtype']}"


def _ceilings(result: Result) -> list[str]:
    compute = _range([row.peak_gflops for row in result.rows], unit(result)[1])
    copy = _range([row.copy_gb_s for row in result.rows], 1.0 if result.hardware["kind"] == "cpu" else 1e3)
    what = "multiply-adds in registers" if result.hardware["kind"] == "cpu" else "a large matrix product"
    lines = [f"{what}: {compute} {unit(result)[0]}, measured in the same run"] if compute else []
    return lines + ([f"a copy: {copy} {'GB/s' if result.hardware['kind'] == 'cpu' else 'TB/s'}"] if copy else [])


def _range(values: Iterable[float | None], scale: float) -> str:
    known = sorted(value / scale for value in values if value is not None)
    if not known:
        return ""
    low, high = (f"{value:.3g}" for value in (known[0], known[-1]))
    return low if low == high else f"{low} to {high}"


def _left_out(result: Result) -> list[str]:
    """Each contender and reason once, with how many cases it holds for."""
    counts: dict[tuple[str, str], int] = {}
    for row in result.rows:
        for name, reason in row.skipped.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    every = len(result.rows)
    return [
        f"{title(name)}{'' if count == every else f', in {count} of {every} cases'}: {reason}"
        for (name, reason), count in counts.items()
    ]


_DETAIL = ("contender", "time", "noise", "plan", "with plan", "rate", "GB/s", "of floor", "takes", "error")


def details(result: Result, row: Row) -> list[Cells]:
    """One case with every figure: a line for each contender. Rates are in the unit of the result."""
    scale, own = unit(result)[1], row.entries.get(OURS)
    return [
        (
            title(contender), _ms(entry.ms), _NONE if entry.noise is None else f"±{entry.noise:.1%}",
            _ms(entry.plan_ms), _ms(entry.with_plan_ms), _three(entry.gflops, scale), _three(entry.gb_s, 1.0),
            _share(entry.of_floor, 0), _takes(entry, own),
            _error(entry.error) if entry.pairs == "same" else f"{entry.pairs} pairs",
        )
        for contender, entry in row.entries.items()
    ]  # fmt: skip


def _three(value: float | None, scale: float) -> str:
    return _NONE if value is None else f"{value / scale:.3g}"


def _takes(entry: Entry, own: Entry | None) -> str:
    """How many times as long as ours."""
    if own is None or entry is own:
        return ""
    theirs, ours = (entry.with_plan_ms, own.with_plan_ms) if entry.ms is None else (entry.ms, own.ms)
    return f"{theirs / ours:.2f}×" if theirs and ours else ""


def show(result: Result) -> None:
    """The result on the terminal: a table for each case, whole however narrow the terminal is."""
    from rich.console import Console
    from rich.table import Table as Shown

    head = tuple(f"{name}, {unit(result)[0]}" if name == "rate" else name for name in _DETAIL)
    cases = [(row.case, details(result, row)) for row in result.rows]
    widths = [max(map(len, cells)) for cells in zip(head, *(line for _, lines in cases for line in lines), strict=True)]
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, sum(widths) + 2 * len(widths)))
    for case, lines in cases:
        shown = Shown(title=case, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for number, (name, width) in enumerate(zip(head, widths, strict=True)):
            shown.add_column(name, justify="right" if number else "left", min_width=width, header_style="dim")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
        console.print()
    for fact in facts(result):
        console.print(fact, soft_wrap=True, markup=False)


def markdown(result: Result, plot: str = "") -> str:
    """The result for the README; `plot` is where its plot lies."""
    picture = f"![{result.suite}: rates over sparsity, and of patterns]({plot})\n\n" if plot else ""
    shown = "\n\n".join(map(_markdown, tables(result)))
    return picture + shown + "\n\n" + "\n".join(f"- {fact}" for fact in facts(result)) + "\n"


def _markdown(table: Table) -> str:
    lines = [table.head, (":---", *("---:",) * (len(table.head) - 1)), *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table.title[:1].upper()}{table.title[1:]}:\n\n{text}"


def filled(text: str, directory: Path) -> str:
    """`text` with what stands between `<!-- bench: NAME -->` and `<!-- end -->` made anew from NAME.json."""

    def fill(found: re.Match[str]) -> str:
        result = read(directory / f"{found[2]}.json")
        return f"{found[1]}{markdown(result, f'docs/bench/{found[2]}.svg')}{found[3]}"

    return _MARKS.sub(fill, text)


def main() -> None:
    """Write the README's tables and plots: `python -m spgen.bench.report`, in the repository."""
    from spgen.bench.plot import save

    readme, directory = Path("README.md"), Path("docs/bench")
    readme.write_text(filled(readme.read_text(encoding="utf-8"), directory), encoding="utf-8")
    for path in sorted(directory.glob("*.json")):
        save(read(path), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
