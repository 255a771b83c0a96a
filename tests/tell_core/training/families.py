"""Tiny models with random weights of several families, by name."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 61
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1, "head_dim": 16}

# Sliding windows of 8 tokens are shorter than the examples of the tests.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED),
    "gemma3": Gemma3TextConfig(
        **_GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "gpt_neox": GPTNeoXConfig(**_SIZES, attention_dropout=0.0, hidden_dropout=0.0),
    "phi": PhiConfig(**_SIZES, resid_pdrop=0.0, embd_pdrop=0.0),
    "mixtral": MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    # Of its experts peft knows nothing; those of the two before it finds by itself.
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
}
EXPERTS = ("mixtral", "qwen3_moe", "qwen2_moe")
# Families that cannot be packed here, and a word of the reason.
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gemma2": (Gemma2Config(**_GROUPED), "eager"),
    "bloom": (BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2), "interface"),
    "falcon": (
        FalconConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        "interface",
    ),
    "lfm2": (
        Lfm2Config(**_SIZES, num_key_value_heads=1, layer_types=["conv", "full_attention"]),
        "differ",
    ),
}


def write_family(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, directory: Path, **changes: int
) -> Path:
    """Save a model of the family with a tokenizer; ``changes`` are to its configuration."""
    fields = config.to_dict() | changes
    family_model(type(config).from_dict(fields)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def family_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode; its weights are larger than usual, so that tokens matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            if weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=0.2)
    return model.eval()
