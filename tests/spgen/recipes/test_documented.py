"""Every recipe is in the table of docs/weights.md, and everything in the table is a recipe."""

import re
from pathlib import Path

from spgen.recipes import activations, weights

TEXT = (Path(__file__).parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")


def test_the_table() -> None:
    table = TEXT[TEXT.index("| function | method |") :]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)", row)
    }
    public = {
        name
        for module in (activations, weights)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and name.islower() and not name.startswith("_")
    }
    assert listed == public - {"low_rank_router"}
    for name in listed:
        assert (getattr(activations, name, None) or getattr(weights, name)).__doc__
