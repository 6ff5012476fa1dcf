"""Handing on from one phase to another."""

from __future__ import annotations

import threading

import pytest

from onlinerl.controller.feed import Feed, Stopped


def test_what_is_put_is_taken_in_order_until_it_is_closed():
    feed: Feed[int] = Feed(threading.Event())
    feed.put([1, 2, 3])
    assert feed.take(2) == [1, 2]
    assert feed.take(9) == [3], "no waiting for more than there is"
    threading.Timer(0.05, lambda: feed.put([4])).start()
    assert feed.take(9) == [4]
    threading.Timer(0.05, feed.close).start()
    assert feed.take(9) == []
    assert feed.take(9) == []


def test_one_that_is_complete_from_the_start():
    feed = Feed.of(range(3), threading.Event())
    assert [feed.take(2), feed.take(2), feed.take(2)] == [[0, 1], [2], []]


def test_a_run_that_is_stopped_keeps_nobody_waiting():
    stop = threading.Event()
    feed: Feed[int] = Feed(stop)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        feed.take(1)
    with pytest.raises(Stopped):
        Feed.of([1], stop).take(1)


def test_many_threads_share_a_feed():
    feed, taken, lock = Feed[int](threading.Event()), list[int](), threading.Lock()

    def work():
        while things := feed.take(3):
            with lock:
                taken.extend(things)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(100):
        feed.put([i])
    feed.close()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(taken) == list(range(100))
