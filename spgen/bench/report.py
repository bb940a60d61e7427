"""Results as people read them: a table in the terminal, and the tables of the README, made from docs/bench/*.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Result = Mapping[str, Any]
Cells = Sequence[str]

_CPU_HEAD = (
    "sparsity", "spgen", "GFLOP/s", "of peak", "FlexAttention", "SDPA causal", "SDPA + mask", "error",
)  # fmt: skip
_GPU_HEAD = (
    "length", "sparsity", "spgen", "TFLOP/s", "with plan", "FlexAttention", "cuDNN dense", "error",
)  # fmt: skip
_PATTERN_HEAD = (
    "pattern", "length", "density", "spgen", "TFLOP/s", "plan", "with plan", "FlexAttention", "error",
)  # fmt: skip
_TOKEN_HEAD = ("pattern", "spgen", "GFLOP/s", "of blocks", "needed of visited", "SDPA causal takes", "error")
_BUSY = 0.7  # of the load of the last minute: others were at work, too
_MARKS = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """`title` is empty where the suite has one table only."""

    title: str
    head: Cells
    rows: Sequence[Cells]


def tables(result: Result) -> list[Table]:
    """A result as tables."""
    if result["suite"] == "gpu-patterns":
        return [Table("", _PATTERN_HEAD, [_pattern_row(row) for row in result["rows"]])]
    if result["suite"] == "gpu-attention":
        return [Table("", _GPU_HEAD, [_gpu_row(row) for row in result["rows"]])]
    parts = (
        ("rows", "float32", _CPU_HEAD, _cpu_row),
        ("bfloat16", "bfloat16", _CPU_HEAD, _cpu_row),
        ("tokens", "float32, tokens and diagonals", _TOKEN_HEAD, _token_row),
    )
    return [Table(title, head, list(map(cells, result[name]))) for name, title, head, cells in parts if name in result]


def _cpu_row(row: Result) -> Cells:
    share = row["share_of_peak"]
    return (
        f"{row['sparsity']:.0%}", f"{row['ms']['spgen']:.2f} ms", f"{row['gflops']:.0f}",
        "–" if share is None else f"{share:.0%}", *(_peer(row, name) for name in ("flex", "sdpa causal", "sdpa mask")),
        f"{row['error']['spgen']:.1e}",
    )  # fmt: skip


def _token_row(row: Result) -> Cells:
    return (
        row["pattern"], f"{row['ms']['spgen']:.2f} ms", f"{row['gflops']:.0f}", f"{row['of_blocks']:.0%}",
        f"{row['visited']:.0%}", f"{row['faster_than']['sdpa causal']:.1f}×", f"{row['error']['spgen']:.1e}",
    )  # fmt: skip


def _gpu_row(row: Result) -> Cells:
    return (
        f"{row['length'] // 1024}K", f"{row['sparsity']:.0%}", f"{row['ms']['spgen']:.3f} ms",
        f"{row['tflops']['spgen']:.0f}", f"{row['tflops']['spgen with plan']:.0f}",
        *(_rate(row, name) for name in ("flex", "cudnn causal")), f"{row['error']['spgen']:.1e}",
    )  # fmt: skip


def _pattern_row(row: Result) -> Cells:
    flex = f"{row['ms']['flex']:.2f} ms ({row['faster_than']['flex']:.1f}×)" if "flex" in row["ms"] else "not as blocks"
    return (
        row["pattern"], f"{row['length'] // 1024}K", f"{row['density']:.1%}", f"{row['ms']['spgen']:.2f} ms",
        f"{row['tflops']['spgen']:.0f}", f"{row['plan_ms']:.2f} ms", f"{row['ms']['spgen with plan']:.2f} ms", flex,
        f"{row['error']['spgen']:.1e}",
    )  # fmt: skip


def _peer(row: Result, name: str) -> str:
    """A peer's time, and how often ours fits into it."""
    if name not in row["ms"]:
        return "–"
    return f"{row['ms'][name]:.1f} ms ({row['faster_than'][name]:.1f}×)"


def _rate(row: Result, name: str) -> str:
    if name not in row["ms"]:
        return "–"
    return f"{row['tflops'][name]:.0f} ({row['faster_than'][name]:.1f}×)"


def facts(result: Result) -> list[str]:
    """What belongs to the table: work, machine, versions, floor, launch and compile times."""
    machine, launch, start = result["machine"], result["launch"], result["start"]
    size = f"{machine['threads']} threads" if machine["kind"] == "cpu" else f"{machine['multiprocessors']} SMs"
    named = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    first = f"{start['first_call_s']:.2f} s, {start['warm_cache_s']:.2f} s if the kernel is in the cache"
    lines = [
        str(result["work"]),
        f"{machine['name']}, {machine['arch']}, {size}; {named}",
        _floor(result),
        f"launch: {launch['attend_us']:.1f} µs a call, {launch['overhead_us']:.1f} µs of it beyond the bare kernel",
        f"first call in a fresh process, beyond torch's import: {first}",
    ]
    lines += [_bfloat16(result)] if "bfloat16" in result else []
    lines += [f"{name} is missing: {why}" for name, why in result["missing"].items()]
    if result.get("load", 0) > _BUSY:
        lines.append(f"the machine was busy: its load was {result['load']} before the run")
    return lines + (["quick: small sizes and few repeats, no figures to quote"] if result["quick"] else [])


def _floor(result: Result) -> str:
    if "peak_tflops" in result:
        return f"a large bf16 matrix product reaches {result['peak_tflops']['matmul']:.0f} TFLOP/s"
    peaks = sorted(row["peak_gflops"] for row in result["rows"])
    return (
        f"FMA peak: {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s in registers, measured in the same rounds "
        f"({result['stated_peak_gflops']:.0f} as stated); the whole diagonal block counts as work"
    )


def _bfloat16(result: Result) -> str:
    peak, in_pairs = result["pair_peak_gflops"], result["bfloat16_pairs"]
    reached = "there is no vdpbf16ps" if peak is None else f"vdpbf16ps reaches {peak:.0f} GFLOP/s in registers"
    return f"bf16 is {'multiplied in pairs' if in_pairs else 'widened to fp32'}: {reached}"


def show(result: Result) -> None:
    """The result on the terminal."""
    from rich import table
    from rich.console import Console

    console = Console(highlight=False)
    for title, head, rows in tables(result):
        shown = table.Table(title=" ".join(filter(None, (result["suite"], title))))
        for name in head:
            shown.add_column(name, justify="right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for fact in facts(result):
        console.print(fact, soft_wrap=True)


def write(result: Result, path: Path) -> None:
    """The result as a JSON file."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(result: Result) -> str:
    """The result for the README."""
    shown = "\n\n".join(map(_markdown, tables(result)))
    return shown + "\n\n" + "\n".join(f"- {fact}" for fact in facts(result)) + "\n"


def _markdown(table: Table) -> str:
    lines = [table.head, ("---:",) * len(table.head), *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table.title}:\n\n{text}" if table.title else text


def filled(text: str, directory: Path) -> str:
    """`text` with what stands between `<!-- bench: NAME -->` and `<!-- end -->` made anew from NAME.json."""

    def fill(found: re.Match[str]) -> str:
        result = json.loads((directory / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}{markdown(result)}{found[3]}"

    return _MARKS.sub(fill, text)


def main() -> None:
    """Write the README's tables: `python -m spgen.bench.report`, in the repository."""
    readme = Path("README.md")
    readme.write_text(filled(readme.read_text(encoding="utf-8"), Path("docs/bench")), encoding="utf-8")


if __name__ == "__main__":
    main()
