"""Controls of quanta discovery: problems whose groups are known, and problems that have none.

Acceptance numbers and the reasons for them: docs/quanta.md.

Shape letters: S samples, D dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tell_core.analysis.quanta.acceptance import Check, measured
from tell_core.analysis.quanta.clustering import (
    FloatArray,
    IntArray,
    agreement,
    chance_p_value,
    cluster_gradients,
    cosine_distances,
    null_agreements,
)
from tell_core.analysis.quanta.gradients import (
    Float32Array,
    layer_shapes,
    linear_layers,
    looped_gradients,
    project_gradients,
    relative_errors,
)
from tell_core.analysis.quanta.projection import (
    PROJECTIONS,
    CountSketch,
    Exact,
    ProjectionName,
    build_projection,
)
from tell_core.analysis.quanta.ranks import NO_EVIDENCE, rank_verdict
from tell_core.analysis.quanta.tokens import select_tokens, token_samples
from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.training.collation import collate
from tell_core.training.losses import supervised_nll

MAX_RELATIVE_ERROR = 1e-4
MOVED_BY = 1e-3
MAX_COSINE_ERROR = 1.2  # over the square root of the dimensions
_NUM_SAMPLES = 600
_NUM_RANDOM = 200
_NUM_SKILLS, _NUM_ANSWERS, _NUM_FILLERS = 4, 4, 20


# --- Gradients and projections ------------------------------------------------------------------


def check_gradients() -> list[Check]:
    """Batched gradients against a loop, and against a loop over a model that differs."""
    model, examples, _ = planted_language_model(num_steps=30)
    samples = examples.select(range(24))
    batched = project_gradients(model, samples, Exact(layer_shapes(model))).vectors

    def same() -> tuple[str, bool]:
        error = float(relative_errors(batched, looped_gradients(model, samples)).max())
        return f"{error:.1e}", error <= MAX_RELATIVE_ERROR

    def moved() -> tuple[str, bool]:
        error = float(relative_errors(batched, looped_gradients(_moved(model), samples)).max())
        return f"{error:.1e}", error > MAX_RELATIVE_ERROR

    return [
        measured("per-sample gradients", f"relative error <= {MAX_RELATIVE_ERROR:g}", same),
        measured(
            "per-sample gradients, a weight moved by 0.001",
            f"relative error > {MAX_RELATIVE_ERROR:g}: the check can fail",
            moved,
        ),
    ]


def check_projection() -> list[Check]:
    """Error of projected cosines, and of the clusters found with them."""
    model, examples, pairs = planted_language_model()
    chosen = select_tokens(model, examples, limit=300)
    samples = token_samples(examples, chosen)
    exact = project_gradients(model, samples, Exact(layer_shapes(model))).vectors
    groups = pairs[chosen.examples]

    def cosines(name: ProjectionName) -> tuple[str, bool]:
        # The textbook map takes as much longer as it is larger.
        sizes = (512,) if name == "rademacher" else (512, 2048)
        error = max(cosine_error(model, samples, exact, name, size) for size in sizes)
        return f"{error:.2f} / sqrt(d)", error <= MAX_COSINE_ERROR

    def clusters() -> tuple[str, bool]:
        sketched = project_gradients(model, samples, CountSketch(512)).vectors
        found = [agreement(cluster_gradients(v).labels, groups) for v in (exact, sketched)]
        return f"{found[1]:.2f}, exact {found[0]:.2f}", abs(found[0] - found[1]) <= 0.08

    asked = f"rms error <= {MAX_COSINE_ERROR:g} / sqrt(d)"
    return [
        *(measured(f"{name}, cosines", asked, partial(cosines, name)) for name in PROJECTIONS),
        measured("projection, clusters", "ARI within 0.08 of exact gradients, d = 512", clusters),
    ]


def cosine_error(
    model: nn.Module,
    samples: EncodedExamples,
    exact: Float32Array,
    name: ProjectionName,
    num_dimensions: int,
) -> float:
    """Root mean square error of projected cosines over three seeds, times the root of D.

    Args:
        model: Whose gradients they are.
        samples: What they are taken on.
        exact: Shape (S, weights). The gradients.
        name: The projection.
        num_dimensions: D.
    """
    pairs = np.triu_indices(len(exact), k=1)
    truth = cosine_distances(exact)[pairs]
    errors = [
        cosine_distances(
            project_gradients(model, samples, build_projection(name, num_dimensions, seed)).vectors
        )
        for seed in range(3)
    ]
    squares = [np.mean((distances[pairs] - truth) ** 2) for distances in errors]
    return float(np.sqrt(np.mean(squares) * num_dimensions))


def _moved(model: nn.Module) -> nn.Module:
    """A copy whose first linear layer has one weight moved."""
    other = copy.deepcopy(model)
    first = next(iter(linear_layers(other).values()))
    with torch.no_grad():
        first.weight[0, 0] += MOVED_BY
    return other


# --- Vectors ------------------------------------------------------------------------------------


def check_planted_mixture() -> list[Check]:
    """Twenty clusters with noise of the same size as what tells them apart."""

    def measure() -> tuple[str, bool]:
        vectors, groups = planted_mixture(1000, 20, 256, noise=1.0, seed=0)
        found = cluster_gradients(vectors)
        score = agreement(found.labels, groups)
        return f"{score:.3f} with {found.num_clusters} clusters", score >= 0.95

    return [measured("planted isotropic mixture, 20 clusters", "ARI >= 0.95", measure)]


def planted_mixture(
    num_samples: int, num_clusters: int, num_dimensions: int, noise: float, seed: int
) -> tuple[FloatArray, IntArray]:
    """Standard normal centres, and samples around them with normal noise of that deviation."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((num_clusters, num_dimensions))
    groups = generator.integers(0, num_clusters, num_samples)
    spread = noise * generator.standard_normal((num_samples, num_dimensions))
    return centres[groups] + spread, groups


