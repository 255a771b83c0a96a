"""A metric of the user's own: one function, named in the specification as `module:function`."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import ModuleType

from tell_core.errors import InputError
from tell_core.evaluation.base import MeanMetric, ScoredItem
from tell_core.spec.identity import file_digest
from tell_core.spec.model import MetricSpec

OwnFunction = Callable[[str | None, str], float]


class OwnMetric(MeanMetric):
    """The mean over items of a user's function of prediction and reference.

    The function gets the parsed prediction, None where it could not be parsed, and the parsed
    reference (or column ``field``), and returns a number. Its name is the metric's name in tables;
    which direction is better says ``higher_is_better``. Before anything is trained it is called
    once per item with None as prediction.
    """

    limits = (-math.inf, math.inf)
    options = frozenset({"field", "higher_is_better"})

    def __init__(self, spec: MetricSpec) -> None:
        super().__init__(spec)
        self._function = load_function(spec.name)
        self.name = spec.name.partition(":")[2]
        self.higher_is_better = spec.higher_is_better

    def _value(self, item: ScoredItem) -> float:
        try:
            value = self._function(item.predicted_text, self._reference(item))
        except InputError:
            raise
        except Exception as error:  # whatever a user's code may raise, with the item it failed on
            raise InputError(
                f"metric {self.spec.name!r} failed on test item {item.item_id}"
                f" ({type(error).__name__}: {error}); the function is called with the prediction, a"
                " text or None, and the reference, a text"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(
                f"metric {self.spec.name!r} returned {value!r} for test item {item.item_id};"
                " needed: a finite number"
            )
        return float(value)


def load_function(name: str) -> OwnFunction:
    """The function that ``module:function`` names, from sys.path or the working directory.

    Raises:
        InputError: There is no such module, it cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    module = _load_module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = sorted(n for n, _ in inspect.getmembers(module, inspect.isfunction))
        raise InputError(
            f"metric {name!r}: module {module_name!r} has no function {function_name!r}; it has"
            f" {', '.join(found) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


def source_digest(name: str) -> str:
    """sha256 of the file that holds the function: a change of it is another metric.

    What that file imports is not looked at.

    Raises:
        InputError: As `load_function`; or the module has no source file.
    """
    module_name = name.partition(":")[0]
    path = getattr(_load_module(module_name, name), "__file__", None)
    if not path or not Path(path).is_file():
        raise InputError(
            f"metric {name!r}: module {module_name!r} has no file of its own; put the function"
            " into a Python file"
        )
    return file_digest(Path(path))


def _load_module(module_name: str, name: str) -> ModuleType:
    with _working_directory_on_path():
        try:
            return importlib.import_module(module_name)
        except Exception as error:  # importing runs the user's code
            if isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]:
                raise InputError(
                    f"metric {name!r}: there is no module {module_name!r}, neither installed nor"
                    f" as {module_name.replace('.', '/')}.py in {Path.cwd()}"
                ) from error
            raise InputError(
                f"metric {name!r}: module {module_name!r} cannot be imported"
                f" ({type(error).__name__}: {error})"
            ) from error


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Look for modules in the working directory too, after everything else."""
    directory = str(Path.cwd())
    if directory in sys.path:
        yield
        return
    sys.path.append(directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
