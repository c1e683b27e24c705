"""Shared by the examples: a few texts, and a tiny random model for runs without MODEL."""

import tempfile

from autoregembed.testing import tiny_model, tiny_tokenizer

# (query, positive, negative)
TRIPLETS = [
    ("A man plays a guitar.", "Somebody makes music.", "The stage is empty."),
    ("Two dogs run over a meadow.", "Animals are outdoors.", "A cat sleeps on a chair."),
    ("The train arrives late.", "Passengers have to wait.", "The station was closed years ago."),
    ("She cooks soup for her friends.", "A woman prepares a meal.", "They order a pizza."),
    ("Rain fell all night.", "The streets are wet.", "The fields are dry and dusty."),
    ("He repairs an old bicycle.", "A man mends something.", "A boy buys a new car."),
    ("Children build a castle of sand.", "Kids play on the beach.", "Adults work in an office."),
    ("The company hired ten engineers.", "A firm has grown.", "A firm dismissed its staff."),
]


_folder = tempfile.TemporaryDirectory()  # removed when the process ends


def tiny() -> str:
    """A folder with a random causal LM and its tokenizer."""
    tokenizer = tiny_tokenizer([text for row in TRIPLETS for text in row])
    tokenizer.save_pretrained(_folder.name)
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(_folder.name)
    return _folder.name
