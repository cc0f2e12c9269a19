"""Progress bars: in a terminal, in a notebook, or not at all. On stderr; stdout belongs to the program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
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


class NoBar:
    """A bar that nobody wants. Even a disabled one of tqdm's would leave a thread in the process."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def bar(total: int | None, what: str, unit: str, *, asked: bool | None) -> Iterator[Any]:
    """Yield a tqdm bar (a widget in a notebook that has ipywidgets), or a `NoBar` if nobody wants one."""
    if not wanted(asked):
        yield NoBar()
        return
    if _in_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm  # the widget version warns where ipywidgets is missing
    else:
        from tqdm import tqdm
    with tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True) as progress:
        yield progress
