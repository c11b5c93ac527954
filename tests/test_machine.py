"""Work in threads: results in order, the first error in that order, an end to what is under way, no thread left."""

import gc
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2surgery.machine import ahead, uncollected


@given(st.lists(st.integers(), max_size=30), st.integers(1, 4), st.none() | st.integers(1, 40))
def test_every_item_gives_its_result_once_and_in_order(items: list[int], threads: int, in_hand: int | None) -> None:
    before = threading.enumerate()
    assert list(ahead(lambda item: 2 * item, items, threads, in_hand=in_hand)) == [2 * item for item in items]
    assert threading.enumerate() == before


@given(st.integers(1, 4), st.none() | st.integers(1, 9))
def test_no_more_items_are_taken_than_may_be_in_hand(threads: int, in_hand: int | None) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken

    with closing(ahead(lambda item: item, items(), threads, in_hand=in_hand)) as results:
        for seen, _ in enumerate(results):
            assert taken - seen <= (in_hand or threads + 1)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_of_several_errors_the_first_in_order_is_raised(kind: type[BaseException]) -> None:
    """Though the later item fails first: the error does not depend on which thread was faster."""
    before = threading.enumerate()
    later = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            assert later.wait(60)
        if item == 2:
            later.set()
        if item:
            raise kind(item)
        return item

    with pytest.raises(kind, match=r"^1$"):
        list(ahead(work, range(3), 2, in_hand=3))
    assert threading.enumerate() == before


@pytest.mark.parametrize("ended_by", ["an error", "the caller"])
def test_what_is_under_way_is_told_to_stop(ended_by: str) -> None:
    """The second item works until it is told: without that this would not end."""
    before = threading.enumerate()
    stopping, begun = threading.Event(), threading.Event()
    stopped = []

    def work(item: int) -> int:
        if item == 1:
            begun.set()
            stopped.append(stopping.wait(60))
        elif item == 0:
            assert begun.wait(60)
            if ended_by == "an error":
                raise ValueError(item)
        return item

    with closing(ahead(work, range(9), 2, in_hand=9, stopping=stopping)) as results:
        if ended_by == "an error":
            with pytest.raises(ValueError, match="0"):
                next(results)
        else:
            assert next(results) == 0
    assert stopped == [True]
    assert threading.enumerate() == before


def test_an_error_of_the_items_themselves_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    before = threading.enumerate()
    with pytest.raises(ValueError, match="no more"):
        list(ahead(lambda item: item, items()))
    assert threading.enumerate() == before


# Importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, KeyError])
def test_collection_is_off_inside_and_afterwards_as_it_was(enabled: bool, error: type[Exception] | None) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        try:
            with uncollected():
                assert not gc.isenabled()
                if error:
                    raise error
        except KeyError:
            pass
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()
