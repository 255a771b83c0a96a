"""``tell anchor``: the search for an anchor prompt."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.printing import explained, print_json, print_table

app = typer.Typer()


@app.command()
@explained
def anchor(
    spec: Annotated[Path, typer.Argument(help="The experiment's YAML.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value for a variable or field of the YAML; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/<name> by default.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Texts that the model writes.")] = 12,
    examples: Annotated[
        int, typer.Option(min=2, help="Training examples that each is written from.")
    ] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest candidate in tokens.")] = 64,
    shots: Annotated[
        int, typer.Option(min=0, help="Solved examples of the few-shot score; 0: none.")
    ] = 2,
    train: Annotated[
        bool, typer.Option("--train", help="Train TELL with the best one and its controls too.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Let the base model write anchor prompts; choose one on dev items, test it on others."""
    from tell_core.analysis.anchor_candidates import Proposing
    from tell_core.anchor_search import RESULT_FILE, Searching, search_anchors
    from tell_core.pipeline import curate_stage
    from tell_core.results import default_root, open_run, sole_owner
    from tell_core.spec.loading import load_spec

    experiment = load_spec(spec, settings or [])
    root = out or default_root(experiment)
    open_run(experiment, root)
    proposing = Proposing(
        num_candidates=candidates, num_examples=examples, max_tokens=max_tokens, seed=seed
    )
    with sole_owner(root):
        found = search_anchors(
            experiment,
            curate_stage(experiment, root),
            Searching(proposing, num_shots=shots),
            is_trained=train,
            on_progress=_say,
        )
    if as_json:
        print_json(found)
        return
    _print_search(found)
    print(f"numbers:   {root / RESULT_FILE}")


def _say(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def _print_search(found: dict[str, Any]) -> None:
    print_table([_row(row) for row in _shown_rows(found["rows"])])
    if found["rejected"]:
        reasons = [one["reason"] for one in found["rejected"]]
        counts = ", ".join(f"{reasons.count(name)} {name}" for name in dict.fromkeys(reasons))
        print(f"set aside: {counts}")
    print(
        f"nats per token, chosen on {found['num_choosing']} dev items, tested on"
        f" {found['num_testing']} others\n{_family_words(found)}"
    )
    _print_tested("base model", found, found["tested"])
    trained = found["trained"]
    if trained:
        print(
            f"trained at {trained['task_budget_tokens']:,} task and"
            f" {trained['general_budget_tokens']:,} general tokens, learning rate"
            f" {trained['learning_rate']:g}, {trained['num_seeds']} seeds"
        )
        _print_tested("after training", trained, trained["tested"])
    _print_advice(found)


def _family_words(found: dict[str, Any]) -> str:
    """What p-values are corrected for."""
    tries, comparisons = found["num_tries"], found["num_comparisons"]
    if tries == 1:
        return f"p after Holm over {comparisons} comparisons; first search on these dev items"
    return (
        f"p after Holm over the {comparisons} comparisons of {tries} searches on these dev items in"
        f" this run directory, times {tries}: who searches until a text is adopted looks that often"
    )


def _shown_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates and fixed anchors, best first; of the random texts the best and the worst."""
    random = sorted(
        (row for row in rows if row["kind"] == "random text"), key=lambda row: -row["choosing"]
    )
    others = [row for row in rows if row["kind"] != "random text"]
    return sorted([*others, *random[:1], *random[1:][-1:]], key=lambda row: -row["choosing"])


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "": row["kind"],
        "tokens": row["num_tokens"],
        "zero-shot": row["zero_shot"],
        "few-shot": row["few_shot"],
        "over no anchor": row["over_none"],
        "low": row["low"],
        "high": row["high"],
        "testing": row["testing"],
        "text": row["text"].strip() or "–",
    }


def _print_tested(where: str, judged: dict[str, Any], tested: list[dict[str, Any]]) -> None:
    if tested:
        print_table(
            [
                {
                    f"the chosen candidate, {where}": f"minus {one['against']}",
                    "estimate": one["estimate"],
                    "low": one["low"],
                    "high": one["high"],
                    "p (Holm)": one["p_holm"],
                }
                for one in tested
            ]
        )
    print(f"{where}: {judged['verdict']}: {judged['reason']}")


def _print_advice(found: dict[str, Any]) -> None:
    """What to write into the YAML, where the candidate has shown itself."""
    last = found["trained"] or found
    if last["verdict"] != "adopt":
        print("leave `anchor` in the YAML as it is")
        return
    text = json.dumps(found["chosen"], ensure_ascii=False)
    print(f"in the YAML:\nanchor: {{source: given, position: {found['position']}, text: {text}}}")
    if found["own_instruction"]:
        print(
            "with task files whose prompts no longer begin with their own instruction"
            f" ({len(found['own_instruction'])} characters): the candidates stood in its place"
        )
