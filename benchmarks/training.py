"""Useful tokens per second and peak memory: this engine, TRL's SFTTrainer, and a bare loop.

All train the same adapters on the same examples, in the same order where they let one choose, with
AdamW in float32 on one thread (a GPU with --device cuda). Useful tokens are those of the examples,
without padding. TRL packs sequences, not examples: --pack-tokens and --packs are chosen so that its
step holds about as many tokens. Engines run in turn; CPU time is compared, since it does not depend
on what else the machine does, on a GPU wall time. Peak memory is that of a process with one engine
only; on a GPU of the tensors of its last run. --profile says which operations took it.

    tell mix configs/halu_smollm2_cpu.yaml --set data=DIRECTORY --set model=MODEL --out RUN
    python benchmarks/training.py --mixture RUN/stages/mix-... --model MODEL
    python benchmarks/training.py --mixture RUN/stages/mix-... --shape 256x4
    python benchmarks/training.py --random-tokens 2048 --shape llama-8b --dtype bfloat16 \\
        --device cuda --engines tell --vocabulary 128256 --batch-size 8 --steps 4 --profile

The last one tells how much of a GPU's arithmetic is used, on random tokens: no data is needed.
The mixture may also be the inputs/ of a bundle, which has no other files behind it.
Needs ``trl`` for the engines that bear its name; --engines leaves it out.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import Mixture, from_lists
from tell_core.data.token_store import open_mixture
from tell_core.spec.model import TrainingSpec
from tell_core.training.attention import attended
from tell_core.training.batching import lay_out
from tell_core.training.collation import collate, pack
from tell_core.training.devices import (
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from tell_core.training.losses import supervised_nll
from tell_core.training.models import attach_lora, detach_adapter, load_model
from tell_core.training.optimisation import create_optimiser, set_learning_rate
from tell_core.training.trainer import Trainer

_SHOWN_OPERATIONS = 12
ENGINES = ("tell", "bare_loop", "trl_packing", "trl_padded")


def main() -> None:
    """Run the pairs, then each engine alone for its memory, and print JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    bench = Bench(arguments)
    if arguments.alone:
        bench.run(arguments.alone)
        print(json.dumps({"peak_memory_bytes": peak_memory_bytes(bench.device)}))
        return
    seconds: dict[str, list[float]] = {engine: [] for engine in arguments.engines}
    for pair in range(arguments.pairs + 1):
        for engine in arguments.engines:
            took = bench.run(engine)
            print(f"round {pair}: {engine} {took:.2f} s", file=sys.stderr, flush=True)
            if pair:  # the first round warms up
                seconds[engine].append(took)
    report = bench.report(seconds)
    if bench.device.type == "cpu":
        report["peak_memory_bytes"] = _peaks(arguments)
    if arguments.profile:
        report["share_of_time"] = bench.profile()
    print(json.dumps(report, indent=1))


