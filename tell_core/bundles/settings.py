"""Settings of a bundle: read from JSON, used like the sections of a specification."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


class Settings:
    """The settled fields of a section, as attributes, where pydantic is not installed.

    What they hold was checked when the bundle was exported. Lists are tuples and inner sections
    `Settings`, as they are in `tell_core.spec.model`.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(
                f"the bundle's settings have no {name!r}: they are of another version of tell;"
                " export the bundle again, or use that version"
            )
        return _frozen(fields[name])

    def model_dump(
        self, *, mode: str = "json", exclude: Collection[str] = frozenset()
    ) -> dict[str, Any]:
        """The fields as JSON values, in the manner of a pydantic model."""
        if mode != "json":
            raise ValueError(f"mode {mode!r}: only JSON values are known here")
        return {name: value for name, value in self._fields.items() if name not in exclude}

    def replaced(self, **changes: Any) -> Settings:
        """The same settings with other values for some."""
        return type(self)(self._fields | changes)


class TrainingSettings(Settings):
    """Settings of one training, settled: one learning rate, one number of epochs."""

    @property
    def is_tuned(self) -> bool:
        """Whether several candidates are to be compared: never in a bundle."""
        return False

    @property
    def candidates(self) -> tuple[Any, ...]:
        """The only candidate."""
        chosen = {name: self._fields[name] for name in ("learning_rate", "epochs")}
        return (Settings(chosen),)

    @property
    def num_epochs(self) -> int:
        """Passes over the mixture."""
        return int(self._fields["epochs"])


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Settings(value)
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
