"""Progress bars: in a terminal, in a notebook, or not at all. On stderr; stdout belongs to the program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def wanted(asked: bool | None) -> bool:
    """Return whether to show progress: as asked, else where somebody can see it (a terminal or a notebook)."""
    if asked is not None:
        return asked
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    running: Any = shell.get_ipython() if shell is not None else None
    return running is not None and type(running).__name__ == "ZMQInteractiveShell"


@contextmanager
def bar(total: int | None, what: str, unit: str, *, asked: bool | None) -> Iterator[Any]:
    """Yield a tqdm bar (a widget in a notebook that has ipywidgets). A bar that nobody wants costs nothing."""
    from overlap.bars import Bar, NoThread

    kind: Any = Bar
    if _in_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm  # the widget version warns where ipywidgets is missing

        kind = type("Widget", (NoThread, tqdm), {})
    with kind(total=total, desc=what, unit=unit, disable=not wanted(asked), dynamic_ncols=True) as progress:
        yield progress
