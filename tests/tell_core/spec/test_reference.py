from pathlib import Path

from tell_core.spec.model import ExperimentSpec
from tell_core.spec.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "specification.md"


def test_the_page_equals_the_code():
    assert PAGE.read_text() == reference(), "run: python -m tell_core.spec.reference > the page"


def test_every_field_of_the_experiment_is_described():
    assert all(f"| `{name}` |" in reference() for name in ExperimentSpec.model_fields)
    assert "|  |\n" not in reference()
