"""The specification's reference page, from its models: ``python -m tell_core.spec.reference``."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tell_core.spec.model import ExperimentSpec

_HEAD = """\
# Specification

Every section and field, with its default. Written by `python -m tell_core.spec.reference`; a test
keeps this page equal to the code.

`variables:` at the top of a YAML names values that a user gives with `--set name=value`, each with
a default or null; they stand as `${name}` in any string. `--set section.field=value` overrides a
field.
"""


def reference() -> str:
    """The page as Markdown."""
    return _HEAD + "".join(_section(title, model) for title, model in _models())


def _models() -> Iterator[tuple[str, type[BaseModel]]]:
    """The experiment and every section below it, each once, in order of the fields."""
    waiting: list[tuple[str, type[BaseModel]]] = [("experiment", ExperimentSpec)]
    seen: set[type[BaseModel]] = set()
    while waiting:
        title, model = waiting.pop(0)
        if model in seen:
            continue
        seen.add(model)
        yield title, model
        inner = [(name, _inner(field.annotation)) for name, field in model.model_fields.items()]
        waiting += [(name, found) for name, found in inner if found]


def _section(title: str, model: type[BaseModel]) -> str:
    about = " ".join((model.__doc__ or "").split())
    rows = "".join(
        f"| `{name}` | {_default(field)} | {' '.join((field.description or '').split())} |\n"
        for name, field in model.model_fields.items()
    )
    return f"\n## {title}\n\n{about}\n\n| field | default | meaning |\n|---|---|---|\n{rows}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        return f"`[{', '.join(_plain(item) for item in value)}]`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(value.model_dump().get("name"))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner(argument) for argument in get_args(annotation))
    return next((model for model in found if model), None)


if __name__ == "__main__":
    print(reference(), end="")
