"""Errors of this project: each says what was given, what was needed and what to do next."""


class TellError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        exit_code: Exit code of the command line: 1 the run failed, 2 the user's input is wrong.
    """

    exit_code = 1


class InputError(TellError):
    """The user's input is wrong; nothing was run."""

    exit_code = 2


class SpecError(InputError):
    """The experiment specification cannot be read or is inconsistent."""


class DataError(InputError):
    """A data source is missing, unreadable or unfit for the task."""


class TokenBudgetError(InputError):
    """A token budget cannot hold even one example."""


class AnchorError(InputError):
    """The anchor prompt cannot be resolved or does not fit."""


class ModelError(InputError):
    """The base model or its tokenizer cannot be found or used."""


class StoreError(TellError):
    """The run directory cannot be written, or belongs to something else."""


class TrainingError(TellError):
    """Training stopped before it was finished."""


class EvaluationError(TellError):
    """Evaluation stopped before it was finished."""


class AnalysisError(TellError):
    """The results cannot be analysed."""
