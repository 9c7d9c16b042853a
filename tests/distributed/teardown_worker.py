"""Two ranks load a checkpoint into sharded tensors and leave as any program does, again and again.

teardown_worker.py CASE.json ROUNDS: one `Case` of parity_worker. A round is two forks of this process, which has
imported torch for all of them; each leaves through Python's own end, finalisers included. Prints their exit statuses.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch.distributed.checkpoint  # noqa: F401  here and not in every child
from parity_worker import Case

from training.machine import configure_threads

RANKS = 2


def main(case, rounds):
    configure_threads(1)
    statuses = []
    for _ in range(int(rounds)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                meeting = {"RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in meeting.items()})
                Case(**json.loads(Path(case).read_text())).run()
                return
            children.append(child)
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
