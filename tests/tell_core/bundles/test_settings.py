import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.bundles.settings import Settings, TrainingSettings
from tell_core.spec.identity import canonical_json
from tell_core.spec.model import EvaluationSpec, HarnessSpec, MetricSpec, TrainingSpec
from tell_core.training.identity import training_fields

trainings = st.builds(
    TrainingSpec,
    learning_rate=st.floats(1e-6, 1),
    epochs=st.integers(1, 9),
    method=st.sampled_from(["lora", "full"]),
    lora_dropout=st.sampled_from([0.0, 0.1]),
    lora_targets=st.sampled_from(["all-linear", ("q_proj", "v_proj")]),
    micro_batch_size=st.none() | st.integers(1, 8),
)


@given(trainings)
def test_settings_are_used_like_the_section_they_were_written_from(training: TrainingSpec):
    settings = TrainingSettings(training.model_dump(mode="json"))

    for name in TrainingSpec.model_fields:
        assert getattr(settings, name) == getattr(training, name)
    assert canonical_json(training_fields(settings)) == canonical_json(training_fields(training))
    assert settings.num_epochs == training.num_epochs
    assert settings.is_tuned == training.is_tuned
    assert settings.candidates[0].learning_rate == training.candidates[0].learning_rate


def test_inner_sections_are_settings_and_lists_tuples():
    evaluation = EvaluationSpec(
        stop=("END",), metrics=(MetricSpec(name="bleu"),), harness=(HarnessSpec(task="arc"),)
    )

    settings = Settings(evaluation.model_dump(mode="json"))

    assert settings.stop == ("END",)
    assert settings.parse.kind == "text"
    assert [entry.task for entry in settings.harness] == ["arc"]


def test_replacing_a_value_leaves_the_others_and_the_original():
    settings = Settings({"device": "cpu", "threads": 1})

    assert settings.replaced(threads=4).model_dump() == {"device": "cpu", "threads": 4}
    assert settings.threads == 1


def test_a_setting_of_another_version_is_explained():
    with pytest.raises(AttributeError, match=r"no 'batching'.*export the bundle again"):
        _ = Settings({"threads": 1}).batching
