from __future__ import annotations

import threading
import time

import pytest

from te_runtime.side_by_side import side_by_side


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_answers_come_in_the_order_of_the_jobs(threads: int | None) -> None:
    def job(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    jobs = [lambda number=number: job(number) for number in range(20)]
    assert side_by_side(jobs, threads) == list(range(20))


def test_no_jobs() -> None:
    assert side_by_side([]) == []


def test_two_jobs_that_wait_for_each_other_both_run() -> None:
    meeting = threading.Barrier(2, timeout=10)
    assert sorted(side_by_side([meeting.wait, meeting.wait], 2)) == [0, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_in_the_order_of_the_jobs_is_raised_and_no_job_is_begun_after(threads: int) -> None:
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        if number >= 2:
            time.sleep(0.05 if number == 2 else 0)
            raise ValueError(f"job {number}")

    with pytest.raises(ValueError, match="job 2"):
        side_by_side([lambda number=number: job(number) for number in range(50)], threads)
    assert len(begun) <= 2 + threads
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count


def test_an_interrupt_in_a_job_reaches_the_caller() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([interrupted, lambda: None], 2)
