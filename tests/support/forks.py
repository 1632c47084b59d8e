# SPDX-License-Identifier: Apache-2.0
"""Ranks as forks of one process, which saves them the import of the libraries."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable


def fork(processes: int, function: Callable, *arguments) -> None:
    """Call a function on each rank of a new group, and wait for all; SystemExit if one fails, which ends the others.

    Args:
        processes: number of ranks; one is told of no group.
        function: what to call.
        arguments: what to call it with.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = set()
    for rank in map(str, range(processes)):
        child = os.fork()
        if child == 0:
            try:
                if processes > 1:
                    os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
                function(*arguments)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        ranks.add(child)
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            sys.exit("a rank failed")
