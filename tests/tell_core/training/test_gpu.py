"""What holds on a GPU: kernels, number formats, memory, resuming, locks, several of them.

Most bodies run on a CPU too (`-m slow`), so that a machine without a GPU shows that they work. They
need torch, transformers, peft, accelerate, safetensors, numpy, pydantic and pytest with
pytest-timeout and hypothesis; bitsandbytes for 4-bit base weights. `make gpu` runs them.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from tell_core.data.encoding import EncodedExamples, Mixture, from_lists
from tell_core.lanes import gpus_of_lanes, in_lane, open_lanes
from tell_core.spec.model import TrainingSpec
from tell_core.training import devices, trainer
from tell_core.training.attention import (
    TOLERANCE,
    attended,
    attention_name,
    packing_refusal,
    segments_attended,
)
from tell_core.training.batching import Limits
from tell_core.training.collation import collate, pack
from tell_core.training.gradients import StepLosses, step_gradients
from tell_core.training.loop import train_cell
from tell_core.training.losses import _packed_arguments, supervised_logits
from tell_core.training.models import attach_lora, detach_adapter
from tests.tell_core.training.families import CONFIGS, EXPERTS, family_model, write_family

VOCAB_SIZE = 61
PACKED, ONE_BY_ONE = Limits("packed"), Limits("padded", max_examples=1)
# Heads of 64, as most models have; several tokens a tile of the GPU's kernels.
MIDDLE = LlamaConfig(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=None,
)  # fmt: skip

pytestmark = pytest.mark.timeout(600)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
Train = Callable[..., dict[str, Any]]


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    return found(request.param)


@pytest.fixture(params=[GPU])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    return found(request.param)


def found(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def need_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, {torch.cuda.device_count()} are visible")


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> EncodedExamples:
    """16 examples of 20 to 300 tokens, on a CPU to 60, half of them task examples."""
    generator = np.random.default_rng(0)
    parts = []
    longest = 60 if "cpu" in request.node.name else 300
    for length in generator.integers(20, longest + 1, size=16).tolist():
        tokens = generator.integers(2, VOCAB_SIZE, size=length).tolist()
        parts.append((tokens, int(generator.integers(1, length))))
    drawn = from_lists(parts, True)
    return dataclasses.replace(drawn, is_task=np.arange(len(drawn)) % 2 == 0)


@pytest.fixture
def middle(device: torch.device) -> Iterator[PreTrainedModel]:
    yield torch.nn.Module.to(family_model(MIDDLE), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, examples: EncodedExamples, tmp_path: Path) -> Train:
    """Trains the middle model on the examples, twice over, in steps of 4."""
    model = write_family(MIDDLE, tokenizer, tmp_path / "model")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    order = np.tile(np.arange(len(examples), dtype=np.int32), 2)
    Mixture(examples, order).save(inputs / "mixture.safetensors")
    examples.select(np.arange(3)).save(inputs / "probe.safetensors")

    def run(training: TrainingSpec, name: str = "out", **more: Any) -> dict[str, Any]:
        return train_cell(
            model_path=str(model), revision=None, inputs=inputs, training=training, seed=3,
            out=tmp_path / name, **more,
        )  # fmt: skip

    return run


def losses_of(out: Path) -> np.ndarray:
    lines = (out / "log.jsonl").read_text().splitlines()
    return np.asarray([json.loads(line)["loss"] for line in lines])


def precision_of(dtype: str, device: torch.device) -> devices.Precision:
    return devices.resolve_precision(dtype, device)  # type: ignore[arg-type]


def gradient_of(
    model: Any,
    examples: EncodedExamples,
    limits: Limits,
    device: torch.device,
    precision: devices.Precision,
) -> tuple[StepLosses, torch.Tensor]:
    """Losses and the whole gradient, flat, of one step over all examples."""
    model.zero_grad(set_to_none=True)
    with attended(model, limits):
        losses = step_gradients(
            model, examples, np.arange(len(examples)),
            limits=limits, device=device, precision=precision,
        )  # fmt: skip
    flat = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return losses, torch.cat(flat)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_examples_have_logits_loss_and_gradient_of_single_ones(
    device: torch.device,
    middle: PreTrainedModel,
    examples: EncodedExamples,
    training_spec: Callable[..., TrainingSpec],
    dtype: str,
):
    """In bfloat16 packed and single are both compared with float32: neither is the more exact."""
    exact = precision_of("float32", device)
    adapted = attach_lora(middle, training_spec(lora_rank=4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    true_losses, true_gradient = gradient_of(adapted, examples, ONE_BY_ONE, device, exact)
    true_logits = single_logits(adapted, examples, device, exact)
    precision = precision_of(dtype, device)
    for weight in adapted.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(precision.weights)

    losses, gradient = gradient_of(adapted, examples, PACKED, device, precision)
    logits = packed_logits(adapted, examples, device, precision)
    _, single_gradient = gradient_of(adapted, examples, ONE_BY_ONE, device, precision)
    single = single_logits(adapted, examples, device, precision)

    name = attention_name(adapted, PACKED, device, precision)
    detach_adapter(adapted)
    assert name == ("varlen, packed" if (device.type, dtype) == ("cuda", "bfloat16") else
                    "sdpa, packed")  # fmt: skip
    assert losses.loss == pytest.approx(true_losses.loss, rel=TOLERANCE[dtype])
    assert losses.task_loss == pytest.approx(true_losses.task_loss, rel=TOLERANCE[dtype])
    if dtype == "float32":
        assert apart(gradient, true_gradient) < 1e-4
        assert apart(logits, true_logits) < 1e-4
    else:
        assert apart(gradient, true_gradient) < 1.5 * apart(single_gradient, true_gradient)
        assert apart(logits, true_logits) < 1.5 * apart(single, true_logits)


def single_logits(
    model: Any, examples: EncodedExamples, device: torch.device, precision: devices.Precision
) -> torch.Tensor:
    """Logits at all supervised positions by the model's own attention, longest example first."""
    found = []
    with torch.no_grad(), precision.autocast(device):
        for row in np.argsort(-examples.lengths, kind="stable"):
            batch = collate(examples, [row], device)
            found.append(supervised_logits(model, batch.input_ids_RL, batch.positions_S))
    return torch.cat(found)


