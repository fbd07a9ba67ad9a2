"""Quantities and names as people read them."""

from datetime import datetime


def seconds_text(seconds: float) -> str:
    """12.3 µs, 4.56 ms, 1.23 s, 118 s or 3 min 5 s."""
    if seconds >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes < 600 else f"{seconds / 3600:.1f} h"
    if seconds >= 0.9995 or seconds <= 0:
        return f"{digits(seconds)} s"
    return f"{digits(1e3 * seconds)} ms" if seconds >= 0.9995e-3 else f"{digits(1e6 * seconds)} µs"


def bytes_text(num_bytes: float) -> str:
    """512 B, 64 KiB or 16 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{digits(num_bytes)} {unit}"
        num_bytes /= 1024
    return f"{digits(num_bytes)} TiB"


def digits(value: float) -> str:
    """About three digits, with an exponent only below 0.001 and from a million on."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    decimals = 0 if size >= 99.95 or value == int(value) else 1 if size >= 9.995 else 2 if size >= 0.9995 else 4
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def counted(number: int, noun: str) -> str:
    """1 check, 2 checks."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percent_text(share: float) -> str:
    """98.34 %."""
    return f"{100 * share:.2f} %"


def moment_text(time: float) -> str:
    """Seconds since 1970 as 2026-03-02 14:05:12 CET, in the zone of this machine; empty where there is no such time."""
    try:
        return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except (OSError, OverflowError, ValueError):
        return ""


def as_title(name: str) -> str:
    """The name of a check or a value with spaces and a capital: Slow rank."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def as_value(value: object) -> str:
    """A value as a configuration file has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
