from __future__ import annotations

import threading

import pytest

from overlap.streams.ahead import start_driver


@pytest.mark.parametrize("device", ["auto", "cuda:63", "cuda:none"])
def test_without_a_driver_or_the_device_nothing_is_started_and_nothing_said(device: str) -> None:
    let_go = start_driver(device)
    let_go()
    let_go()
    assert not any(thread.name == "overlap-driver" for thread in threading.enumerate())
