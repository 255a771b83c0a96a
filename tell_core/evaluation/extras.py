"""Packages that are installed only by those who need them."""

import importlib
from typing import Any

from tell_core.errors import InputError


def optional_module(name: str, needed_by: str, command: str) -> Any:
    """Import a module that may not be there.

    Args:
        name: Full name of the module.
        needed_by: What of the specification asks for it, as the user wrote it.
        command: How to install it.

    Raises:
        InputError: It, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{needed_by} needs a package that cannot be imported ({error}); install it with"
            f" `{command}`, or remove that from the specification"
        ) from error
