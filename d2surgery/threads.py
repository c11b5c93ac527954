"""Work in threads whose results come in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def workers() -> int:
    """Threads for work that also reads and writes: one for each core that this process may use, up to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)
