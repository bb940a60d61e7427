"""Interning: structurally equal constructor calls return the same object, so equality and hashing are identity."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Interned(type):
    """Metaclass of immutable nodes.

    The class names its fields in `__slots__`; positional arguments become those fields and must be hashable.
    Because children are interned too, a node's key is as cheap to hash as its number of fields, however deep or
    shared the graph below it is.
    """

    _lock = threading.Lock()

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        cls._nodes: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()

    def __call__(cls, *fields: Any) -> Any:
        """The node with these fields; the same object for equal fields."""
        # True == 1 in Python: the types belong in the key, or `const(True)` would come back as `const(1)`.
        key = (fields, _types(fields))
        with Interned._lock:
            node = cls._nodes.get(key)
            if node is None:
                node = super().__call__(*fields)
                cls._nodes[key] = node
        return node


def _types(field: Any) -> Any:
    return tuple(map(_types, field)) if isinstance(field, tuple) else type(field)
