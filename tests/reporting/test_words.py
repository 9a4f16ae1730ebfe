"""Times, sizes and warnings as a person reads them."""

from __future__ import annotations

import pytest

from pyprune.reporting import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (60, "1 min"),
        (390, "6 min 30 s"),
        (3599.9, "60 min"),
        (7500, "2 h 5 min"),
        (155035, "43 h"),
    ],
)
def test_times_are_readable(seconds, text):
    assert words.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 B"),
        (1020, "1.0 KiB"),
        (400_736, "391 KiB"),
        (300 * 2**20, "300 MiB"),
        (1023 * 2**20, "1.0 GiB"),
        (37.76 * 2**30, "37.8 GiB"),
        (131.4 * 2**30, "131 GiB"),
    ],
)
def test_sizes_are_readable(size, text):
    assert words.size_text(size) == text


def test_warnings_that_differ_in_numbers_alone_are_shown_once():
    told = [f"model.layers.{i}.mlp.down_proj.weight norm grew {i}.5-fold" for i in range(30)] + ["something else"]
    assert words.distinct(told) == [told[0] + " (and 29 like it, in report.json)", "something else"]
