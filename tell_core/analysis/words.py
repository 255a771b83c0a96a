"""Numbers and names as sentences for people show them."""

import math

ARM_WORDS = {"tell": "TELL", "sft": "plain SFT", "sft_matched": "SFT with as many steps"}


def metric_words(metric: str) -> str:
    """A metric's name as words."""
    return {"log_probability": "log-probability"}.get(metric, metric.replace("_", " "))


def count(value: float | None) -> str:
    """A whole number with thousands marked; "no" where there is none."""
    return "no" if value is None else f"{round(value):,}"


def rounded(value: float) -> int:
    """To two significant digits: more would claim a precision that is not there."""
    return int(round(value, 1 - math.floor(math.log10(value)))) if value > 0 else 0


def short(value: float) -> str:
    """A ratio with two significant digits."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def number(value: float) -> str:
    """A score with three significant digits."""
    return f"{value:.3g}".replace("-", "−")
