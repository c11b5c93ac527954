"""Which of the files beside the weights are a tokenizer's."""

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model"
)  # fmt: skip
"""A tokenizer has at least one of these."""
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_ENDINGS = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # a file named `token` holds a password
BEGINNINGS = ("token", "vocab", "merges", "special_", "added_", "spiece", "sentencepiece", "chat_template")


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: its vocabulary, merges, special tokens, chat template."""
    return name.startswith(BEGINNINGS) and name.endswith(_ENDINGS)
