"""Numbers and tables as text: one way to round and one set of units everywhere."""

from decimal import Decimal

import pytest

from sparsity.common.text import bytes_text, count_text, finite_text, half_up, markdown_table, percent_text, power_text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (2.675, 2, "2.68"),
        (-2.675, 2, "-2.68"),
        (0.125, 2, "0.13"),
        (20.0, 2, "20.00"),
        (1e16, 2, "1.00e+16"),
        (Decimal("1.005"), 2, "1.01"),
        (float("nan"), 2, "nan"),
    ],
)
def test_a_half_is_rounded_away_from_zero_as_it_is_printed(value, digits, text):
    assert half_up(value, digits) == text


def test_counts_have_the_units_of_the_cards():
    assert [count_text(count) for count in (999, 4096, 57_940_480, 99_999_999, 1e8, 1.5e12)] == [
        "999", "4.10K", "57.94M", "100.00M", "0.10B", "1.50T"
    ]  # fmt: skip
    assert [count_text(count, 1, trim=True) for count in (8e6, 8.39e6, 524_288)] == ["8M", "8.4M", "524.3K"]


def test_shares_powers_and_bytes():
    assert (percent_text(0.575), percent_text(0.79995)) == ("57.50%", "80.00%")
    assert [power_text(value) for value in (3e-4, 6.4e-3, 1.0, 3.14e21)] == ["3e-4", "6.4e-3", "1e0", "3.14e21"]
    assert [bytes_text(size) for size in (999, 4_819_525_632, 2e12)] == ["999 B", "4.82 GB", "2.00 TB"]
    assert (finite_text(1.005, 2), finite_text(float("inf"), 2)) == ("1.01", "not finite")


def test_a_table_is_aligned_and_is_markdown():
    assert markdown_table(["Run", "N"], [["a", "1.20B"], ["longer", "5"]]) == (
        "| Run    | N     |\n|--------|-------|\n| a      | 1.20B |\n| longer | 5     |"
    )
