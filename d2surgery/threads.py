"""Work in threads whose results come in order."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int = 1) -> Generator[Result]:
    """The results in the order of the items, while the next ones are worked on: no more in hand than threads + 1."""
    with ThreadPoolExecutor(threads) as pool:
        todo = iter(items)
        running = deque(pool.submit(work, item) for item in islice(todo, threads + 1))
        try:
            while running:
                yield running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(todo, 1))
        finally:
            for future in running:
                future.cancel()


def pipeline(
    items: Iterable[Item],
    read: Callable[[Item, Tensor], None],
    compute: Callable[[Item, Tensor], Result | None],
    write: Callable[[Item, Result], None],
    buffers: Iterable[Tensor],
) -> None:
    """Read ahead and write behind in two threads while the caller's thread computes; everything stays in order.

    `buffers` bound the memory: a buffer is free again when what was computed from it has been written.
    The first error of any stage stops all three and is raised here.
    """
    free: queue.Queue[Tensor | None] = queue.Queue()
    ready: queue.Queue[tuple[Item, Tensor] | None] = queue.Queue()
    done: queue.Queue[tuple[Item, Tensor, Result | None] | None] = queue.Queue()
    failures: list[BaseException] = []
    for buffer in buffers:
        free.put(buffer)

    def read_all() -> None:
        try:
            for item in items:
                buffer = free.get()
                if buffer is None or failures:
                    break
                read(item, buffer)
                ready.put((item, buffer))
        except BaseException as error:
            failures.append(error)
        ready.put(None)

    def write_all() -> None:
        while (step := done.get()) is not None:
            item, buffer, result = step
            try:
                if result is not None and not failures:
                    write(item, result)
            except BaseException as error:
                failures.append(error)
            free.put(buffer)

    threads = [threading.Thread(target=stage, daemon=True) for stage in (read_all, write_all)]
    for thread in threads:
        thread.start()
    try:
        while (step := ready.get()) is not None and not failures:
            item, buffer = step
            done.put((item, buffer, compute(item, buffer)))
    except BaseException as error:
        failures.append(error)
    done.put(None)
    free.put(None)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
