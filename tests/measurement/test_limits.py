"""How long a request may take: the least of what the caller, the run and the requests before say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from autocompress.measurement.limits import RequestLimits
from autocompress.runs.deadline import Deadline


def test_without_a_deadline_the_caller_s_limit_counts() -> None:
    assert RequestLimits().seconds("infer", "e", 5, 300) == 300


def test_a_request_takes_half_of_what_is_left_and_the_last_ones_all() -> None:
    limits = RequestLimits(Deadline.after(100))
    assert limits.seconds("infer", "e", 1, 300) == pytest.approx(50, abs=1)
    assert limits.seconds("infer", "e", 1, 20) == 20
    with limits.until(Deadline.after(30), share=1.0):
        assert limits.seconds("infer", "e", 1, 300) == pytest.approx(30, abs=1)
    assert limits.seconds("infer", "e", 1, 300) == pytest.approx(50, abs=1)


def test_a_large_graph_has_longer_to_build_and_the_user_s_word_counts(tmp_path: Path) -> None:
    onnx = tmp_path / "model.onnx"
    onnx.touch()
    with (tmp_path / "model.onnx.data").open("wb") as data:
        data.truncate(200 * 2**20)
    limits = RequestLimits()
    assert limits.seconds("build", "e", 1, 300, onnx) == 600
    assert limits.seconds("build", "e", 1, 300, tmp_path / "small.onnx") == 300
    limits = RequestLimits(Deadline.after(100), build_s=90.0)
    # It is no more cut to a share, but to what there is.
    assert limits.seconds("build", "e", 1, 300, onnx) == 90
    limits.deadline = Deadline.after(10)
    assert limits.seconds("build", "e", 1, 300, onnx) == pytest.approx(10, abs=1)


def test_what_takes_ten_times_the_longest_hangs_where_requests_are_alike() -> None:
    for learns, expected in ((False, 300), (True, 120)):
        limits = RequestLimits(learns=learns)
        limits.answered("infer", "e", 100, 0.5)
        limits.answered("infer", "e", 100, 1.2)
        assert limits.seconds("infer", "e", 1000, 300) == pytest.approx(expected)
        assert limits.seconds("infer", "other", 1000, 300) == 300
    assert limits.seconds("infer", "e", 1, 300) == 30


@pytest.mark.parametrize(("used", "again"), [(0.1, True), (None, True), (9.0, False)])
def test_what_computes_is_not_asked_again(used: float | None, again: bool) -> None:
    limits = RequestLimits()
    assert limits.again_after_hang(10, used) == again
    assert not limits.again_after_hang(10, 0.1)
    limits.new_candidate()
    limits.deadline = Deadline(time.monotonic() - 1)
    assert not limits.again_after_hang(10, 0.1)
