"""What does a call that gives up the interpreter cost beside a thread that reads?

    python bench/turns.py         (ten seconds; no device and no model; the last line is JSON)

A launch of 40 calls, each some microseconds of Python and then one that sleeps for CALL_US without the interpreter, as
calls of torch and Triton do. Milliseconds of it in the median: alone, beside a thread that reads (some microseconds for
each Output, then `Turns.take`) and gives the interpreter up every TURN_S, and beside the same while it is told that the
engine wants it (`Rest.wanted`). `outputs` is how many it read a second. Doubt it for this: a call of CUDA's sleeps less
or more, and a program has more than one thread.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable

from overlap.turns import Rest, Turns

CALLS, CALL_US, LAUNCHES = 40, 5, 100


def launch(sleep: Callable[[int], int]) -> float:
    """Return the milliseconds of one."""
    began = time.perf_counter()
    for _ in range(CALLS):
        sum(range(200))
        sleep(CALL_US)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    sleep, rest, done, outputs = ctypes.CDLL(None).usleep, Rest(), threading.Event(), [0]

    def read() -> None:
        turns = Turns(rest)
        while not done.is_set():
            sum(range(400))
            outputs[0] += 1
            turns.take()

    line: dict[str, object] = {"bench": "turns", "calls": CALLS, "call_us": CALL_US}
    line["alone_ms"] = round(statistics.median(launch(sleep) for _ in range(LAUNCHES)), 2)
    reader = threading.Thread(target=read)
    reader.start()
    for name, wanted in (("beside", False), ("beside_wanted", True)):
        before, began, took = outputs[0], time.perf_counter(), list[float]()
        for _ in range(LAUNCHES):
            time.sleep(0.005)
            rest.wanted = wanted
            took.append(launch(sleep))
            rest.wanted = False
        line[f"{name}_ms"] = round(statistics.median(took), 2)
        line[f"{name}_outputs"] = round((outputs[0] - before) / (time.perf_counter() - began))
    done.set()
    reader.join()
    print(json.dumps({**line, "cpu": platform.machine(), "python": platform.python_version()}))


if __name__ == "__main__":
    main()
