"""Control words: their place in a text, and whether a reward's tokenizer knows them.

A word that is a single token of the tokenizer is common in its training text.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _has_both_places(template: str) -> str:
    if sorted(part for part in ("{word}", "{prompt}") if template.count(part) == 1) != ["{prompt}", "{word}"]:
        raise ValueError("text with {word} and {prompt}, each once")
    return template


Template = Annotated[str, AfterValidator(_has_both_places)]


def worded(template: str, word: str, prompt: str) -> str:
    """Return the prompt with a control word."""
    return template.replace("{word}", word).replace("{prompt}", prompt)


@dataclass(frozen=True)
class Vocabulary:
    """Holds a tokenizer's vocabulary.

    `pieces` splits a word into tokens, `unknown` is the token for what it cannot split, and `words` are all words that
    are one token.
    """

    pieces: Callable[[str], list[str]]
    unknown: str | None
    words: tuple[str, ...]

    def knows(self, word: str) -> bool:
        """Return whether the word is a single known token."""
        found = self.pieces(word)
        return len(found) == 1 and found[0] != self.unknown

    def nearest(self, word: str) -> str | None:
        """Return the most similar known word, or None."""
        return next(iter(difflib.get_close_matches(word.lower(), self.words, n=1, cutoff=0.5)), None)


def split(text: str) -> list[str]:
    """Return the words of a text, without numbers and punctuation."""
    return re.findall(r"[^\W\d_]+", text)


@lru_cache(maxsize=8)
def transformers_vocabulary(source: str) -> Vocabulary | None:
    """Return the vocabulary of a tokenizer of transformers, a hub id or a folder; None where it is not here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(source).expanduser()), local_files_only=True)
    except (OSError, ValueError):
        return None
    # CLIP's unknown token is its end token, which says nothing about a word.
    unknown = tokenizer.unk_token if tokenizer.unk_token != tokenizer.eos_token else None
    return Vocabulary(tokenizer.tokenize, unknown, _whole(tokenizer.get_vocab()))


@lru_cache(maxsize=1)
def open_clip_vocabulary() -> Vocabulary | None:
    """Return the vocabulary of open_clip's tokenizer; None where open_clip is not installed."""
    try:
        from open_clip import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer()
    return Vocabulary(lambda word: [str(i) for i in tokenizer.encode(word)], None, _whole(tokenizer.encoder))


def _whole(tokens: dict[str, int]) -> tuple[str, ...]:
    ended = any(token.endswith("</w>") for token in tokens)  # CLIP's byte pairs mark the ends of words
    words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>") or not ended}
    return tuple(sorted(word for word in words if word.isalpha() and len(word) > 2))
