"""The one strict Jinja2 environment of all backends.

An undefined name is an error, block tags leave no blank lines behind, and what is rendered is parsed before it is
used, so that a faulty template fails here with its own place rather than deep inside a backend's compiler.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from spgen.errors import CompileError

FOLDER = Path(__file__).resolve().parent


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The environment; templates are named from this folder, such as "tvm/attention.py.jinja"."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"],
    )


def render(name: str, /, **symbols: Any) -> str:
    """The text of template `name` over `symbols`; Python source must parse.

    Raises CompileError if it does not: a template's mistake, never the user's.
    """
    source = environment().get_template(name).render(**symbols)
    if name.endswith(".py.jinja"):
        _parse(name, source)
    return source


def _parse(name: str, source: str) -> None:
    try:
        ast.parse(source)
    except SyntaxError as fault:
        raise CompileError(
            f"template {name}",
            given=f"line {fault.lineno}: {(fault.text or '').strip()}",
            allowed="Python source",
            remedy="please report this pattern: the compiler wrote a kernel that does not parse",
        ) from fault
