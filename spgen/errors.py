"""Every error a user of spgen can meet, in one file.

Each message answers four questions: which argument, what was given, what is allowed, what to do.
Raising one is a single expression::

    raise ShapeError("k", given="7 key heads for 32 query heads",
                     allowed="a number of key heads that divides the query heads",
                     remedy="pass k and v with 1, 2, 4, 8, 16 or 32 heads")

All classes derive from :class:`SpgenError`; each also derives from the built-in exception a user of PyTorch
would expect in its place, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CacheWarning",
    "CompileError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "GradientError",
    "PatternError",
    "PlanError",
    "RecordError",
    "ShapeError",
    "SpgenError",
    "TextError",
    "ToolchainError",
    "UnsupportedError",
    "VerifyError",
    "WorkloadError",
]


class SpgenError(Exception):
    """Base of all errors: ``subject`` is the argument (or the thing) at fault, the rest explains it.

    ``given`` is what arrived, ``allowed`` what would have been right, ``remedy`` what to do about it.
    A part left empty is left out of the message.
    """

    def __init__(self, subject: str, *, given: object = "", allowed: object = "", remedy: str = "") -> None:
        super().__init__(subject)  # args stay (subject,): the error pickles, its other parts travel in __dict__
        self.subject = subject
        self.given = _text(given)
        self.allowed = _text(allowed)
        self.remedy = remedy

    def __str__(self) -> str:
        """The whole message: a headline, then one indented line for each part that is known."""
        return "\n".join([self._headline(), *self._details()])

    def _headline(self) -> str:
        return f"{self.subject}: got {self.given}" if self.given else self.subject

    def _details(self) -> list[str]:
        parts = (("allowed", self.allowed), ("remedy", self.remedy))
        return [f"  {name}: {value}" for name, value in parts if value]


class PatternError(SpgenError, ValueError):
    """A pattern that cannot mean anything: a negative window, a block without data, a wrong count in per_head."""


class ShapeError(SpgenError, ValueError):
    """A tensor of a wrong rank or size, or tensors whose sizes do not agree."""


class DtypeError(SpgenError, TypeError):
    """A tensor or value of a wrong type."""


class DeviceError(SpgenError, ValueError):
    """Tensors on different devices, or on a device no backend serves."""


class DataError(SpgenError, ValueError):
    """Index data that contradict themselves: a decreasing indptr, an order that is no permutation."""


class PlanError(SpgenError, ValueError):
    """A plan used with lengths, a device or a pattern it was not made for."""


class GradientError(SpgenError, NotImplementedError):
    """A gradient was asked for where none is built."""


class UnsupportedError(SpgenError, NotImplementedError):
    """A meaningful request that no kernel serves (never answered by a silent fallback)."""


class CompileError(SpgenError, RuntimeError):
    """A kernel that could not be compiled, or that was not allowed to be."""


class CacheError(SpgenError, RuntimeError):
    """A cache directory that cannot be trusted or used."""


class RecordError(SpgenError, ValueError):
    """A file of tuning records that cannot be read, written or merged."""


class WorkloadError(SpgenError, ValueError):
    """A workload that names what does not exist: an unknown pattern, shape or target."""


class ToolchainError(SpgenError, RuntimeError):
    """A missing tool (tvm, triton, a C compiler); the remedy says how to get it."""


class CacheWarning(UserWarning):
    """The cache had to work around something: an entry was rebuilt, or a kernel could not be kept."""


class TextError(SpgenError, ValueError):
    """Pattern or IR text that cannot be read; shows the line with the faulty part underlined.

    ``start`` and ``end`` are offsets into ``text`` (``end`` defaults to one character); or give ``line``
    (counted from 1) alone to underline that whole line.
    """

    def __init__(
        self,
        subject: str,
        *,
        text: str = "",
        start: int | None = None,
        end: int | None = None,
        line: int | None = None,
        given: object = "",
        allowed: object = "",
        remedy: str = "",
    ) -> None:
        super().__init__(subject, given=given, allowed=allowed, remedy=remedy)
        self.text = text
        if start is None:
            start, end = _line_span(text, line if line is not None else 1)
        self.start = min(max(start, 0), len(text))
        self.end = min(max(end if end is not None else 0, self.start + 1), len(text) + 1)

    @property
    def line(self) -> int:
        """The number of the faulty line, counted from 1."""
        return self.text.count("\n", 0, self.start) + 1

    @property
    def column(self) -> int:
        """The column of the faulty part in its line, counted from 1."""
        return self.start - (self.text.rfind("\n", 0, self.start) + 1) + 1

    def _details(self) -> list[str]:
        return [*_underlined(self.text, self.line, self.column, self.end - self.start), *super()._details()]


class VerifyError(TextError):
    """IR that breaks a rule of its level; underlines the operation at fault."""


def float8_error(arch: str, reason: str | None) -> UnsupportedError:
    """Float8 is served by one form of kernels alone, which refuses a call for this reason, or does not exist here."""
    return UnsupportedError(
        "q", given=f"float8: {reason}" if reason else f"float8 on {arch}", allowed="float8 on Hopper GPUs (sm_90), "
        "over keys that follow each other by 128 (64 where rows differ by 64)", remedy="pass bfloat16 or float16",
    )  # fmt: skip


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _line_span(text: str, number: int) -> tuple[int, int]:
    """Offsets of line ``number`` (from 1) without its indentation and line end; the last line if beyond it."""
    lines = text.split("\n")
    index = min(max(number - 1, 0), len(lines) - 1)
    begin = sum(len(line) + 1 for line in lines[:index])
    content = lines[index]
    return begin + len(content) - len(content.lstrip()), begin + len(content.rstrip())


def _underlined(text: str, number: int, column: int, length: int) -> list[str]:
    """The source line behind its number, and under it a row of ^ below the faulty part."""
    if not text:
        return []
    content = text.split("\n")[number - 1]
    width = max(1, min(length, len(content) - column + 1))
    # tabs are kept in the padding, so that the carets stay below the text however wide a tab is shown
    padding = "".join("\t" if char == "\t" else " " for char in content[: column - 1])
    gutter = " " * len(str(number))
    return [f"  {number} | {content}", f"  {gutter} | {padding}{'^' * width}"]
