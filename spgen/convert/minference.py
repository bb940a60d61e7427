"""MInference's head configurations: the JSON files that its offline search writes.

MInference 1.0, Jiang et al. 2024, arXiv:2407.02490, section 3 and `minference/configs/`. A file is a list with one
object for each layer, from the head's number to [kind, vertical, slash, score].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spgen.errors import DataError, DtypeError
from spgen.patterns import Pattern, causal, per_head, sink, top_k, vertical_slash, window
from spgen.scores import last_queries, pooled

# What its kernels use beside the file: rows that are scored, and what every head keeps out of its budget.
_SCORED_ROWS = 64
_LEAST_COLUMNS, _LEAST_OFFSETS = 30, 50
_FIRST_COLUMNS, _NEAREST_OFFSETS = 30, 100
_BLOCKS, _BLOCK = 100, 64
_HEAD_NOT_LISTED = ("vertical_and_slash", 1000, 6096, 1)


def from_minference(config: str | Path | Sequence[Mapping[str, Any]], *, heads: int | None = None) -> list[Pattern]:
    """One pattern for each layer, `per_head` over the query heads.

    `config` is the path of a JSON file, or what it holds. `heads` is how many query heads a layer has (default: as many
    as the file lists); a head that is not listed is a vertical-slash head of 1000 columns and 6096 diagonals.

    - `vertical_and_slash`: the `vertical` best columns and `slash` best diagonals by the last 64 queries, at least 30
      and 50, together with the first 30 keys and the 100 nearest;
    - `block_sparse`: the 100 best blocks of 64 keys for each 64 queries, by mean query and key;
    - `stream_llm`: the first `vertical` keys and the `slash` nearest.

    Raises DataError with the place of a mistake. Selections are patterns, which no kernel computes yet; layers of
    `stream_llm` heads run.
    """
    layers = _loaded(config)
    return [_layer(number, layer, heads) for number, layer in enumerate(layers)]


def _loaded(config: Any) -> Sequence[Any]:
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(config, Sequence) or isinstance(config, str):
        allowed = "the path of a JSON file, or a list with an object for each layer"
        raise DtypeError("from_minference: config", given=type(config).__name__, allowed=allowed)
    return config


def _layer(number: int, layer: Any, heads: int | None) -> Pattern:
    subject = f"from_minference: layer {number}"
    if not isinstance(layer, Mapping) or not all(str(head).isdecimal() for head in layer):
        raise DataError(subject, given=layer, allowed='an object such as {"0": ["stream_llm", 100, 800, 0.9]}')
    entries = {int(head): entry for head, entry in layer.items()}
    count = max(entries, default=-1) + 1 if heads is None else heads
    if count < 1 or max(entries, default=-1) >= count:
        given = f"head {max(entries)}" if entries else "no heads"
        raise DataError(subject, given=given, allowed="at least one head" if heads is None else f"{heads} heads")
    return per_head(_head(f"{subject}, head {h}", entries.get(h, _HEAD_NOT_LISTED)) for h in range(count))


def _head(subject: str, entry: Any) -> Pattern:
    kind, *numbers = entry if isinstance(entry, Sequence) and not isinstance(entry, str) and entry else (entry,)
    if kind not in ("vertical_and_slash", "block_sparse", "stream_llm"):
        raise DataError(subject, given=kind, allowed="vertical_and_slash, block_sparse or stream_llm")
    sizes = numbers[:2]
    if len(sizes) < 2 or not all(type(size) is int and size >= 0 for size in sizes):
        raise DataError(subject, given=list(entry), allowed="[kind, vertical, slash, score], counts of at least 0")
    vertical, slash = sizes
    if kind == "stream_llm":
        return causal() & (sink(vertical) | window(slash))
    if kind == "block_sparse":
        return causal() & top_k(_BLOCKS, rows=_BLOCK, cols=_BLOCK, scores=pooled())
    best = vertical_slash(
        vertical=max(vertical, _LEAST_COLUMNS), slash=max(slash, _LEAST_OFFSETS), scores=last_queries(_SCORED_ROWS)
    )
    return causal() & (best | sink(_FIRST_COLUMNS) | window(_NEAREST_OFFSETS))


__all__ = ["from_minference"]
