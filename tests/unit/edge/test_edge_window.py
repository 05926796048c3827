"""Who is under way, who gives up its place, and who is sent again; time is an argument."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from edge.config import LinkConfig
from edge.window import Window

STRANGERS = itertools.count(1000)
CONFIG = LinkConfig(window=4, retry_s=10.0, retry_max_s=40.0)


def full_window() -> Window:
    """Frames 1 to 4 under way since 0 s, all kept by the broker."""
    window = Window(CONFIG)
    for row in range(1, 5):
        window.publish(row, 0, mid=row, now_s=0.0)
        window.acknowledge(row, kept=True, now_s=0.0)
    return window


def free_places(window: Window, now_s: float) -> int:
    """Fill the window; how many frames it took."""
    free = 0
    while window.has_room(now_s):
        row = next(STRANGERS)
        window.publish(row, 0, mid=row, now_s=now_s)
        free += 1
    return free


def test_a_place_is_free_only_after_both_acknowledgement_and_answer() -> None:
    for answer_first in (True, False):
        window = Window(LinkConfig(window=1))
        window.publish(1, 0, mid=9, now_s=0.0)
        if answer_first:
            window.answer(1, 1.0)
        else:
            window.acknowledge(9, kept=True, now_s=1.0)
        assert not window.has_room(1.0)
        if answer_first:
            window.acknowledge(9, kept=False, now_s=1.0)  # refused a copy of what is answered already
        else:
            window.answer(1, 1.0)
        assert window.has_room(1.0)


def test_a_late_frame_is_due_again_after_a_pause_that_doubles_up_to_a_limit() -> None:
    window, now_s, longest_s = Window(CONFIG), 0.0, []
    for tries in range(5):
        window.publish(1, tries, mid=1, now_s=now_s)
        window.acknowledge(1, kept=True, now_s=now_s)
        window.give_up(now_s + 9.9)
        assert window.take_due(now_s + 9.9) is None
        now_s += 10.1  # off the edge, where floats round
        window.give_up(now_s)
        pause_s = next(step / 10 for step in range(1, 500) if window._retries[0][0] <= now_s + step / 10)
        longest_s.append(pause_s)
        now_s += pause_s
        assert window.take_due(now_s) == (1, tries + 1)
    for pause_s, limit_s in zip(longest_s, (10, 20, 40, 40, 40), strict=True):
        assert limit_s / 2 <= pause_s <= limit_s + 0.1


def test_all_late_frames_give_up_their_places_while_the_cloud_answers_others() -> None:
    window = full_window()
    window.answer(4, 5.0)
    window.give_up(10.0)
    assert free_places(window, 10.0) == 4


def test_only_one_frame_in_retry_s_gives_up_its_place_while_the_cloud_is_away() -> None:
    window = full_window()
    for _ in range(3):
        window.give_up(10.0)
    assert free_places(window, 10.0) == 1
    window.give_up(19.9)
    assert free_places(window, 19.9) == 0
    window.give_up(20.0)
    assert free_places(window, 20.0) == 1


def test_everything_pauses_when_the_broker_keeps_nothing() -> None:
    window = Window(CONFIG)
    window.publish(1, 0, mid=1, now_s=0.0)
    window.acknowledge(1, kept=False, now_s=0.0)
    assert not window.has_room(9.9)
    assert window.has_room(10.0)
    assert window.take_due(10.0) == (1, 1)


def test_a_broker_without_memory_makes_what_it_kept_due_at_once() -> None:
    window = full_window()
    window.answer(2, 1.0)
    window.publish(5, 0, mid=5, now_s=1.0)
    window.forget(2.0)
    assert [window.take_due(2.0) for _ in range(4)] == [(1, 1), (3, 1), (4, 1), None]
    window.acknowledge(5, kept=True, now_s=3.0)  # paho sent this one again by itself
    window.answer(5, 3.0)
    assert free_places(window, 3.0) == 4


def test_acknowledgements_and_answers_of_strangers_change_nothing() -> None:
    window = full_window()
    window.acknowledge(99, kept=False, now_s=0.0)
    window.answer(99, 0.0)
    assert free_places(window, 0.0) == 0


EVENTS = st.lists(
    st.tuples(st.sampled_from(["tick", "acknowledge", "refuse", "answer", "forget"]), st.integers(1, 8)),
    max_size=60,
)


@given(events=EVENTS)
def test_a_frame_without_an_answer_is_never_forgotten(events: list[tuple[str, int]]) -> None:
    """Eight frames: each is always under way, waiting to be sent, waiting to be sent again, or answered."""
    window, now_s, mid = Window(CONFIG), 0.0, 0
    fresh, answered, mids = list(range(1, 9)), set[int](), dict[int, int]()
    for event, row in [*events, *[("tick", 0)] * 400]:
        now_s += 1.0
        settled = event == "tick" and row == 0
        if event == "answer":
            window.answer(row, now_s)
            answered.add(row)
        elif event == "forget":
            window.forget(now_s)
        elif event in ("acknowledge", "refuse") and row in mids:
            window.acknowledge(mids.pop(row), event == "acknowledge", now_s)
        window.give_up(now_s)
        while window.has_room(now_s):
            due = window.take_due(now_s)
            if due is None and not fresh:
                break
            row, tries = due or (fresh.pop(0), 0)
            if row in answered:
                continue  # as the spool no longer has it
            mid += 1
            window.publish(row, tries, mid, now_s)
            mids[row] = mid
        if settled:  # from here on the broker and the cloud do their duty
            for row in list(mids):
                window.acknowledge(mids.pop(row), True, now_s)
                window.answer(row, now_s)
                answered.add(row)
    assert answered == set(range(1, 9))
