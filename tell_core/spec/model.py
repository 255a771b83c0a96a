"""The experiment specification: frozen, closed to unknown keys, a docstring per field."""

from itertools import product
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tell_core.errors import SpecError
from tell_core.spec.arms import parse_arm

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float | str) else value


Budgets = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)]


class Candidate(NamedTuple):
    """Training settings that tuning compares.

    Attributes:
        learning_rate: Peak learning rate.
        epochs: Passes over the mixture.
    """

    learning_rate: float
    epochs: int


class Section(BaseModel):
    """A part of the specification."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelSpec(Section):
    """The base model."""

    id: str = Field(min_length=1)
    """Directory of a Hugging Face causal language model, or its id on the hub."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None takes the hub's default branch."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto: bfloat16 on a GPU that has it, else float32."""
    licence: str | None = None
    """Licence of the base model, as its owner states it; shown in the report card."""


class SourceSpec(Section):
    """One source of examples. In YAML a plain string is its path."""

    path: str = Field(min_length=1)
    """File, directory or glob of JSONL (.gz, .zst), CSV or Parquet; or a hub dataset id."""
    name: str = ""
    """Name in tables; the path's stem by default."""
    format: Literal["auto", "prompt_response", "alpaca", "messages", "sharegpt"] = "auto"
    """Shape of the rows; auto decides by the columns and says what it decided."""
    columns: dict[str, str] = {}
    """Our column name -> theirs, for prompt, response, system, instruction, input, output,
    messages (turns with role and content) and conversations (turns with from and value)."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; only a commit makes sure of equal data later."""
    streaming: bool = False
    """Whether a hub dataset is read as it arrives, without a copy of it on disk."""
    weight: PositiveFloat = 1.0
    """Share of the general budget, relative to the other general sources."""
    licence: str | None = None
    """Licence of the data, as their owner states it; shown in the report card."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _name_from_path(self) -> Self:
        if not self.name:
            stem = PurePath(self.path.rstrip("/")).name.split(".")[0]
            object.__setattr__(self, "name", stem or self.path)
        return self


class TaskSpec(Section):
    """The low-resource task."""

    name: str = Field(pattern=_NAME)
    """Name of the task, for people and for the model registry."""
    train: SourceSpec
    """Task examples from which the task budgets are drawn."""
    test: SourceSpec
    """Test items; never trained on, never used to choose anything."""
    dev: SourceSpec | None = None
    """Items that choose learning rates and checkpoints; by default taken out of `train`."""
    dev_examples: PositiveInt = 32
    """Examples set aside from `train` when `dev` is not given; the loss of all is traced."""


class CurationSpec(Section):
    """What is set aside before any budget is drawn."""

    max_tokens: PositiveInt = 1024
    """Longest rendered example in tokens, anchor prompt included; longer ones are rejected."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of repeats among the runs of 5 words of a general response; None: any."""
    max_symbols: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of signs among the characters of a general response; None: any."""
    max_copied: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of a general response's runs of 5 words that stand in its prompt; None: any."""
    drop_refusals: bool = False
    """Whether general examples whose response begins with a refusal are removed."""
    drop_boilerplate: bool = False
    """Whether general examples with phrases of web pages in the response are removed."""
    languages: tuple[str, ...] = ()
    """Languages of general examples, as ISO 639-1 codes (extra `language`); none: all."""
    max_other_language: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Largest probability that a general example is in none of `languages`."""
    general_heldout_examples: PositiveInt = 32
    """General examples held out to measure the price paid in general ability; the loss of all is
    traced."""
    retention_examples: PositiveInt = 32
    """Examples of `retention` that are measured, by seeded choice."""
    drop_duplicates: bool = True
    """Whether later exact copies of an example are removed."""
    near_duplicate_similarity: Annotated[float, Field(ge=0.5, le=1)] | None = 0.8
    """Least Jaccard similarity of runs of 5 words at which examples are near-duplicates, which
    `drop_duplicates` and `drop_overlap` remove like copies; None: only copies are looked for."""
    drop_overlap: bool = True
    """Whether training examples that also stand in test or dev, and general examples that also
    stand in the task, are removed."""
    overlap_ngram_share: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    """Share of the runs of 13 words in the prompt of a test or retention item from which on an
    example that holds them counts as overlap; with a smaller share it is only flagged; None: they
    are not looked for."""
    seed: Seed = 0
    """Seed of the choice of held-out examples."""
    max_memory_gb: PositiveFloat | None = None
    """Memory of the data engine in gigabytes; what does not fit is written to the run directory and
    read again. Changes nothing in the result. None: 80 % of the machine's memory."""


