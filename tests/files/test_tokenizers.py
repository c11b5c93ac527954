"""Which files are a tokenizer's."""

import pytest

from d2surgery.files.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG, VOCABULARIES, is_of_tokenizer


@pytest.mark.parametrize(
    "name",
    [*VOCABULARIES, TOKENIZER_CONFIG, CHAT_TEMPLATE, "merges.txt", "special_tokens_map.json", "added_tokens.json"],
)
def test_a_tokenizers_files(name: str) -> None:
    assert is_of_tokenizer(name)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "adapter_config.json"])
def test_other_files(name: str) -> None:
    assert not is_of_tokenizer(name)
