import pytest
from transformers import PreTrainedTokenizerFast

from .tiny_tokenizers import CHATML, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tiny tokenizer with a chat template that has all roles."""
    return build_tokenizer(CHATML)
