"""A follower: runs the steps that the leading rank tells it, on its part of the model.

Started by the leader as `python -m overlap.parallel.rank SOCKET`; under torchrun a program calls `follow()` in every
process but rank 0's. It has no planner, no tokenizer and no requests, and ends when the leader does.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Final

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from overlap.assemble import _free_bytes, _on, _stream
from overlap.cache.pages import PAGE, pages_for
from overlap.environment import TorchRun, cache_directory, package_index, torchrun
from overlap.errors import ConfigError
from overlap.flight import TorchFlight
from overlap.lane_runner import host_bound_tokens
from overlap.models import build, open_checkpoint
from overlap.models.open import LoadFormat
from overlap.models.shard import shard_config
from overlap.ops.attention import choose_attention
from overlap.parallel.group import Group, reason
from overlap.parallel.lockstep import Lockstep
from overlap.parallel.team import ADDRESS_KEY, START_S, place_store
from overlap.parallel.wire import (
    ORDERS,
    Failed,
    Hello,
    Launch,
    Loaded,
    Memory,
    Order,
    Placed,
    Ready,
    Setup,
    Stop,
    WarmUp,
    receive,
    send,
)
from overlap.resolve import rank_device
from overlap.runner import Runner
from overlap.streams.stream import Stream

DEPTH: Final = 2
"""Steps in the air: as many as the leader's loop has, so that no place of the mail is written while it is read."""


class _Orders:
    """What the leader says, heard on a thread: so that its end is noticed whatever this rank waits for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        threading.Thread(target=self._hear, name="overlap-leader", daemon=True).start()

    def _hear(self) -> None:
        while (data := receive(self._connection)) is not None:
            order = ORDERS.decode(data)
            self._orders.put(order)
            if isinstance(order, Stop):
                return
        os._exit(1)  # the leader is gone: a sum that waits for it may never return, so nobody can be asked to end

    def next(self) -> Order:
        """Wait for the next order."""
        return self._orders.get()


def serve(connection: socket.socket, hello: Hello, place: TorchRun | None = None, store: Store | None = None) -> int:
    """Follow the leader behind `connection` until it says Stop; return the exit status.

    `store` is where the ranks of torchrun meet; without, it is the file that the leader names.
    """
    send(connection, hello)
    orders = _Orders(connection)
    try:
        setup = orders.next()
        if isinstance(setup, Setup):
            _Rank(connection, orders, setup, place, store).run()
    except BaseException as failure:
        _tell_failure(connection, failure)
        raise
    return 0


def _tell_failure(connection: socket.socket, failure: BaseException) -> None:
    with suppress(OSError):  # the leader is gone, and needs no reason
        send(connection, Failed(reason(failure)))


class _Rank:
    """One follower's life."""

    def __init__(
        self,
        connection: socket.socket,
        orders: _Orders,
        setup: Setup,
        place: TorchRun | None,
        store: Store | None,
    ) -> None:
        self._connection = connection
        self._orders = orders
        self._setup = setup
        device = setup.device
        if place is not None:
            device = rank_device(device, place.local_rank, torch.cuda.device_count())
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        send(connection, Placed())
        self._group = Group(
            store or FileStore(setup.store, setup.size),
            setup.rank,
            setup.size,
            self._device,
            timeout_s=setup.timeout_s,
            local=place is None or place.local,
        )

    def run(self) -> None:
        """Load, then launch what is told."""
        stream = _stream(self._device)
        try:
            runner = _on(stream, lambda: self._load(stream))
        except BaseException:
            stream.close()
            raise
        if runner is None:
            stream.close()
            return
        send(self._connection, Ready())
        self._follow(runner)
        runner.close()  # not after a failure: what is queued behind it may wait for the other ranks
        self._group.close()

    def _load(self, stream: Stream) -> Runner | None:
        """Return the runner of this rank's part; None if the leader ends before it is told how much KV there is."""
        setup = self._setup
        load_format: LoadFormat = "dummy" if setup.load_format == "dummy" else "auto"
        checkpoint = open_checkpoint(
            setup.model,
            load_format=load_format,
            revision=setup.revision,
            cache_dir=cache_directory(setup.cache_dir),
            index_url=package_index(),
        )
        dtype: torch.dtype = getattr(torch, setup.dtype)
        try:
            program = build(checkpoint, device=self._device, dtype=dtype, ranks=self._group)
            part = shard_config(checkpoint.config, setup.size)
        finally:
            checkpoint.close()
        send(self._connection, Loaded(free_bytes=_free_bytes(self._device)))
        memory = self._orders.next()
        if not isinstance(memory, Memory):
            return None
        kv = torch.zeros(
            (memory.num_pages, part.num_layers, 2, PAGE, part.num_kv_heads, part.head_dim),
            dtype=dtype,
            device=self._device,
        )
        attention, _ = choose_attention(
            kv, part.num_heads, max_pages_per_row=pages_for(memory.context), max_rows=setup.max_rows
        )
        halves = None
        if setup.halves:
            halves, _ = choose_attention(kv, part.num_heads, max_pages_per_row=pages_for(memory.context))
        return Runner(
            program,
            attention,
            Lockstep(stream, self._fail),
            kv=kv,
            max_rows=setup.max_rows,
            token_budget=setup.token_budget,
            context=memory.context,
            host_bound=host_bound_tokens(checkpoint.config, setup.size),
            graphs=setup.graphs,
            halves=halves,
            rank=setup.rank,
        )

    def _fail(self, failure: BaseException) -> None:
        """Tell the leader, and end: from inside a step, for the others already wait in it."""
        _tell_failure(self._connection, failure)
        os._exit(1)

    def _follow(self, runner: Runner) -> None:
        events = asyncio.new_event_loop()
        flights: deque[TorchFlight] = deque()
        try:
            while not isinstance(order := self._orders.next(), Stop):
                if isinstance(order, Launch):
                    while len(flights) >= DEPTH:
                        events.run_until_complete(flights.popleft().wait_landed())
                    flight = runner.launch(order.plan)
                    while flight.blocks_left:
                        flight.launch_block()
                    flights.append(flight)
                elif isinstance(order, WarmUp):
                    runner.warm_up_one()
            while flights:
                events.run_until_complete(flights.popleft().wait_landed())
        finally:
            events.close()


def follow() -> int:
    """Follow rank 0 of torchrun until its engine closes; return the exit status. For every rank but 0, once.

    `examples/several_devices.py` is a program that torchrun can start.

    Raises ConfigError outside torchrun, and on rank 0. If rank 0 ends without closing its engine, so does this process.
    """
    place = torchrun()
    if place is None or place.rank == 0:
        where = "was not started by torchrun" if place is None else "is rank 0, which serves"
        raise ConfigError(f"follow() is for the other ranks of torchrun; this process {where}.")
    store = place_store(place)
    host, port, token = store.get(ADDRESS_KEY).decode().split()
    with socket.create_connection((host, int(port)), timeout=START_S) as connection:
        connection.settimeout(None)
        hello = Hello(pid=os.getpid(), rank=place.rank, token=token)
        return serve(connection, hello, place, PrefixStore("overlap/group", store))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _leader:
        sys.exit(serve(_leader, Hello(pid=os.getpid())))
