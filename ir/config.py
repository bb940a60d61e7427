"""The configuration of a kernel: what a tuner varies, and what never changes a result."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spgen.errors import SpgenError

_TEXT = re.compile(r"(\d+)x(\d+)((?: \w+=\d+)*)")


@dataclass(frozen=True, order=True)
class Config:
    """Tiles of `block_m` rows by `block_n` keys, and further choices as "name=value", known to the backend.

    Its text, such as `128x64 stages=2 warps=8`, is what records hold.
    """

    block_m: int
    block_n: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"{self.block_m}x{self.block_n}", *self.options))

    @staticmethod
    def read(text: str) -> Config:
        """The configuration that prints as `text`. Raises SpgenError for any other text."""
        match = re.fullmatch(_TEXT, text)
        if match is None:
            raise SpgenError("config", given=repr(text), allowed='tiles and options, as "128x64 warps=8 stages=2"')
        return Config(int(match[1]), int(match[2]), tuple(match[3].split()))

    def option(self, name: str, default: int = 0) -> int:
        """One integer choice."""
        return next((int(text.partition("=")[2]) for text in self.options if text.startswith(f"{name}=")), default)

    def having(self, *, block_m: int | None = None, block_n: int | None = None, **options: int | None) -> Config:
        """This configuration with other tiles or options; an option of None is left out."""
        given = {text.partition("=")[0]: text for text in self.options}
        given |= {name: f"{name}={value}" for name, value in options.items()}
        kept = tuple(text for name, text in given.items() if name not in options or options[name] is not None)
        return Config(block_m or self.block_m, block_n or self.block_n, kept)
