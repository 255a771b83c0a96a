"""Numbers as a reader wants them: grouped tokens, ratios with two digits, intervals, bounds."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MISSING = "–"
MINUS = "−"

METRIC_TITLES: Mapping[str, str] = {
    "log_probability": "Log-probability of the reference, nats per token",
    "log_probability_per_byte": "Log-probability of the reference, nats per byte",
    "general_log_probability": "Log-probability of general data, nats per token",
    "retention_log_probability": "Log-probability of the retention set, nats per token",
    "exact_match": "Exact match",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "bleu": "BLEU",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "label_f1": "F1 of the positive label",
    "mcc": "Matthews correlation",
    "json_valid": "Share of valid JSON",
    "gleu": "GLEU",
    "character_error_rate": "Character error rate",
    "rouge_l": "ROUGE-L",
}


def as_number(value: object) -> float | None:
    """Return ``value`` as a finite float, or None for anything else (null, NaN, infinity, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def format_count(value: object) -> str:
    """Write a whole number with thousands grouped: 12000 -> "12,000"."""
    number = as_number(value)
    return MISSING if number is None else f"{round(number):,}".replace("-", MINUS)


def format_short_tokens(tokens: float) -> str:
    """Write tokens for an axis: 500 -> "500", 1500 -> "1.5k", 2e6 -> "2M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"


def format_score(value: object, *, signed: bool = False) -> str:
    """Write a score with three decimals below 10 and one above, and a typographic minus."""
    number = as_number(value)
    if number is None:
        return MISSING
    digits = 3 if abs(number) < 10 else 1
    sign = "+" if signed else ""
    return f"{number:{sign}.{digits}f}".replace("-", MINUS)


def format_ratio(value: object) -> str:
    """Write a leverage ratio with two significant digits below 100: 4.123 -> "4.1"."""
    number = as_number(value)
    if number is None:
        return MISSING
    if number >= 9.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def format_share(value: object) -> str:
    """Write a share between 0 and 1 as a percentage: 0.124 -> "12 %", with a space that holds."""
    number = as_number(value)
    return MISSING if number is None else f"{100 * number:.0f}\N{NO-BREAK SPACE}%"


def format_seconds(value: object) -> str:
    """Write a duration in the largest fitting unit: 75 -> "1.2 min"."""
    number = as_number(value)
    if number is None:
        return MISSING
    if number < 60:
        return f"{number:.1f} s"
    return f"{number / 60:.1f} min" if number < 3600 else f"{number / 3600:.1f} h"


def format_megabytes(value: object) -> str:
    """Write bytes as MB (10^6 bytes)."""
    number = as_number(value)
    return MISSING if number is None else f"{number / 1e6:,.0f} MB"


def format_rate(value: object) -> str:
    """Write a learning rate or p-value compactly: 0.00002 -> "2.0e-05"."""
    number = as_number(value)
    if number is None:
        return MISSING
    return f"{number:.3g}" if number == 0 or abs(number) >= 1e-4 else f"{number:.1e}"


def format_p_value(value: object) -> str:
    """Write a p-value with two significant digits, tiny ones as a bound: 0.00002 -> "< 0.001"."""
    number = as_number(value)
    if number is None:
        return MISSING
    return "< 0.001" if number < 0.001 else f"{number:.2g}"


def format_time(text: str) -> str:
    """Write an ISO 8601 time to the minute: "2026-03-02 10:11 UTC"; other text stays."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def format_score_interval(low: object, high: object, *, signed: bool = False) -> str:
    """Write an interval of scores, or nothing when either end is missing."""
    if as_number(low) is None or as_number(high) is None:
        return ""
    return f"[{format_score(low, signed=signed)}, {format_score(high, signed=signed)}]"


def leverage_bound(row: Mapping[str, Any]) -> float | None:
    """Return the bound of a leverage ratio that is only known to lie above or below it."""
    if row.get("censored") not in ("above", "below"):
        return None
    end = "low" if row["censored"] == "above" else "high"
    bound = as_number(row.get("bound"))
    return as_number(row.get(end)) if bound is None else bound


def format_leverage(row: Mapping[str, Any]) -> str:
    """Write one entry of ``leverage.json``: ratio with interval, a bound, or "undefined"."""
    bound = leverage_bound(row)
    if bound is not None:
        return f"{'≥' if row['censored'] == 'above' else '≤'} {format_ratio(bound)}×"
    ratio = as_number(row.get("ratio"))
    if row.get("censored") != "none" or ratio is None:
        return "undefined"
    return f"{format_ratio(ratio)}× {format_leverage_interval(row)}"


def format_leverage_interval(row: Mapping[str, Any]) -> str:
    """Write the interval of a leverage ratio; a null end is unbounded, as bootstrap draws are."""
    low, high = as_number(row.get("low")), as_number(row.get("high"))
    lower = "(0" if low is None else f"[{format_ratio(low)}"
    upper = "∞)" if high is None else f"{format_ratio(high)}]"
    return f"{lower}, {upper}"


def metric_title(metric: str) -> str:
    """Return the written name of a metric; an unknown one keeps its own name."""
    if metric.startswith("harness/"):
        return " · ".join(metric.split("/")[1:]) + " (harness)"
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def short_metric_title(metric: str) -> str:
    """Return the written name of a metric without unit, for the axis of a small figure."""
    return metric_title(metric).split(",")[0].replace(" of the reference", "")


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: (1, "seed") -> "1 seed", (3, "seed") -> "3 seeds"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def clip(value: object, length: int) -> str:
    """Return the beginning of a text, an ellipsis where it was cut."""
    text = "" if value is None else str(value)
    return text if len(text) <= length else text[:length].rstrip() + " …"
