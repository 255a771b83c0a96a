"""Near-duplicates: this project's search against text-dedup's and datatrove's MinHash.

Plants a corpus: real texts of a directory that share little with each other, and near-duplicates
of 4,000 of them with words replaced, left out and put in, at a Jaccard similarity of at least 0.8
(runs of 5 words). Every program gets the same file in a process of its own on one thread, in turns;
counted are the CPU seconds of its work, imports left out. Recall and precision are over removed
documents.

    python benchmarks/near_duplicates.py DATA --peers-python PEERS/bin/python

DATA holds JSONL or Parquet files with columns prompt and response. The peers (``pip install
text-dedup==0.4.0 'datatrove[processing]==0.10.1'``) live in an environment of their own.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NUM_DOCUMENTS, NUM_PLANTED = 20_000, 4_000
SIMILARITY = 0.8
PROGRAMS = ("tell", "text-dedup", "datatrove")
_RUN = 5
_MIN_WORDS, _MAX_WORDS = 60, 1000
_MAX_COMMON = 0.1
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main() -> None:
    """Plant, run every program in turns, print medians and ratios as JSON."""
    arguments = _parse()
    if arguments.run:
        _run_program(arguments.run, arguments.data, arguments.out)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        clusters = plant(arguments.data, directory / "corpus.jsonl", random.Random(arguments.seed))
        programs = PROGRAMS if arguments.peers_python else PROGRAMS[:1]
        rounds = []
        for number in range(arguments.rounds):
            measured = {}
            for program in programs:
                out = directory / f"{program}-{number}"
                python = sys.executable if program == "tell" else arguments.peers_python
                measured[program] = _measure(python, program, directory / "corpus.jsonl", out)
                measured[program] |= score(clusters, set(measured[program].pop("kept")))
            rounds.append(measured)
            print(json.dumps(measured), file=sys.stderr)
    print(json.dumps(_summary(rounds), indent=1))


def plant(data: Path, path: Path, rng: random.Random) -> list[int]:
    """Write the corpus; returns the number of the original of each document."""
    texts = _originals(data, rng)
    words = [word for text in texts[:2000] for word in text.split()]
    documents = list(enumerate(texts))
    originals = iter(rng.sample(range(len(texts)), len(texts)))
    while len(documents) < NUM_DOCUMENTS:
        original = next(originals)
        changed = changed_words(texts[original], words, rng)
        if SIMILARITY <= jaccard(texts[original], changed) < 1:
            documents.append((original, changed))
    rng.shuffle(documents)
    with path.open("w", encoding="utf-8") as file:
        for number, (_, text) in enumerate(documents):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    return [original for original, _ in documents]


def score(originals: list[int], kept: set[int]) -> dict[str, float]:
    """Recall and precision of the removed documents; one of each cluster should stay."""
    sizes: dict[int, int] = {}
    left: dict[int, int] = {}
    for number, original in enumerate(originals):
        sizes[original] = sizes.get(original, 0) + 1
        left[original] = left.get(original, 0) + (number in kept)
    right = sum(sizes[original] - max(left[original], 1) for original in sizes)
    removed = len(originals) - len(kept)
    return {
        "recall": right / (len(originals) - len(sizes)),
        "precision": right / removed if removed else 1.0,
    }


def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of 5 words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1)}


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts by their runs of words."""
    one, other = runs(first), runs(second)
    return len(one & other) / max(len(one | other), 1)


def _originals(data: Path, rng: random.Random) -> list[str]:
    """Texts of which each shares at most a tenth of its runs with all before it."""
    texts = list(dict.fromkeys(_texts(data)))
    rng.shuffle(texts)
    seen: set[int] = set()
    chosen = []
    for text in texts:
        if not _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
            continue
        hashes = {hash(run) for run in runs(text)}
        if hashes and len(hashes & seen) <= _MAX_COMMON * len(hashes):
            chosen.append(text)
            seen |= hashes
        if len(chosen) == NUM_DOCUMENTS - NUM_PLANTED:
            return chosen
    raise SystemExit(f"{data} holds {len(chosen)} texts that differ enough; needed are 16,000.")


def _texts(data: Path) -> Iterator[str]:
    import duckdb

    for path in sorted(data.rglob("*")):
        if path.suffix in (".jsonl", ".parquet"):
            rows = duckdb.sql(f"select prompt, response from '{path}'").fetchall()
            yield from (f"{prompt}\n{response}" for prompt, response in rows)


def changed_words(text: str, words: list[str], rng: random.Random) -> str:
    """The text with some words replaced, left out or put in, 1 in 250 to 1 in 40."""
    pieces = text.split(" ")
    for _ in range(max(1, round(len(pieces) * rng.uniform(0.004, 0.025)))):
        at = rng.randrange(len(pieces))
        kind = rng.choice(("replace", "drop", "insert"))
        new = [] if kind == "drop" else [rng.choice(words)]
        pieces[at : at + (kind != "insert")] = new
    return " ".join(pieces)


