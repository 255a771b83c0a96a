"""One cell from its inputs to predictions and scores, on a tiny random model."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tell_core.errors import DataError, EvaluationError, InputError
from tell_core.evaluation.base import ScoredItem
from tell_core.evaluation.generation import Decoding, Request, generate
from tell_core.evaluation.metrics import build_metric, build_metrics, metric_statistics
from tell_core.evaluation.parsing import Answer
from tell_core.evaluation.scoring import check_references, evaluate_cell
from tell_core.spec.model import (
    EvaluationSpec,
    HarnessSpec,
    MetricSpec,
    ParseSpec,
    TrainingSpec,
)
from tell_core.training.models import LoadedModel, attach_lora, detach_adapter, save_trained

WriteInputs = Callable[..., Path]

ITEMS = [
    {"item_id": "test-0", "prompt": "Is it so?", "reference": '{"label": "yes"}'},
    {"item_id": "test-1", "prompt": "Really? Tell me.", "reference": '{"label": "no"}'},
    {"item_id": "test-2", "prompt": "Or else", "reference": '{"label": "Ísland"}'},
]
LABELS = ("yes", "no", "Ísland")


def evaluation_of(*metrics: MetricSpec | str, **settings: Any) -> EvaluationSpec:
    chosen = tuple(MetricSpec(name=m) if isinstance(m, str) else m for m in metrics)
    defaults: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2}
    return EvaluationSpec(metrics=chosen, **(defaults | settings))


ALL_METRICS = evaluation_of(
    "exact_match",
    "json_valid",
    "accuracy",
    MetricSpec(name="mcc", labels=LABELS),
    MetricSpec(name="label_f1", positive="yes"),
    "bleu",
    "chrf++",
    "character_error_rate",
    "log_probability_per_byte",
    parse=ParseSpec(kind="json", field="label"),
)


def evaluate(
    base: LoadedModel, inputs: Path, out: Path, evaluation: EvaluationSpec, **options: Any
) -> dict[str, dict[str, Any]]:
    return evaluate_cell(
        model_path=base.id,
        revision=None,
        inputs=inputs,
        trained=options.pop("trained", None),
        evaluation=evaluation,
        out=out,
        loaded=base,
        **options,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_metric_is_written_with_its_direction(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    scores = evaluate(base, write_inputs(ITEMS), tmp_path / "out", ALL_METRICS)

    asked = [metric.name for metric in ALL_METRICS.metrics]
    assert list(scores) == [*asked, "log_probability", "general_log_probability"]
    assert json.loads((tmp_path / "out/scores.json").read_text()) == scores
    assert [name for name in scores if not scores[name]["higher_is_better"]] == [
        "character_error_rate"
    ]
    assert {name for name in scores if scores[name]["signature"]} == {"bleu", "chrf++"}
    assert scores["general_log_probability"]["num_items"] == 2
    assert scores["exact_match"]["num_items"] == 3


def test_predictions_hold_what_the_bootstrap_needs(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    scores = evaluate(base, write_inputs(ITEMS), tmp_path / "out", ALL_METRICS)

    for spec in (*ALL_METRICS.metrics, MetricSpec(name="general_log_probability")):
        metric = build_metric(spec)
        statistics = metric_statistics(metric, lines(tmp_path / "out" / metric.items_file))
        assert len(statistics) == scores[spec.name]["num_items"]
        assert metric.score_from_items(statistics) == scores[spec.name]["score"]


def test_predictions_rows_are_complete_and_in_order(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    evaluate(base, write_inputs(ITEMS), tmp_path / "out", ALL_METRICS)

    rows = lines(tmp_path / "out/predictions.jsonl")
    assert [row["item_id"] for row in rows] == ["test-0", "test-1", "test-2"]
    assert [row["reference"] for row in rows] == [item["reference"] for item in ITEMS]
    assert [row["num_bytes"] for row in rows] == [16, 15, 20]
    assert [row["num_tokens"] for row in rows] == [17, 16, 21]
    assert all(isinstance(row["prediction"], str) and row["parsed"] is None for row in rows)
    assert rows[0]["scores"]["log_probability"] == -rows[0]["nll"] / 17
    assert rows[0]["scores"]["mcc"] is None


def test_batch_size_does_not_change_what_is_written(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs(ITEMS)

    for size in (1, 3):
        spec = ALL_METRICS.model_copy(update={"batch_size": size})
        evaluate(base, inputs, tmp_path / f"size-{size}", spec)

    one, three = ((tmp_path / f"size-{size}/predictions.jsonl").read_text() for size in (1, 3))
    assert one == three


def test_nothing_is_generated_when_no_metric_looks_at_text(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    seen: list[str] = []

    scores = evaluate(
        base,
        write_inputs(ITEMS),
        tmp_path / "out",
        evaluation_of("log_probability"),
        on_progress=lambda phase, done, total: seen.append(phase),
    )

    assert list(scores) == ["log_probability", "general_log_probability"]
    assert {row["prediction"] for row in lines(tmp_path / "out/predictions.jsonl")} == {None}
    assert seen == ["scoring", "scoring general"]


def test_model_is_loaded_from_its_directory(
    base: LoadedModel, model_directory: Path, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs(ITEMS)
    in_memory = evaluate(base, inputs, tmp_path / "a", ALL_METRICS)

    from_disk = evaluate_cell(
        model_path=str(model_directory),
        revision=None,
        inputs=inputs,
        trained=None,
        evaluation=ALL_METRICS,
        out=tmp_path / "b",
        dtype="float32",
        device="cpu",
    )

    assert from_disk == in_memory


def test_trained_adapter_changes_the_scores_and_leaves_the_base_model(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs, spec = write_inputs(ITEMS), evaluation_of("log_probability")
    before = evaluate(base, inputs, tmp_path / "before", spec)
    torch.manual_seed(0)
    adapted = attach_lora(base.model, TrainingSpec(lora_rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    save_trained(adapted, base.tokenizer, tmp_path / "trained")
    detach_adapter(adapted)

    trained = evaluate(base, inputs, tmp_path / "t", spec, trained=tmp_path / "trained")

    assert trained["log_probability"]["score"] != before["log_probability"]["score"]
    assert evaluate(base, inputs, tmp_path / "after", spec) == before


def test_fully_trained_model_is_evaluated(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    save_trained(base.model, base.tokenizer, tmp_path / "trained")
    inputs = write_inputs(ITEMS)

    scores = evaluate(base, inputs, tmp_path / "a", ALL_METRICS, trained=tmp_path / "trained")

    assert scores == evaluate(base, inputs, tmp_path / "b", ALL_METRICS)


def test_a_full_model_is_evaluated_in_float32_without_its_base(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trained(base.model, base.tokenizer, tmp_path / "trained")
    seen: list[torch.dtype] = []

    def look(model: torch.nn.Module, examples: Any, *_: Any) -> Any:
        seen.append(next(model.parameters()).dtype)
        seen.append(torch.get_autocast_dtype("cpu"))
        assert torch.is_autocast_enabled("cpu")
        return np.zeros(len(examples))

    monkeypatch.setattr("tell_core.evaluation.measuring.gold_nll", look)

    evaluate_cell(
        model_path="there/is/no/such/model",
        revision=None,
        inputs=write_inputs(ITEMS),
        trained=tmp_path / "trained",
        evaluation=evaluation_of("log_probability"),
        out=tmp_path / "out",
        dtype="bfloat16",
        device="cpu",
    )

    assert set(seen[::2]) == {torch.float32}
    assert set(seen[1::2]) == {torch.bfloat16}


def test_an_item_whose_gold_response_exceeds_the_context_is_named(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    long = {"item_id": "test-7", "prompt": "Why?", "reference": "because " * 40}

    with pytest.raises(DataError, match=r"1 of 3 items .* 256 tokens .* test-7 with 326 tokens"):
        evaluate(
            base, write_inputs([*ITEMS[:2], long]), tmp_path / "out", evaluation_of("exact_match")
        )


def test_references_are_checked_without_tokens_or_model() -> None:
    rows = [ITEMS[0] | {"extra": {}}, ITEMS[1] | {"extra": {}, "reference": '{"label": "maybe"}'}]
    accuracy = MetricSpec(name="accuracy", labels=LABELS)
    evaluation = evaluation_of(accuracy, parse=ParseSpec(kind="json", field="label"))
    check_references(rows[:1], evaluation)

    with pytest.raises(InputError, match="maybe"):
        check_references(rows, evaluation)


def test_answer_ends_at_the_marker_that_training_taught(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = base.tokenizer.convert_tokens_to_ids("<|end|>")
    said = base.tokenizer("{}")["input_ids"]
    script = iter([*said, end, *said, *said] * 9)

    def speak(input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.nn.functional.one_hot(torch.tensor([[next(script)]]), 300).float()
        return type("Output", (), {"logits": logits, "past_key_values": None})()

    inputs = write_inputs(ITEMS[:1])
    spec = evaluation_of("json_valid")
    nll = "tell_core.evaluation.measuring.gold_nll"
    monkeypatch.setattr(nll, lambda model, examples, *_: np.zeros(len(examples)))
    monkeypatch.setattr(base.model, "forward", speak)

    scores = evaluate(base, inputs, tmp_path / "out", spec)

    assert lines(tmp_path / "out/predictions.jsonl")[0]["prediction"] == "{}"
    assert scores["json_valid"]["score"] == 1.0


def test_unreadable_reference_is_refused_before_any_model_is_loaded(
    write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs([ITEMS[0], ITEMS[1] | {"reference": "no JSON here"}])

    with pytest.raises(InputError, match="test item test-1 has no reference answer"):
        evaluate_cell(
            model_path="there/is/no/such/model",
            revision=None,
            inputs=inputs,
            trained=None,
            evaluation=ALL_METRICS,
            out=tmp_path / "out",
        )


def test_missing_reference_column_is_warned_of(
    base: LoadedModel,
    write_inputs: WriteInputs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = [ITEMS[0] | {"extra": {"gold": "yes"}}, ITEMS[1]]
    spec = evaluation_of(
        MetricSpec(name="accuracy", field="gold"), parse=ParseSpec(kind="json", field="label")
    )

    with caplog.at_level(logging.WARNING):
        evaluate(base, write_inputs(items), tmp_path / "out", spec)

    assert "1 of 2 test items have no column 'gold'" in caplog.text


def test_weights_that_overflowed_are_refused(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll = "tell_core.evaluation.measuring.gold_nll"
    monkeypatch.setattr(nll, lambda model, examples, *_: np.full(len(examples), np.nan))

    with pytest.raises(EvaluationError, match="log-probability of 3 of 3 gold responses"):
        evaluate(base, write_inputs(ITEMS), tmp_path / "out", evaluation_of("log_probability"))


def test_items_that_do_not_fit_their_arrays_are_refused(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs(ITEMS)
    (inputs / "items.jsonl").write_text(json.dumps(ITEMS[0]) + "\n")

    with pytest.raises(EvaluationError, match="holds 1 items"):
        evaluate(base, inputs, tmp_path / "out", ALL_METRICS)


def test_lack_of_memory_is_explained(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tell_core.evaluation.measuring.gold_nll", run_out)

    with pytest.raises(EvaluationError, match=r"lower `evaluation.batch_size`"):
        evaluate(base, write_inputs(ITEMS), tmp_path / "out", evaluation_of("log_probability"))


def test_retention_set_is_scored_beside_the_general_items(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs(ITEMS, retention=("kept-0", "kept-1", "kept-2"))

    scores = evaluate(base, inputs, tmp_path / "out", evaluation_of("log_probability"))

    rows = lines(tmp_path / "out/retention_items.jsonl")
    assert [row["item_id"] for row in rows] == ["kept-0", "kept-1", "kept-2"]
    assert scores["retention_log_probability"]["num_items"] == 3
    assert scores["retention_log_probability"]["score"] == pytest.approx(
        np.mean([-row["nll"] / row["num_tokens"] for row in rows])
    )
    assert scores["general_log_probability"]["num_items"] == 2


def test_without_a_retention_set_there_is_no_such_metric(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    scores = evaluate(base, write_inputs(ITEMS), tmp_path / "out", evaluation_of("exact_match"))

    assert "retention_log_probability" not in scores
    assert lines(tmp_path / "out/retention_items.jsonl") == []


def test_greedy_repeats_are_made_in_other_batches_and_agree_in_float32(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int | None] = []

    def spy(*arguments: Any, **options: Any) -> list[str]:
        seeds.append(options["order_seed"])
        return generate(*arguments, **options)

    monkeypatch.setattr("tell_core.evaluation.measuring.generate", spy)
    spec = evaluation_of("chrf", "exact_match", num_repeats=3, decoding_seed=5)

    scores = evaluate(base, write_inputs(ITEMS), tmp_path / "out", spec)

    assert seeds == [None, 6, 7]
    assert scores["chrf"]["repeats"] == [scores["chrf"]["score"]] * 3
    assert "repeats" not in scores["log_probability"]


def test_drawn_repeats_measure_the_noise_of_decoding(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path
) -> None:
    inputs = write_inputs(ITEMS)
    spec = evaluation_of("character_error_rate", num_repeats=3, temperature=2.0)

    scores = evaluate(base, inputs, tmp_path / "a", spec)["character_error_rate"]
    again = evaluate(base, inputs, tmp_path / "b", spec)["character_error_rate"]
    other = evaluate(base, inputs, tmp_path / "c", spec.model_copy(update={"decoding_seed": 1}))[
        "character_error_rate"
    ]

    assert scores == again
    assert scores["repeats"][0] == scores["score"]
    assert len(set(scores["repeats"])) > 1
    assert other["repeats"] != scores["repeats"]


def test_each_item_may_have_a_limit_and_stop_strings_reach_the_model(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], Decoding]] = []

    def spy(
        model: Any, tokenizer: Any, requests: list[Request], decoding: Decoding, **_: Any
    ) -> list[str]:
        asked.append(([request.max_new_tokens for request in requests], decoding))
        return ["{}"] * len(requests)

    monkeypatch.setattr("tell_core.evaluation.measuring.generate", spy)
    items = [item | {"extra": {"limit": n}} for n, item in enumerate(ITEMS, start=1)]
    spec = evaluation_of(
        "exact_match", max_new_tokens_column="limit", max_new_tokens=2, stop=("END",), top_p=0.5
    )

    evaluate(base, write_inputs(items), tmp_path / "out", spec)

    end = base.tokenizer.convert_tokens_to_ids("<|end|>")
    decoding = Decoding(stop=("END",), stop_ids=frozenset({end}), temperature=0.0, top_p=0.5)
    assert asked == [([1, 2, 2], decoding)]


def test_backend_of_the_specification_writes_and_the_model_itself_is_measured(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    @contextmanager
    def engine(directory: Path, adapter: Path | None, _: Any, **options: Any) -> Iterator[Any]:
        asked.update(options, directory=directory, adapter=adapter)
        yield SimpleNamespace(generate=lambda requests, *_, **__: ['{"label": "no"}'] * 3)

    monkeypatch.setattr("tell_core.evaluation.subject.vllm_engine", engine)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = attach_lora(base.model, TrainingSpec(lora_rank=2))
    save_trained(adapted, base.tokenizer, tmp_path / "trained")
    detach_adapter(adapted)
    spec = ALL_METRICS.model_copy(update={"backend": "vllm", "batch_size": 7})

    scores = evaluate_cell(
        model_path=str(tmp_path / "base"),
        revision=None,
        inputs=write_inputs(ITEMS),
        trained=tmp_path / "trained",
        evaluation=spec,
        out=tmp_path / "out",
        dtype="float32",
        device="cpu",
    )

    assert asked == {
        "directory": tmp_path / "base",
        "adapter": tmp_path / "trained/adapter",
        "dtype": "float32",
        "batch_size": 7,
    }
    assert scores["accuracy"]["score"] == pytest.approx(1 / 3)
    assert scores["log_probability"]["score"] < 0


def test_harness_tasks_have_a_file_and_metrics_like_all_others(
    base: LoadedModel, write_inputs: WriteInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        ScoredItem(f"arc-{n}", None, Answer("yes", False), {"acc": float(n > 0)}, 0.0, 1, 1)
        for n in range(4)
    ]
    monkeypatch.setattr(
        "tell_core.evaluation.harness.run_harness", lambda *_, **__: {"harness/arc": found}
    )
    spec = evaluation_of("log_probability", harness=(HarnessSpec(task="arc"),))

    scores = evaluate(base, write_inputs(ITEMS), tmp_path / "out", spec)

    rows = lines(tmp_path / "out/harness_arc.jsonl")
    assert scores["harness/arc/acc"]["score"] == 0.75
    assert [row["scores"]["harness/arc/acc"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    metric = build_metrics(spec)[-1]
    assert metric.score_from_items(metric_statistics(metric, rows)) == 0.75


def test_what_is_not_installed_is_found_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [ITEMS[0] | {"extra": {}}]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)

    with pytest.raises(InputError, match="needs vLLM"):
        check_references(rows, evaluation_of("json_valid", backend="vllm"))
    with pytest.raises(InputError, match=r"evaluation.harness"):
        check_references(rows, evaluation_of("json_valid", harness=(HarnessSpec(task="arc"),)))


def test_wrong_limit_is_found_before_anything_is_trained() -> None:
    rows = [ITEMS[0] | {"extra": {"limit": 4}}, ITEMS[1] | {"extra": {"limit": "four"}}]

    with pytest.raises(InputError, match="test item test-1: column 'limit'"):
        check_references(rows, evaluation_of("json_valid", max_new_tokens_column="limit"))
