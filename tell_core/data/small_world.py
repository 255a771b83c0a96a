"""A small synthetic world whose quanta are known by construction.

Every example asks for a transformation of a short word of capital letters: a *position skill*
(``reverse``, ``sort``, ...), a *cipher* (a letter-by-letter substitution), or one after the other,
answered plainly or as JSON. The base model is pre-trained on single skills, general data draws from
everything public, and the task composes a shared skill and a shared format with a *private* cipher
that no other data shows. So it is known beforehand which quanta are shared and how often each is
used, which is what the quantization model needs as a positive control.

Files written by :func:`write_world`: ``pretrain.jsonl``, ``general.jsonl``, ``task_train.jsonl``,
``task_test.jsonl``, ``quanta.json`` and ``base_init/`` (tokenizer, chat template and the
configuration of the base model, without weights).
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tell_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T", bound=Hashable)
Row = dict[str, Any]
Skill = Callable[[str], str]

ALPHABET = "ABCDEFGH"
PRIVATE_CIPHER = "veil"
TASK_CHAIN = ("rotate", "reverse")
POSITION_SKILLS: Mapping[str, Skill] = {
    "reverse": lambda word: word[::-1],
    "copy": lambda word: word,
    "rotate": lambda word: word[1:] + word[:1],
    "last": lambda word: word[-1],
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "drop": lambda word: word[:-1],
    "first": lambda word: word[0],
    "odd": lambda word: word[::2],
    "even": lambda word: word[1::2],
}
"""Skills that move or select letters, most used first."""

PUBLIC_CIPHERS = ("shift", "mirror", "code")
"""Letter-by-letter substitutions that pre-training and general data show, most used first."""

CHAINS = (("rotate", "reverse"), ("swap", "rotate"), ("reverse", "drop"), ("rotate", "odd"))
"""Position skills that general data applies one after the other, before a cipher; most used
first."""

SINGLE_SKILLS = (
    *("reverse", "shift", "copy", "mirror", "rotate", "code"),
    *("last", "swap", "drop", "first", "odd", "even"),
)
"""Every public skill, most used first."""

FORMATS = ("plain", "json")
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
INITIALIZER_RANGE = 0.07
"""With the usual 0.02 a model this narrow stays on its first plateau for over 1500 steps."""

_WORD_PATTERN = r'\{"answer":"|"\}|: | ?[a-z]+|.|\s'


@dataclass(frozen=True, kw_only=True)
class WorldSize:
    """How much of each kind of data there is, and the shape of the base model."""

    num_pretrain: int = 16_000
    """Single-skill examples on which the base model is trained."""
    num_general: int = 3_000
    """Examples of general data."""
    num_task_train: int = 1_200
    """Task examples for training and dev."""
    num_task_test: int = 200
    """Task examples for the report; their words occur nowhere else."""
    min_letters: int = 4
    """Shortest word, in letters."""
    max_letters: int = 6
    """Longest word, in letters."""
    zipf_exponent: float = 0.5
    """Use frequency of the k-th skill (and of the k-th cipher) is proportional to k to the minus
    this."""
    composition_share: float = 0.8
    """Share of general examples that compose position skills with a public cipher."""
    json_share: float = 0.5
    """Share of pre-training and general examples answered as JSON."""
    hidden_size: int = 96
    """Width of the base model."""
    num_layers: int = 3
    """Number of transformer layers of the base model."""
    num_heads: int = 4
    """Number of attention heads of the base model."""


@dataclass(frozen=True)
class Request:
    """What an example asks for: skills applied from left to right, and the answer's format."""

    skills: tuple[str, ...]
    format: str

    @property
    def instruction(self) -> str:
        """The request in words, e.g. ``reverse then shift as json: `` (the word follows)."""
        suffix = "" if self.format == "plain" else f" as {self.format}"
        return " then ".join(self.skills) + suffix + ": "


TASK_REQUEST = Request((*TASK_CHAIN, PRIVATE_CIPHER), "json")


