from __future__ import annotations

from itertools import chain, count, repeat
from types import ModuleType

import pytest

from te_runtime.bench_scenarios import MAX_WARM_CALLS, measure_calls, measure_pairs, warm_up

MS = 1_000_000


def ignore(_part: float) -> None:
    pass


def test_calls_follow_each_other_until_the_time_is_over(bench_fakes: ModuleType) -> None:
    clock, parts = bench_fakes.FakeClock(), []
    timed = measure_calls(
        clock.calls(repeat(3 * MS)), clock, rows_per_call=8, duration_ns=10 * MS, tick=parts.append
    )
    assert list(timed.latencies_ns) == [3 * MS] * 4
    assert (timed.wall_ns, timed.cpu_ns, timed.rows) == (12 * MS, 6 * MS, 32)
    assert timed.rows_per_s == pytest.approx(32 / 0.012)
    assert parts == [0.3, 0.6, 0.9, 1.0]
    assert not timed.is_interrupted


def test_a_call_longer_than_the_duration_is_timed_once(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    timed = measure_calls(clock.calls(repeat(9 * MS)), clock, rows_per_call=1, duration_ns=1, tick=ignore)
    assert list(timed.latencies_ns) == [9 * MS]


def test_an_interrupt_leaves_what_was_timed(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    timed = measure_calls(
        clock.calls(iter([MS, 2 * MS, -1])), clock, rows_per_call=1, duration_ns=90 * MS, tick=ignore
    )
    assert list(timed.latencies_ns) == [MS, 2 * MS]
    assert timed.wall_ns == 3 * MS
    assert timed.is_interrupted


def test_warm_up_ends_where_two_tens_agree(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    times = chain(repeat(9 * MS, 10), repeat(2 * MS, 10), repeat(MS))
    found = warm_up(clock.calls(times), clock, limit_ns=1000 * MS)
    assert (found.calls, found.settled) == (40, True)


def test_warm_up_has_an_end_in_calls_and_in_time(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    growing = (MS * 2 ** (number // 10) for number in count())
    assert warm_up(clock.calls(growing), clock, limit_ns=25 * MS).calls == 18  # 10 of 1 ms, then of 2 ms
    grows = (number // 10 % 2 * MS + MS for number in count())
    found = warm_up(clock.calls(grows), clock, limit_ns=10**15)
    assert (found.calls, found.settled) == (MAX_WARM_CALLS, False)


def test_pairs_take_turns_and_time_every_second_call(bench_fakes: ModuleType) -> None:
    clock, order = bench_fakes.FakeClock(), []

    def named(name: str, time_ns: int):  # type: ignore[no-untyped-def]
        call = clock.calls(repeat(time_ns))
        return lambda number: (order.append(name), call(number))

    first, second = measure_pairs(
        (named("A", MS), named("B", 2 * MS)), clock, rows_per_call=4, duration_ns=17 * MS, tick=ignore
    )
    assert "".join(order) == "AABBBBAAAABB"
    assert list(first.latencies_ns) == [MS] * 3
    assert list(second.latencies_ns) == [2 * MS] * 3
    assert (second.wall_ns, second.cpu_ns, second.rows) == (6 * MS, 3 * MS, 12)


def test_an_interrupted_pair_is_left_out(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    steady, stopped = clock.calls(repeat(MS)), clock.calls(iter([MS, MS, MS, MS, -1]))
    first, second = measure_pairs((steady, stopped), clock, rows_per_call=1, duration_ns=99 * MS, tick=ignore)
    assert (len(first.latencies_ns), len(second.latencies_ns)) == (2, 2)
    assert first.is_interrupted
