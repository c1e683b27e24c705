"""Text to token ids: what the encoder reads of a text and what the decoder scores of a target."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# An LM that has read a text and this goes on with what the text is about. Its hidden states at the compress tokens,
# which start as commas, say so before any training (docs/explanation/study.md).
INSTRUCTION = "Keywords:"
COMPRESS_INIT = " ,"


@dataclass(frozen=True)
class Prompt:
    """How text becomes ids: text and suffix are tokenized separately, so truncation never reaches the instruction.

    The encoder reads `bos · text · "\\n" · instruction · "\\n" · compress tokens`, at most `max_length` tokens. The
    decoder scores at most `max_target_length` target tokens and eos. In retrieval data, `query_instruction` is put
    before every query and `passage_instruction` before every passage, like the prompts of sentence-transformers.
    """

    tokenizer: Any
    num_compress_tokens: int
    bos_token_id: int | None
    instruction: str
    max_length: int = 512
    max_target_length: int = 512
    query_instruction: str = ""
    passage_instruction: str = ""

    def ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def suffix(self, instruction: str | None = None) -> list[int]:
        return instruction_ids(self.tokenizer, self.instruction if instruction is None else instruction)

    def text(self, ids: list[int], suffix: list[int], place: str | None = None) -> list[int]:
        """The ids of a text that fit beside `suffix`.

        Raises:
            ValueError: there is room for none.
        """
        room = self.max_length - len(suffix) - self.num_compress_tokens - (self.bos_token_id is not None)
        if room < 1:
            raise ValueError(
                f"max_length: got {self.max_length}, expected at least {self.max_length - room + 1} for this "
                f"instruction of {len(suffix)} tokens and {self.num_compress_tokens} compress tokens"
                + ("" if place is None else f" in {place}")
            )
        return ids[:room]

    def fingerprint(self) -> str:
        parts = (
            tokenizer_fingerprint(self.tokenizer), self.num_compress_tokens, self.bos_token_id, self.instruction,
            self.max_length, self.max_target_length, self.query_instruction, self.passage_instruction,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone: not truncated, and without the ids that the tokenizer's post-processor adds.

    Raises:
        ValueError: no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected one: use from_pretrained, or give the constructor a tokenizer")
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def require_fast(tokenizer: Any) -> None:
    """Raises ValueError for a slow tokenizer, such as ByT5's: it cannot end the texts of an export."""
    if tokenizer is None:
        raise ValueError(
            "tokenizer: got None, expected a fast tokenizer: use from_pretrained, or give the constructor one"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, which is slow, expected a fast tokenizer: one whose folder "
            "has tokenizer.json (AutoTokenizer makes one of most slow ones when sentencepiece and tiktoken are "
            "installed), or a model with another tokenizer"
        )


def instruction_ids(tokenizer: Any, instruction: str) -> list[int]:
    """The ids between a text and the compress tokens."""
    return token_ids(tokenizer, f"\n{instruction}\n")


def batch_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of each text.

    Raises:
        ValueError: no tokenizer, or a text without a token (the row is named).
        TypeError: one string, or a text that is none.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts: got the string {texts[:40]!r}, expected a list of strings")
    out = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: got {type(text).__name__} in row {row}, expected a string")
        ids = token_ids(tokenizer, text)
        if not ids:
            raise ValueError(f"texts: got an empty text in row {row}, expected at least one token")
        out.append(ids)
    return out


def tokenizer_fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
