"""Services of compose.yaml as plain processes: their very commands, at other addresses."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "servers"
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def service(
    name: str, variables: Mapping[str, str], addresses: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service.

    Args:
        name: Of the service.
        variables: What the file `.env` would set.
        addresses: What stands for an address inside of compose, by that address.
    """
    found = yaml.safe_load((DIRECTORY / "compose.yaml").read_text(encoding="utf-8"))["services"]

    def here(text: str) -> str:
        text = _VARIABLE.sub(lambda match: _value(match, variables), text)
        for inside, outside in addresses.items():
            text = text.replace(inside, outside)
        return text

    words = shlex.split(here(found[name]["command"]))
    if words[:2] == ["sh", "-c"]:  # what installs packages first
        words = shlex.split(words[2].rpartition("exec ")[2])
    environment = {key: here(value) for key, value in found[name]["environment"].items()}
    return [sys.executable, "-m", *words], environment


def _value(match: "re.Match[str]", variables: Mapping[str, str]) -> str:
    name, kind, rest = match.groups()
    if name in variables:
        return variables[name]
    assert kind == "-", f"{name} has to be set: {rest}"
    return str(rest)
