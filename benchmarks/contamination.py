"""Planted contamination: how much of it curation removes, and what else it removes.

For each task, test items are planted into its training data and into a sample of general data, in
four classes: exact (other case and white space), near (words changed, runs of 5 words still alike
by 0.8), tenth (one word in ten another, the answer kept) and split (the text cut in two, over
prompt and response). Then `curate` runs. Recall is the share of planted rows that were set aside;
items with at least 20 words in their prompt are counted apart, since shorter ones are left to exact
matching. False drops are rows not planted that were set aside as overlap with the test set for
another reason than the same prompt; a real leak in the data counts as one.

    python benchmarks/contamination.py DATA --tasks gec_is halu_cot_json

DATA holds tasks/<name>/{train,test}.jsonl with columns prompt, response and anchor_len, and
general/*.parquet with prompt and response.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
from near_duplicates import changed_words, jaccard

from tell_core.data.curation import curate
from tell_core.data.small_world import build_tokenizer
from tell_core.spec.model import ExperimentSpec

CLASSES = ("exact", "near", "tenth", "split")
TASKS = (
    "banking77", "gec_is", "halu_cot_json", "mt_is_en", "restaurant8k_json", "text2sql_advising",
)  # fmt: skip
LONG_WORDS = 20
SIMILARITY = 0.8
_TRIES = 30
Row = dict[str, Any]


def main() -> None:
    """Plant, curate and count, task by task; print the sums as JSON."""
    arguments = _parse()
    counts: Counter[str] = Counter()
    by_task = {}
    for task in arguments.tasks:
        by_task[task] = _run_task(arguments, task)
        counts.update(by_task[task])
        print(task, json.dumps(by_task[task]), flush=True)
    print(json.dumps(_summary(counts), indent=1))


def _run_task(arguments: argparse.Namespace, task: str) -> Counter[str]:
    rng = random.Random(arguments.seed)
    source = arguments.data / "tasks" / task
    train, test = (_rows(source / f"{part}.jsonl") for part in ("train", "test"))
    general = _general(arguments.data, arguments.num_general, rng)
    planted = _plant(test, arguments.num_planted, rng)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        classes = {
            "train": _write(directory / "train.jsonl", train, planted[::2]),
            "general": _write(directory / "general.jsonl", general, planted[1::2]),
        }
        _write(directory / "test.jsonl", test, [])
        curate(
            _spec(directory, arguments.similarity, arguments.share), build_tokenizer(), directory
        )
        rejects = pq.read_table(directory / "rejects.parquet").to_pylist()
        overlap = pq.read_table(directory / "overlap.parquet").to_pylist()
        flagged = pq.read_table(directory / "flagged.parquet").to_pylist()
    _show(overlap, classes, arguments.show)
    return _count(classes, rejects, overlap, flagged, len(train) + len(general))


def _plant(test: list[Row], num_each: int, rng: random.Random) -> list[tuple[str, Row]]:
    """Rows with their class, every class from items of its own draw."""
    planted = []
    for kind in CLASSES:
        found = 0
        for row in rng.sample(test, len(test)):
            bare = row["prompt"][row["anchor_len"] :]
            changed = _planted(kind, bare, row["response"], rng)
            if changed is not None and found < num_each:
                found += 1
                size = "long" if len(bare.split()) >= LONG_WORDS else "short"
                prompt, response = changed
                new = row | {"prompt": row["prompt"][: row["anchor_len"]] + prompt}
                planted.append((f"{kind} {size}", new | {"response": response}))
    rng.shuffle(planted)
    return planted


def _planted(kind: str, prompt: str, response: str, rng: random.Random) -> tuple[str, str] | None:
    """Prompt and response of one planted row, or None where the item is too short for its class."""
    words = prompt.split(" ")
    if kind == "exact":
        return rng.choice((prompt, prompt.upper(), prompt.replace(" ", "  "))), response
    if kind == "tenth":
        for start in range(0, len(words), 10):
            words[min(start + rng.randrange(10), len(words) - 1)] = rng.choice(words) + "x"
        return " ".join(words), response
    if kind == "split":
        middle = len(words) // 2
        first, second = " ".join(words[:middle]), " ".join(words[middle:])
        return (first, f"{second}\n{response}") if first.strip() else None
    for _ in range(_TRIES):
        changed = changed_words(prompt, words, rng)
        whole = jaccard(f"{prompt}\n{response}", f"{changed}\n{response}")
        if min(jaccard(prompt, changed), whole) >= SIMILARITY and changed != prompt:
            return changed, response
    return None


def _count(
    classes: dict[str, dict[int, str]],
    rejects: list[Row],
    overlap: list[Row],
    flagged: list[Row],
    num_rows: int,
) -> Counter[str]:
    dropped = {(row["source"], row["line"]) for row in rejects}
    seen = dropped | {(row["source"], row["line"]) for row in flagged}
    counts: Counter[str] = Counter({"rows": num_rows})
    for source, lines in classes.items():
        for line, kind in lines.items():
            counts[f"{kind} planted"] += 1
            counts[f"{kind} dropped"] += (source, line) in dropped
            counts[f"{kind} seen"] += (source, line) in seen
    for row in overlap:
        if row["line"] not in classes.get(row["source"], {}):
            counts[f"not planted, {row['matched']}"] += 1
    for row in flagged:
        counts["not planted, flagged"] += row["line"] not in classes.get(row["source"], {})
    return counts


def _summary(counts: Counter[str]) -> dict[str, Any]:
    false = counts["not planted, near_duplicate"] + counts["not planted, 13_grams"]
    recall = {
        f"{kind} {size}": {
            "planted": counts[f"{kind} {size} planted"],
            "dropped": counts[f"{kind} {size} dropped"] / counts[f"{kind} {size} planted"],
            "dropped or flagged": counts[f"{kind} {size} seen"] / counts[f"{kind} {size} planted"],
        }
        for kind in CLASSES
        for size in ("long", "short")
        if counts[f"{kind} {size} planted"]
    }
    return {"recall": recall, "false drops": false, "share": false / counts["rows"]} | {
        name: number for name, number in counts.items() if name.startswith(("not", "rows"))
    }


def _show(overlap: list[Row], classes: dict[str, dict[int, str]], limit: int) -> None:
    """Print some rows that were dropped without having been planted, for a person to judge."""
    others = [
        row
        for row in overlap
        if row["line"] not in classes.get(row["source"], {})
        and row["matched"] in ("near_duplicate", "13_grams")
    ]
    for row in others[:limit]:
        print(row["matched"], "|", row["text"][:240], "|", row["matched_text"][:240])


def _spec(directory: Path, similarity: float | None, share: float | None) -> ExperimentSpec:
    sources = {part: str(directory / f"{part}.jsonl") for part in ("train", "test")}
    return ExperimentSpec.model_validate(
        {
            "name": "contamination",
            "model": {"id": "none"},
            "task": {"name": "task", "dev_examples": 1} | sources,
            "general": [str(directory / "general.jsonl")],
            "anchor": {"length_column": "anchor_len"},
            "curation": {
                "max_tokens": 1_000_000,
                "general_heldout_examples": 1,
                "near_duplicate_similarity": similarity,
                "overlap_ngram_share": share,
            },
            "budgets": {"task_tokens": 1000, "general_tokens": 1000},
        }
    )


def _general(data: Path, count: int, rng: random.Random) -> list[Row]:
    files = str(data / "general" / "*.parquet")
    rows = duckdb.sql(
        f"select prompt, response from read_parquet('{files}', filename = true)"
        " order by filename, prompt, response"
    ).fetchall()
    chosen = rng.sample(rows, min(count, len(rows)))
    return [{"prompt": prompt, "response": response} for prompt, response in chosen]


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = ("prompt", "response", "anchor_len")
    return [{name: row[name] for name in names} for row in rows]


def _write(path: Path, rows: list[Row], planted: list[tuple[str, Row]]) -> dict[int, str]:
    """Write rows and planted ones after them; returns the class by line of the planted."""
    is_general = path.stem == "general"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        for _, row in planted:
            bare = row["prompt"][row["anchor_len"] :] if is_general else row["prompt"]
            file.write(json.dumps(row | {"prompt": bare}) + "\n")
    return {len(rows) + place: kind for place, (kind, _) in enumerate(planted, start=1)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--num-planted", type=int, default=100, help="of each class and task")
    parser.add_argument("--num-general", type=int, default=10_000)
    parser.add_argument("--similarity", type=float, default=0.8)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--show", type=int, default=0, help="false drops to print, per task")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
