"""Useful tokens per second: the batched engine against a one-by-one `model.generate` loop.

Both answer the same prompts greedily, of mixed lengths and with mixed limits, on one thread in
float32 (a GPU with --device cuda). Useful tokens are those of the answers: no padding, no end
token. Pairs are run in turn and medians compared; the answers must agree.

    python benchmarks/generation.py --model runs/demo/stages/world-.../base/model
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import GenerationConfig

from tell_core.evaluation.generation import Decoding, Request, end_token_ids, generate
from tell_core.training.devices import resolve_device
from tell_core.training.models import LoadedModel, load_model


def main() -> None:
    """Run the pairs and print medians as JSON."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    loaded = load_model(arguments.model, dtype="float32", device=device)
    requests = _requests(loaded, arguments)
    batched = {size: _batched(loaded, requests, size) for size in arguments.batch_size}
    alone = _one_by_one(loaded, requests)
    expected: list[list[int]] = []
    seconds: dict[str, list[float]] = {}
    num_different: dict[str, int] = {}
    for pair in range(arguments.pairs):
        for name, work in {"one_by_one": alone, **batched}.items():
            started = time.perf_counter()
            answers = work()
            taken = time.perf_counter() - started
            print(f"pair {pair + 1} of {arguments.pairs}: {name} {taken:.1f} s", file=sys.stderr)
            expected = expected or answers
            seconds.setdefault(str(name), []).append(taken)
            num_different[str(name)] = sum(a != b for a, b in zip(answers, expected, strict=True))
    num_tokens = sum(map(len, expected))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: medians["one_by_one"] / median for name, median in medians.items()}
    print(
        json.dumps(
            {
                "num_prompts": len(requests),
                "useful_tokens": num_tokens,
                "seconds": seconds,
                "useful_tokens_per_second": {n: num_tokens / m for n, m in medians.items()},
                "ratio_to_one_by_one": ratios,
                "answers_that_differ": num_different,
            },
            indent=1,
        )
    )
    if any(num_different.values()):
        raise SystemExit("answers differ between the two ways of writing them")


def _requests(loaded: LoadedModel, arguments: argparse.Namespace) -> list[Request]:
    """Prompts of random ordinary tokens, lengths and limits uniform."""
    context = loaded.model.config.max_position_embeddings
    generator = np.random.default_rng(0)
    special = set(loaded.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(loaded.tokenizer)) if token not in special]
    longest = min(arguments.max_prompt_tokens, context - arguments.max_new_tokens)
    return [
        Request(
            generator.choice(ordinary, size=int(generator.integers(4, longest + 1))),
            int(generator.integers(arguments.max_new_tokens // 8, arguments.max_new_tokens + 1)),
        )
        for _ in range(arguments.prompts)
    ]


class _Ids:
    """Shows token ids instead of text, so that answers can be compared token by token."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.eos_token_id = loaded.tokenizer.eos_token_id

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(map(str, ids))


def _batched(
    loaded: LoadedModel, requests: list[Request], batch_size: int
) -> Callable[[], list[list[int]]]:
    def work() -> list[list[int]]:
        texts = generate(
            loaded.model,
            _Ids(loaded),  # type: ignore[arg-type]
            requests,
            Decoding(),
            batch_size=batch_size,
            device=loaded.model.device,
        )
        return [[int(word) for word in text.split()] for text in texts]

    return work


def _one_by_one(loaded: LoadedModel, requests: list[Request]) -> Callable[[], list[list[int]]]:
    ends = end_token_ids(loaded.model, loaded.tokenizer)

    def work() -> list[list[int]]:
        return [_answer(loaded, request, ends) for request in requests]

    return work


def _answer(loaded: LoadedModel, request: Request, ends: frozenset[int]) -> list[int]:
    ids = torch.from_numpy(request.prompt)[None].to(loaded.model.device)
    written = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=0,
        ),
    )
    answer = written[0, len(request.prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in ends else answer


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a causal language model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
