import json
import shutil

import numpy as np
import pytest

from tell_core.data import pools
from tell_core.data.anchors import random_anchor
from tell_core.data.corpus import Corpus
from tell_core.data.curation import curate, renderer_for
from tell_core.data.encoding import EncodedExamples
from tell_core.data.mixtures import build_cell_inputs, plan_cell
from tell_core.data.selection import GENERAL_GRADIENTS, TASK_GRADIENTS
from tell_core.data.token_store import open_mixture
from tell_core.errors import DataError, TokenBudgetError
from tell_core.spec.arms import ARM_NAMES, parse_arm
from tell_core.spec.cells import Cell
from tell_core.store import read_json

from .worlds import PREFIX, general_rows, make_spec, write_rows, write_world

ARMS = [name.replace("(k)", "(3)") for name in ARM_NAMES]
TRAINED = [name for name in ARMS if parse_arm(name).is_trained]

GOLDEN_DIGESTS = {
    "sft 0": "b11173fccb0e0987",
    "sft 3": "3523329a695b976b",
    "sft_matched 0": "5ee97c8a2720f824",
    "sft_matched 3": "59323ccd2cc0d1f3",
    "tell 0": "ddc0fff7f36c2dde",
    "tell 3": "df77619b97938f75",
    "tell_no_anchor 0": "fe1c05c4d99931ad",
    "tell_no_anchor 3": "28dd72c207396cdb",
    "tell_random_anchor 0": "f40c33c775862a03",
    "tell_random_anchor 3": "b62ad67f5ab8acaf",
    "tell_anchor_all 0": "b387149e693e56e0",
    "tell_anchor_all 3": "804ac92ab4687342",
    "tell_task_first 0": "6b9ff4ac13a176f1",
    "tell_task_first 3": "b1e3bcd510114e46",
    "tell_task_last 0": "07d12fb2eb07f899",
    "tell_task_last 3": "2668c01c07811c04",
    "general_only 0": "c8a8a6321945fa1b",
    "general_only 3": "0f27fa87c59bffa9",
    "tell_blocks(3) 0": "5a5a4452869ca32d",
    "tell_blocks(3) 3": "8b81043050db59f7",
}
"""Digests of the mixtures when each cell still held tokens of its own: what is trained on must not
change with how it is stored."""


class World:
    """Curated data, and a place to build cells in."""

    def __init__(self, directory, tokenizer, **sections):
        write_world(directory)
        self.directory = directory
        self.spec = make_spec(directory, **sections)
        self.curated = directory / "curated"
        curate(self.spec, tokenizer, self.curated)
        self.renderer = renderer_for(self.spec, tokenizer)
        self.gradients = _drawn_gradients(self.curated)

    def cell(self, arm, budget=600, general=2000, seed=0):
        kind = parse_arm(arm)
        has_general = kind.uses_general or kind.matches_steps
        return Cell(arm, budget if kind.uses_task else None, general if has_general else None, seed)

    def build(self, cell, spec=None, name="mix", num_steps=None):
        out = self.directory / f"{name}-{cell.name}"
        out.mkdir(exist_ok=True)
        build_cell_inputs(
            spec or self.spec, cell, self.curated, self.renderer, out, num_steps,
            gradients=self.gradients,
        )  # fmt: skip
        return Built(out, self.renderer.tokenizer)

    def plan(self, cell, spec=None, **limits):
        return plan_cell(
            spec or self.spec, cell, self.curated, self.renderer, gradients=self.gradients, **limits
        )


def _drawn_gradients(curated):
    """Gradients for arms that select by alignment, drawn at random in place of a model's."""
    drawn = np.random.default_rng(0)
    for part, name in (("task_train", TASK_GRADIENTS), ("general", GENERAL_GRADIENTS)):
        count = Corpus(curated / f"{part}.parquet").num_examples
        np.save(curated / name, drawn.standard_normal((count, 8)).astype(np.float32))
    return curated