class Bench:
    """The model, the examples and the engines."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = resolve_device(arguments.device)
        self.base = _model(arguments, self.device)
        self.utilisations: list[float] = []
        self.out_of_memory = 0
        self._attached: nn.Module | None = None
        self.peaks: dict[str, int] = {}
        whole = open_mixture(arguments.mixture) if arguments.mixture else _random_mixture(arguments)
        order = whole.order[: arguments.steps * arguments.batch_size]
        rows, inverse = np.unique(order, return_inverse=True)
        examples = whole.examples.select(rows)
        vocabulary = self.base.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        examples.tokens[:] = examples.tokens % vocabulary
        self.mixture = Mixture(examples, inverse.astype(np.int32))
        self.num_tokens = int(examples.lengths[self.mixture.order].sum())
        self.training = TrainingSpec(
            learning_rate=1e-4, epochs=1, batch_size=arguments.batch_size, num_probes=2,
            keep="last", warmup_fraction=0, device=arguments.device, batching=arguments.batching,
            micro_batch_tokens=arguments.micro_batch_tokens,
        )  # fmt: skip
        self.precision = resolve_precision(arguments.dtype, self.device)

    def run(self, engine: str) -> float:
        """Train a fresh copy; returns the seconds of the training alone."""
        work: dict[str, Callable[[], float]] = {
            "tell": self._tell,
            "bare_loop": self._bare_loop,
            "trl_packing": lambda: self._trl(is_packed=True),
            "trl_padded": lambda: self._trl(is_packed=False),
        }
        torch.manual_seed(0)
        reset_peak_memory(self.device)
        took = work[engine]()
        self.peaks[engine] = peak_memory_bytes(self.device)
        return took

    def _adapted(self) -> nn.Module:
        """The base with fresh adapters: on a GPU itself, for a large one is there only once."""
        if self.device.type == "cpu":
            return attach_lora(copy.deepcopy(self.base), self.training).train()
        if self._attached is not None:
            detach_adapter(self._attached)
        self._attached = attach_lora(self.base, self.training).train()
        return self._attached

    def _trainer(self) -> Trainer:
        return Trainer(
            self._adapted(), self.mixture, from_lists([], True), self.training, 0, self.device,
            self.precision,
        )  # fmt: skip

    def _tell(self) -> float:
        trainer = self._trainer()
        with tempfile.TemporaryDirectory() as out:
            took = _timed(lambda: trainer.run(Path(out), "benchmark"), self.device)
        if (used := trainer.model_flops_utilisation()) is not None:
            self.utilisations.append(used)
        self.out_of_memory = trainer.engine.num_out_of_memory
        return took

    def _bare_loop(self) -> float:
        """The same forward passes, collated beforehand, and nothing but what a step must do."""
        trainer = self._trainer()
        model, limits, examples = trainer.model, trainer.engine.limits, self.mixture.examples
        gather = pack if limits.layout == "packed" else collate
        size = self.training.batch_size
        steps = [
            self.mixture.order[at : at + size] for at in range(0, len(self.mixture.order), size)
        ]
        batches = [
            [
                gather(examples, rows[part], self.device)
                for part in lay_out(examples.lengths[rows], limits)
            ]
            for rows in steps
        ]
        optimiser = create_optimiser(trainer.parameters, 0.0)
        set_learning_rate(optimiser, 1e-4)

        def loop() -> None:
            with attended(model, limits):  # type: ignore[arg-type]
                for step in batches:
                    supervised = sum(len(batch.targets_S) for batch in step)
                    optimiser.zero_grad(set_to_none=True)
                    for batch in step:
                        with self.precision.autocast(self.device):
                            nll_S = supervised_nll(model, batch)
                        (nll_S.sum() / supervised).backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(trainer.parameters.values(), 1.0)
                    optimiser.step()

        return _timed(loop, self.device)

    def _trl(self, *, is_packed: bool) -> float:
        """SFTTrainer, its loss on completions only as ours, its own settings otherwise."""
        import datasets
        from peft import PeftModel
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        examples, lengths = self.mixture.examples, self.mixture.examples.lengths
        rows = self.mixture.order.tolist()
        data = datasets.Dataset.from_dict(
            {
                "input_ids": [examples.example(row).tolist() for row in rows],
                "completion_mask": [
                    [int(at >= examples.response_starts[row]) for at in range(lengths[row])]
                    for row in rows
                ],
            }
        )
        clock = SimpleNamespace(started=0.0, took=0.0)
        now = time.process_time if self.device.type == "cpu" else time.perf_counter

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.started = now()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                clock.took = now() - clock.started

        longest = int(lengths.max())
        tokens = self.arguments.pack_tokens or longest
        with tempfile.TemporaryDirectory() as out:
            config = SFTConfig(
                output_dir=out, num_train_epochs=1, packing=is_packed, completion_only_loss=True,
                max_length=max(tokens, longest) if is_packed else longest,
                per_device_train_batch_size=(
                    self.arguments.packs if is_packed else self.training.batch_size
                ),
                learning_rate=1e-4, lr_scheduler_type="cosine", max_grad_norm=1.0,
                bf16=self.arguments.dtype == "bfloat16", gradient_checkpointing=False,
                use_cpu=self.device.type == "cpu", logging_steps=10**6, save_strategy="no",
                report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            model = self._adapted()
            assert isinstance(model, PeftModel)
            trainer = SFTTrainer(
                model=model, args=config, train_dataset=data, callbacks=[Clock()],
                processing_class=_tokenizer(),
            )  # fmt: skip
            trainer.train()
        return float(clock.took)

    def report(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Medians, and the engine's speed as a multiple of the others', pair by pair."""
        ours = seconds["tell"]
        engine = self._trainer().engine
        counts, limits = engine.count_batches(), engine.limits
        used = self.utilisations[1:]  # the first round warms up
        return {
            "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "trl")},
            "model_parameters": sum(weight.numel() for weight in self.base.parameters()),
            "useful_tokens": self.num_tokens,
            "examples": len(self.mixture.order),
            "forward_passes": counts.forward_passes,
            "padding_share": counts.padding_share,
            "model_flops_utilisation": statistics.median(used) if used else None,  # see telemetry
            "num_out_of_memory": self.out_of_memory,
            "micro_batch_tokens": limits.max_tokens,
            "cpu_seconds" if self.device.type == "cpu" else "seconds": seconds,
            "peak_memory_bytes": self.peaks,
            "useful_tokens_per_second": {
                engine: self.num_tokens / statistics.median(took)
                for engine, took in seconds.items()
            },
            "tell_is_faster_by": {
                engine: statistics.median(
                    theirs / own for theirs, own in zip(took, ours, strict=True)
                )
                for engine, took in seconds.items()
                if engine != "tell"
            },
        }

    def profile(self) -> dict[str, float]:
        """Shares of one step's wall time, of the operations that take most of it.

        On a GPU what no operation takes is ``idle``: the GPU waits for this process, whose work the
        profiler slows down. Empty where the profiler cannot see the GPU.
        """
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        is_cpu = self.device.type == "cpu"
        trainer = self._trainer()
        kinds = [ProfilerActivity.CPU] if is_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with trainer.engine.attended():
            if trainer.num_steps > 1:
                trainer.train_step()
            with profile(activities=kinds) as seen:
                wall = _timed(lambda: trainer.train_step(), self.device)
        # Kernels are listed by themselves, too, and would be counted twice.
        events = [one for one in seen.key_averages() if one.device_type == DeviceType.CPU]
        name = "self_cpu_time_total" if is_cpu else "self_device_time_total"
        times = {event.key: float(getattr(event, name)) / 1e6 for event in events}
        total = sum(times.values())
        if not total:
            return {}
        whole = total if is_cpu else wall
        most = sorted(times, key=lambda key: -times[key])[:_SHOWN_OPERATIONS]
        shares = {key: times[key] / whole for key in most}
        shares["others"] = total / whole - sum(shares.values())
        return shares if is_cpu else shares | {"idle": 1 - total / whole}


