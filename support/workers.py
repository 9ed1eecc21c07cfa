"""
Decoding in processes of their own, which may die or hang over a file: that file alone is lost.
"""

import re
import resource
import signal
from collections import deque
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from pebble import ProcessExpired, ProcessPool

from support import decode, media
from support.common import out_of_memory, printable

HANG_SECONDS = 60  # until a process is ended that decodes one file: twice decode.MAX_SECONDS
LOOK_AHEAD = 4  # files that each decoding process may be ahead of the reader: they wait in memory


def catch_out_of_memory(work, item):
    """work(item), or the reason (str) if it does not fit into memory."""
    try:
        return work(item)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return media.NO_MEMORY


memory_limit = resource.RLIM_INFINITY  # bytes that a decoding process may hold: begin_worker sets it


def begin_worker():
    """What a decoding process does first."""
    global memory_limit
    torch.set_num_threads(1)  # threads do not survive a fork
    memory_limit, _ = resource.getrlimit(resource.RLIMIT_DATA)  # mostly infinite
    status = Path("/proc/self/status")
    if status.exists():  # Linux; elsewhere nothing tells what it holds already
        held = int(re.search(r"VmData:\s+(\d+)", status.read_text())[1]) * 1024
        most = held + decode.MAX_MEMORY_BYTES
        memory_limit = most if memory_limit == resource.RLIM_INFINITY else min(most, memory_limit)


def run_in_worker(work, item):
    """catch_out_of_memory(work, item) within the limits of time and memory."""
    signal.alarm(2 * HANG_SECONDS)  # ends it even within C code, also where the run was killed meanwhile
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, before[1]))
    try:
        return catch_out_of_memory(work, item)
    finally:  # the result lies within the limit, and may take as much again on its way through the pipe
        resource.setrlimit(resource.RLIMIT_DATA, before)
        signal.alarm(0)


def until_failure(work, todo, num_workers):
    """Yields work(item) for the items of the deque `todo`, in order, and takes off what is done.

    Stops at the first that fails and returns the reason (str), or None if none did."""
    # Forked, as torch's own loaders are: a fresh process would import torch first (7 s, 400 MB).
    pool, futures = ProcessPool(num_workers, initializer=begin_worker, context=get_context("fork")), deque()
    try:
        while todo:
            for item in islice(todo, len(futures), LOOK_AHEAD * num_workers):
                futures.append(pool.schedule(run_in_worker, (work, item), timeout=HANG_SECONDS))
            result = futures.popleft().result(2 * HANG_SECONDS)  # longer than that it is the pool that hangs
            if isinstance(result, str) and media.NO_MEMORY in result:
                return result
            yield result
            todo.popleft()
    except TimeoutError:
        return f"decoding it took longer than {HANG_SECONDS} seconds"
    except (ProcessExpired, RuntimeError) as error:
        if isinstance(error, RuntimeError) and pool.active:  # a fault of ours, not a broken pool
            raise
        return "its decoding process died"
    finally:
        pool.stop()
        pool.join()


def in_processes(work, items, num_workers):
    """Yields work(item) for each item, in order, from `num_workers` processes; where an item ends its process
    (a crash), takes longer than HANG_SECONDS or more than decode.MAX_MEMORY_BYTES, twice, the reason (str).

    What else `work` raises is raised here. With 0 processes this one works: then nothing limits its memory,
    decode.MAX_SECONDS alone its time, and a crash ends the run.
    """
    if num_workers == 0:
        yield from (catch_out_of_memory(work, item) for item in items)
        return
    todo = deque(items)
    while todo:
        reason = yield from until_failure(work, todo, num_workers)
        # A second chance alone, in a new process: the fault may be the machine's, or other items may have
        # left the memory in pieces. Then new processes for the rest: the old pool may be out of order.
        if reason and (reason := (yield from until_failure(work, deque([todo.popleft()]), 1))):
            yield reason


def read_picture(path, resolution):
    """media.read_image in a decoding process, with the limits of in_processes: the first frame of a file from
    anywhere. Returns uint8 (resolution, resolution, 3). Raises MediaError."""
    (picture,) = in_processes(partial(media.read_image, resolution=resolution), [path], 1)
    if isinstance(picture, str):  # the reason why there is none
        raise media.MediaError(f"{printable(path)} cannot be decoded ({picture}); choose another picture.")
    return picture
