"""Tasks of lm-evaluation-harness: real ones on a tiny model, and what is refused."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tell_core.errors import InputError
from tell_core.evaluation.harness import (
    check_harness,
    harness_identity,
    harness_metrics,
    run_harness,
)
from tell_core.evaluation.metrics import build_metrics
from tell_core.spec.model import EvaluationSpec, HarnessSpec, TrainingSpec
from tell_core.training.models import LoadedModel, attach_lora, detach_adapter

CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
  - {metric: acc_bytes, higher_is_better: false, aggregation: mean}
  - {metric: f1}
"""
WRITE = """
task: tiny_write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: word, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
"""
QUESTIONS = ["Is it so?", "Really?", "Or else", "Why not?", "And then?"]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "answer": ("yes", "no")[i % 2]} for i, q in enumerate(QUESTIONS)]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        f"dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        f"  cache_dir: {directory}/cache\n"
    )
    other = CHOICE.replace("tiny_choice", "tiny_other")
    for name, task in (("choice", CHOICE), ("other", other), ("write", WRITE)):
        (directory / f"{name}.yaml").write_text(source + task)
    (directory / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice, tiny_other]\n")
    return str(directory)


def log_probability(base: LoadedModel, prompt: str, answer: str) -> float:
    """Of the answer after the prompt, a space between, each token in turn."""
    start = len(base.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([base.tokenizer(f"{prompt} {answer}")["input_ids"]])
    with torch.inference_mode():
        logs = base.model(input_ids=ids).logits.log_softmax(-1)[0]
    return float(sum(logs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_every_item_has_the_value_that_the_model_gives_it(
    is_adapted: bool, base: LoadedModel, tasks_dir: str
) -> None:
    pytest.importorskip("lm_eval")
    spec = HarnessSpec(task="tiny_choice", tasks_dir=tasks_dir)
    torch.manual_seed(0)
    model = attach_lora(base.model, TrainingSpec(lora_rank=2)) if is_adapted else base.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)

    (items,) = run_harness(model, base.tokenizer, [spec], batch_size=2).values()

    likelier = [
        max(("yes", "no"), key=lambda answer: log_probability(base, question, answer))
        for question in QUESTIONS
    ]
    detach_adapter(model)
    right = [float(found == ("yes", "no")[i % 2]) for i, found in enumerate(likelier)]
    assert [item.extra["acc"] for item in items] == right
    assert [item.item_id for item in items] == [f"tiny_choice-{i:05d}" for i in range(5)]


def test_metrics_of_one_task_share_one_run_and_score_as_the_harness_does(
    base: LoadedModel, tasks_dir: str
) -> None:
    pytest.importorskip("lm_eval")
    specs = [
        HarnessSpec(task="tiny_choice", tasks_dir=tasks_dir, metric=name, max_items=3)
        for name in ("acc", "acc_norm")
    ]
    seen: list[tuple[int, int]] = []

    found = run_harness(
        base.model,
        base.tokenizer,
        specs,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )

    items = found["harness/tiny_choice"]
    assert seen == [(1, 1)]
    assert len(items) == 3
    for metric in harness_metrics(specs):
        statistics = metric.statistics(metric.payloads(items))
        values = [item.extra[metric.harness.metric] for item in items]
        assert metric.score_from_items(statistics) == pytest.approx(np.mean(values))


def test_a_group_is_scored_over_all_its_items(base: LoadedModel, tasks_dir: str) -> None:
    pytest.importorskip("lm_eval")
    spec = HarnessSpec(task="tiny_group", tasks_dir=tasks_dir, max_items=2)

    found = run_harness(base.model, base.tokenizer, [spec], batch_size=2)

    assert [item.item_id for item in found["harness/tiny_group"]] == [
        "tiny_choice-00000", "tiny_choice-00001", "tiny_other-00000", "tiny_other-00001",
    ]  # fmt: skip


def test_written_answers_are_kept_and_the_way_of_reading_them_is_chosen(
    base: LoadedModel, tasks_dir: str
) -> None:
    pytest.importorskip("lm_eval")
    spec = HarnessSpec(task="tiny_write", tasks_dir=tasks_dir, metric="exact_match,word")

    (items,) = run_harness(base.model, base.tokenizer, [spec], batch_size=2).values()

    assert all(isinstance(item.predicted_text, str) for item in items)
    assert {item.extra["exact_match,word"] for item in items} <= {0.0, 1.0}
    assert [item.reference.value for item in items] == ["yes", "no", "yes", "no", "yes"]


def test_the_models_tokenizer_is_left_as_it_was(base: LoadedModel, tasks_dir: str) -> None:
    pytest.importorskip("lm_eval")
    run_harness(
        base.model,
        base.tokenizer,
        [HarnessSpec(task="tiny_choice", tasks_dir=tasks_dir, max_items=1)],
        batch_size=1,
    )

    assert base.tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("tiny_chioce", {}, "there is no task 'tiny_chioce' in .*; near it: tiny_choice"),
        ("tiny_choice", {"metric": "bleu"}, "there is no metric 'bleu' .* it has acc, acc_bytes"),
        ("tiny_choice", {"metric": "f1"}, "no mean over items .* acc, acc_bytes, acc_norm"),
        ("tiny_choice", {"metric": "acc_bytes"}, "better when it is lower"),
        ("tiny_write", {"metric": "exact_match"}, "in the ways whole, word; name one of them"),
        ("tiny_write", {"metric": "exact_match,line"}, "in the ways whole, word"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_runs(
    task: str, options: dict[str, str], message: str, tasks_dir: str
) -> None:
    pytest.importorskip("lm_eval")

    with pytest.raises(InputError, match=message):
        check_harness([HarnessSpec(task=task, tasks_dir=tasks_dir, **options)])


def test_task_whose_data_is_missing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    missing = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {tmp_path}/no}}"
    (tmp_path / "task.yaml").write_text(missing + CHOICE)

    with pytest.raises(InputError, match="'tiny_choice' cannot be loaded"):
        check_harness([HarnessSpec(task="tiny_choice", tasks_dir=str(tmp_path))])


def test_metrics_are_named_after_task_and_metric() -> None:
    specs = (HarnessSpec(task="arc_easy"), HarnessSpec(task="arc_easy", metric="acc_norm"))

    metrics = build_metrics(EvaluationSpec(harness=specs))[-2:]

    assert [metric.name for metric in metrics] == [
        "harness/arc_easy/acc",
        "harness/arc_easy/acc_norm",
    ]
    assert {metric.items for metric in metrics} == {"harness/arc_easy"}
    assert {metric.items_file for metric in metrics} == {"harness_arc_easy.jsonl"}
    assert not any(metric.needs_generation for metric in metrics)


def test_one_task_with_two_settings_is_refused() -> None:
    specs = (HarnessSpec(task="arc_easy"), HarnessSpec(task="arc_easy", num_shots=5))

    with pytest.raises(InputError, match="'arc_easy' is named twice with different settings"):
        harness_metrics(specs)


def test_missing_harness_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)

    with pytest.raises(InputError, match=r"install it with `pip install 'tell\[harness\]'`"):
        check_harness([HarnessSpec(task="arc_easy")])


def test_identity_follows_version_and_task_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4")
    (tmp_path / "task.yaml").write_text("task: a")
    spec = HarnessSpec(task="a", tasks_dir=str(tmp_path))
    before = harness_identity([spec])

    (tmp_path / "task.yaml").write_text("task: a # changed")

    assert before["lm_eval"] == "0.4"
    assert list(before["files"][0]) == ["task.yaml"]
    assert harness_identity([spec]) != before
    assert harness_identity([]) == {}
