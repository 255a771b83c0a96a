"""What one prediction of the quantization hypothesis came to, and the verdict on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tell_core.analysis.multiple import holm

Judgement = Literal["supported", "contradicted", "undetermined"]

CLAIMS: Mapping[str, str] = {
    "P1": "With task data fixed, the loss of single items falls in a step as general data grows.",
    "P2": "Shared units are learned before specific ones, and more general data moves only the "
    "shared ones earlier.",
    "P3": "The more often a skill is used, the earlier it is learned: time ∝ frequency^−β.",
    "P4": "The anchor makes task data separable, and that is what the gain comes from.",
    "P5": "Extensive shuffle beats ordered data, in the score and in what is forgotten.",
    "P6": "TELL reaches the score of SFT with less task data.",
    "P7": "TELL moves the directions of specific units alone, SFT those of both groups.",
}


class Component(NamedTuple):
    """One measurement that a prediction rests on.

    Attributes:
        name: What was measured, with its unit.
        estimate: Its value.
        low: Lower end of its interval, or None where unbounded.
        high: Upper end.
        p_value: Against the null, two-sided.
        is_as_predicted: Whether the estimate lies on the predicted side of the null.
    """

    name: str
    estimate: float
    low: float | None
    high: float | None
    p_value: float
    is_as_predicted: bool


@dataclass(frozen=True)
class Finding:
    """What a run says about one prediction.

    Attributes:
        prediction: "P1" to "P7".
        claim: The prediction in words.
        components: Measurements, the leading one first; empty where nothing could be measured.
        needs: What a run must have to determine it, where this one has not; else None.
        remark: What the reader must know of these numbers.
        figure: Numbers behind it, for the report's figure.
    """

    prediction: str
    claim: str
    components: tuple[Component, ...] = ()
    needs: str | None = None
    remark: str = ""
    figure: Mapping[str, Any] = field(default_factory=dict)

    @property
    def p_value(self) -> float | None:
        """The p-value that enters Holm's correction.

        A prediction of several parts holds only if all do: the largest p-value. If a part points
        the other way, the smallest of those parts' p-values, times their number.
        """
        if self.needs is not None or not self.components:
            return None
        against = [part.p_value for part in self.components if not part.is_as_predicted]
        if against:
            return min(1.0, len(against) * min(against))
        return max(part.p_value for part in self.components)


def unmeasured(prediction: str, needs: str) -> Finding:
    """A prediction that the run cannot determine, with what it needs."""
    return Finding(prediction, CLAIMS[prediction], needs=needs)


def judge(findings: Sequence[Finding], confidence: float) -> list[dict[str, Any]]:
    """Rows of the table of predictions: numbers, p after Holm over those with a p, the verdict.

    Args:
        findings: One per prediction.
        confidence: 1 minus the level of the tests.
    """
    corrected = holm([finding.p_value for finding in findings])
    return [
        _row(finding, p_holm, confidence)
        for finding, p_holm in zip(findings, corrected, strict=True)
    ]


def _row(finding: Finding, p_holm: float | None, confidence: float) -> dict[str, Any]:
    verdict, reason = _verdict(finding, p_holm, confidence)
    leading = finding.components[0] if finding.components else None
    return {
        "prediction": finding.prediction,
        "claim": finding.claim,
        "measure": leading.name if leading else None,
        "estimate": leading.estimate if leading else None,
        "low": leading.low if leading else None,
        "high": leading.high if leading else None,
        "p_value": finding.p_value,
        "p_holm": p_holm,
        "verdict": verdict,
        "reason": reason,
        "remark": finding.remark,
        "components": [part._asdict() for part in finding.components],
        "figure": dict(finding.figure),
    }


def _verdict(
    finding: Finding, p_holm: float | None, confidence: float
) -> tuple[Judgement, str | None]:
    if finding.needs is not None:
        return "undetermined", finding.needs
    if p_holm is None or p_holm > 1 - confidence:
        open_parts = [part.name for part in finding.components if part.p_value > 1 - confidence]
        what = "; ".join(open_parts) or "all parts together, allowing for the other predictions"
        return "undetermined", f"the null is not excluded: {what}"
    if all(part.is_as_predicted for part in finding.components):
        return "supported", None
    return "contradicted", None
