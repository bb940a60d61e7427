"""The error classes: their messages, their built-in bases, and the underlining."""

import inspect
import pickle

import pytest

from spgen import errors
from spgen.errors import DtypeError, PatternError, ShapeError, SpgenError, TextError, VerifyError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SpgenError)]


def test_message_has_its_four_parts() -> None:
    error = ShapeError("k", given="7 heads", allowed="heads that divide 32", remedy="repeat the heads")
    assert str(error) == "k: got 7 heads\n  allowed: heads that divide 32\n  remedy: repeat the heads"


def test_parts_left_out_leave_no_trace() -> None:
    assert str(PatternError("window: left is negative")) == "window: left is negative"


def test_given_values_are_shown_as_python_would() -> None:
    assert str(DtypeError("q", given=[1, 2])) == "q: got [1, 2]"
    assert str(PatternError("left", given=-3)) == "left: got -3"


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("PatternError", ValueError), ("DtypeError", TypeError), ("GradientError", NotImplementedError)],
)
def test_errors_are_also_the_builtin_a_user_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_error_is_exported_documented_and_survives_pickling(cls: type[SpgenError]) -> None:
    assert cls.__name__ in errors.__all__
    assert cls.__doc__
    error = cls("q", given="a", allowed="b", remedy="c")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)


def test_text_error_underlines_the_faulty_part() -> None:
    text = "causal()\n  & windw(64)"
    start = text.index("windw")
    error = TextError("pattern", text=text, start=start, end=start + 5, given="'windw'", remedy="did you mean window?")
    assert (error.line, error.column) == (2, 5)
    assert str(error).splitlines() == [
        "pattern: got 'windw'",
        "  2 |   & windw(64)",
        "    |     ^^^^^",
        "  remedy: did you mean window?",
    ]


def test_verify_error_underlines_a_whole_line() -> None:
    error = VerifyError("tiles.range", text="a\n   tiles.range lo=3  \nb", line=2)
    assert str(error).splitlines()[1:] == ["  2 |    tiles.range lo=3  ", "    |    ^^^^^^^^^^^^^^^^"]


def test_underline_stays_within_its_line_and_keeps_tabs() -> None:
    error = TextError("pattern", text="\tsink(\nwindow", start=5, end=12)
    assert str(error).splitlines()[1:] == ["  1 | \tsink(", "    | \t    ^"]


@pytest.mark.parametrize("start", [-4, 0, 8, 99])
def test_any_position_can_be_shown(start: int) -> None:
    assert "^" in str(TextError("pattern", text="causal()", start=start))


def test_no_text_no_underline() -> None:
    assert str(TextError("pattern", start=3)) == "pattern"