class Built:
    """What was written for one cell."""

    def __init__(self, out, tokenizer):
        self.out, self.tokenizer = out, tokenizer
        self.ledger = read_json(out / "ledger.json")

    @property
    def mixture(self):
        return open_mixture(self.out)

    def encoded(self, name):
        return EncodedExamples.load(self.out / f"{name}.safetensors")

    def lines(self, name):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    def texts(self, examples, is_task):
        rows = np.flatnonzero(examples.is_task == is_task)
        return [self.tokenizer.decode(examples.example(row)) for row in rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return World(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.mark.parametrize("arm", ARMS)
def test_planned_ledger_is_the_ledger_of_the_run(world, arm):
    cell = world.cell(arm)

    planned = world.plan(cell)

    assert planned == world.build(cell).ledger


@pytest.mark.parametrize("arm", [arm for arm in TRAINED if arm != "sft_matched"])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_example_comes_exactly_once_per_epoch(world, arm, seed):
    mixture = world.build(world.cell(arm, seed=seed)).mixture

    for epoch in mixture.order.reshape(world.spec.training.epochs, -1):
        assert sorted(epoch.tolist()) == list(range(len(mixture.examples)))


@pytest.mark.parametrize("arm", TRAINED)
def test_ledger_counts_what_the_mixture_holds(world, arm):
    built = world.build(world.cell(arm))
    examples, order, ledger = built.mixture.examples, built.mixture.order, built.ledger

    assert ledger["rendered_tokens"] == examples.lengths[order].sum()
    assert ledger["supervised_tokens"] == examples.supervised_counts[order].sum()
    assert ledger["num_task_examples"] == examples.is_task.sum()
    assert ledger["num_general_examples"] == (~examples.is_task).sum()
    assert ledger["task_rendered_tokens"] == examples.lengths[examples.is_task].sum()
    assert ledger["steps"] == built.mixture.num_steps(world.spec.training.batch_size)
    assert ledger["task_tokens"] <= (ledger["task_budget_tokens"] or 0)
    assert ledger["general_tokens"] <= (ledger["general_budget_tokens"] or 0)


def test_all_arms_draw_the_same_task_examples(world):
    ids = {arm: _task_prompts(world.build(world.cell(arm))) for arm in TRAINED}
    del ids["general_only"]

    assert len(set(map(tuple, ids.values()))) == 1


def _task_prompts(built):
    """Bare task prompts of a mixture, in order of choice."""
    texts = built.texts(built.mixture.examples, is_task=True)
    return [text.split("task word")[1].split("<|end|>")[0] for text in texts]


def test_larger_budget_begins_with_the_examples_of_the_smaller(world):
    small = _task_prompts(world.build(world.cell("tell", budget=600)))
    large = _task_prompts(world.build(world.cell("tell", budget=1500)))

    assert small == large[: len(small)]
    assert len(small) < len(large)


def test_seeds_draw_different_examples(world):
    first, second = (_task_prompts(world.build(world.cell("sft", seed=seed))) for seed in (0, 1))

    assert first != second


@pytest.mark.parametrize("batch_size", [3, 4, 7])
@pytest.mark.parametrize("epochs", [1, 3])
def test_matched_arm_has_the_steps_of_tell(world, batch_size, epochs):
    training = world.spec.training.model_copy(update={"batch_size": batch_size, "epochs": epochs})
    spec = world.spec.model_copy(update={"training": training})

    tell = world.build(world.cell("tell"), spec, "steps").ledger
    matched = world.build(world.cell("sft_matched"), spec, "steps").ledger

    assert matched["steps"] == tell["steps"]
    assert matched["num_task_examples"] == tell["num_task_examples"]
    assert matched["num_general_examples"] == matched["general_tokens"] == 0
    assert matched["task_epochs"] > epochs


@pytest.mark.parametrize("min_steps", [0, 40, 500])
@pytest.mark.parametrize("arm", TRAINED)
def test_small_mixtures_are_passed_over_until_the_fewest_steps(world, arm, min_steps):
    training = world.spec.training.model_copy(update={"min_steps": min_steps})
    spec = world.spec.model_copy(update={"training": training})
    cell = world.cell(arm)

    ledger = world.plan(cell, spec)

    assert ledger == world.build(cell, spec, f"min{min_steps}").ledger
    assert ledger["steps"] >= min_steps
    assert ledger["epochs"] >= training.epochs
    if arm == "sft_matched":
        tell = world.plan(world.cell("tell"), spec)
        assert ledger["steps"] == tell["steps"]
    else:
        assert ledger["epochs"] == ledger["epochs"] // 1
        num_examples = ledger["num_task_examples"] + ledger["num_general_examples"]
        fewer = (ledger["epochs"] - 1) * num_examples / training.batch_size
        assert ledger["epochs"] == training.epochs or fewer < min_steps


def test_matched_arm_repeats_whole_shuffled_epochs(world):
    mixture = world.build(world.cell("sft_matched")).mixture

    count = len(mixture.examples)
    whole = len(mixture.order) // count * count
    epochs = mixture.order[:whole].reshape(-1, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_matched_arm_takes_a_number_of_steps_when_given(world):
    built = world.build(world.cell("sft_matched"), name="given", num_steps=11)

    assert built.ledger["steps"] == 11
    assert len(built.mixture.order) == 11 * world.spec.training.batch_size


@pytest.mark.parametrize(
    ("arm", "on_task", "on_general"),
    [
        ("sft", True, None),
        ("tell", True, False),
        ("tell_no_anchor", False, False),
        ("tell_random_anchor", False, False),
        ("tell_anchor_all", True, True),
        ("tell_task_first", True, False),
    ],
)
def test_anchor_stands_where_the_arm_says(world, arm, on_task, on_general):
    built = world.build(world.cell(arm))
    examples = built.mixture.examples

    assert {PREFIX in text for text in built.texts(examples, is_task=True)} == {on_task}
    general = {PREFIX in text for text in built.texts(examples, is_task=False)}
    assert general == (set() if on_general is None else {on_general})
    for name in ("test", "probe"):
        encoded = built.encoded(name)
        assert {PREFIX in text for text in built.texts(encoded, is_task=True)} == {on_task}


@pytest.mark.parametrize("arm", ["base", "base_few_shot", "general_only"])
def test_arms_without_task_data_are_tested_with_the_anchor(world, arm):
    built = world.build(world.cell(arm))

    assert all(PREFIX in text for text in built.texts(built.encoded("test"), is_task=True))


def test_random_anchor_is_as_long_as_the_anchor_and_drawn_by_seed(world):
    anchor = read_json(world.curated / "anchor.json")
    built = world.build(world.cell("tell_random_anchor", seed=1))
    text = random_anchor(world.renderer.tokenizer, anchor["num_anchor_tokens"], 1)

    assert all(text in shown for shown in built.texts(built.mixture.examples, is_task=True))
    tell = world.build(world.cell("tell", seed=1)).ledger
    assert built.ledger["task_rendered_tokens"] == tell["task_rendered_tokens"]


def test_untrained_arms_have_no_mixture(world):
    built = world.build(world.cell("base"))

    assert not (built.out / "mixture_index.safetensors").exists()
    assert not (built.out / "shuffle_proof.json").exists()
    assert built.ledger["steps"] == built.ledger["task_tokens"] == 0
    assert len(built.encoded("test")) == 12


def test_few_shot_prompts_hold_the_first_examples_of_the_seed(world):
    built = world.build(world.cell("base_few_shot"))
    sft = _task_prompts(world.build(world.cell("sft")))

    for text in built.texts(built.encoded("test"), is_task=True):
        parts = [part.split("<|end|>")[0] for part in text.split("task word")[1:]]
        assert parts[:2] == sft[:2]
        assert len(parts) == 3
    assert built.ledger["num_task_examples"] == 2
    assert built.ledger["task_tokens"] > 0


def test_shuffled_arms_with_equal_data_have_equal_orders(world):
    proofs = [
        read_json(world.build(world.cell(arm)).out / "shuffle_proof.json")
        for arm in ("tell", "tell_no_anchor", "tell_anchor_all")
    ]

    assert len({proof["order_digest"] for proof in proofs}) == 1


def test_identical_inputs_give_identical_digests(world):
    first = world.build(world.cell("tell"), name="one").mixture
    second = world.build(world.cell("tell"), name="two").mixture

    assert first.digest == second.digest
    assert first.digest != world.build(world.cell("tell", seed=1)).mixture.digest


def test_items_are_the_same_for_every_cell_and_belong_to_the_tokens(world):
    evaluation = world.spec.evaluation.model_copy(update={"max_items": 7})
    spec = world.spec.model_copy(update={"evaluation": evaluation})
    tell = world.build(world.cell("tell"), spec, "few")
    base = world.build(world.cell("base"), spec, "few")

    items = tell.lines("items.jsonl")
    assert len(items) == len(tell.encoded("test")) == 7
    assert [item["item_id"] for item in items] == [
        item["item_id"] for item in base.lines("items.jsonl")
    ]
    texts = tell.texts(tell.encoded("test"), is_task=True)
    for item, text in zip(items, texts, strict=True):
        assert text.endswith(
            f"{item['prompt']}<|end|>\n<|start|>assistant\n{item['reference']}<|end|>"
        )
        assert item["extra"]["label"] in ("yes", "no")
        assert len(item["prompt_digest"]) == 16


def test_probe_holds_all_dev_items_then_all_heldout_general_items_without_anchor(world):
    built = world.build(world.cell("tell_anchor_all"))

    probe, items = built.encoded("probe"), built.lines("probe_items.jsonl")
    assert probe.is_task.tolist() == [True] * 8 + [False] * 8
    assert [item["role"] for item in items] == ["task"] * 8 + ["general"] * 8
    assert not any(PREFIX in text for text in built.texts(probe, is_task=False))


def test_retention_items_are_probed_bare_and_never_trained_on(tmp_path, tokenizer):
    shared = general_rows(3)
    write_rows(tmp_path / "kept.jsonl", [*general_rows(9, "kept"), *shared])
    world = World(
        tmp_path,
        tokenizer,
        retention=[str(tmp_path / "kept.jsonl")],
        curation={"max_tokens": 400, "general_heldout_examples": 8, "retention_examples": 5},
    )

    built = world.build(world.cell("tell_anchor_all", general=10**6))

    roles = [item["role"] for item in built.lines("probe_items.jsonl")]
    assert roles == ["task"] * 8 + ["general"] * 8 + ["retention"] * 5
    assert not any(PREFIX in text for text in built.texts(built.encoded("probe"), is_task=False))
    trained = built.texts(built.mixture.examples, is_task=False)
    assert not any(f"{row['prompt']}<|end|>" in text for row in shared for text in trained)
    assert any("general question 3<|end|>" in text for text in trained)
    assert Corpus(world.curated / "retention.parquet").num_examples == 12


def test_samples_show_text_and_labels(world):
    samples = read_json(world.build(world.cell("tell")).out / "samples.json")

    assert [sample["role"] for sample in samples] == ["task", "task", "general", "general"]
    supervised = "".join(text for text, is_supervised in samples[0]["pieces"] if is_supervised)
    assert supervised.startswith("answer") and supervised.endswith("<|end|>")


def test_budget_beyond_the_pool_uses_everything_once_and_says_so(world):
    built = world.build(world.cell("tell", budget=10**6, general=10**6))

    for role in ("task", "general"):
        assert built.ledger[f"{role}_tokens"] == built.ledger[f"{role}_available_tokens"] < 10**6
        assert built.ledger[f"{role}_budget_tokens"] == 10**6
    assert built.ledger["task_epochs"] == world.spec.training.epochs


def test_general_budget_is_shared_by_weight(tmp_path, tokenizer):
    general = [
        {"path": str(tmp_path / "general.jsonl"), "weight": 3},
        {"path": str(tmp_path / "chat.jsonl"), "weight": 1},
    ]
    world = World(tmp_path, tokenizer, general=general)

    texts = _general_texts(world.build(world.cell("tell", general=4000)))

    tokens = {name: sum(n for text, n in texts if name in text) for name in ("chat", "general")}
    assert tokens["general"] / tokens["chat"] == pytest.approx(3, rel=0.2)


def _general_texts(built):
    examples = built.mixture.examples
    rows = np.flatnonzero(~examples.is_task)
    return [
        (built.tokenizer.decode(examples.example(row)), int(examples.lengths[row])) for row in rows
    ]


def test_task_budget_that_holds_nothing_is_a_clear_error(world):
    with pytest.raises(TokenBudgetError, match="a budget of 3 tokens holds no example of task"):
        world.plan(world.cell("sft", budget=3))


def test_examples_without_supervised_tokens_are_listed(tmp_path, tokenizer, monkeypatch):
    world = World(tmp_path, tokenizer)
    encode = world.renderer.encode
    monkeypatch.setattr(
        type(world.renderer), "encode", lambda self, e: [(ids, len(ids)) for ids, _ in encode(e)]
    )

    with pytest.raises(DataError, match=r"no token to learn from.*train\.jsonl, line \d+"):
        world.build(world.cell("sft"))


def test_what_is_kept_between_cells_changes_nothing(world, tmp_path, tokenizer):
    cells = [world.cell(arm, budget, seed=1) for arm in ARMS for budget in (1500, 600)]
    shared = [world.build(cell, name="shared") for cell in cells]

    for number, (cell, built) in enumerate(zip(cells, shared, strict=True)):
        alone = tmp_path / str(number)
        shutil.copytree(world.curated, alone / "curated")
        fresh = renderer_for(world.spec, tokenizer)
        (alone / "mix").mkdir()
        build_cell_inputs(
            world.spec, cell, alone / "curated", fresh, alone / "mix", gradients=world.gradients
        )

        assert _contents(alone / "mix") == _contents(built.out)


def test_examples_are_rendered_once_for_all_cells(tmp_path, tokenizer, monkeypatch):
    world = World(tmp_path, tokenizer)
    rendered = []
    encode = type(world.renderer).encode
    monkeypatch.setattr(
        type(world.renderer),
        "encode",
        lambda self, examples: rendered.extend(examples) or encode(self, examples),
    )

    for budget in (600, 1500):
        for seed in (0, 1):
            for arm in ("sft", "tell", "tell_blocks(3)", "general_only"):
                cell = world.cell(arm, budget, seed=seed)
                world.plan(cell)
                world.build(cell)
                pools._opened.cache_clear()

    assert len(set(rendered)) == len(rendered)


def test_mixture_stages_hold_no_tokens_of_their_own(world):
    small = world.build(world.cell("tell", budget=1500)).out / "mixture_index.safetensors"

    mixture = open_mixture(small.parent)

    num_numbers = 8 * len(mixture.examples) + 4 * len(mixture.order)
    assert small.stat().st_size < num_numbers + 1000 < 4 * mixture.examples.num_tokens


def _digests(world):
    return {
        f"{arm} {seed}": world.build(world.cell(arm, seed=seed)).mixture.digest[:16]
        for arm in TRAINED
        if parse_arm(arm).selection == "random"
        for seed in (0, 3)
    }


def test_mixtures_are_those_of_before_the_token_stores(world):
    assert _digests(world) == GOLDEN_DIGESTS


def _contents(directory):
    """All files of a mix stage, and the mixture behind its index."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    if files.pop("mixture_index.safetensors", None):
        files["mixture"] = open_mixture(directory).digest
    return files


@pytest.mark.parametrize(
    ("arm", "role", "setting"),
    [("sft", "test", "curation.max_tokens"), ("base_few_shot", "test", "evaluation.num_shots")],
)
def test_items_longer_than_the_context_are_named_with_the_mend(world, arm, role, setting):
    cell = world.cell(arm)
    longest = int(world.build(cell).encoded(role).lengths.max())
    message = rf"{role} items are longer.* {longest - 1} tokens.*test\.jsonl, line \d+.*`{setting}`"

    with pytest.raises(DataError, match=message):
        world.plan(cell, context_tokens=longest - 1)
    with pytest.raises(DataError, match=message):
        build_cell_inputs(
            world.spec,
            cell,
            world.curated,
            world.renderer,
            world.directory,
            context_tokens=longest - 1,
        )


def test_items_that_just_fit_the_context_are_taken(world):
    cell = world.cell("base_few_shot")
    built = world.build(cell)
    longest = max(int(built.encoded(name).lengths.max()) for name in ("test", "probe"))

    planned = world.plan(cell, context_tokens=longest)

    assert planned == built.ledger


@pytest.fixture(scope="module", params=["tokens", "supervised_tokens"])
def weighted(request, tmp_path_factory, tokenizer):
    """A world with two general sources of unequal weight, and the unit of its budgets."""
    directory = tmp_path_factory.mktemp("weighted")
    general = [
        {"path": str(directory / "general.jsonl"), "weight": 3},
        {"path": str(directory / "chat.jsonl"), "weight": 1},
    ]
    budgets = {"task_tokens": 200, "general_tokens": 500, "unit": request.param}
    return World(directory, tokenizer, general=general, budgets=budgets), request.param


@pytest.mark.parametrize("arm", ARMS)
def test_ledger_lists_every_source_in_the_unit_of_the_budgets(weighted, arm):
    world, unit = weighted
    cell, kind = world.cell(arm, budget=200, general=500), parse_arm(arm)

    ledger = world.build(cell).ledger

    assert ledger == world.plan(cell)
    sources = {entry["source"]: entry for entry in ledger["sources"]}
    uses_general = kind.uses_general
    assert list(sources) == ["train"] * kind.uses_task + ["general", "chat"] * uses_general
    for entry in sources.values():
        assert 0 < entry["used"] <= entry["budget"] < entry["available"]
        assert entry["repeats"] > world.spec.training.epochs - 1
    if uses_general:
        assert (sources["general"]["budget"], sources["chat"]["budget"]) == (375, 125)
    name = "num_tokens" if unit == "tokens" else "num_response_tokens"
    pools = {"task": "task_train", "general": "general"}
    for role, part in pools.items():
        entries = [entry for entry in ledger["sources"] if entry["role"] == role]
        counts = getattr(Corpus(world.curated / f"{part}.parquet"), name)
        assert sum(entry["available"] for entry in entries) in (0, counts.sum())
        num_examples = sum(entry["num_examples"] for entry in entries)
        assert num_examples == ledger[f"num_{role}_examples"] * bool(entries)
    if unit == "supervised_tokens" and kind.is_trained:
        used = sum(entry["used"] * entry["repeats"] for entry in sources.values())
        assert used == pytest.approx(ledger["supervised_tokens"], rel=0.05)


def test_task_budgets_hold_the_values_of_a_column_in_proportion(tmp_path, tokenizer):
    budgets = {"task_tokens": 600, "general_tokens": 500, "stratify_by": "label"}
    world = World(tmp_path, tokenizer, budgets=budgets)
    pool = Corpus(world.curated / "task_train.parquet")
    labels = np.asarray(pool.strata("label"))
    share = (labels == '"yes"').mean()

    for budget in (300, 600, 1500):
        texts = world.build(world.cell("tell", budget), name=f"b{budget}")
        ledger = texts.ledger
        numbers = [int(prompt.split()[0]) for prompt in _task_prompts(texts)]
        assert abs(sum(n % 2 for n in numbers) - share * len(numbers)) <= 1
        assert 0 < ledger["task_tokens"] <= budget


def test_a_column_that_the_task_lacks_is_an_error_that_names_those_there(tmp_path, tokenizer):
    budgets = {"task_tokens": 600, "general_tokens": 500, "stratify_by": "topic"}
    world = World(tmp_path, tokenizer, budgets=budgets)

    with pytest.raises(DataError, match=r"stratify_by: .* no column 'topic'.*anchor_len, label"):
        world.plan(world.cell("sft"))
