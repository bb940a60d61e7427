"""What the compiler writes: a pattern on its three levels, and the source of its kernel.

Every level is text that reads back, so each step can be looked at, changed and run by itself; the source is a file that
tracebacks and debuggers show.
"""

from __future__ import annotations

import torch

import spgen as sp
from spgen import opt
from spgen.compile import backend_of
from spgen.explain import levels_of
from spgen.reference import attention as oracle


def main(length: int = 500) -> None:
    """Prints the levels and the source of one pattern; raises AssertionError if the kernel differs from the oracle."""
    torch.manual_seed(0)
    pattern = sp.causal() & (sp.sink(64) | sp.window(128))
    attend = sp.attention(pattern)
    q, k, v = (torch.randn(1, 2, length, 32) for _ in range(3))

    report = attend.explain(q, k, v)
    for name, text in levels_of(report.lowered).items():
        print(f"-- {name} --\n{text}")
        assert str(opt.read(text)) == text

    kernel = backend_of(report.target).build(report.lowered.kernel, report.target)
    print(f"-- source, {kernel.path} --\n{kernel.source}")

    # one pass by itself, as `spgen opt --passes recognize` runs it: a predicate that hides a window
    hidden = "where((j <= i) & (i - j < 128))"
    print(f"-- recognize, on {hidden} --\n{opt.run(hidden, 'recognize')}")

    # lengths are no part of the text: one kernel serves them all
    before = sp.compile_count()
    for rows in (length, 77):
        some = [x[:, :, :rows] for x in (q, k, v)]
        torch.testing.assert_close(attend(*some), oracle(*some, pattern).float(), atol=1e-5, rtol=1e-4)
    assert sp.compile_count() <= before + 1


if __name__ == "__main__":
    main()