def _measure(python: str, program: str, corpus: Path, out: Path) -> dict[str, object]:
    command = [python, __file__, str(corpus), "--run", program, "--out", str(out)]
    environment = os.environ | _THREADS | {"HF_HOME": str(out / "hub"), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads((out / "measured.json").read_text()))


def _run_program(program: str, corpus: Path, out: Path) -> None:
    """Do the work of one program in this process and write what it kept and what it cost."""
    out.mkdir(parents=True)
    prepare = {"tell": _tell, "text-dedup": _text_dedup, "datatrove": _datatrove}[program]
    work = prepare(corpus, out)
    cpu, wall = _cpu_seconds(), time.perf_counter()
    kept = work()
    measured = {"cpu_seconds": _cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}
    (out / "measured.json").write_text(json.dumps(measured | {"kept": kept}))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _tell(corpus: Path, out: Path):
    from tell_core.data.near_duplicates import (
        create_near_duplicate_tables,
        find_near_duplicates,
        index_words,
        settle_near_duplicates,
    )
    from tell_core.data.overlap import index_prompts
    from tell_core.data.workspace import fetch_all, open_workspace

    def work() -> list[int]:
        with open_workspace(out) as connection:
            connection.execute("set threads = 1")
            connection.execute("insert into sources values (0, 'general', 'corpus', 0)")
            connection.execute(
                "insert into examples by name select id::bigint as id, 0 as source_id, 'general'"
                " as part, 'corpus' as file, id::bigint as line, text as prompt, '' as response"
                f" from read_json('{corpus}', format = 'newline_delimited')"
            )
            connection.execute("alter table examples add column example_id varchar")
            index_prompts(connection, "")
            create_near_duplicate_tables(connection)
            store, ids = index_words(connection)
            find_near_duplicates(connection, store, ids, SIMILARITY)
            settle_near_duplicates(connection, drop_duplicates=True, drop_overlap=True)
            return [number for (number,) in fetch_all(connection, "select id from examples")]

    return work


def _text_dedup(corpus: Path, out: Path):
    from datasets import load_from_disk
    from text_dedup import minhash

    arguments = [
        "--path", "json", "--data_files", str(corpus), "--split", "train", "--column", "text",
        "--output", str(out / "kept"), "--num_proc", "1", "--threshold", "0.7",
        "--cache_dir", str(out / "cache"),
    ]  # fmt: skip

    def work() -> list[int]:
        minhash.main(arguments, standalone_mode=False)
        return [int(number) for number in load_from_disk(str(out / "kept"))["id"]]

    return work


def _datatrove(corpus: Path, out: Path):
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()
    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    paths = {name: str(out / name) for name in ("signatures", "buckets", "removed", "kept")}
    stages = (
        ([reader, MinhashDedupSignature(paths["signatures"], config)], 1),
        (
            [MinhashDedupBuckets(paths["signatures"], paths["buckets"], config=config)],
            config.num_buckets,
        ),
        ([MinhashDedupCluster(paths["buckets"], paths["removed"], config=config)], 1),
        (
            [
                reader,
                MinhashDedupFilter(paths["removed"]),
                JsonlWriter(paths["kept"], compression=None),
            ],
            1,
        ),
    )

    def work() -> list[int]:
        for number, (blocks, tasks) in enumerate(stages):
            logs = str(out / f"logs-{number}")
            LocalPipelineExecutor(blocks, tasks=tasks, workers=1, logging_dir=logs).run()
        files = sorted(Path(paths["kept"]).glob("*.jsonl"))
        lines = [line for file in files for line in file.open(encoding="utf-8")]
        return [int(json.loads(line)["id"]) for line in lines]

    return work


def _summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    programs = {}
    for program in rounds[0]:
        rows = [measured[program] for measured in rounds]
        programs[program] = {
            name: statistics.median(row[name] for row in rows)
            for name in ("cpu_seconds", "wall_seconds", "recall", "precision")
        }
        programs[program]["documents_per_cpu_second"] = (
            NUM_DOCUMENTS / programs[program]["cpu_seconds"]
        )
    ratios = {
        f"{program} / tell, CPU seconds": statistics.median(
            measured[program]["cpu_seconds"] / measured["tell"]["cpu_seconds"]
            for measured in rounds
        )
        for program in programs
        if program != "tell"
    }
    return {"num_rounds": len(rounds), "programs": programs, "ratios": ratios}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="directory with JSONL or Parquet files")
    parser.add_argument("--peers-python", help="Python in which the peers are installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