class AnchorSpec(Section):
    """The anchor prompt: constant text on every task prompt."""

    source: Literal["task_prefix", "given", "none"] = "task_prefix"
    """task_prefix: the constant beginning of the task's prompts; given: `text`."""
    text: str | None = None
    """The anchor prompt itself, for source given."""
    length_column: str | None = None
    """Column with the length of the constant prefix in characters; else it is found."""
    position: Literal["before", "after", "system"] = "before"
    """Where the anchor prompt stands: around the prompt or as the system message."""

    @model_validator(mode="after")
    def _text_with_source(self) -> Self:
        if (self.source == "given") != bool(self.text):
            raise ValueError("`text` belongs to `source: given`, and that needs a text")
        return self


class BudgetSpec(Section):
    """Token budgets. One number or a list each."""

    task_tokens: Annotated[Budgets, Field(min_length=1)]
    """Upper bounds on task tokens, counted before the anchor prompt is added."""
    general_tokens: Budgets = ()
    """Upper bounds on general tokens."""
    unit: Literal["tokens", "supervised_tokens"] = "tokens"
    """What budgets are counted in: all tokens of an example (template, bare prompt, response), or
    those of the response and the marker that ends it."""
    stratify_by: str | None = None
    """Column of the task data whose values every task budget holds in the proportions of the pool,
    to within one example; None: examples are drawn without regard to it."""

    @field_validator("task_tokens", "general_tokens")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each budget may stand there once")
        return tuple(sorted(value))


class TrainingSpec(Section):
    """Training, the same loop for every arm."""

    method: Literal["lora", "full"] = "lora"
    """Low-rank adapters (peft) or all weights."""
    learning_rate: PositiveFloat | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = 2e-4
    """Peak learning rate; several: each arm gets the one with the best dev loss (tuning)."""
    epochs: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = 3
    """Passes over the mixture; several: tuned together with the learning rate."""
    min_steps: Annotated[int, Field(ge=0)] = 50
    """Fewest optimiser steps: an arm with too little data for them makes more passes over it."""
    batch_size: PositiveInt = 16
    """Examples per optimiser step."""
    batching: Literal["auto", "padded", "length_grouped", "packed"] = "auto"
    """Layout of forward passes: padded in stored order, padded among examples of similar length, or
    packed one after another without padding and without attention across examples. auto: packed
    where that equals single examples on this model, else length_grouped. Never changes which
    examples a step trains on."""
    micro_batch_tokens: PositiveInt | Literal["auto"] | None = "auto"
    """Most tokens per forward pass, padding included; None: no limit. auto: 4096, or 1024 on a CPU,
    where more is not faster. Changes memory, not the result."""
    micro_batch_size: PositiveInt | None = None
    """Most examples per forward pass; None: no limit. Changes memory, not the result."""
    gradient_checkpointing: bool = False
    """Keep no activations within layers and compute them again for the gradient: less memory, about
    a third more time, the same result."""
    num_ranks: PositiveInt = 1
    """Processes, one GPU each where there are GPUs, among which the examples of every step are
    shared. Changes time, not the result: `batch_size` is that of all ranks together."""
    weight_quantization: Literal["none", "nf4"] = "none"
    """Weight quantization of the frozen base: nf4 keeps it in 4 bits (QLoRA; needs a CUDA GPU and
    the extra `gpu`)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at zero."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down."""
    lora_rank: PositiveInt = 8
    """Rank of the adapters."""
    lora_alpha: PositiveFloat = 16.0
    """Scale of the adapters: alpha / rank multiplies their output."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters; not with adapters of experts."""
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get adapters; all-linear: every linear layer within the body, and every expert
    of a mixture-of-experts layer, which can also be named (`experts.down_proj`)."""
    keep: Literal["best_dev", "last"] = "best_dev"
    """Weights kept: of the probe step with the lowest task dev loss, or of the last step."""
    num_probes: Annotated[int, Field(ge=2)] = 16
    """Logarithmically spaced steps at which the probe set's loss is measured. With 16 points steps
    and gradual falls are told apart at the stated rates, with 12 nine steps of ten are recognised,
    with 8 hardly any."""
    probe_share: PositiveFloat | None = None
    """Most that probes may cost, as a share of the training's own cost, counted in tokens: where
    `num_probes` would cost more there are fewer, but at least 8. Short trainings then have fewer
    points in time, and `keep: best_dev` fewer weights to choose from, than long ones. None: no
    limit."""
    trace_tokens: Annotated[int, Field(ge=0)] = 2000
    """Supervised tokens of the probe set whose own losses are kept, by seeded choice; the same in
    every cell. They cost no forward pass beside the probes."""
    keep_probe_weights: bool = False
    """Whether the trained weights are kept at every probe step, an adapter or a model each: what
    prediction P7 is measured on. Changes no result; costs the disk that `tell plan` shows."""
    checkpoint_seconds: PositiveFloat | Literal["auto"] = "auto"
    """Seconds between checkpoints; auto: a minute, or longer where writing them would take more
    than 2 % of the time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs; auto: a GPU when there is one."""
    threads: PositiveInt = 1
    """CPU threads of one training."""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Learning rate and epochs, one pair or several to be compared."""
        pairs = product(_as_tuple(self.learning_rate), _as_tuple(self.epochs))
        return tuple(Candidate(rate, epochs) for rate, epochs in pairs)

    @property
    def is_tuned(self) -> bool:
        """Whether several candidates are to be compared."""
        return len(self.candidates) > 1

    @property
    def num_epochs(self) -> int:
        """Passes over the mixture, once they are settled: the largest candidate until then."""
        return max(epochs for _, epochs in self.candidates)


