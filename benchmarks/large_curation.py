"""Curation larger than memory: time, peak memory and spilled bytes over a synthetic corpus.

Writes a corpus of short examples (nine in ten have 10 to 20 words, one in ten 30 to 60), of which
2 % are copies and 2 % near-duplicates of earlier ones, and a small task whose test prompts stand in
one general example in 10,000. Curates it in a process of its own and samples the memory of
that process and its children five times a second. The tokenizer is a word-level one over the
synthetic vocabulary without a chat template, so that the time is that of the data stages;
``--tokenizer`` takes a real one.

    python benchmarks/large_curation.py --examples 5000000

Prints JSON: seconds and CPU seconds in all and of each step, peak resident memory, largest spill,
rows kept and set aside by reason.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_VOCABULARY = 20_000
_COPIES, _NEAR, _LONG, _LEAKED = 0.02, 0.02, 0.1, 1e-4
_REMEMBERED = 5000
_TEST_ITEMS = 200
_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Write the corpus, curate it in a child, print what it took."""
    arguments = _parse()
    if arguments.run:
        _curate(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        start = time.perf_counter()
        write_corpus(directory, arguments.examples, random.Random(arguments.seed))
        print(f"corpus written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        print(json.dumps(_measure(directory, arguments), indent=1))


def write_corpus(directory: Path, num_examples: int, rng: random.Random) -> None:
    """``general.jsonl``, ``train.jsonl``, ``test.jsonl`` and a word-level tokenizer."""
    words = [_word(number) for number in range(_VOCABULARY)]
    test = [_text(words, rng, 8, 16) for _ in range(_TEST_ITEMS)]
    _write_rows(directory / "test.jsonl", ((prompt, _text(words, rng, 2, 6)) for prompt in test))
    train = [(_text(words, rng, 8, 16), _text(words, rng, 2, 6)) for _ in range(1000)]
    _write_rows(directory / "train.jsonl", iter(train))
    _write_rows(directory / "general.jsonl", _general(words, test, num_examples, rng))
    _write_tokenizer(directory / "tokenizer", words)


def _general(
    words: list[str], test: list[str], num_examples: int, rng: random.Random
) -> Iterator[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    for number in range(num_examples):
        drawn = rng.random()
        if seen and drawn < _COPIES:
            yield rng.choice(seen)
            continue
        if seen and drawn < _COPIES + _NEAR:
            prompt, response = rng.choice(seen)
            yield _changed(prompt, words, rng), response
            continue
        if rng.random() < _LEAKED:
            yield rng.choice(test), _text(words, rng, 4, 10)
            continue
        is_long = rng.random() < _LONG
        prompt = _text(words, rng, 26, 50) if is_long else _text(words, rng, 6, 12)
        example = prompt, _text(words, rng, 4, 10)
        if is_long and number % 20 == 0:
            seen = [*seen[-_REMEMBERED:], example]
        yield example


def _text(words: list[str], rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(words, k=rng.randint(least, most)))


def _changed(text: str, words: list[str], rng: random.Random) -> str:
    """The text with its last word replaced: most runs of 5 words stay."""
    return f"{text.rsplit(' ', 1)[0]} {rng.choice(words)}"


def _word(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = ""
    while number or len(word) < 3:
        number, letter = divmod(number, 26)
        word += letters[letter]
    return word


def _write_rows(path: Path, rows: Iterator[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt, response in rows:
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def _write_tokenizer(directory: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<end>", "<unknown>", *words]
    vocabulary = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    fast.save_pretrained(directory)


def _measure(directory: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Run the child; watch its memory and what it spills."""
    command = [sys.executable, __file__, "--run", str(directory)]
    for name in ("max_memory_gb", "similarity", "tokenizer"):
        value = getattr(arguments, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    start = time.perf_counter()
    child = subprocess.Popen(
        command, env=os.environ | _THREADS, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    watch = _Watch(child.pid, directory / "run")
    watch.start()
    output, _ = child.communicate()
    watch.join()
    if child.returncode:
        raise SystemExit(f"curation ended with exit code {child.returncode}")
    return {
        "examples": arguments.examples,
        "max_memory_gb": arguments.max_memory_gb,
        "near_duplicate_similarity": arguments.similarity or None,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_gb": round(watch.peak_rss / 1e9, 3),
        "peak_spill_gb": round(watch.peak_spill / 1e9, 3),
        **json.loads(output),
    }


class _Watch(threading.Thread):
    """Samples resident memory of a process and its children, and bytes of its spill files."""

    def __init__(self, pid: int, run: Path):
        super().__init__(daemon=True)
        self.pid, self.run_directory = pid, run
        self.peak_rss = self.peak_spill = 0

    def run(self) -> None:
        import psutil

        process = psutil.Process(self.pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [process, *process.children(recursive=True)]
                rss = sum(member.memory_info().rss for member in family)
            except psutil.NoSuchProcess:
                return
            self.peak_rss = max(self.peak_rss, rss)
            self.peak_spill = max(self.peak_spill, _bytes_under(self.run_directory))
            time.sleep(0.2)


def _bytes_under(directory: Path) -> int:
    total = 0
    for path in directory.glob(".duckdb-*/**/*"):
        try:
            total += path.stat().st_size
        except OSError:  # gone since it was listed
            continue
    return total


def _curate(arguments: argparse.Namespace) -> None:
    """Curate; print CPU seconds, steps and what came out."""
    from transformers import AutoTokenizer

    from tell_core.data.curation import curate
    from tell_core.spec.model import ExperimentSpec

    directory: Path = arguments.run
    spec = ExperimentSpec.model_validate(
        {
            "name": "large",
            "model": {"id": "none"},
            "task": {
                "name": "task",
                "train": str(directory / "train.jsonl"),
                "test": str(directory / "test.jsonl"),
            },
            "general": [str(directory / "general.jsonl")],
            "anchor": {"source": "none"},
            "curation": {
                "max_memory_gb": arguments.max_memory_gb,
                "near_duplicate_similarity": arguments.similarity or None,
            },
            "budgets": {"task_tokens": 1000, "general_tokens": 10_000},
        }
    )
    steps = _Steps()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or directory / "tokenizer")
    profile = curate(spec, tokenizer, directory / "run", steps)
    general = next(source for source in profile["sources"] if source["role"] == "general")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
                "child_peak_rss_gb": round(usage.ru_maxrss / 1e6, 3),
                "steps": steps.summary(),
                "kept": general["num_kept"],
                "tokens": general["num_tokens"],
                "rejects": general["rejects"],
            }
        )
    )


class _Steps:
    """A progress callback that keeps how long each step took and how often it spoke."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, float, float]] = []
        self._spoken = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self._calls.append((step, now, time.process_time()))
        if now - self._spoken > 10:
            self._spoken = now
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"{step} {done:,}/{total:,} · peak {rss:.2f} GB", file=sys.stderr, flush=True)

    def summary(self) -> dict[str, dict[str, float]]:
        """Seconds from a step's first call to the next step's, CPU seconds, and calls."""
        found: dict[str, dict[str, float]] = {}
        ends = [*self._calls[1:], ("", time.perf_counter(), time.process_time())]
        for (step, begun, cpu_begun), (_, ended, cpu_ended) in zip(self._calls, ends, strict=True):
            entry = found.setdefault(
                step, {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0, "longest_silence": 0.0}
            )
            entry["seconds"] += ended - begun
            entry["cpu_seconds"] += cpu_ended - cpu_begun
            entry["calls"] += 1
            entry["longest_silence"] = max(entry["longest_silence"], ended - begun)
        return {
            step: {name: round(value, 1) for name, value in entry.items()}
            for step, entry in found.items()
        }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--max-memory-gb", type=float, default=2.0)
    parser.add_argument("--similarity", type=float, default=0.8, help="0: no near-duplicates")
    parser.add_argument("--tokenizer", help="directory of a tokenizer; default: a word-level one")
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
