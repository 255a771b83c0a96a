import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.encoding import EncodedExamples, Mixture, from_lists
from tell_core.spec.model import TrainingSpec
from tell_core.training import probes
from tell_core.training.collation import collate
from tell_core.training.devices import Precision
from tell_core.training.losses import supervised_nll
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, None)


@given(num_steps=st.integers(1, 100_000), num_probes=st.integers(2, 40))
def test_probe_steps_rise_from_zero_to_the_last_step(num_steps: int, num_probes: int):
    steps = probes.probe_steps(num_steps, num_probes)

    assert steps[0] == 0
    assert steps[-1] == num_steps
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert len(steps) == min(num_probes, num_steps + 1)


def test_probe_steps_are_spaced_logarithmically():
    steps = probes.probe_steps(1000, 5)

    assert steps == (0, 1, 10, 100, 1000)


def test_probe_losses_are_means_per_supervised_token_of_each_example(
    random_examples: Callable[..., EncodedExamples],
    base: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(probes.PROBE_BATCH_TOKENS, "cpu", 40)
    examples = random_examples(3, 4)
    probe_set = probes.ProbeSet.prepare(examples, CPU)

    losses = probe_set.measure(base.model, FLOAT32.autocast(CPU))

    alone = [supervised_nll(base.model, collate(examples, [row], CPU)).mean() for row in range(7)]
    assert len(probe_set.batches) > 1
    assert losses == pytest.approx([float(loss) for loss in alone], abs=1e-5)


def test_measuring_leaves_the_training_mode_as_it_was(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    probe_set = probes.ProbeSet.prepare(random_examples(1, 1), CPU)

    probe_set.measure(base.model, FLOAT32.autocast(CPU))

    assert not base.model.training


def test_saved_probes_are_read_back(tmp_path: Path):
    losses = np.arange(6.0).reshape(2, 3)

    probes.save_probe(tmp_path / "probe.npz", (0, 7), losses)

    steps, read = probes.load_probe(tmp_path / "probe.npz")
    assert steps.tolist() == [0, 7]
    assert np.array_equal(read, losses)


def test_token_losses_average_to_the_losses_of_their_examples(
    random_examples: Callable[..., EncodedExamples],
    base: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(probes.PROBE_BATCH_TOKENS, "cpu", 40)
    examples = random_examples(3, 4)
    probe_set = probes.ProbeSet.prepare(examples, CPU)

    nll = probe_set.measure_tokens(base.model, FLOAT32.autocast(CPU))

    alone = [supervised_nll(base.model, collate(examples, [row], CPU)) for row in range(7)]
    assert nll == pytest.approx(torch.cat(alone).double().detach().numpy(), abs=1e-5)
    assert probe_set.by_example(nll) == pytest.approx([float(one.mean()) for one in alone])


def test_shared_beginnings_change_losses_by_rounding_alone(base: LoadedModel):
    generator = np.random.default_rng(0)
    beginning = generator.integers(2, 61, size=12).tolist()
    examples = from_lists(
        [(beginning + generator.integers(2, 61, size=size).tolist(), 13) for size in range(3, 9)],
        is_task=True,
    )
    autocast = FLOAT32.autocast(CPU)
    alone = probes.ProbeSet.prepare(examples, CPU).measure_tokens(base.model, autocast)

    shared = probes.ProbeSet.prepare(examples, CPU, is_packed=True)

    assert sum(batch.num_tokens for batch in shared.batches) < examples.num_tokens / 2
    assert shared.measure_tokens(base.model, autocast) == pytest.approx(alone, abs=1e-5)


@given(keys=st.lists(st.integers(0, 9), max_size=40), most=st.integers(1, 5))
def test_the_last_few_losses_are_remembered_and_those_of_no_other_key(keys: list[int], most: int):
    remembered, measured = probes.RememberedLosses(most), 0

    for place, key in enumerate(keys):
        before = list(dict.fromkeys(reversed(keys[:place])))[:most]  # the last used, latest first

        def measure(key: int = key) -> probes.FloatArray:
            nonlocal measured
            measured += 1
            return np.full(2, float(key))

        count = measured
        losses = remembered.get(key, measure)
        assert losses.tolist() == [key, key]
        assert not losses.flags.writeable
        assert measured == count + (key not in before)


def mixture_of(num_tokens: int) -> Mixture:
    return Mixture(from_lists([([2] * num_tokens, 1)], True), np.zeros(1, dtype=np.int32))


@given(
    share=st.floats(0.01, 2), trained=st.integers(10, 100_000), wished=st.integers(2, 60),
    method=st.sampled_from(["full", "lora"]),
)  # fmt: skip
def test_probes_keep_to_their_share_unless_they_would_be_too_few(
    share: float, trained: int, wished: int, method: str
):
    training = TrainingSpec(num_probes=wished, probe_share=share, method=method)
    probe = from_lists([([2, 3, 4, 5], 1), ([6, 3, 4, 5, 6], 1)], True)

    count = probes.num_affordable_probes(mixture_of(trained), probe, training)

    cost = 7 * (1 / 3 if method == "full" else 1 / 2)  # 3 + 4 tokens whose output is read
    assert count <= max(share * trained / cost, probes.FEWEST_PROBES)
    assert count == wished or (count + 1) * cost > share * trained - 1e-6
    assert min(wished, probes.FEWEST_PROBES) <= count <= wished


def test_without_a_limit_there_are_as_many_probes_as_wished():
    probe = from_lists([([2, 3, 4, 5], 1)], True)

    count = probes.num_affordable_probes(mixture_of(10), probe, TrainingSpec(num_probes=40))

    assert count == 40


@given(max_tokens=st.integers(0, 60))
def test_traced_tokens_are_distinct_and_at_most_as_many_as_wished(max_tokens: int):
    starts = np.array([0, 4, 9, 10, 30])
    probe_set = probes.ProbeSet((), starts, np.ones(4, dtype=bool))

    traced = probes.TracedTokens.choose(probe_set, max_tokens)

    assert len(set(traced.places.tolist())) == len(traced.places) == min(max_tokens, 30)
    assert np.array_equal(starts[traced.examples] + traced.positions, traced.places)
    assert (traced.positions < np.diff(starts)[traced.examples]).all()


def test_traced_tokens_are_the_same_each_time():
    probe_set = probes.ProbeSet((), np.array([0, 500, 1000]), np.ones(2, dtype=bool))

    first, second = (probes.TracedTokens.choose(probe_set, 20) for _ in range(2))

    assert np.array_equal(first.places, second.places)


def test_saved_token_losses_are_read_back(tmp_path: Path):
    probe_set = probes.ProbeSet((), np.array([0, 2, 5]), np.ones(2, dtype=bool))
    traced = probes.TracedTokens.choose(probe_set, 3)
    token_losses = np.arange(6.0).reshape(2, 3)

    probes.save_probe(tmp_path / "probe.npz", (0, 7), np.zeros((2, 2)), traced, token_losses)

    with np.load(tmp_path / "probe.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["token_losses"], token_losses)
        assert np.array_equal(arrays["token_examples"], traced.examples)
        assert np.array_equal(arrays["token_positions"], traced.positions)
