"""Green contexts: streams whose kernels run on some of a device's SMs.

A share cuts the SMs in two: so many are one lane's own, the rest the other's. Each share is a cut of the whole device,
made for itself; contexts of different shares overlap, and nobody runs in two of them but while a lane changes over.

The driver's functions are called through cuda-bindings. A kernel runs on the SMs of the stream that it is launched on;
a kernel in a graph on those of the stream that the graph was recorded on, wherever the graph is launched. So graphs are
recorded for each share. A kernel that sizes itself by the SMs of the device (a persistent one) runs on fewer all the
same, some blocks after the others.

Contexts and streams are kept for as long as the process lives, for the next engine (see `streams.cuda`).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal, TypeAlias

Half: TypeAlias = Literal["own", "rest"]
"""The SMs that a share names, or all others."""
STEP: Final = 8
"""SMs are shared out in such steps: what Hopper asks for, and a multiple of what older devices do."""
_PARTS: Final = (0.18, 0.3, 0.42)
_NON_BLOCKING: Final = 1
_DEFAULT_STREAM: Final = 1


class NoShares(Exception):
    """Why SMs cannot be shared out here. Never reaches a user: lanes compete for SMs then, and `explain` says why."""


def default_shares(num_sms: int) -> tuple[int, ...]:
    """Return the shares to choose from, ascending: about 18, 30 and 42% of the SMs. Of 132 they are 24, 40 and 56.

    Few, since each has to be measured for each size of step, and has graphs of its own.
    """
    near = {round(part * num_sms / STEP) * STEP for part in _PARTS}
    return tuple(sorted(share for share in near if fits(share, num_sms))) or (STEP,)


def fits(share: int, num_sms: int) -> bool:
    """Return whether a share is whole steps, and leaves the other lane at least as many SMs as a step has."""
    return share % STEP == 0 and STEP <= share <= num_sms - STEP


class Splits:
    """The cuts of one device, made when they are first asked for. Raises NoShares for what the driver refuses."""

    def __init__(self, device: int, driver: Any) -> None:
        """`driver` is `cuda.bindings.driver`. Needs a CUDA that is initialized."""
        self._driver = driver
        self._device = self._call("cuDeviceGet", device)
        self._kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        self._all = self._call("cuDeviceGetDevResource", self._device, self._kind)
        self.num_sms: Final = int(self._all.sm.smCount)
        if self.num_sms < 2 * STEP:
            raise NoShares(f"{self.num_sms} SMs are too few")
        self._cuts: dict[int, dict[Half, tuple[Any, int]]] = {}

    def num_sms_of(self, share: int, half: Half) -> int:
        """Return how many SMs a half really has: the driver may round."""
        return self._cut(share)[half][1]

    def new_stream(self, share: int, half: Half, priority: int) -> int:
        """Return the address of a new stream on these SMs. `priority` is CUDA's: lower numbers go first."""
        context, _ = self._cut(share)[half]
        return int(self._call("cuGreenCtxStreamCreate", context, _NON_BLOCKING, priority))

    def _cut(self, share: int) -> dict[Half, tuple[Any, int]]:
        cut = self._cuts.get(share)
        if cut is None:
            if not fits(share, self.num_sms):
                raise NoShares(f"{share} of {self.num_sms} SMs is no share in steps of {STEP}")
            groups, count, rest = self._call("cuDevSmResourceSplitByCount", 1, self._all, 0, share)
            if count < 1:
                raise NoShares(f"the driver makes no group of {share} SMs")
            cut = self._cuts[share] = {"own": self._context(groups[0]), "rest": self._context(rest)}
        return cut

    def _context(self, resource: Any) -> tuple[Any, int]:
        described = self._call("cuDevResourceGenerateDesc", [resource], 1)
        context = self._call("cuGreenCtxCreate", described, self._device, _DEFAULT_STREAM)
        return context, int(self._call("cuGreenCtxGetDevResource", context, self._kind).sm.smCount)

    def _call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._driver, name, None)
        if function is None:
            raise NoShares(f"cuda-bindings has no {name}: it is too old")
        try:
            code, *results = function(*arguments)
        except (RuntimeError, TypeError) as failure:  # cuda-bindings: the driver itself lacks the function, or ...
            raise NoShares(f"{name}: {failure}") from failure
        if int(code):
            raise NoShares(f"{name}: {getattr(code, 'name', code)}")
        return results[0] if len(results) == 1 else results


@cache
def splits(device: int) -> Splits:
    """Return the cuts of a device, one object for all engines of the process. Raises NoShares."""
    try:
        from cuda.bindings import driver
    except ImportError as failure:
        raise NoShares(f"cuda-bindings is not there ({failure}); it comes with overlap[cuda]") from failure
    return Splits(device, driver)
