"""Tests that share a GPU: those that measure what is free of it run while no other does, in whichever process."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test, and the fixtures that it is the first to need or the last, while nobody measures, or alone."""
    if HERE not in item.path.parents or not torch.cuda.is_available():  # pytest asks for each test of a run
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with (Path(tempfile.gettempdir()) / f"overlap-gpu-tests-{os.getuid()}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)
