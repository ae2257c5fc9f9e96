"""The word-level tokenizer of the embedded world, as a transformers fast tokenizer.

Words in upper case and numbers are split into letters and digits, one token each.
"""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align_cluster.embedded import scene

MAX_LENGTH = 16  # the longest prompt has 13 words, plus begin and end
# The end id must not be 2: CLIPTextModel then takes a legacy path and pools at the largest id instead.
SPECIAL = ("<|pad|>", "<|unk|>", "<|startoftext|>", "<|endoftext|>")


def vocabulary() -> dict[str, int]:
    """Return the map from token to id. The order is part of the shipped weights."""
    words = "a an photo picture drawing of and on light dark background small large sign that says".split()
    words += [*scene.NUMBERS.values(), "left", "right", "above", "below"]
    words += [*scene.SHAPES, *scene.PLURALS.values(), *scene.COLORS]
    words += [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", '"', ".", ",", "-"]
    return {word: index for index, word in enumerate((*SPECIAL, *words))}


def build() -> PreTrainedTokenizerFast:
    """Return the tokenizer with CLIP's conventions: begin and end tokens around the words, pad id 0."""
    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<|unk|>"))
    pieces = pre_tokenizers.Split(Regex(r"[a-z]+|[A-Z]|[0-9]|[^\sA-Za-z0-9]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(token, vocabulary()[token]) for token in SPECIAL[2:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        model_max_length=MAX_LENGTH,
    )
