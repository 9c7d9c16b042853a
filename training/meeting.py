"""How the processes of a job find each other at the start, and how they part, also where some have failed.

Both go through the store of the rendezvous and not through collectives: a name that all of them know does not exist
yet at the start, and at the end some may hang in another collective.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
import uuid
from datetime import timedelta

import torch.distributed as dist

from errors import InputError, say

POLL_SECONDS = 0.05
# How long a rank that has failed waits for the others: all raise what was shared; alone, it must not hold up the end.
PARTING = timedelta(seconds=20)
ASK = timedelta(seconds=5)  # for keys that are known to be on their way


def meet(store: dist.Store, rank: int, size: int, timeout: timedelta) -> tuple[dist.Store, bool]:
    """The part of the store that belongs to these very processes, and whether others of this job were there before.

    torchrun keeps its store over restarts, with the addresses of processes that are gone, and tells no name of the
    round (TORCHELASTIC_RESTART_COUNT is each node's own: one that was restarted since another joined does not count).
    So rank 0 makes a name, tells it to each rank that asks, and waits until all have heard it. A rank asks with a word
    of its own, so what was left by a process that is gone is answered in vain.
    Raises InputError if not all of them come within `timeout`.
    """
    until = time.monotonic() + timeout.total_seconds()
    seconds = f"{timeout.total_seconds():.0f} s (parallel.timeout_seconds)"
    if rank != 0:
        mine = uuid.uuid4().hex
        store.set(f"ask/{rank}", mine)
        try:
            store.wait([f"answer/{mine}"], timeout)
        except RuntimeError:
            raise InputError(f"rank {rank} heard nothing of rank 0 in {seconds}") from None
        name, again = json.loads(store.get(f"answer/{mine}"))
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store), again
    again = store.add("rounds", 1) > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    name, answered = uuid.uuid4().hex, dict.fromkeys(range(1, size), b"")
    missing = set(answered)
    while missing:
        for other in sorted(missing):
            if not store.check([f"ask/{other}"]):
                continue
            word = store.get(f"ask/{other}")
            if word != answered[other]:
                answered[other] = word
                store.set(f"answer/{word.decode()}", json.dumps([name, again]))
            if store.check([f"{name}/heard/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > until:
            raise InputError(f"{len(missing)} of {size} ranks (the first is {min(missing)}) did not come in {seconds}")
        if missing:
            time.sleep(POLL_SECONDS)
    return dist.PrefixStore(name, store), again


def leave_together(store: dist.Store, rank: int, size: int, line: str, timeout: timedelta) -> str | None:
    """Tells with which line this rank leaves ("": none) and waits for the others; what rank 0 leaves with.

    None: not all of them left within `timeout`, or the store went down with one.
    """
    try:
        store.set(f"left/{rank}", line)
        store.wait([f"left/{other}" for other in range(size)], timeout)
        first = store.get("left/0").decode()
        store.set(f"read/{rank}", "")
        if rank == 0:  # whose process may hold the store
            store.wait([f"read/{other}" for other in range(size)], ASK)
    except RuntimeError:  # torch's DistStoreError among them
        return None
    return first


def teardown(error: BaseException | None = None) -> None:
    """Takes the process group down. Live sharded tensors at interpreter exit abort gloo now and then (measured: 1 to 4
    of 12), so the caller has let go of model and optimizer.

    error: with which this process leaves, alone perhaps. NCCL may then wait for ranks that are in another collective;
    so after `PARTING` it is said and the process ends as it is.
    """
    gc.collect()
    if error is None:
        dist.destroy_process_group()
        return
    leave = threading.Timer(PARTING.total_seconds(), _leave, [error])
    leave.daemon = True
    leave.start()
    try:
        dist.destroy_process_group()
    finally:
        leave.cancel()
        leave.join()  # it knows the error, and as the last to drop it, while the interpreter ends, it aborts


def _leave(error: BaseException) -> None:
    code = say(error)
    if code is None:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1 if code is None else code)