def packed_logits(
    model: Any, examples: EncodedExamples, device: torch.device, precision: devices.Precision
) -> torch.Tensor:
    batch = pack(examples, np.argsort(-examples.lengths, kind="stable"), device)
    with torch.no_grad(), precision.autocast(device), segments_attended(model):
        return supervised_logits(
            model, batch.input_ids_RL, batch.positions_S, **_packed_arguments(batch)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_families_are_packed_with_windows_groups_of_heads_and_experts(
    device: torch.device,
    random_examples: Callable[..., EncodedExamples],
    family: str,
    dtype: str,
):
    """Examples of 6 to 20 tokens, windows of 8."""
    if family in EXPERTS and dtype == "bfloat16":
        pytest.skip("rounding sends tokens to other experts: packed is not to be told from single")
    drawn, precision = random_examples(3, 4), precision_of(dtype, device)
    model = torch.nn.Module.to(family_model(CONFIGS[family]), device, precision.weights)

    assert packing_refusal(model, drawn, np.arange(7), device, precision) is None


@pytest.mark.parametrize(("method", "learning_rate"), [("lora", 1e-2), ("full", 1e-3)])
def test_bfloat16_trains_float32_weights_along_the_losses_of_float32(
    device: torch.device,
    train: Train,
    training_spec: Callable[..., TrainingSpec],
    tmp_path: Path,
    method: str,
    learning_rate: float,
):
    spec = training_spec(device=device.type, method=method, learning_rate=learning_rate)

    summary = train(spec, "half", dtype="bfloat16")

    train(spec, "exact", dtype="float32")
    half, exact = losses_of(tmp_path / "half"), losses_of(tmp_path / "exact")
    (weights,) = (tmp_path / "half").glob("*/*.safetensors")
    assert (summary["device"], summary["dtype"]) == (device.type, "bfloat16")
    assert summary["attention"] == f"{'varlen' if device.type == 'cuda' else 'sdpa'}, packed"
    assert {weight.dtype for weight in load_file(weights).values()} == {torch.float32}
    assert half[4:].mean() < half[:4].mean()  # the second time over the same examples
    assert half[0] == pytest.approx(exact[0], rel=TOLERANCE["bfloat16"])
    assert half.mean() == pytest.approx(exact.mean(), rel=TOLERANCE["bfloat16"])


def test_when_memory_runs_out_the_step_is_taken_in_smaller_passes_with_the_same_result(
    device: torch.device,
    middle: PreTrainedModel,
    examples: EncodedExamples,
    training_spec: Callable[..., TrainingSpec],
):
    spec = training_spec(device=device.type, batch_size=16, batching="packed")
    order = np.arange(len(examples), dtype=np.int32)
    adapted = attach_lora(middle, spec)
    engine = trainer.StepEngine(
        adapted, Mixture(examples, order), spec, device, precision_of("float32", device)
    )
    engine.limits = PACKED

    def step() -> tuple[float, torch.Tensor]:
        with engine.attended():
            losses = engine.gradients(0, 0)
        flat = [p.grad.flatten() for p in adapted.parameters() if p.grad is not None]
        return losses.loss, torch.cat(flat).clone()

    loss, gradient = step()
    with _little_memory(device, engine):
        less_loss, less_gradient = step()

    detach_adapter(adapted)
    assert engine.num_out_of_memory >= 1
    assert (engine.limits.max_tokens or 0) < examples.lengths.sum()
    assert less_loss == pytest.approx(loss, rel=1e-5)
    assert apart(less_gradient, gradient) < 1e-4


def _little_memory(
    device: torch.device, engine: trainer.StepEngine
) -> AbstractContextManager[None]:
    """Too little memory for a step in one pass, enough for one by halves or quarters."""
    if device.type == "cuda":
        return _small_fraction(engine)
    return _no_pass_beyond(int(engine.mixture.examples.num_tokens) // 3)


@contextmanager
def _small_fraction(engine: trainer.StepEngine) -> Iterator[None]:
    """Halfway between what the step takes whole and what it takes one example at a time."""

    def reserved(limits: Limits) -> int:
        engine.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        engine.limits = limits
        with engine.attended():
            engine.gradients(0, 0)
        return torch.cuda.max_memory_reserved()

    whole, least = reserved(PACKED), reserved(dataclasses.replace(PACKED, max_examples=1))
    assert least < whole, "the step is too small to run out of memory"
    total = torch.cuda.get_device_properties(0).total_memory
    engine.limits = PACKED
    engine.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((whole + least) / 2 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _no_pass_beyond(num_tokens: int) -> Iterator[None]:
    """A machine on which a forward pass of more tokens runs out of memory."""

    def limited(model: Any, packed: EncodedExamples, rows: Any, **options: Any) -> StepLosses:
        most = options["limits"].max_tokens
        if most is None or most > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_gradients(model, packed, rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "step_gradients", limited)
        yield


# Trains, and notes the digest of the tokens of every step; killed after one of them where asked.
NOTED = """
import hashlib, os, pathlib, signal, sys
from tell_core.spec.model import TrainingSpec
from tell_core.training import trainer
from tell_core.training.loop import train_cell

model, inputs, spec, out, dtype, kill_after = sys.argv[1:]
original = trainer.StepEngine.gradients

def noted(engine, step, *more):
    examples = engine.mixture.examples
    tokens = b"".join(examples.example(row).tobytes() for row in engine.rows(step))
    with open(out + ".steps", "a") as file:
        file.write(f"{step} {hashlib.sha256(tokens).hexdigest()}\\n")
    return original(engine, step, *more)

def watch(done, *_):
    if str(done) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.StepEngine.gradients = noted
train_cell(model_path=model, revision=None, inputs=pathlib.Path(inputs), seed=3, dtype=dtype,
           training=TrainingSpec.model_validate_json(spec), out=pathlib.Path(out),
           on_progress=watch)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_started_again_it_sees_the_same_tokens_and_stays_within_the_noise(
    device: torch.device,
    train: Train,  # writes model and inputs
    training_spec: Callable[..., TrainingSpec],
    tmp_path: Path,
    dtype: str,
):
    """Two unbroken runs show the noise; on a CPU there is none, and the curves are equal."""
    if (device.type, dtype) == ("cpu", "bfloat16"):
        pytest.skip("slow on most CPUs, and no other code than in float32")
    spec = training_spec(
        device=device.type, learning_rate=1e-2, lora_dropout=0.1, checkpoint_seconds=1e-9
    )

    def run(name: str, kill_after: int | None = None) -> int:
        paths = [tmp_path / "model", tmp_path / "inputs", spec.model_dump_json(), tmp_path / name]
        command = [sys.executable, "-c", NOTED, *map(str, paths), dtype, str(kill_after)]
        done = subprocess.run(command, capture_output=True, check=False, env=_one_thread())
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        return done.returncode

    assert [run("one"), run("two"), run("broken", 3), run("broken", 6), run("broken")] == [
        0, 0, -signal.SIGKILL, -signal.SIGKILL, 0,
    ]  # fmt: skip

    # An attempt ends at once after the step whose checkpoint was not yet written: done again.
    steps = [(tmp_path / f"{name}.steps").read_text().split("\n") for name in ("one", "broken")]
    assert sorted(set(steps[1])) == sorted(steps[0])
    assert len(steps[1]) - len(steps[0]) <= 2
    one, two, broken = (losses_of(tmp_path / name) for name in ("one", "two", "broken"))
    noise = np.abs(one - two).max()
    least = 0.0 if device.type == "cpu" else TOLERANCE[dtype] / 10 * one.max()
    assert np.abs(broken - one).max() <= max(3 * noise, least)


def _one_thread() -> dict[str, str]:
    here = str(Path(__file__).parents[3])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here}


def test_four_bit_base_weights_are_trained_over(
    gpu: torch.device,
    train: Train,
    training_spec: Callable[..., TrainingSpec],
    tmp_path: Path,
):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (extra `gpu`)")
    spec = training_spec(device="cuda", learning_rate=1e-2)

    summary = train(spec.model_copy(update={"weight_quantization": "nf4"}), "four_bit")

    train(spec, "whole", dtype="bfloat16")
    four_bit, whole = losses_of(tmp_path / "four_bit"), losses_of(tmp_path / "whole")
    assert summary["attention"] == "varlen, packed"
    assert four_bit[4:].mean() < four_bit[:4].mean()
    assert four_bit[0] != whole[0]
    assert four_bit[0] == pytest.approx(whole[0], rel=0.15)


# Holds the device and says so, until it is killed.
HOLDER = """
import pathlib, sys, time, torch
from tell_core.training import devices

lock = sys.argv[1]
if lock:
    devices._lock_path = lambda device: pathlib.Path(lock)
with devices.exclusive_device(torch.device("cuda", 0)):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_gpu_is_held_by_one_process_at_a_time_and_free_when_that_is_killed(
    device: torch.device, tmp_path: Path
):
    """Without a GPU the lock has a path that does not name one."""
    lock = str(tmp_path / "lock") if device.type == "cpu" else ""
    command = [sys.executable, "-u", "-c", HOLDER, lock]
    holders = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_one_thread())
        for _ in range(2)
    ]
    outputs = [holder.stdout for holder in holders]
    first = _speaking(outputs, seconds=120)
    other = 1 - first

    assert _speaking([outputs[other]], seconds=5) is None
    holders[first].kill()
    assert _speaking([outputs[other]], seconds=30) == 0

    for holder in holders:
        holder.kill()
        holder.communicate()


def _speaking(outputs: list[Any], seconds: float) -> Any:
    """Index of the first of several pipes that says something; None when none does in time."""
    import select

    ready, _, _ = select.select(outputs, [], [], seconds)
    if not ready:
        return None
    assert ready[0].readline() == "held\n"
    return outputs.index(ready[0])


def _own_gpu(directory: Path) -> list[str]:
    """What a lane sees and can compute on, once another lane is there too."""
    (directory / str(os.getpid())).touch()
    while len(list(directory.iterdir())) < 2:
        pass
    assert float(torch.ones(8, device="cuda").sum()) == 8
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def test_two_lanes_compute_on_a_gpu_each(gpu: torch.device, tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    need_gpus(2)
    gpus = gpus_of_lanes(TrainingSpec(device="cuda"))[:2]

    with open_lanes(2, gpus), ThreadPoolExecutor() as pool:
        seen = [pool.submit(in_lane, _own_gpu, tmp_path) for _ in range(2)]
        uuids = [one.result() for one in seen]

    assert [len(own) for own in uuids] == [1, 1]
    assert uuids[0] != uuids[1]


def test_two_ranks_on_two_gpus_equal_one(
    gpu: torch.device,
    train: Train,
    training_spec: Callable[..., TrainingSpec],
    tmp_path: Path,
):
    need_gpus(2)
    spec = training_spec(device="cuda")
    train(spec, "one", dtype="float32")

    train(spec.model_copy(update={"num_ranks": 2}), "two", dtype="float32")

    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5)


def test_a_machine_with_the_packages_of_a_training_can_run_these_tests():
    """Collecting them imports every conftest that they need."""
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['--collect-only', '-q', '-m', 'gpu', sys.argv[1]])\n"
        "absent = {'prefect', 'mlflow', 'duckdb', 'datasets', 'pyarrow', 'pandas'}\n"
        "print(code, sorted(absent & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__], cwd=Path(__file__).parents[3],
        capture_output=True, check=False, text=True, env=_one_thread(),
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
