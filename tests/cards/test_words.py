from __future__ import annotations

import math

import pytest

from cards import words
from quants.filetypes import FILE_TYPES


@pytest.mark.parametrize(
    ("count", "text"),
    [(24_153_690_112, "24.15 B"), (1_000_000_000, "1.00 B"), (134_515_008, "134.5 M"), (0, "0.0 M")],
)
def test_parameters_in_billions_or_millions(count: int, text: str) -> None:
    assert words.billions(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(14_437_000_000, "14.4 GB"), (999_000_000, "999 MB"), (270_400_000, "270 MB"), (2_600, "3 kB"), (12, "12 bytes")],
)
def test_bytes_are_decimal(count: int, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (42.2, "42 s"), (99.7, "2 min"), (1530, "26 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1], "0 and 1"),
        ([0, 1, 2, 3, 7, 30, 31], "0 to 3, 7, 30 and 31"),
        ([0, 1, 2], "0 to 2"),
    ],
)
def test_spans_of_layers(numbers: list[int], text: str) -> None:
    assert words.spans(numbers) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "infinite"), (math.inf, "infinite"), (math.nan, "-"), (1.456, "1.46"), (-0.1, "-0.10")]
)
def test_numbers_that_are_none_are_words(value: float | None, text: str) -> None:
    assert words.number(value, 2) == text


def test_every_file_type_that_can_be_made_has_its_sentence() -> None:
    assert words.WHEN.keys() == FILE_TYPES.keys() == set(words.PREFERRED)