def check_random_vectors() -> list[Check]:
    """Vectors without clusters: neither groups nor a power law may be found."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((1000, 256))
    groups = generator.integers(0, 20, len(vectors))
    found = cluster_gradients(vectors)

    def labels() -> tuple[str, bool]:
        score = agreement(found.labels, groups)
        return f"{score:+.3f}", abs(score) <= 0.02

    def power_law() -> tuple[str, bool]:
        verdict = rank_verdict(vectors, found.labels)
        return f"{verdict.verdict}, slope {verdict.slope:.2f}", verdict.verdict == NO_EVIDENCE

    def clusters() -> tuple[str, bool]:
        smaller = generator.standard_normal((_NUM_RANDOM, 64))
        found = cluster_gradients(smaller)
        p_value = chance_p_value(found.agreement, null_agreements(smaller))
        return f"agreement {found.agreement:.2f}, p = {p_value:.2f}", p_value > 0.05

    return [
        measured("random vectors, random labels", "ARI within 0.02 of 0", labels),
        measured(f"{_NUM_RANDOM} random vectors", "no evidence of clusters, p > 0.05", clusters),
        measured("random vectors, rank and size", f'"{NO_EVIDENCE}"', power_law),
    ]


# --- Networks -----------------------------------------------------------------------------------

Draw = Callable[[torch.Generator, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def check_gaussian_subtasks() -> list[Check]:
    """A network learns ten subtasks, each an answer for a Gaussian cloud of inputs."""

    def measure() -> tuple[str, bool]:
        draw = gaussian_subtasks(num_subtasks=10, num_inputs=32, separation=1.5)
        score = _network_agreement(draw, num_inputs=32, num_answers=10, num_steps=300)
        return f"{score:.2f}", score >= 0.90

    return [measured("Gaussian subtasks, separation 1.5", "ARI >= 0.90", measure)]


def gaussian_subtasks(num_subtasks: int, num_inputs: int, separation: float) -> Draw:
    """Unit Gaussian clouds around centres whose coordinates have that standard deviation.

    Answers and subtasks are the same: how a subtask is told from others is what has to be learned.
    """
    centres = separation * torch.randn(
        num_subtasks, num_inputs, generator=torch.Generator().manual_seed(0)
    )

    def draw(
        generator: torch.Generator, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        subtasks = torch.randint(0, num_subtasks, (count,), generator=generator)
        noise = torch.randn(count, num_inputs, generator=generator)
        return centres[subtasks] + noise, subtasks, subtasks

    return draw


def check_sparse_parity() -> list[Check]:
    """On sparse parity gradients do not group by subtask: a method that says so would be wrong."""

    def measure() -> tuple[str, bool]:
        draw = parity_subtasks(num_subtasks=20, num_bits=16)
        score = _network_agreement(draw, num_inputs=36, num_answers=2, num_steps=2000)
        return f"{score:+.3f}", abs(score) <= 0.05

    return [measured("sparse parity, learned subtasks", "ARI about 0 (within 0.05)", measure)]


def parity_subtasks(num_subtasks: int, num_bits: int) -> Draw:
    """Inputs name a subtask (one-hot) and carry random bits; the answer is the parity of two."""
    pairs = torch.combinations(torch.arange(num_bits))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    subsets = pairs[order[:num_subtasks]]

    def draw(
        generator: torch.Generator, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        subtasks = torch.randint(0, num_subtasks, (count,), generator=generator)
        bits = torch.randint(0, 2, (count, num_bits), generator=generator)
        answers = bits.gather(1, subsets[subtasks]).sum(dim=1) % 2
        names = nn.functional.one_hot(subtasks, num_subtasks)
        return torch.cat([names, bits], dim=1).float(), answers, subtasks

    return draw


def _network_agreement(draw: Draw, *, num_inputs: int, num_answers: int, num_steps: int) -> float:
    """Agreement of gradient clusters with the subtasks, over samples that are learned."""
    with settled():
        network = nn.Sequential(nn.Linear(num_inputs, 256), nn.ReLU(), nn.Linear(256, num_answers))
        generator = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(num_steps):
            inputs, answers, _ = draw(generator, 500)
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(inputs), answers).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        inputs, answers, subtasks = draw(generator, 20 * _NUM_SAMPLES)
        with torch.no_grad():
            losses = nn.functional.cross_entropy(network(inputs), answers, reduction="none")
        kept = torch.nonzero((losses > 1e-6) & (losses <= 0.1)).flatten()[:_NUM_SAMPLES]
        vectors = network_gradients(network, inputs[kept], answers[kept])
        return agreement(cluster_gradients(vectors).labels, subtasks[kept].numpy())


def network_gradients(
    network: nn.Module, inputs_SI: torch.Tensor, answers_S: torch.Tensor
) -> Float32Array:
    """Per-sample gradients of a plain network's cross-entropy by all its weights, shape (S, P)."""
    weights = {name: weight.detach() for name, weight in network.named_parameters()}

    def loss(
        given: dict[str, torch.Tensor], inputs_I: torch.Tensor, answer: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.func.functional_call(network, given, (inputs_I[None],))
        return nn.functional.cross_entropy(logits, answer[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    gradients = per_sample(weights, inputs_SI, answers_S)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1).numpy()


def check_language_model() -> list[Check]:
    """A tiny language model with planted (skill, answer) pairs, through the whole pipeline."""

    def measure() -> tuple[str, bool]:
        model, examples, pairs = planted_language_model()
        chosen = select_tokens(model, examples, limit=_NUM_SAMPLES)
        sketches = project_gradients(model, token_samples(examples, chosen), CountSketch(1024))
        found = cluster_gradients(sketches.vectors)
        score = agreement(found.labels, pairs[chosen.examples])
        return f"{score:.2f} with {found.num_clusters} clusters", score >= 0.80

    name = "tiny language model, (skill, answer) pairs; design and seed chosen by outcome"
    return [measured(name, "ARI >= 0.80", measure)]


def planted_language_model(
    num_steps: int = 180, seed: int = 0
) -> tuple[nn.Module, EncodedExamples, npt.NDArray[np.int64]]:
    """A tiny Llama that has learned four skills, new examples, and their (skill, answer) pairs.

    An example is a skill's name, four filler tokens, an argument and one answer token, which is
    supervised. Each skill is a permutation of four answers; all share arguments and answers. The
    training ends while the losses are between floor and ceiling; a few steps more and there is
    little left to look at.
    """
    generator = np.random.default_rng(seed)
    table = np.stack([generator.permutation(_NUM_ANSWERS) for _ in range(_NUM_SKILLS)])
    sizes = (_NUM_ANSWERS, _NUM_SKILLS, _NUM_ANSWERS, _NUM_FILLERS)
    with settled(seed):
        config = LlamaConfig(
            vocab_size=sum(sizes),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            initializer_range=0.07,
        )
        model = LlamaForCausalLM(config).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(num_steps):
            examples, _ = _planted_examples(table, 128, generator)
            batch = collate(examples, np.arange(len(examples)), torch.device("cpu"))
            optimiser.zero_grad(set_to_none=True)
            supervised_nll(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    examples, pairs = _planted_examples(table, 2000, generator)
    return model.eval(), examples, pairs


def _planted_examples(
    table: npt.NDArray[np.int64], count: int, generator: np.random.Generator
) -> tuple[EncodedExamples, npt.NDArray[np.int64]]:
    skills = generator.integers(0, _NUM_SKILLS, count)
    arguments = generator.integers(0, _NUM_ANSWERS, count)
    fillers = generator.integers(0, _NUM_FILLERS, (count, 4))
    answers = table[skills, arguments]
    first_argument = _NUM_ANSWERS + _NUM_SKILLS
    tokens = np.column_stack(
        [
            _NUM_ANSWERS + skills,
            first_argument + _NUM_ANSWERS + fillers,
            first_argument + arguments,
            answers,
        ]
    )
    encoded = from_lists([(row, tokens.shape[1] - 1) for row in tokens], is_task=False)
    return encoded, skills * _NUM_ANSWERS + answers


@contextmanager
def settled(seed: int = 0) -> Iterator[None]:
    """One CPU thread and fixed random weights: what a control measures is the same every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
