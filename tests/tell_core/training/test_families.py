"""Every family: adapters on all of its matrices, resuming, evaluation, and `tell doctor`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tell_core.data.encoding import EncodedExamples, Mixture
from tell_core.doctor import check_experiment
from tell_core.errors import ModelError
from tell_core.evaluation.generation import Decoding, Request, generate
from tell_core.evaluation.likelihood import gold_nll
from tell_core.evaluation.subject import Subject
from tell_core.spec.model import ExperimentSpec, TrainingSpec
from tell_core.training.attention import attended
from tell_core.training.batching import Limits, share_rows
from tell_core.training.devices import Precision
from tell_core.training.gradients import step_gradients
from tell_core.training.loop import train_cell
from tell_core.training.models import LoadedModel, attach_lora
from tell_core.training.probes import load_probe
from tests.fixtures.tiny import tiny_fields
from tests.tell_core.training.families import CONFIGS, EXPERTS, family_model, write_family
from tests.tell_core.training.test_kills import KILLED
from tests.tell_core.training.test_loop import InterruptionError, interrupt_at, outcome

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, None)
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
_QUICK = ("gemma3", "mixtral")  # sliding windows; experts
TRAINED_FAMILIES = pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=[] if one in _QUICK else pytest.mark.slow) for one in CONFIGS],
)
Spec = Callable[..., TrainingSpec]
Inputs = Callable[..., Path]


def in_memory(family: str, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(family_model(CONFIGS[family]), tokenizer, family, family)


def train(base: LoadedModel, inputs: Path, spec: TrainingSpec, out: Path, **more: Any) -> Any:
    arguments = {"model_path": base.id, "revision": None, "inputs": inputs, "training": spec}
    return train_cell(**arguments, seed=3, out=out, loaded=base, **more)


@FAMILIES
def test_adapters_reach_every_matrix_within_the_layers(family: str, training_spec: Spec):
    """But for the routers of families whose experts peft does not know."""
    model = attach_lora(family_model(CONFIGS[family]), training_spec())

    adapted = {
        name.split(".lora_A")[0].replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }
    missed = [
        name
        for name, weight in model.named_parameters()
        if ".layers." in name and weight.ndim >= 2 and "lora_" not in name
        if not any(name.replace(".base_layer", "").startswith(f"{one}.") for one in adapted)
    ]

    assert all(name.endswith("mlp.gate.weight") for name in missed)
    assert bool(missed) == (family == "qwen2_moe")


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("targets", ["all-linear", ("down_proj",), ("q_proj", "experts.down_proj")])
def test_each_expert_has_an_adapter_of_its_own(family: str, targets: Any, training_spec: Spec):
    model = attach_lora(family_model(CONFIGS[family]), training_spec(lora_targets=targets))

    adapters = {
        name: weight
        for name, weight in model.named_parameters()
        if "experts" in name and "lora_A" in name
    }
    tensors = 2 if targets == "all-linear" else 1
    layers, experts, rank = 2, 4, 2

    assert len(adapters) == layers * tensors
    assert all(weight.shape[0] % (experts * rank) == 0 for weight in adapters.values())
    assert all(weight.dtype == torch.float32 for weight in adapters.values())


@pytest.mark.parametrize("family", EXPERTS)
def test_dropout_before_adapters_of_experts_is_refused_with_the_reason(
    family: str, training_spec: Spec
):
    model, dropout = family_model(CONFIGS[family]), {"lora_dropout": 0.1}

    with pytest.raises(ModelError, match=rf"lora_dropout is 0\.1.*{family}.*experts\.down_proj"):
        attach_lora(model, training_spec(**dropout))

    attach_lora(model, training_spec(**dropout, lora_targets=("q_proj", "v_proj")))


@FAMILIES
def test_micro_batches_and_ranks_give_the_gradient_of_the_whole_batch(
    family: str, random_examples: Callable[..., EncodedExamples], training_spec: Spec
):
    """1 x 8, 8 x 1 and two ranks, packed as the family is trained, each against padded 1 x 8."""
    examples, rows = random_examples(3, 5), np.arange(8)
    model: Any = attach_lora(family_model(CONFIGS[family]), training_spec())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)

    def gradient(limits: Limits, num_ranks: int = 1) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with attended(model, limits):
            for share in share_rows(examples.lengths[rows], num_ranks):
                step_gradients(
                    model, examples, rows, limits=limits, device=CPU, precision=FLOAT32,
                    share=share,
                )  # fmt: skip
        trained = (p.grad for p in model.parameters() if p.grad is not None)
        return torch.cat([each.flatten().double() for each in trained])

    expected = gradient(Limits("padded"))
    found = [
        gradient(Limits("padded", max_examples=1)),
        gradient(Limits("packed")),
        gradient(Limits("packed", max_tokens=40), num_ranks=2),
    ]

    apart = [float((each - expected).norm() / expected.norm()) for each in found]
    assert max(apart) <= 1e-5, apart


@TRAINED_FAMILIES
def test_a_stopped_training_ends_with_the_bits_of_an_unbroken_one(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    write_inputs: Inputs,
    training_spec: Spec,
    tmp_path: Path,
):
    base, inputs = in_memory(family, tokenizer), write_inputs(epochs=1)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    spec = training_spec(checkpoint_seconds=1e-9, keep="best_dev", learning_rate=0.03)
    train(base, inputs, spec, tmp_path / "unbroken")

    with pytest.raises(InterruptionError):
        train(base, inputs, spec, tmp_path / "stopped", on_progress=interrupt_at(4))
    resumed: list[int] = []
    train(
        base, inputs, spec, tmp_path / "stopped", on_progress=lambda done, *_: resumed.append(done)
    )

    assert resumed[0] == 4
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "unbroken")
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@TRAINED_FAMILIES
def test_what_was_trained_is_evaluated_as_it_was_probed(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    write_inputs: Inputs,
    training_spec: Spec,
    tmp_path: Path,
):
    """Scores equal the losses that training recorded; answers in a batch are those one by one."""
    base, inputs = in_memory(family, tokenizer), write_inputs(epochs=1)
    train(base, inputs, training_spec(learning_rate=0.03), tmp_path / "out")
    probe = EncodedExamples.load(inputs / "probe.safetensors")
    examples = Mixture.load(inputs / "mixture.safetensors").examples
    prompts = [examples.example(row)[: examples.response_starts[row]] for row in range(8)]
    requests = [Request(prompt, 12) for prompt in prompts]
    subject = Subject(family, None, tmp_path / "out", "auto", CPU, base)

    with subject.in_memory() as (model, _):
        nll = gold_nll(model, probe, CPU)
        batched, alone = (
            generate(model, tokenizer, requests, Decoding(), batch_size=size, device=CPU)
            for size in (8, 1)
        )
    with Subject(family, None, None, "auto", CPU, base).in_memory() as (model, _):
        untrained = gold_nll(model, probe, CPU)

    recorded = load_probe(tmp_path / "out" / "probe.npz")[1]
    per_token = probe.supervised_counts
    np.testing.assert_allclose(nll / per_token, recorded[-1], rtol=1e-5)
    np.testing.assert_allclose(untrained / per_token, recorded[0], rtol=1e-5)
    assert batched == alone
    assert len(set(batched)) > 1


@pytest.mark.slow
@FAMILIES
def test_killed_it_ends_with_the_bits_of_an_unbroken_one(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    write_inputs: Inputs,
    training_spec: Spec,
    tmp_path: Path,
):
    """Adapters by SIGKILL after the third step and within the checkpoint after the seventh."""
    model = write_family(CONFIGS[family], tokenizer, tmp_path / "model")
    inputs, out = write_inputs(), tmp_path / "killed"
    spec = training_spec(checkpoint_seconds=1e-9, keep="best_dev")
    paths: dict[str, Any] = {"model_path": str(model), "revision": None, "inputs": inputs}
    paths |= {"training": spec, "seed": 3}
    train_cell(**paths, out=tmp_path / "unbroken")

    arguments = [model, inputs, spec.model_dump_json(), out, "3:", "7:_seal"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == [str(int(signal.SIGKILL)).encode()] * 2, done.stderr.decode()
    train_cell(**paths, out=out)

    assert outcome(out) == outcome(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@FAMILIES
def test_the_doctor_finds_every_invariant_kept(
    family: str, method: str, tiny_world: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "base_init")
    model = write_family(
        CONFIGS[family], tokenizer, tmp_path / "model",
        vocab_size=len(tokenizer), max_position_embeddings=256,
    )  # fmt: skip
    fields = tiny_fields(tiny_world) | {"model": {"id": str(model)}}
    fields["training"] |= {"method": method, "learning_rate": 0.001}

    checks, _ = check_experiment(ExperimentSpec.model_validate(fields), tmp_path / "run")

    assert [check.verdict for check in checks] == ["ok"] * 7, checks
