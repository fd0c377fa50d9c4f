"""The timing helper."""

import pytest

from dyninf.timing import Timing, device_name, measure


def test_medians_and_percentiles_by_hand():
    timing = Timing(samples=(5.0, 1.0, 2.0, 3.0, 4.0))
    # Sorted 1 2 3 4 5: the median is 3; p10 lies at index 0.4, p90 at 3.6.
    assert (timing.median, timing.p10, timing.p90) == pytest.approx((3.0, 1.4, 4.6))
    assert timing.per(2).samples == (2.5, 0.5, 1.0, 1.5, 2.0)


def test_runs_are_counted_and_set_up_untimed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    calls = []

    def setup():
        now[0] += 100.0
        return len(calls)

    def work(number):
        calls.append(number)
        now[0] += 1.0 + number

    assert measure(work, warmup=2, repeats=3, setup=setup).samples == (3.0, 4.0, 5.0)
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}], ids=["repeats", "warmup"])
def test_no_run_that_counts_is_refused(arguments):
    with pytest.raises(ValueError, match="expected repeats >= 1"):
        measure(lambda: None, **arguments)


def test_the_device_has_a_name():
    assert device_name()
