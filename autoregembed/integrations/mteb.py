"""mteb on an encoder in memory.

An exported folder needs none of this: `mteb.evaluate(SentenceTransformer(folder), tasks)` reads the instruction that
the export wrote behind every text. Here each task, or each side of a search, can have the instruction that it was
trained with:

    model = MTEBEncoder(encoder, instructions={"query": "Find an answer.", "STS": "Compare."})
    mteb.evaluate(model, tasks)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch import Tensor

from autoregembed.encoder import Encoder

__all__ = ["MTEBEncoder"]


class MTEBEncoder(AbsEncoder):
    """Makes an `Encoder` available to mteb, as its `EncoderProtocol`.

    Args:
        encoder: an encoder with a tokenizer, as `Encoder.from_pretrained` returns it.
        instructions: instructions by mteb's prompt names: a task ("STSBenchmark"), a type of task ("Retrieval"), a side
            ("query", "document"), or task and side ("NFCorpus-query"). The most specific one applies; texts without
            any get the encoder's own. The encoder's `prompts` precede queries and documents, as in an export.
        name: "organisation/model", under which mteb stores the results.
        revision: the revision under which mteb stores the results.
        max_length, token_budget: as in `Encoder.encode`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        instructions: Mapping[str, str] | None = None,
        name: str = "autoregembed/encoder",
        revision: str | None = None,
        max_length: int | None = None,
        token_budget: int = 4096,
    ):
        self.encoder = encoder
        self.model_prompts = dict(instructions or {})
        self.max_length = max_length
        self.token_budget = token_budget
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> Tensor:
        """(n, D) float32, rows of norm 1, of the texts that `inputs` yields in batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = self.get_prompt_name(task_metadata, prompt_type)
        instruction = None if name is None else self.model_prompts[name]
        side = None if prompt_type is None else PromptType(prompt_type).value
        prompt_name = side if side in self.encoder.prompts else None
        return self.encoder.encode(
            texts, instruction=instruction, max_length=self.max_length, token_budget=self.token_budget,
            prompt_name=prompt_name,
        )  # fmt: skip