def _timed(work: Callable[[], None], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def _model(arguments: argparse.Namespace, device: torch.device) -> Any:
    if arguments.model:
        return load_model(str(arguments.model), dtype=arguments.dtype, device=device).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if arguments.shape == "llama-8b":
        config = LlamaConfig(
            vocab_size=arguments.vocabulary, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            max_position_embeddings=4096,
        )  # fmt: skip
    else:
        width, layers = map(int, arguments.shape.split("x"))
        config = LlamaConfig(
            vocab_size=arguments.vocabulary, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=4096, tie_word_embeddings=True,
        )  # fmt: skip
    with device:
        model = LlamaForCausalLM._from_config(
            config, dtype=resolve_precision(arguments.dtype, device).weights
        )
    return model.eval()


def _random_mixture(arguments: argparse.Namespace) -> Mixture:
    """Examples of equal length whose second half is supervised."""
    random = np.random.default_rng(0)
    length, count = arguments.random_tokens, arguments.steps * arguments.batch_size
    tokens = random.integers(arguments.vocabulary, size=(count, length), dtype=np.int32)
    examples = from_lists([(row, length // 2) for row in tokens], is_task=True)
    return Mixture(examples, np.arange(count, dtype=np.int32))


def _tokenizer() -> Any:
    """SFTTrainer asks for one, though the examples are encoded; it pads with token 0 as we do."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"pad": 0, "end": 1}, unk_token="pad"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end")


def _peaks(arguments: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:]]
    peaks = {}
    for engine in arguments.engines:
        done = subprocess.run([*command, "--alone", engine], capture_output=True, check=True)
        peaks[engine] = int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])
    return peaks


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--mixture", type=Path, help="a mix stage")
    data.add_argument("--random-tokens", type=int, help="length of random examples instead")
    parser.add_argument("--model", type=Path, help="a model directory; default: random weights")
    parser.add_argument(
        "--shape", default="256x4", help="width x layers of a random Llama, or llama-8b"
    )
    parser.add_argument("--vocabulary", type=int, default=49152, help="of the random Llama")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batching", default="auto")
    parser.add_argument(
        "--micro-batch-tokens",
        type=lambda given: given if given == "auto" else int(given),
        default="auto",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pack-tokens", type=int, default=0, help="of TRL; default: the longest")
    parser.add_argument("--packs", type=int, default=4, help="of a step of TRL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--profile", action="store_true", help="shares of one more step's time")
    parser.add_argument("--alone", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
