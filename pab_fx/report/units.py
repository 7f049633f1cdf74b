"""Numbers for people: one unit for a column, about three digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def unit_of(sizes: Iterable[int]) -> str:
    """The unit in which to show sizes in bytes side by side: the largest that the largest of them fills.

    Example:
        >>> unit_of([0, 512, 3 * 2**20]), unit_of([])
        ('MiB', 'KiB')
    """
    largest = max(sizes, default=0)
    return BYTES[max((i for i in range(1, len(BYTES)) if largest >= 1024**i), default=1)]


def in_bytes(size: int, unit: str | None = None) -> str:
    """A size in bytes, in that unit or the one that suits it.

    Example:
        >>> in_bytes(1536), in_bytes(1536, "MiB"), in_bytes(0, "MiB"), in_bytes(5 * 2**30)
        ('1.5 KiB', '< 0.1 MiB', '0 MiB', '5.0 GiB')
    """
    unit = unit or unit_of([size])
    scaled = size / 1024 ** BYTES.index(unit)
    return f"{scaled:.1f} {unit}" if scaled >= 0.05 else f"< 0.1 {unit}" if size else f"0 {unit}"


def in_seconds(seconds: float) -> str:
    """A time.

    Example:
        >>> in_seconds(0.0123), in_seconds(4.2), in_seconds(3e-6)
        ('12.3 ms', '4.20 s', '3.00 us')
    """
    scale, unit = next((each for each in SECONDS if seconds >= each[0]), SECONDS[-1])
    return f"{_digits(seconds / scale)} {unit}"


def in_flops(count: int) -> str:
    """A number of floating-point operations.

    Example:
        >>> in_flops(1_234_000), in_flops(12), in_flops(0)
        ('1.23 M', '12', '0')
    """
    scale, prefix = next((each for each in COUNTS if count >= each[0]), (1.0, ""))
    return f"{_digits(count / scale)} {prefix}" if prefix else str(count)


def in_percent(share: float | None) -> str:
    """A share; "" for one that is not known.

    Example:
        >>> in_percent(0.1234), in_percent(1.0), in_percent(None)
        ('12.3 %', '100 %', '')
    """
    return "" if share is None else f"{_digits(100 * share)} %"


def counted(number: int, thing: str) -> str:
    """So many of a thing.

    Example:
        >>> counted(1, "graph"), counted(2, "graph")
        ('1 graph', '2 graphs')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def listed(things: Sequence[str]) -> str:
    """Things with commas and an "and".

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join(filter(None, (", ".join(things[:-1]), *things[-1:])))


def _digits(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:.0f}"
