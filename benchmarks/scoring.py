"""What scoring costs: parsing and metrics against the whole evaluation of one cell.

Evaluates one cell several times on one thread and takes the seconds spent on metrics from the
evaluation's own log. Then each metric alone, in microseconds per item. By default with every metric
that needs no package and no labels of its own, which is more than anybody asks for.

    python benchmarks/scoring.py --model runs/demo/stages/world-.../base/model \
        --inputs runs/demo/stages/mix-...
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

from tell_core.evaluation.base import Metric, ScoredItem
from tell_core.evaluation.metrics import build_metrics
from tell_core.evaluation.parsing import parse_answer
from tell_core.evaluation.scoring import evaluate_cell
from tell_core.spec.model import EvaluationSpec, MetricSpec

OVER_TEXTS = (
    "bleu", "character_error_rate", "chrf", "chrf++", "exact_match", "gleu", "json_field_f1",
    "json_valid", "log_probability_per_byte", "rouge_l", "slot_f1",
)  # fmt: skip


class MetricSeconds(logging.Handler):
    """Collects the seconds that evaluations say they spent on metrics."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("computed %d metrics"):
            assert isinstance(record.args, tuple)
            self.seconds.append(float(record.args[1]))


def main() -> None:
    """Evaluate, and print medians as JSON."""
    arguments = _parse()
    evaluation = EvaluationSpec(
        metrics=tuple(MetricSpec(name=name) for name in arguments.metrics),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    collected = MetricSeconds()
    log = logging.getLogger("tell_core.evaluation.scoring")
    log.setLevel(logging.INFO)
    log.addHandler(collected)
    totals = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            evaluate_cell(
                model_path=arguments.model,
                revision=None,
                inputs=arguments.inputs,
                trained=arguments.trained,
                evaluation=evaluation,
                out=Path(directory),
                device=arguments.device,
            )
            totals.append(time.perf_counter() - started)
        items = _items(Path(directory) / "predictions.jsonl", evaluation)
    total, scoring = statistics.median(totals), statistics.median(collected.seconds)
    print(
        json.dumps(
            {
                "num_items": len(items),
                "evaluation_seconds": totals,
                "scoring_seconds": collected.seconds,
                "share": scoring / total,
                "microseconds_per_item": {
                    metric.name: _microseconds(metric, items)
                    for metric in build_metrics(evaluation)
                    if metric.items == "test"
                },
            },
            indent=1,
        )
    )


def _items(path: Path, evaluation: EvaluationSpec) -> list[ScoredItem]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        ScoredItem(
            row["item_id"], parse_answer(row["prediction"], evaluation.parse),
            parse_answer(row["reference"], evaluation.parse), {}, row["nll"], row["num_tokens"],
            row["num_bytes"],
        )
        for row in rows
    ]  # fmt: skip


def _microseconds(metric: Metric, items: list[ScoredItem]) -> float:
    started = time.perf_counter()
    metric.item_scores(metric.statistics(metric.payloads(items)))
    return 1e6 * (time.perf_counter() - started) / len(items)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the base model's directory")
    parser.add_argument("--inputs", type=Path, required=True, help="a stage mix-... of a run")
    parser.add_argument("--trained", type=Path, help="a stage train-... of the same run")
    parser.add_argument("--metrics", nargs="+", default=list(OVER_TEXTS))
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
