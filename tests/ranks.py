"""A function on one or two ranks, under a layout of the launch files; what each of them gives comes back.

The processes are forked from the server of tests/interrupted.py, so that a launch costs seconds.
"""

from __future__ import annotations

import os
import socket
import traceback
from typing import TYPE_CHECKING, Any

from tests.conftest import ROOT
from tests.interrupted import PATIENCE, SERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection


def on_ranks(function: Callable[..., Any], *args: Any, environment: Mapping[str, str], count: int = 2) -> list[Any]:
    """`function(*args)` on `count` ranks: its results, by rank. AssertionError with the traceback where one fails."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared = size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started: list[tuple[Any, Connection]] = []
    for rank in map(str, range(count)):
        receiver, sender = SERVER.Pipe(duplex=False)
        own = {"ACCELERATE_USE_CPU": "true", **environment, **shared, "RANK": rank, "LOCAL_RANK": rank}
        process = SERVER.Process(target=_work, args=(function, args, own, sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        outcomes = [receiver.recv() if receiver.poll(PATIENCE) else ("no answer", None) for _, receiver in started]
        failed = [problem for problem, _ in outcomes if problem is not None]
        assert not failed, "\n".join(failed)
        codes: list[int | None] = []
        for process, _ in started:
            process.join(PATIENCE)
            codes.append(process.exitcode)
        assert codes == [0] * count
        return [result for _, result in outcomes]
    finally:
        for process, _ in started:
            process.kill()


def _work(
    function: Callable[..., Any], args: tuple[Any, ...], environment: Mapping[str, str], answer: Connection
) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    try:
        result = function(*args)
    except BaseException:
        answer.send((traceback.format_exc(), None))
        raise
    answer.send((None, result))
