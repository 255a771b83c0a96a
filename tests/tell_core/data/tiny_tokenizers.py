"""A byte-level tokenizer with a handful of words, and chat templates, built without a download."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "answer", "is", "copy", "reverse", "translate", "yes", "no", "word", "and")
SPECIAL_TOKENS = ("<|end|>", "<|start|>")

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|start|>system\nBe kind<|end|>\n{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Writes a system message of its own, ends turns with a token and a line break."""

INSTRUCT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('system role not supported') }}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %}{{ message['content'] | trim }}<|end|>{% endif %}"
    "{% endfor %}"
)
"""Has no system role, trims contents, knows no generation prompt."""

TEMPLATES = {"chatml": CHATML, "instruct": INSTRUCT, "none": None}


def build_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """256 bytes, then the words with and without a leading space, then special tokens."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in (*WORDS, *(f"\u0120{word}" for word in WORDS)):
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
                pieces.append(word[:end])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=chat_template,
    )
