"""How SMs are shared out, over a driver that is made up; what the real one does is for tests/gpu."""

# ruff: noqa: N802 - the names are those of CUDA

from __future__ import annotations

import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from overlap.streams.green import STEP, NoShares, Splits, default_shares, fits, splits


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class Driver:
    """Splits as Hopper does: whole steps, and what is left."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def __init__(self, num_sms: int = 132, refuses: str = "") -> None:
        self._num_sms = num_sms
        self._refuses = refuses
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self._run(name, arguments)

    def _run(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append(name)
        if name == self._refuses:
            return (Code.CUDA_ERROR_NOT_SUPPORTED, None)
        return Code.CUDA_SUCCESS, *getattr(self, "_" + name)(*arguments)

    def _sms(self, count: int) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=count))

    def _cuDeviceGet(self, index: int) -> tuple[int]:
        return (index,)

    def _cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[Any]:
        return (self._sms(self._num_sms),)

    def _cuDevSmResourceSplitByCount(self, groups: int, of: Any, flags: int, least: int) -> tuple[Any, int, Any]:
        assert (groups, flags) == (1, 0)
        count = -(-least // 8) * 8
        return [self._sms(count)], 1, self._sms(of.sm.smCount - count)

    def _cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> tuple[Any]:
        assert count == len(resources) == 1
        return (resources[0],)

    def _cuGreenCtxCreate(self, described: Any, device: int, flags: int) -> tuple[Any]:
        assert flags == 1
        return (described,)

    def _cuGreenCtxGetDevResource(self, context: Any, kind: int) -> tuple[Any]:
        return (context,)

    def _cuGreenCtxStreamCreate(self, context: Any, flags: int, priority: int) -> tuple[int]:
        assert flags == 1
        return (0x1000 * context.sm.smCount + priority,)


class OldDriver:
    """Of a time before green contexts."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def cuDeviceGet(self, index: int) -> tuple[Code, int]:
        return Code.CUDA_SUCCESS, index


def test_a_few_shares_in_whole_steps_are_offered() -> None:
    assert default_shares(132) == (24, 40, 56)
    assert default_shares(148) == (24, 48, 64)
    assert default_shares(16) == (8,)
    for num_sms in range(2 * STEP, 300):
        shares = default_shares(num_sms)
        assert 1 <= len(shares) <= 3
        assert list(shares) == sorted(set(shares))
        assert all(fits(share, num_sms) for share in shares)


def test_a_share_leaves_a_step_to_the_other_lane() -> None:
    assert [share for share in range(-8, 41) if fits(share, 40)] == [8, 16, 24, 32]


def test_a_share_cuts_the_sms_in_two_and_is_cut_once() -> None:
    driver = Driver()
    cuts = Splits(0, driver)
    assert cuts.num_sms == 132
    for share in (24, 56, 24):
        assert (cuts.num_sms_of(share, "own"), cuts.num_sms_of(share, "rest")) == (share, 132 - share)
    assert cuts.new_stream(24, "own", -1) == 0x1000 * 24 - 1
    assert cuts.new_stream(24, "rest", 0) == 0x1000 * 108
    assert driver.calls.count("cuDevSmResourceSplitByCount") == 2
    assert driver.calls.count("cuGreenCtxCreate") == 4


@pytest.mark.parametrize("share", [0, 4, 12, 128, 136])
def test_what_is_no_share_is_refused(share: int) -> None:
    with pytest.raises(NoShares, match="of 132 SMs is no share in steps of 8"):
        Splits(0, Driver()).num_sms_of(share, "own")


@pytest.mark.parametrize("name", ["cuDevSmResourceSplitByCount", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_what_the_driver_refuses_is_said(name: str) -> None:
    with pytest.raises(NoShares, match=f"{name}: CUDA_ERROR_NOT_SUPPORTED"):
        Splits(0, Driver(refuses=name)).new_stream(24, "own", 0)


def test_an_old_binding_and_a_small_device_have_none() -> None:
    with pytest.raises(NoShares, match="has no cuDeviceGetDevResource: it is too old"):
        Splits(0, OldDriver())
    with pytest.raises(NoShares, match="8 SMs are too few"):
        Splits(0, Driver(num_sms=8))


def test_without_cuda_bindings_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    splits.cache_clear()
    with pytest.raises(NoShares, match=r"cuda-bindings is not there .* overlap\[cuda\]"):
        splits(0)