class TuningSpec(Section):
    """Equal tuning effort: every trained arm tries the same learning rates and epochs."""

    task_tokens: PositiveInt | None = None
    """Task budget of the comparison; None: the middle one of `budgets.task_tokens`."""
    seed: Seed = 1000
    """Seed of the comparison; not one of `seeds`."""


class MetricSpec(Section):
    """One metric. In YAML a plain string is its name."""

    name: str = Field(min_length=1)
    """Name of the metric, `docs/metrics.md` lists them; or `module:function` for your own."""
    field: str | None = None
    """Column of the test data that holds the reference label; else the parsed reference."""
    labels: tuple[str, ...] | None = None
    """Labels, for metrics over labels."""
    positive: str | None = None
    """Positive label, for F1."""
    normalise: bool = False
    """Whether case, punctuation and runs of white space are ignored (exact match)."""
    higher_is_better: bool = True
    """Direction of a metric of your own (name `module:function`); the others know theirs."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ParseSpec(Section):
    """How an answer is read out of the generated text."""

    kind: Literal["text", "json"] = "text"
    """text: the whole answer; json: the first JSON object in it."""
    field: str | None = None
    """Key of the JSON object that holds the answer; None: the whole object."""
    drop_prefix: str | None = None
    """Constant beginning removed from predictions and references."""


class HarnessSpec(Section):
    """One task of lm-evaluation-harness. In YAML a plain string is its name."""

    task: str = Field(min_length=1)
    """Name of the task, as the harness knows it."""
    metric: str = "acc"
    """Which of the task's metrics is taken."""
    num_shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each question."""
    max_items: PositiveInt | None = None
    """First items used; None: all."""
    tasks_dir: str | None = None
    """Directory with task files of your own (the harness's YAML format)."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


class EvaluationSpec(Section):
    """Evaluation of every cell on the same items."""

    max_items: PositiveInt | None = None
    """Test items used, by seeded choice; None: all."""
    max_new_tokens: PositiveInt = 128
    """Longest generated answer in tokens."""
    max_new_tokens_column: str | None = None
    """Column of the test data with a limit for each item; `max_new_tokens` caps it."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; it is cut off before the first of them."""
    batch_size: PositiveInt = 16
    """Items generated side by side."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What generates: the model as it was trained, or vLLM (extra `vllm`, GPU)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the likeliest token each time (greedy); above: tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest that together hold this probability."""
    decoding_seed: Seed = 0
    """Seed of the draws; each item has a stream of its own."""
    num_repeats: PositiveInt = 1
    """How often all answers are generated, to measure the noise of decoding: drawn with other
    seeds, or greedy in other batches. The first repeat is the score."""
    metrics: tuple[MetricSpec, ...] = (MetricSpec(name="exact_match"),)
    """Metrics beside the gold log-probability, which is always there."""
    parse: ParseSpec = ParseSpec()
    """How answers are read."""
    num_shots: PositiveInt = 4
    """Solved examples in the prompt of arm base_few_shot."""
    harness: tuple[HarnessSpec, ...] = ()
    """Tasks of lm-evaluation-harness run on every model (extra `harness`); part of the price."""


class AnalysisSpec(Section):
    """Statistics."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 2000
    """Draws of every interval: items resampled, seed noise from Student's t, paired over arms."""
    primary_metric: str = "log_probability"
    """Metric of the headline answer."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    target_score: float | None = None
    """Score of the primary metric for which the forecast says how much task data it takes."""
    target_half_width: PositiveFloat | None = None
    """An adaptive run adds seeds one by one, from the third on, until half the interval of TELL's
    advantage, in units of the primary metric, is surely at most this; None: all seeds at once."""
    forecast_confidence: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Coverage of the forecast's intervals."""
    quantum_column: str | None = None
    """Column of the general data that names the skill of an example; its shares are the use
    frequencies that learning times are regressed on. None: no such regression."""


class ExperimentSpec(Section):
    """One experiment: what is trained on what, how it is scored, what is compared."""

    name: str = Field(pattern=_NAME)
    """Name of the experiment and of its run directory."""
    model: ModelSpec
    """The base model."""
    task: TaskSpec
    """The task."""
    general: tuple[SourceSpec, ...] = ()
    """General instruction data."""
    retention: tuple[SourceSpec, ...] = ()
    """Examples of abilities to be kept; never trained on, only measured: part of the price."""
    curation: CurationSpec = CurationSpec()
    """Curation."""
    anchor: AnchorSpec = AnchorSpec()
    """The anchor prompt."""
    budgets: BudgetSpec
    """Token budgets."""
    arms: tuple[str, ...] = ("base", "sft", "sft_matched", "tell", "general_only")
    """Arms to compare."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple)] = (0, 1, 2)
    """Training seeds; at least two for an interval."""
    training: TrainingSpec = TrainingSpec()
    """Training."""
    tuning: TuningSpec = TuningSpec()
    """Tuning."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Evaluation."""
    analysis: AnalysisSpec = AnalysisSpec()
    """Statistics."""

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for name in value:
                parse_arm(name)
        except SpecError as error:
            raise ValueError(str(error)) from error
        return _distinct(value)

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs_general = [name for name in self.arms if _needs_general(name)]
        if needs_general and not (self.general and self.budgets.general_tokens):
            raise ValueError(
                f"arm {needs_general[0]!r} mixes in general data: it needs sources under"
                " `general` and at least one number under `budgets.general_tokens`"
            )
        selective = [name for name in self.arms if parse_arm(name).selection != "random"]
        if selective and "tell" not in self.arms:
            raise ValueError(
                f"arm {selective[0]!r} chooses its general data: what that gains shows only beside"
                " random choice; add arm 'tell' to `arms`"
            )
        names = [source.name for source in self.general]
        if len(set(names)) != len(names):
            raise ValueError(f"general sources need different names, got {', '.join(names)}")
        if self.training.is_tuned and self.tuning.seed in self.seeds:
            raise ValueError(f"`tuning.seed` {self.tuning.seed} is also one of `seeds`")
        return self

    @property
    def tuning_budget_tokens(self) -> int:
        """Task budget at which learning rates are compared."""
        budgets = self.budgets.task_tokens
        return self.tuning.task_tokens or budgets[len(budgets) // 2]


def _needs_general(name: str) -> bool:
    arm = parse_arm(name)
    return arm.uses_general or arm.matches_steps


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value or len(set(value)) != len(value):
        raise ValueError(f"needs at least one entry and each only once, got {list(value)}")
    return value
