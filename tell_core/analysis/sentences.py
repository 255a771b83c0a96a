"""The forecast in plain words, for the command line and the report."""

from collections.abc import Mapping
from typing import Any

from tell_core.analysis.words import ARM_WORDS, count, metric_words, number, rounded

Entry = Mapping[str, Any]


def forecast_sentences(forecast: Entry, leverage: Entry) -> list[str]:
    """The answer of forecast.json about the primary metric: what SFT lacks, what more data gives.

    Args:
        forecast: Content of forecast.json.
        leverage: Content of leverage.json; without TELL or SFT in it nothing is said of them.

    Returns:
        For each curve its targets and what twice the data would bring, or why there is no
        forecast; at last how often forecasts of this run held.
    """
    metric = forecast["primary_metric"]
    entry = forecast["metrics"].get(metric)
    if entry is None:
        known = ", ".join(leverage["metrics"]) or "none"
        return [f"Nothing is forecast: no cell has the primary metric {metric!r} (there: {known})."]
    if not entry["curves"]:
        return ["Nothing is forecast: none of the arms tell, sft and sft_matched was run."]
    several = len({curve["general_budget_tokens"] for curve in entry["curves"]} - {None}) > 1
    sentences = []
    for curve in entry["curves"]:
        arm = _arm(curve, several)
        if curve["status"] == "undefined":
            sentences.append(f"No forecast for {arm}: {curve['reason']}.")
            continue
        sentences += [_target(target, curve, arm, forecast) for target in curve["targets"]]
        sentences.append(_gain(curve, arm, metric, forecast))
    return [*sentences, _calibration(entry["calibration"])]


def _arm(curve: Entry, several: bool) -> str:
    words = ARM_WORDS[curve["arm"]]
    general = curve["general_budget_tokens"]
    return f"{words} at {count(general)} general tokens" if several and general else words


def _target(target: Entry, curve: Entry, arm: str, forecast: Entry) -> str:
    label, measured = target["label"], count(curve["max_task_tokens"])
    if target["status"] == "reached":
        tokens = count(rounded(target["tokens"]))
        basis = "" if target["reason"] is None else f" ({target['reason']})"
        return _capital(f"{arm} reaches {label} with about {tokens} task tokens already{basis}.")
    if target["status"] == "beyond_horizon":
        horizon = count(rounded(curve["max_task_tokens"] * forecast["horizon_factor"]))
        return _capital(
            f"{arm} does not reach {label} within {horizon} task tokens, as far as this run can"
            f" say ({_more(target, forecast)})."
        )
    more = count(rounded(target["more_tokens"]))
    return (
        f"To reach {label}, {arm} needs {more} more task tokens than the {measured} measured"
        f" ({_more(target, forecast)})."
    )


def _more(target: Entry, forecast: Entry) -> str:
    """The interval of the further tokens; an end beyond the horizon is not known."""
    level, low, high = _level(forecast["confidence"]), target["low"], target["high"]
    if low is None:
        return f"{level}: more than the forecast reaches"
    if high is None:
        least = f"{count(rounded(low))} or more" if low > 0 else "none to beyond the forecast"
        return f"{level}: {least}"
    return f"{level}: {count(rounded(low))} to {count(rounded(high))}"


def _gain(curve: Entry, arm: str, metric: str, forecast: Entry) -> str:
    """What twice the largest measured amount would bring."""
    twice = 2 * curve["max_task_tokens"]
    gain = min(curve["gains"], key=lambda row: abs(row["task_tokens"] - twice))
    return (
        f"With {count(rounded(gain['more_tokens']))} more task tokens, {arm} would reach"
        f" {metric_words(metric)} {number(gain['score'])} ({_level(forecast['confidence'])}:"
        f" {number(gain['low'])} to {number(gain['high'])})."
    )


def _calibration(calibration: Entry) -> str:
    if not calibration["num_backtests"]:
        return "No budget could be held out to try these forecasts."
    return (
        f"Tried on larger budgets held out of this run, {calibration['num_covered']} of"
        f" {calibration['num_backtests']} scores lay inside their"
        f" {_level(calibration['nominal'])} interval."
    )


def _level(confidence: float) -> str:
    return f"{100 * confidence:g} %"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
