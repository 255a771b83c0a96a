import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tell_core.data.encoding import EncodedExamples, Mixture
from tell_core.errors import DataError, InputError, SpecError, TrainingError
from tell_core.spec.model import TrainingSpec
from tell_core.store import MARKER
from tell_core.training import loop, trainer
from tell_core.training.batching import Limits, count_batches
from tell_core.training.checkpoints import CheckpointClock, _seal
from tell_core.training.loop import probe_weights, train_cell
from tell_core.training.models import LoadedModel
from tell_core.training.probes import ProbeSet, RememberedLosses, load_probe
from tell_core.training.stopping import STOP_VARIABLE
from tell_core.training.trainer import DivergedError, PreemptedError

Inputs = Callable[..., Path]
Spec = Callable[..., TrainingSpec]

NUM_STEPS = 12  # 24 examples, twice, in batches of 4

# Forks before torch has computed anything, so that each child trains as a fresh process would.
KILLED_TRAINING = """
import os, pathlib, signal, sys
from tell_core.spec.model import TrainingSpec
from tell_core.training import checkpoints
from tell_core.training.loop import train_cell

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def train_until(step, where):
    def watch(done, *_):
        if done == step and where == "step":
            kill()
        if done == step and where == "checkpoint":
            checkpoints._seal = kill

    train_cell(model_path=model, revision=None, inputs=pathlib.Path(inputs), seed=3,
               training=TrainingSpec.model_validate_json(spec), out=pathlib.Path(out),
               on_progress=watch)

model, inputs, spec, out = sys.argv[1:]
for step, where in [(3, "step"), (7, "checkpoint")]:
    child = os.fork()
    if child == 0:
        train_until(step, where)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


class InterruptionError(Exception):
    """Raised by tests to break a training off."""


def interrupt_at(step: int) -> Callable[[int, int, dict[str, Any]], None]:
    def watch(done: int, _: int, __: dict[str, Any]) -> None:
        if done == step:
            raise InterruptionError

    return watch


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, between two runs of one training."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["seconds"], line["finished"], line["peak_memory_bytes"]
    (weights,) = out.glob("*/*.safetensors")
    summary = json.loads((out / "summary.json").read_text())
    return {
        "log": log,
        "probe": [array.tobytes() for array in np.load(out / "probe.npz").values()],
        "weights": weights.read_bytes(),
        "kept": (summary["kept_step"], summary["kept_dev_loss"], summary["final_loss"]),
    }


@pytest.fixture
def train(base: LoadedModel, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains with seed 3 on the model in memory, into a directory of the given name."""

    def run(inputs: Path, spec: TrainingSpec, name: str = "out", **more: Any) -> dict[str, Any]:
        return train_cell(
            **{
                "model_path": "unused",
                "revision": None,
                "inputs": inputs,
                "training": spec,
                "seed": 3,
                "out": tmp_path / name,
                "loaded": base,
            }
            | more
        )

    return run


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("keep", ["best_dev", "last"])
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(breaks=st.sets(st.integers(1, NUM_STEPS - 1), min_size=1, max_size=3))
def test_a_broken_training_ends_with_the_bits_of_an_unbroken_one(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    method: str,
    keep: str,
    breaks: set[int],
):
    """Dropout is on; the last checkpoint is one step behind the point of interruption."""
    directory = tmp_path_factory.mktemp("broken")
    inputs = write_inputs(f"inputs-{directory.name}")
    spec = training_spec(
        method=method, keep=keep, lora_dropout=0.2, checkpoint_seconds=1e-9, micro_batch_size=3
    )
    train(inputs, spec, out=directory / "unbroken")

    for step in sorted(breaks):
        with pytest.raises(InterruptionError):
            train(inputs, spec, out=directory / "broken", on_progress=interrupt_at(step))
    train(inputs, spec, out=directory / "broken")

    assert outcome(directory / "broken") == outcome(directory / "unbroken")
    assert not (directory / "broken" / "checkpoints").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_on_disk_before_the_summary_and_that_before_checkpoints_go(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    """What a loss of power may leave is decided by what was synced when."""
    out, synced, seen = tmp_path / "out", set(), []
    fsync, write, remove = os.fsync, loop.write_json, loop.remove_checkpoints

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def watch_summary(path: Path, value: object) -> None:
        names = ("*/*.safetensors", "adapter", "model", "log.jsonl", "probe.npz")
        files = [file for name in names for file in out.glob(name)]
        seen.append([file.name for file in files if file.stat().st_ino not in synced])
        assert len(files) == 4 and list(out.glob("checkpoints/step-*"))
        synced.clear()
        write(path, value)

    def watch_removal(directory: Path) -> None:
        needed = (out / "summary.json", out)
        seen.append([path.name for path in needed if path.stat().st_ino not in synced])
        remove(directory)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(loop, "write_json", watch_summary)
    monkeypatch.setattr(loop, "remove_checkpoints", watch_removal)

    train(write_inputs(), training_spec(method=method, checkpoint_seconds=1e-9))

    assert seen == [[], []]


def test_cells_that_share_a_base_model_give_what_they_give_alone(
    model_directory: Path,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs, spec = write_inputs(), training_spec()
    paths = {"model_path": str(model_directory), "loaded": None}
    train(inputs, spec, "alone", **paths)

    train(inputs, training_spec(learning_rate=0.1), "before", **paths)
    train(inputs, spec, "after", **paths)

    assert outcome(tmp_path / "after") == outcome(tmp_path / "alone")
    assert outcome(tmp_path / "before") != outcome(tmp_path / "alone")


def test_killed_between_steps_and_within_a_checkpoint_it_ends_with_the_same_bits(
    model_directory: Path,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs, out = write_inputs(), tmp_path / "killed"
    spec = training_spec(lora_dropout=0.2, keep="best_dev", checkpoint_seconds=1e-9)
    paths = {"model_path": str(model_directory), "loaded": None}
    train(inputs, spec, "unbroken", **paths)

    arguments = [model_directory, inputs, spec.model_dump_json(), out]
    command = [sys.executable, "-c", KILLED_TRAINING, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.stdout.split() == [b"9", b"9"], done.stderr.decode()
    train(inputs, spec, "killed", **paths)

    assert outcome(out) == outcome(tmp_path / "unbroken")


def test_a_damaged_newest_checkpoint_does_not_change_the_outcome(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs = write_inputs()
    spec = training_spec(checkpoint_seconds=1e-9)
    train(inputs, spec, "unbroken")
    with pytest.raises(InterruptionError):
        train(inputs, spec, "damaged", on_progress=interrupt_at(6))
    newest = max((tmp_path / "damaged" / "checkpoints").glob("step-*"))
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\0")

    train(inputs, spec, "damaged")

    assert outcome(tmp_path / "damaged") == outcome(tmp_path / "unbroken")


def test_a_checkpoint_of_other_data_is_not_used(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    spec = training_spec(checkpoint_seconds=1e-9)
    ours, theirs = write_inputs("ours", seed=0), write_inputs("theirs", seed=5)
    train(ours, spec, "fresh")
    with pytest.raises(InterruptionError):
        train(theirs, spec, "shared", on_progress=interrupt_at(6))

    train(ours, spec, "shared")

    assert outcome(tmp_path / "shared") == outcome(tmp_path / "fresh")


@pytest.mark.parametrize(
    "change",
    [
        "renamed",
        "removed",
        "shorter weight",
        "other probes",
        "renamed moment",
        "no second moment",
        "no kept weights",
    ],
)
def test_a_checkpoint_of_another_version_of_the_program_begins_the_training_anew(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
):
    inputs, spec = write_inputs(), training_spec(checkpoint_seconds=1e-9, keep="best_dev")
    train(inputs, spec, "fresh")
    with pytest.raises(InterruptionError):
        train(inputs, spec, "old", on_progress=interrupt_at(6))
    for path in (tmp_path / "old" / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "tensors.safetensors")
        first = next(name for name in tensors if name.startswith("weight/"))
        if change == "renamed":
            state["state"]["seconds"] = state["state"].pop("train_seconds")
        elif change == "removed":
            del state["state"]["flops"]
        elif change == "shorter weight":
            tensors[first] = tensors[first][:1]
        elif change == "renamed moment":
            for name in [name for name in tensors if name.startswith("exp_avg/")]:
                tensors[name.replace("exp_avg/", "momentum/")] = tensors.pop(name)
        elif change == "no second moment":
            del tensors[first.replace("weight/", "exp_avg_sq/")]
        elif change == "no kept weights":
            tensors = {name: one for name, one in tensors.items() if not name.startswith("kept/")}
        else:
            tensors["probes"] = tensors["probes"][:-1]
        (path / "state.json").write_text(json.dumps(state))
        save_file({name: value.contiguous() for name, value in tensors.items()},
                  path / "tensors.safetensors")  # fmt: skip
        (path / MARKER).unlink()
        _seal(path)
    seen: list[int] = []

    train(inputs, spec, "old", on_progress=lambda done, *_: seen.append(done))

    assert seen[0] == 1
    assert "was written by another version of this program" in caplog.text
    assert outcome(tmp_path / "old") == outcome(tmp_path / "fresh")


def test_sigterm_writes_a_checkpoint_and_exits_with_143(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    def terminate(done: int, _: int, __: dict[str, Any]) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    inputs, spec = write_inputs(), training_spec(checkpoint_seconds=1e9)

    with pytest.raises(PreemptedError, match="after step 5 of 12") as caught:
        train(inputs, spec, on_progress=terminate)

    assert caught.value.exit_code == 143
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000005"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_that_would_take_longer_than_there_is_time_for_is_not_begun(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The first is written: only then is it known how long one takes."""
    inputs, spec = write_inputs(), training_spec(checkpoint_seconds=1e9)
    train(inputs, spec, "unbroken")
    monkeypatch.setenv(STOP_VARIABLE, "0")
    monkeypatch.setattr(CheckpointClock, "is_due", lambda clock: clock.write_seconds is None)

    def terminate(done: int, _: int, __: dict[str, Any]) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError, match=r"none was begun.*from step 1$"):
        train(inputs, spec, "out", on_progress=terminate)

    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    train(inputs, spec, "out")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "unbroken")


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan"])
def test_a_time_to_stop_in_that_is_no_number_of_seconds_is_refused_before_training(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    seconds: str,
):
    monkeypatch.setenv(STOP_VARIABLE, seconds)

    with pytest.raises(SpecError, match=STOP_VARIABLE):
        train(write_inputs(), training_spec())


def test_a_finished_training_is_not_repeated(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    inputs, spec = write_inputs(), training_spec()
    first = train(inputs, spec)

    again = train(inputs, spec, on_progress=interrupt_at(1))

    assert again == first


def test_training_works_outside_the_main_thread(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    summaries: list[dict[str, Any]] = []
    inputs, spec = write_inputs(), training_spec()
    thread = threading.Thread(target=lambda: summaries.append(train(inputs, spec)))

    thread.start()
    thread.join()

    assert summaries[0]["steps"] == NUM_STEPS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_model_in_memory_is_left_as_it_was(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    method: str,
):
    before = copy.deepcopy(base.model.state_dict())
    names = [name for name, _ in base.model.named_modules()]
    random_state = torch.get_rng_state()

    train(write_inputs(), training_spec(method=method))

    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in base.model.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("method", "learning_rate"), [("lora", 0.1), ("full", 0.02)])
def test_the_loss_falls(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    method: str,
    learning_rate: float,
):
    spec = training_spec(method=method, learning_rate=learning_rate)

    train(write_inputs(epochs=8), spec)

    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    first_epoch, last_epoch = np.mean(losses[:6]), np.mean(losses[-6:])
    assert last_epoch < first_epoch - 0.02


def test_best_dev_keeps_the_weights_of_the_probe_with_the_lowest_task_loss(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    """With other tokens in the probe set than in the mixture, dev loss soon rises."""
    inputs = write_inputs(epochs=4)
    spec = training_spec(method="full", keep="best_dev", num_probes=8, learning_rate=0.01)

    summary = train(inputs, spec)

    steps, losses = load_probe(tmp_path / "out" / "probe.npz")
    task_losses = losses[:, :3].mean(axis=1)
    best = 1 + int(np.argmin(task_losses[1:]))
    assert summary["kept_step"] == steps[best] < summary["steps"]
    assert summary["kept_dev_loss"] == pytest.approx(task_losses[best])


def test_kept_weights_are_those_of_the_kept_step(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs = write_inputs(epochs=4)
    constant = {"learning_rate": 0.05, "schedule": "constant", "warmup_fraction": 0}
    spec = training_spec(keep="best_dev", num_probes=8, **constant)
    kept = train(inputs, spec, "best")["kept_step"]
    mixture = Mixture.load(inputs / "mixture.safetensors")
    Mixture(mixture.examples, mixture.order[: kept * 4]).save(inputs / "mixture.safetensors")

    train(inputs, training_spec(**constant), "cut")

    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("best", "cut")]
    best, cut = (load_file(path) for path in files)
    assert all(torch.equal(best[name], cut[name]) for name in cut)


def test_the_trained_model_has_the_probe_losses_that_were_recorded(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    from tell_core.training.devices import Precision
    from tell_core.training.models import detach_adapter, load_trained
    from tell_core.training.probes import ProbeSet

    inputs = write_inputs()
    summary = train(inputs, training_spec(keep="best_dev"))
    cpu = torch.device("cpu")
    probe_set = ProbeSet.prepare(EncodedExamples.load(inputs / "probe.safetensors"), cpu)

    model = load_trained(base, tmp_path / "out")

    losses = probe_set.measure(model, Precision(torch.float32, None).autocast(cpu))
    detach_adapter(model)
    assert losses[:3].mean() == summary["kept_dev_loss"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_kept_at_the_probes_have_the_losses_that_were_recorded_there(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    method: str,
):
    from tell_core.training.devices import Precision
    from tell_core.training.models import detach_adapter, load_trained
    from tell_core.training.probes import ProbeSet

    inputs, cpu = write_inputs(), torch.device("cpu")
    train(inputs, training_spec(method=method, keep_probe_weights=True))
    probe_set = ProbeSet.prepare(EncodedExamples.load(inputs / "probe.safetensors"), cpu)
    steps, losses = load_probe(tmp_path / "out" / "probe.npz")

    for step, expected in zip(steps.tolist(), losses, strict=True):
        model = load_trained(base, probe_weights(tmp_path / "out", step))
        measured = probe_set.measure(model, Precision(torch.float32, None).autocast(cpu))
        detach_adapter(model)
        assert measured == pytest.approx(expected, abs=1e-6)


def test_keeping_weights_at_the_probes_changes_nothing_else(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs = write_inputs()

    train(inputs, training_spec(keep_probe_weights=True), "kept")
    train(inputs, training_spec(), "usual")

    assert outcome(tmp_path / "kept") == outcome(tmp_path / "usual")
    assert not (tmp_path / "usual" / "probe_weights").exists()


class CountedProbes:
    """How often the probe set was measured, with nothing remembered at the beginning."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = ProbeSet.measure_tokens

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return original(*arguments)

        self.remembered = RememberedLosses()
        patch.setattr(trainer, "_untrained", self.remembered)
        patch.setattr(ProbeSet, "measure_tokens", counted)

    def taken(self) -> int:
        """Measurements since last asked."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def counted_probes(monkeypatch: pytest.MonkeyPatch) -> CountedProbes:
    return CountedProbes(monkeypatch)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("batching", ["packed", "length_grouped"])
def test_what_an_untrained_model_gives_is_measured_once_and_is_the_same_bits_as_measured_again(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    counted_probes: CountedProbes,
    tmp_path: Path,
    method: str,
    batching: str,
):
    inputs, other = write_inputs(), write_inputs("other", epochs=1, seed=4)
    (other / "probe.safetensors").write_bytes((inputs / "probe.safetensors").read_bytes())
    spec = training_spec(method=method, batching=batching)
    train(inputs, spec, "first")
    assert counted_probes.taken() == spec.num_probes
    again = {"seed": 8, "training": spec.model_copy(update={"lora_rank": 4})}

    train(other, spec, "second", **again)
    assert counted_probes.taken() == spec.num_probes - 1
    trainer._untrained = RememberedLosses()  # the fixture puts the process's own back
    train(other, spec, "measured", **again)

    assert outcome(tmp_path / "second") == outcome(tmp_path / "measured")


def test_another_start_is_measured_for_itself(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    counted_probes: CountedProbes,
):
    inputs, spec = write_inputs(), training_spec()
    other_model = copy.deepcopy(base.model)
    with torch.no_grad():
        other_model.model.norm.weight.mul_(2)
    starts: list[dict[str, Any]] = [
        {},
        {"inputs": write_inputs("other", seed=5)},
        {"loaded": LoadedModel(other_model, base.tokenizer, "other", "other digest")},
        {"training": training_spec(method="full")},
        {"training": training_spec(batching="padded")},
        {"dtype": "bfloat16"},
    ]

    for number, changed in enumerate(starts):
        arguments = {"inputs": inputs, "spec": spec, "name": f"out {number}"} | changed
        train(**arguments)
        assert counted_probes.taken() == spec.num_probes, changed


def test_a_training_that_goes_on_takes_its_first_losses_from_its_checkpoint(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    counted_probes: CountedProbes,
    tmp_path: Path,
):
    inputs, spec = write_inputs(), training_spec(checkpoint_seconds=1e-9)
    train(inputs, spec, "unbroken")
    with pytest.raises(InterruptionError):
        train(inputs, spec, "broken", on_progress=interrupt_at(6))
    for key in list(counted_probes.remembered._losses):
        counted_probes.remembered._losses[key] = np.zeros(0)

    train(inputs, spec, "broken")

    assert outcome(tmp_path / "broken") == outcome(tmp_path / "unbroken")


def test_log_and_summary_account_for_every_token(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs = write_inputs()
    mixture = Mixture.load(inputs / "mixture.safetensors")

    summary = train(inputs, training_spec(batching="padded"))

    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(NUM_STEPS))
    assert sum(line["tokens"] for line in log) == 2 * mixture.examples.num_tokens
    supervised = sum(line["supervised_tokens"] for line in log)
    assert supervised == 2 * mixture.examples.num_supervised_tokens
    padded = sum(line["padded_tokens"] for line in log)
    assert 0 < summary["padding_share"] == 1 - 2 * mixture.examples.num_tokens / padded
    assert summary["final_loss"] == log[-1]["loss"]
    assert 0 < summary["model_flops_utilisation"] < 1
    assert summary["attention"] == "sdpa"


def test_a_loss_that_is_not_finite_names_step_and_examples(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
):
    broken = copy.deepcopy(base.model)
    inputs = write_inputs()
    mixture = Mixture.load(inputs / "mixture.safetensors")
    token = int(mixture.examples.example(int(mixture.order[9]))[0])
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = torch.nan
        broken.lm_head = torch.nn.Linear(32, 61, bias=False)
    loaded = LoadedModel(broken, base.tokenizer, "broken", "digest")
    concerned = [row for row in mixture.order if token in mixture.examples.example(row)]
    first = next(i for i, row in enumerate(mixture.order) if row in concerned) // 4

    with pytest.raises(DivergedError, match=rf"step {first}: loss nan.*Examples concerned") as got:
        train(inputs, training_spec(), loaded=loaded)

    named = got.value.args[0].split("mixture): ")[1].split(".")[0].split(", ")
    assert set(map(int, named)) <= {int(row) for row in concerned}
    row = got.value.rows[0]
    response = mixture.examples.example(row)[mixture.examples.response_starts[row] :]
    source = "task" if mixture.examples.is_task[row] else "general"
    assert f"{row} ({source} data) 't{response[0]} " in got.value.args[0]


def test_a_gradient_that_is_not_finite_names_the_examples_that_cause_it(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
):
    """Their losses are finite: the square root of an activation that is zero."""
    inputs = write_inputs()
    mixture = Mixture.load(inputs / "mixture.safetensors")
    token = int(mixture.examples.example(int(mixture.order[9]))[0])
    concerned = {row for row in range(24) if token in mixture.examples.example(row)}
    first = next(i for i, row in enumerate(mixture.order) if int(row) in concerned) // 4

    def spoil(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        marked = inputs[0] == token
        spoilt = output.clone()
        spoilt[marked] = output[marked] + (output[marked] * 0).abs().sqrt()
        return spoilt

    hook = base.model.get_input_embeddings().register_forward_hook(spoil)
    try:
        with pytest.raises(DivergedError, match=rf"step {first}: loss \d.*norm nan") as got:
            train(inputs, training_spec(method="full"))
    finally:
        hook.remove()

    step = {int(row) for row in mixture.order[first * 4 : first * 4 + 4]}
    assert set(got.value.rows) == concerned & step < step


def test_a_loss_that_explodes_ends_the_training_with_the_worst_examples(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    constant = {"schedule": "constant", "warmup_fraction": 0, "max_grad_norm": 1e9}
    spec = training_spec(method="full", learning_rate=3.0, num_probes=2, **constant)

    with pytest.raises(DivergedError, match=r"loss \d.* exploded.*Their responses begin") as got:
        train(write_inputs(), spec)

    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    limit = 2 * max(np.log(61), log[0]["loss"])
    assert all(line["loss"] <= limit for line in log)
    assert 1 <= len(got.value.rows) <= 4


@pytest.mark.parametrize("keep", ["best_dev", "last"])
def test_a_probe_loss_that_is_not_finite_after_the_last_step_is_divergence(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    keep: str,
):
    """One step at an absurd rate: its loss is finite, that of the weights it leaves is not."""
    spec = training_spec(keep=keep, learning_rate=1e30, batch_size=48, warmup_fraction=0)

    with pytest.raises(DivergedError, match=r"step 1: the loss of probe examples .* not finite"):
        train(write_inputs(), spec)

    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_base_model_without_finite_losses_is_no_divergence(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
):
    broken = copy.deepcopy(base.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    loaded = LoadedModel(broken, base.tokenizer, "broken", "digest")

    with pytest.raises(TrainingError, match="before any training") as caught:
        train(write_inputs(), training_spec(), loaded=loaded)

    assert not isinstance(caught.value, DivergedError)


def test_a_checkpoint_serves_a_training_in_smaller_pieces_elsewhere(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    inputs = write_inputs()
    with pytest.raises(InterruptionError):
        train(inputs, training_spec(checkpoint_seconds=1e-9), on_progress=interrupt_at(6))
    seen: list[int] = []

    train(inputs, training_spec(micro_batch_size=2), on_progress=lambda done, *_: seen.append(done))

    assert seen[0] == 6


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory (said by the test)")
CPU_OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory (said by the test)")


def fits(most_tokens: int, error: Exception = OUT_OF_MEMORY) -> Callable[..., None]:
    """A hook that raises as a GPU would when a forward pass has more tokens than fit."""

    def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled() and inputs[0].numel() > most_tokens:
            raise error

    return look


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, CPU_OUT_OF_MEMORY], ids=["gpu", "cpu"])
@pytest.mark.parametrize("batching", ["padded", "length_grouped", "packed"])
def test_out_of_memory_makes_forward_passes_smaller_and_changes_nothing_else(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    batching: str,
    error: Exception,
):
    inputs, spec = write_inputs(), training_spec(batching=batching, batch_size=8)
    train(inputs, spec, "enough")
    hook = base.model.get_input_embeddings().register_forward_pre_hook(fits(40, error))

    try:
        summary = train(inputs, spec, "scarce")
    finally:
        hook.remove()

    assert summary["num_out_of_memory"] > 0
    assert summary["micro_batch_tokens"] <= 40
    assert "out of memory on cpu at step 0" in caplog.text
    enough, scarce = (outcome(tmp_path / name)["log"] for name in ("enough", "scarce"))
    for one, other in zip(enough, scarce, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize("then", ["auto", 10])
def test_after_an_interruption_memory_need_not_run_out_again_and_a_smaller_limit_counts(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    then: Any,
):
    inputs, spec = write_inputs(), training_spec(checkpoint_seconds=1e-9, batch_size=8)
    hook = base.model.get_input_embeddings().register_forward_pre_hook(fits(40))
    try:
        with pytest.raises(InterruptionError):
            train(inputs, spec, on_progress=interrupt_at(2))
        before = json.loads(
            next((tmp_path / "out" / "checkpoints").glob("step-*1/state.json")).read_text()
        )["state"]

        summary = train(inputs, spec.model_copy(update={"micro_batch_tokens": then}))
    finally:
        hook.remove()

    assert summary["num_out_of_memory"] == before["num_out_of_memory"] > 0
    assert summary["micro_batch_tokens"] == (before["max_tokens"] if then == "auto" else then)
    assert summary["steps"] == 6


def test_memory_that_runs_out_beside_the_forward_passes_is_explained(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
):
    def step(*_: Any, **__: Any) -> None:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    with pytest.raises(TrainingError, match=r"out of memory on cpu at step 0, beside .*optimiser"):
        train(write_inputs(), training_spec())


def test_an_example_that_does_not_fit_alone_ends_the_training(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
):
    hook = base.model.get_input_embeddings().register_forward_pre_hook(fits(5))

    try:
        with pytest.raises(TrainingError, match=r"one example of up to .*gradient_checkpointing"):
            train(write_inputs(), training_spec())
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_memory_only(
    base: LoadedModel,
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    method: str,
):
    inputs = write_inputs()
    settings = {"method": method, "lora_dropout": 0.2}
    train(inputs, training_spec(**settings), "kept")

    train(inputs, training_spec(**settings, gradient_checkpointing=True), "again")

    assert outcome(tmp_path / "again") == outcome(tmp_path / "kept")
    assert not base.model.is_gradient_checkpointing


@pytest.mark.parametrize("batching", ["padded", "length_grouped", "packed"])
def test_what_was_counted_before_training_is_what_was_computed(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    batching: str,
):
    inputs = write_inputs()
    mixture = Mixture.load(inputs / "mixture.safetensors")
    spec = training_spec(batching=batching, micro_batch_tokens=40)
    limits = Limits(batching, None, 40)  # type: ignore[arg-type]

    summary = train(inputs, spec)

    counts = count_batches(mixture.examples.lengths, mixture.order, 4, limits)
    assert summary["forward_passes"] == counts.forward_passes
    assert summary["padding_share"] == counts.padding_share


@pytest.mark.parametrize(
    ("method", "words"), [("lora", "CUDA GPU and `pip install"), ("full", "use method: lora")]
)
def test_weight_quantization_that_cannot_be_had_is_refused(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    method: str,
    words: str,
):
    spec = training_spec(weight_quantization="nf4", method=method)

    with pytest.raises(InputError, match=words):
        train(write_inputs(), spec, loaded=None)


def test_best_dev_without_task_probe_items_is_refused(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    inputs = write_inputs()
    (inputs / "probe.safetensors").unlink()

    with pytest.raises(SpecError, match="keep: last"):
        train(inputs, training_spec(keep="best_dev"))


def test_pre_training_needs_no_probe_set(
    training_spec: Spec,
    write_inputs: Inputs,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    inputs = write_inputs()
    (inputs / "probe.safetensors").unlink()

    summary = train(inputs, training_spec(method="full"))

    assert summary["kept_dev_loss"] is None
    assert load_probe(tmp_path / "out" / "probe.npz")[1].shape == (5, 0)


def test_several_learning_rates_are_refused(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    with pytest.raises(SpecError, match="one learning rate"):
        train(write_inputs(), training_spec(learning_rate=(1e-3, 1e-4)))


def test_a_missing_mixture_is_named(
    training_spec: Spec, train: Callable[..., dict[str, Any]], tmp_path: Path
):
    with pytest.raises(DataError, match=r"mixture\.safetensors is missing"):
        train(tmp_path, training_spec())


def test_bfloat16_on_a_cpu_trains_close_to_float32(
    training_spec: Spec, write_inputs: Inputs, train: Callable[..., dict[str, Any]]
):
    inputs = write_inputs()
    exact = train(inputs, training_spec(), "exact")

    rounded = train(inputs, training_spec(), "rounded", dtype="bfloat16")

    assert rounded["dtype"] == "bfloat16"
    assert rounded["final_loss"] == pytest.approx(exact["final_loss"], abs=0.02)
