"""Models with random weights, made in memory."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tell_core.training.models import LoadedModel


def create_model_from_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_tokens: int,
    seed: int,
) -> LoadedModel:
    """A small Llama-architecture model with random weights.

    Input and output embeddings are one matrix. Equal arguments give equal weights.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: Width, a multiple of twice ``num_heads``.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        intermediate_size: Width of the feed-forward layers.
        max_tokens: Longest sequence.
        seed: Seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return LoadedModel(model.eval(), tokenizer, "random", f"random {seed}")
