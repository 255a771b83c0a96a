"""Reading a specification: YAML, variables, overrides, and errors that name line and mend."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tell_core.errors import SpecError
from tell_core.spec.model import ExperimentSpec

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PathKey = tuple[str | int, ...]
# Aliases of aliases let a file of a few lines stand for billions of values.
_MOST_VALUES = 100_000


def load_spec(path: Path, settings: Sequence[str] = ()) -> ExperimentSpec:
    """Read, fill in and validate a specification.

    ``variables:`` at the top names the values a user gives, each with a default or null; they
    stand as ``${name}`` in any string.

    Args:
        path: The YAML file.
        settings: ``name=value`` for a variable, or ``budgets.task_tokens=[2000]`` for any field;
            values are YAML.

    Raises:
        SpecError: With file, line and key, what was given and what was needed.
    """
    text = _read(path)
    document, lines = _parse(text, path)
    variables = document.pop("variables", None) or {}
    if not isinstance(variables, dict):
        raise SpecError(f"{path}: `variables` must be a mapping of names to defaults")
    _apply_settings(document, variables, settings)
    filled = _fill_in(document, variables, (), path, lines)
    try:
        return ExperimentSpec.model_validate(filled)
    except ValidationError as error:
        raise SpecError(_explain(error, path, lines, filled)) from error


def dump_spec(spec: ExperimentSpec) -> str:
    """The specification in full as YAML: every default written out, no variables left."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(
            f"no specification at {path.absolute()}: give the path of a YAML file, such as those"
            " under configs/"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from error


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[_PathKey, int]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, dict) or node is None:
        raise SpecError(f"{path}: a specification is a mapping that begins with `name:`")
    lines: dict[_PathKey, int] = {}
    _collect_lines(node, (), lines, path)
    return value, lines


def _collect_lines(node: yaml.Node, key: _PathKey, lines: dict[_PathKey, int], path: Path) -> None:
    lines.setdefault(key, node.start_mark.line + 1)
    if len(lines) > _MOST_VALUES:
        raise SpecError(
            f"{path} holds more than {_MOST_VALUES:,} values with its aliases written out; a"
            " specification has hundreds: write it without aliases of aliases"
        )
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            child = (*key, name.value)
            if child in lines:
                raise SpecError(
                    f"{path}:{name.start_mark.line + 1}: key `{name.value}` stands there twice,"
                    f" first in line {lines[child]}; keep one"
                )
            lines[child] = name.start_mark.line + 1
            _collect_lines(value, child, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*key, index), lines, path)


def _apply_settings(
    document: dict[str, Any], variables: dict[str, Any], settings: Sequence[str]
) -> None:
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise SpecError(f"--set {setting!r}: write it as name=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {setting!r}: the value is not valid YAML: {error}") from error
        if name in variables:
            variables[name] = text
        else:
            _set_field(document, name, value, variables)


def _set_field(
    document: dict[str, Any], dotted: str, value: Any, variables: Mapping[str, Any]
) -> None:
    *parents, last = dotted.split(".")
    if (parents or [last])[0] not in ExperimentSpec.model_fields:
        known = [*variables, *ExperimentSpec.model_fields]
        raise SpecError(
            f"--set {dotted}=…: no such variable or section; did you mean"
            f" `{_nearest(dotted, known)}`? Variables here: {', '.join(variables) or 'none'}"
        )
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise SpecError(f"--set {dotted}=…: `{parent}` is not a section with keys")
    section[last] = value


def _fill_in(
    value: Any,
    variables: Mapping[str, Any],
    key: _PathKey,
    path: Path,
    lines: Mapping[_PathKey, int],
) -> Any:
    if isinstance(value, dict):
        return {k: _fill_in(v, variables, (*key, k), path, lines) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill_in(v, variables, (*key, i), path, lines) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if variables.get(name) is None:
            known = f"; variables here: {', '.join(variables)}" if variables else ""
            raise SpecError(
                f"{path}:{_line(key, lines)}: `{_dotted(key)}` needs a value for ${{{name}}}: add"
                f" `--set {name}=…` to the command{known}"
            )
        return str(variables[name])

    return _VARIABLE.sub(replacement, value)


def _explain(
    error: ValidationError, path: Path, lines: Mapping[_PathKey, int], document: Any
) -> str:
    problems = []
    for detail in error.errors():
        key = _real_key(detail["loc"], document)
        where = f"{path}:{_line(key, lines)}: `{_dotted(key)}`" if key else f"{path}"
        problems.append(f"{where}: {_reason(detail, key)}")
    return "\n".join(dict.fromkeys(problems))


def _reason(detail: Any, key: _PathKey) -> str:
    if detail["type"] == "extra_forbidden":
        known = _known_keys(key[:-1])
        return (
            f"unknown key; did you mean `{_nearest(str(key[-1]), known)}`?"
            f" Known here: {', '.join(known)}"
        )
    if detail["type"] == "missing":
        return "needed, but not given"
    message = detail["msg"].removeprefix("Value error, ")
    is_scalar = isinstance(detail["input"], str | int | float | bool | None)
    return f"{message} (given: {detail['input']!r})" if is_scalar else message


def _real_key(location: tuple[str | int, ...], document: Any) -> _PathKey:
    """Drop what pydantic adds to a location, such as the branch of a union."""
    key: list[str | int] = []
    value = document
    for position, part in enumerate(location):
        if _has(value, part):
            value = value[part]
        elif position < len(location) - 1 or not isinstance(value, dict):
            continue
        key.append(part)
    return tuple(key)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _known_keys(key: _PathKey) -> list[str]:
    model: type[BaseModel] | None = ExperimentSpec
    for part in key:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_of(argument) for argument in get_args(annotation))
    return next((found for found in inner if found), None)


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _line(key: _PathKey, lines: Mapping[_PathKey, int]) -> int:
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


def _dotted(key: _PathKey) -> str:
    return ".".join(str(part) for part in key)
