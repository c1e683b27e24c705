"""What the examples share: a model with compress tokens, its frozen decoder, and a few texts."""

import copy

from autoregembed import Decoder, Encoder
from autoregembed.models import add_compress_tokens, load_causal_lm
from autoregembed.testing import tiny_model, tiny_tokenizer

# (query, a text that belongs to it, one that does not)
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


def load(name: str = "tiny"):
    """(encoder, frozen decoder, text -> ids) of a Hugging Face causal LM; "tiny" is a random one, made on the spot."""
    if name == "tiny":
        tokenizer = tiny_tokenizer([text for row in TRIPLETS for text in row])
        model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True)
    else:
        model, tokenizer, _ = load_causal_lm(name)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    decoder = Decoder(copy.deepcopy(model), eos_token_id=tokenizer.eos_token_id, z_norm="match_rms")
    compress_token_ids = add_compress_tokens(model, tokenizer, 5)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    head.requires_grad_(head is embedding)  # the encoder reads no head, and DDP waits for gradients of all that train
    encoder = Encoder(
        model,
        compress_token_ids=compress_token_ids,
        suffix_ids=ids("\nRepresent the text.\n"),
        bos_token_id=tokenizer.bos_token_id,
    )
    return encoder, decoder, ids
