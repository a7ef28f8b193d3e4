from __future__ import annotations

import pytest

from streamcomp.errors import RecipeError
from streamcomp.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1073741824", 2**30),
        ("512B", 512),
        ("1K", 2**10),
        ("900MiB", 900 * 2**20),
        ("32G", 32 * 2**30),
        ("32GB", 32 * 2**30),
        ("32GiB", 32 * 2**30),
        ("32 gib", 32 * 2**30),
        (" 1.5g ", 3 * 2**29),
        ("2T", 2**41),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "+1G", "1e9", "1,5G", "1.G", ".5G", "12X", "1GG", "0x10", "1 2", "50%"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not understood: write 32G"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "0G", "0.4B"])
def test_no_bytes_at_all_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="above zero"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "size"), [("75%", 750), ("100%", 1000), ("12.5 %", 125), (" 1% ", 10), ("1K", 1024)]
)
def test_a_share_is_taken_of_the_whole(text: str, size: int) -> None:
    assert parse_bytes(text, whole=1000) == size


@pytest.mark.parametrize("text", ["0%", "100.1%", "250%"])
def test_a_share_beyond_the_whole_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="above 0% and at most 100%"):
        parse_bytes(text, whole=1000)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (6 * 2**30, "6.00 GiB"),
        (int(5.94 * 2**30), "5.94 GiB"),
        (52.34 * 2**20, "52.3 MiB"),
        (900 * 2**20, "900 MiB"),
        (2000 * 2**40, "2000 TiB"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_sizes_are_written_with_three_digits(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize("size", [1, 17, 1000, 1024, 123456, 10**7, 2**33 + 12345, 3 * 10**12])
def test_a_size_written_is_read_back_within_a_percent(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (4.23, "4.2s"),
        (10, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (73, "1m13s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_times_are_written_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
