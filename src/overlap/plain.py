"""Plain Python numbers from what users give, which may be numpy's. Imports no numpy.

A bool is no number here: where one is given for a number, something else was meant.
"""

from __future__ import annotations

import operator
from numbers import Real


def plain_int(value: object) -> int | None:
    """Return an integer as an int; None for what is none."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # what is no integer raises
    except TypeError:
        return None


def plain_bool(value: object) -> bool | None:
    """Return True or False, numpy's too; None for what is neither."""
    kind = type(value)
    return bool(value) if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")) else None


def plain_float(value: object) -> float | None:
    """Return a real number as a float, or as an int if it is one; None for what is none or too large for a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    whole = plain_int(value)
    return number if whole is None else whole
