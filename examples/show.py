"""Look before you run: a pattern, what each head sees, and the tiles that the kernel walks.

In a terminal and a notebook pictures show themselves; `save` writes .png, .svg or .pdf, where matplotlib is installed.
The same from the command line: spgen show "causal() & (sink(64) | window(256))" --tiles -o picture.svg
"""

from __future__ import annotations

from pathlib import Path

import torch

import spgen as sp


def main(length: int = 2048, file: str | None = None) -> None:
    """Prints three pictures, and writes the last one to `file` if that is given."""
    streaming = sp.causal() & (sp.sink(64) | sp.window(256))
    print(f"{sp.show(streaming, length)}\n")

    # index data are seen as they are; each head has its own here
    torch.manual_seed(0)
    columns, offsets = torch.randint(length, (4, 12)), torch.randint(length, (4, 6))
    heads = sp.per_head([streaming, sp.causal() & sp.stripe(8, cols=64), *[sp.causal() & sp.window(700)] * 2])
    mixed = heads | sp.causal() & sp.vertical_slash(columns, offsets)
    print(f"{sp.show(mixed, length, q_heads=4, heads=True)}\n")

    # whole tiles run without a mask: the fewer are masked, the better
    picture = sp.show(streaming | sp.causal() & sp.columns(columns[0]), length, tiles=True)
    print(picture)
    for segment, (whole, masked) in picture.segments.items():
        print(f"{segment}: {masked / max(whole + masked, 1):.0%} of the tiles are masked")
    if file is not None:
        picture.save(file)
        print(f"{file}: {Path(file).stat().st_size} bytes")


if __name__ == "__main__":
    main()