def write_world(out: Path, size: WorldSize | None = None, *, seed: int = 0) -> dict[str, Path]:
    """Write the data, the known quanta, the tokenizer and the untrained base model's shape.

    The same size and seed give the same bytes. No word of the test split occurs in any other file,
    and no file but the task's names or applies the private cipher.

    Args:
        out: Directory to write to; created when missing.
        size: Amounts of data and shape of the model; the default is what the demo uses.
        seed: Seed of the words, the ciphers and the draws.

    Returns:
        Name -> path of ``pretrain``, ``general``, ``task_train``, ``task_test``, ``quanta`` and
        ``base_init``.

    Raises:
        DataError: More different words were asked for than exist.
    """
    size = size or WorldSize()
    rng = np.random.default_rng(seed)
    skills = build_skills(rng)
    rows = _draw_splits(size, skills, rng)
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    paths["quanta"] = out / "quanta.json"
    paths["quanta"].write_text(json.dumps(describe_quanta(size), indent=1) + "\n", encoding="utf-8")
    paths["base_init"] = out / "base_init"
    write_base_init(paths["base_init"], size)
    return paths


def build_skills(rng: np.random.Generator) -> dict[str, Skill]:
    """Name -> function of every skill, the private cipher among them.

    ``shift`` moves each letter one on, ``mirror`` swaps the alphabet's ends; ``code`` and the
    private cipher are arbitrary substitutions, drawn so that the private one agrees with no public
    cipher on any letter and leaves no letter as it is.
    """
    letters = np.array(list(ALPHABET))
    tables = [letters, np.roll(letters, -1), letters[::-1]]
    for _ in range(2):
        tables.append(_draw_disjoint_permutation(letters, tables, rng))
    names = (*PUBLIC_CIPHERS, PRIVATE_CIPHER)
    ciphers = {name: _substitution(table) for name, table in zip(names, tables[1:], strict=True)}
    return {**POSITION_SKILLS, **ciphers}


def _draw_disjoint_permutation(
    letters: NDArray[np.str_], others: Sequence[NDArray[np.str_]], rng: np.random.Generator
) -> NDArray[np.str_]:
    """Draw permutations until one differs from all ``others`` in every place."""
    while True:
        table = rng.permutation(letters)
        if not any(bool((table == other).any()) for other in others):
            return table


def _substitution(table: NDArray[np.str_]) -> Skill:
    """Return the skill that replaces the k-th letter of the alphabet by ``table[k]``."""
    mapping = str.maketrans(ALPHABET, "".join(table))
    return lambda word: word.translate(mapping)


def general_requests(size: WorldSize) -> dict[Request, float]:
    """Probability of each request in general data: all public singles, compositions and formats."""
    position = zipf_frequencies(CHAINS, 1.0)
    cipher = zipf_frequencies(PUBLIC_CIPHERS, size.zipf_exponent)
    single = zipf_frequencies(SINGLE_SKILLS, size.zipf_exponent)
    skills: dict[tuple[str, ...], float] = {
        (name,): (1 - size.composition_share) * p for name, p in single.items()
    }
    for (chain, p), (last, q) in itertools.product(position.items(), cipher.items()):
        skills[*chain, last] = size.composition_share * p * q
    return _with_formats(skills, size)


def _with_formats(skills: Mapping[tuple[str, ...], float], size: WorldSize) -> dict[Request, float]:
    """Cross the probabilities of skills with those of the answer's formats."""
    formats = {"plain": 1 - size.json_share, "json": size.json_share}
    return {
        Request(names, form): p * q
        for (names, p), (form, q) in itertools.product(skills.items(), formats.items())
    }


def pretrain_requests(size: WorldSize) -> dict[Request, float]:
    """Probability of each request in pre-training: public single skills in both formats."""
    single = zipf_frequencies(SINGLE_SKILLS, size.zipf_exponent)
    return _with_formats({(name,): p for name, p in single.items()}, size)


def zipf_frequencies(names: Sequence[T], exponent: float) -> dict[T, float]:
    """Share of the k-th name, proportional to k to the minus ``exponent``; the shares sum to 1."""
    weights = np.arange(1, len(names) + 1, dtype=np.float64) ** -exponent
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))


def _draw_splits(
    size: WorldSize, skills: Mapping[str, Skill], rng: np.random.Generator
) -> dict[str, list[Row]]:
    """Draw the four data sets; the words of the test split are kept out of the others."""
    num_task = size.num_task_test + size.num_task_train
    words = draw_words(num_task, size, frozenset(), rng)
    test_words, train_words = words[: size.num_task_test], words[size.num_task_test :]
    reserved = frozenset(test_words)
    return {
        "task_test": [make_row(TASK_REQUEST, word, skills) for word in test_words],
        "task_train": [make_row(TASK_REQUEST, word, skills) for word in train_words],
        "general": _draw_rows(
            size.num_general, general_requests(size), size, skills, reserved, rng
        ),
        "pretrain": _draw_rows(
            size.num_pretrain, pretrain_requests(size), size, skills, reserved, rng
        ),
    }


