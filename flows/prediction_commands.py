"""``tell quanta predictions``: the seven predictions of the quantization hypothesis; scaling."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.printing import explained, print_json, print_table


@explained
def predictions(
    directory: Annotated[
        Path, typer.Argument(help="Directory that a run printed.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Test the seven predictions of the quantization hypothesis on a finished run; fit scaling."""
    from tell_core.analysis.predictions import QUANTA_DIRECTORY, measure_predictions
    from tell_core.analysis.run_scaling import SCALING_FILE
    from tell_core.report.page import write_report
    from tell_core.results import sole_owner
    from tell_core.store import read_json

    with sole_owner(directory):
        table = measure_predictions(directory, _say)
        report = write_report(directory)
    scaling = read_json(directory / QUANTA_DIRECTORY / SCALING_FILE)
    if as_json:
        print_json(table | {"scaling": scaling})
        return
    print_table([_row(row) for row in table["predictions"]])
    if scaling["curves"]:
        print_table([_curve_row(row) for row in scaling["curves"]])
    print(f"numbers:   {directory / QUANTA_DIRECTORY}\nreport:    {report}")


def _say(what: str, done: int, total: int) -> None:
    print(f"{what} {done} of {total}", file=sys.stderr, flush=True)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "": row["prediction"],
        "verdict": row["verdict"],
        "estimate": row["estimate"],
        "low": row["low"],
        "high": row["high"],
        "p (Holm)": row["p_holm"],
        "measured, or what it needs": row["reason"] or row["measure"],
    }


def _curve_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "mean loss over": row["kind"].replace("_", " "),
        "arm": row["arm"],
        "items": row["role"],
        "points": row["num_points"],
        "exponent": row["exponent"],
        "low": row["low"],
        "high": row["high"],
        "scaling": row["status"],
        "why": row["reason"],
    }
