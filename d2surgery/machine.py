"""The machine: threads whose results come in order, the memory in use, and importing what makes many objects."""

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_jobs: ContextVar[int] = ContextVar("jobs", default=0)


def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = 1,
    *,
    in_hand: int | None = None,
    stopping: Event | None = None,
) -> Generator[Result]:
    """The results in the order of the items, while the next ones are worked on.

    No more than `in_hand` items (threads + 1) are worked on or wait for their turn. The first error in that order is
    raised. Whatever ends it waits for the items being worked on; `stopping` is set to let them come to an end sooner.
    """
    from concurrent.futures import ThreadPoolExecutor  # a tenth of what it takes to describe an adapter

    if isinstance(items, Sized) and len(items) < 2:  # nothing to be ahead of
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        todo = iter(items)
        running = deque(pool.submit(work, item) for item in islice(todo, in_hand or threads + 1))
        try:
            while running:
                yield running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(todo, 1))
        finally:
            if stopping is not None:
                stopping.set()
            for future in running:
                future.cancel()


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """The results in the order of the items: a core works on one from end to end, and on small ones beside a large one;
    with one thread they come one at a time, each on all cores."""
    if threads < 2:
        yield from map(work, items)
        return
    with one_thread():
        yield from ahead(work, items, threads, in_hand=4 * threads)


@contextmanager
def jobs(count: int) -> Iterator[None]:
    """So many `workers` meanwhile."""
    before = _jobs.set(count)
    try:
        yield
    finally:
        _jobs.reset(before)


def workers() -> int:
    """Threads for work on many tensors: as many as `jobs` says, else one for each core that this process may use, up to
    eight."""
    if asked := _jobs.get():
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread of torch while each core has work of its own: more would fight over the cores."""
    import torch  # what this module is asked for before torch is imported needs none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def give_back(mapped_above: int = 1 << 25) -> None:
    """Where it is glibc: one heap for all threads, since each thread's own keeps what others could use; and back to the
    system go larger blocks than this (at most 32 MB) when they are freed, and what is free at the heap's end.

    Blocks of the heap are used again; a block of its own costs a page fault for each page, each time.
    """
    import ctypes

    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(-8, 1)  # M_ARENA_MAX
        library.mallopt(-3, mapped_above)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 1 << 26)  # M_TRIM_THRESHOLD


def trim() -> None:
    """Where it is glibc: what is free in the heap back to the system, where blocks of many sizes leave holes."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # no glibc; TypeError where it is Windows
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: torch's import makes none, and would be searched again and again (0.2 s).

    What was made is old at once, as though it had been searched (0.3 s more); frozen, where something is frozen.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        frozen = gc.get_freeze_count()
        gc.freeze()
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def peak_memory() -> int:
    """Bytes of resident memory that this process has had at most; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others kilobytes


def resident_memory() -> int:
    """Bytes of resident memory that this process has now; at most, where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else peak_memory()