def _draw_rows(
    count: int,
    requests: Mapping[Request, float],
    size: WorldSize,
    skills: Mapping[str, Skill],
    reserved: frozenset[str],
    rng: np.random.Generator,
) -> list[Row]:
    """Draw ``count`` requests by their probability, each with a word of its own."""
    kinds = list(requests)
    chosen = rng.choice(len(kinds), size=count, p=np.array(list(requests.values())))
    words = draw_words(count, size, reserved, rng)
    return [make_row(kinds[k], word, skills) for k, word in zip(chosen, words, strict=True)]


def draw_words(
    count: int, size: WorldSize, reserved: frozenset[str], rng: np.random.Generator
) -> list[str]:
    """Draw ``count`` different words, none of them in ``reserved``.

    Raises:
        DataError: ``count`` is more than half of the words there are.
    """
    lengths = range(size.min_letters, size.max_letters + 1)
    available = sum(len(ALPHABET) ** length for length in lengths) - len(reserved)
    if count > available // 2:
        raise DataError(
            f"{count} different words were asked for, but words of {size.min_letters} to "
            f"{size.max_letters} letters allow at most {available // 2}; allow longer words"
        )
    words: dict[str, None] = {}
    while len(words) < count:
        length = int(rng.integers(size.min_letters, size.max_letters + 1))
        word = "".join(ALPHABET[k] for k in rng.integers(len(ALPHABET), size=length))
        if word not in reserved:
            words[word] = None
    return list(words)


def make_row(request: Request, word: str, skills: Mapping[str, Skill]) -> Row:
    """The example of ``request`` on ``word``: prompt, response and what it is made of."""
    answer = word
    for name in request.skills:
        answer = skills[name](answer)
    return {
        "prompt": request.instruction + word,
        "response": json.dumps({"answer": answer}, separators=(",", ":"))
        if request.format == "json"
        else answer,
        "skills": list(request.skills),
        "format": request.format,
    }


def describe_quanta(size: WorldSize) -> dict[str, Any]:
    """The quanta of the world: which the task shares with general data, and how often each is used.

    A quantum is a skill, a format or the composition of two skills. Its use frequency is the
    probability that an example of the data set needs it; frequencies of one data set do not sum
    to 1, since an example uses several.
    """
    frequencies = {
        "pretrain": use_frequencies(pretrain_requests(size)),
        "general": use_frequencies(general_requests(size)),
        "task": use_frequencies({TASK_REQUEST: 1.0}),
    }
    names = sorted({name for table in frequencies.values() for name in table})
    quanta = [
        {
            "name": name,
            "group": _group(name, frequencies),
            **{f"{data}_frequency": table.get(name, 0.0) for data, table in frequencies.items()},
        }
        for name in names
    ]
    return {"zipf_exponent": size.zipf_exponent, "quanta": quanta, "size": asdict(size)}


def use_frequencies(requests: Mapping[Request, float]) -> dict[str, float]:
    """Probability that a draw from ``requests`` uses each quantum."""
    totals: dict[str, float] = defaultdict(float)
    for request, probability in requests.items():
        quanta = {f"skill:{name}" for name in request.skills} | {f"format:{request.format}"}
        if len(request.skills) > 1:
            quanta.add("composition")
        for name in quanta:
            totals[name] += probability
    return dict(totals)


def _group(name: str, frequencies: Mapping[str, Mapping[str, float]]) -> str:
    """``shared``: used by task and general data; ``specific``: by the task only; or ``other``."""
    if name not in frequencies["task"]:
        return "other"
    return "shared" if name in frequencies["general"] else "specific"


def write_base_init(directory: Path, size: WorldSize) -> None:
    """Write the tokenizer and the configuration of the base model, loadable by ``transformers``."""
    from transformers import LlamaConfig

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(directory)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless tokenizer: a token per instruction word, letter and piece of JSON; else bytes."""
    from transformers import PreTrainedTokenizerFast

    pieces = [*POSITION_SKILLS, *PUBLIC_CIPHERS, PRIVATE_CIPHER, "then", "as", *FORMATS]
    words = [*pieces, *(f"\u0120{piece}" for piece in pieces), '{"answer":"', '"}', ":\u0120"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *words]
    backend = Tokenizer(
        models.BPE(
            vocab={token: k for k, token in enumerate(vocabulary)}, merges=[], ignore_merges=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
