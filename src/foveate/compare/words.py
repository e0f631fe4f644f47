"""What metrics are called, and figures in people's units."""

from __future__ import annotations

import math

from foveate.compare.frontier import Figure, Row

LABELS = {  # the table's columns in this order; whatever else a task measures comes after them, by name
    "perplexity": "perplexity",
    "passkey": "passkeys answered",
    "copy_surprisal_ratio": "copy surprisal",
    "copy_surprisal_ratio_permuted": "copy surprisal, permuted",
    "copy_surprisal_ratio_novel": "copy surprisal, novel",
    "cache_fraction": "cache",
    "cache_bytes": "cache held",
    "decode_speedup": "decoding",
    "prefill_speedup": "prefill",
    "decode_tokens_per_second": "decoded tokens/s",
    "peak_memory_bytes": "peak memory",
    "parameters": "parameters",
}

# Said elsewhere, or only useful to a program.
UNSHOWN = {
    "perplexity_ratio",
    "prefill_seconds",
    "prefill_tokens_per_second",
    "tokens",
    "held_fraction",
    "distinct_2",
}
PERCENT = {"passkey", "cache_fraction"}


def texts(metric: str, figure: Figure) -> tuple[str, str]:
    """A figure and its interval; the interval is empty where there is none.

    Example:
        >>> texts("perplexity", Figure(12.3141, 11.93, 12.81))
        ('12.31', '[11.9, 12.8]')
        >>> texts("cache_bytes", Figure(23592960))
        ('22.5 MiB', '')
    """
    value = _number(metric, figure.value, 4 if metric == "perplexity" else 3)
    if figure.low is None or figure.high is None or figure.low == figure.high:
        return value, ""
    return value, f"[{_number(metric, figure.low, 3)}, {_number(metric, figure.high, 3)}]"


def _number(metric: str, value: float, digits: int) -> str:
    if metric in PERCENT:
        return f"{100 * value:.{0 if value >= 0.0995 or value == 0 else 1}f}%"
    if metric.endswith("_speedup"):
        return f"{value:.2f}x"
    if metric.endswith("_bytes"):
        return f"{_significant(value / 2**20, digits)} MiB"
    if metric == "parameters":
        return f"{_significant(value / 1e6, 4)} M"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    """`digits` significant digits, as 1e+06 only from a million on."""
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, places):,.{max(places, 0)}f}"


def change_text(row: Row, metric: str, task: str | None) -> str:
    """A quality against that of full; empty for full itself and for what is no quality.

    Example:
        >>> from foveate.compare.frontier import Change
        >>> row = Row("tiny", "h2o", changes={"passkey": {"passkey": Change(-0.5, high=-0.5, real=True)}})
        >>> change_text(row, "passkey", "passkey")
        '−50 points'
    """
    change = row.changes.get(task or "", {}).get(metric)
    if change is None or row.recipe == "full":
        return ""
    if not change.real:
        return "≈ full"
    if metric == "perplexity":
        percent = _signed(100 * (change.value - 1), 1) + "%"
        return percent if change.value < 2 else f"{change.value:.3g}x full"
    if metric in PERCENT:
        return _signed(100 * change.value, 0) + " points"
    return _signed(change.value, 2)


def _signed(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")
