"""Files of a pipeline's parts that are on this machine, its settings and tokenizers. Nothing here asks the hub."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Left = dict[str, tuple[tuple[int, ...], ...]]  # text -> what each tokenizer leaves of it


def local_file(source: str, name: str) -> Path | None:
    """Return a file of the pipeline in the folder `source`, or of a hub id from the hub's cache; None where it is not
    here."""
    if (folder := Path(source)).is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, name)
    except ValueError:  # no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def settings_of(source: str, part: str | None) -> dict[str, Any] | None:
    """Return the settings of a part, or the pipeline's index for None; None where they are not here.

    Raises OSError where the file is no JSON object.
    """
    name = "model_index.json" if part is None else f"{part}/config.json"
    file = local_file(source, "scheduler/scheduler_config.json" if part == "scheduler" else name)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OSError(f"{file} is no JSON object")
    return found


@lru_cache(maxsize=8)
def tokenizer_of(source: str, part: str) -> "Tokenizer | None":
    """Return a part's tokenizer without padding, or None where it is not here or has no form that is known here."""
    try:
        if file := local_file(source, f"{part}/tokenizer.json"):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
        elif local_file(source, f"{part}/tokenizer_config.json"):
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(source, subfolder=part, local_files_only=True)
            tokenizer = found.backend_tokenizer
        else:
            return None
        tokenizer.no_padding()
    except (
        Exception
    ):  # `tokenizers` raises no narrower type; a run that loads this tokenizer says what is wrong with it
        return None
    return tokenizer


def cut(source: str, readers: Mapping[str, int], texts: Sequence[str]) -> Left:
    """Return the texts that every reader cuts; `readers` gives the tokens that each tokenizer's encoder reads.

    A tokenizer that is not here leaves nothing to say.
    """
    most = max(readers.values())
    left: Left = {text: () for text in texts if len(text.encode()) + 2 > most}  # a token has a byte, but for two marks
    for part, limit in readers.items():
        if not left or (tokenizer := tokenizer_of(source, part)) is None:
            return {}
        tokenizer.enable_truncation(limit)
        found = zip(left.items(), tokenizer.encode_batch(list(left)), strict=True)
        left = {text: (*ids, tuple(now.ids)) for (text, ids), now in found if now.overflowing}
    return left


def unknown(source: str, part: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the words of each text that a tokenizer has no token for; texts without such a word are left out.

    Tokenizers that split words into bytes know all of them. One that is not here leaves nothing to say.
    """
    tokenizer = tokenizer_of(source, part)
    mark = getattr(tokenizer.model, "unk_token", None) if tokenizer else None
    if mark is None:
        return {}
    tokenizer.no_truncation()
    found = {}
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        pieces = zip(encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
        places = {start for token, special, (start, _) in pieces if token == mark and not special}
        spans = (match for match in re.finditer(r"\S+", text) if places & set(range(*match.span())))
        if words := [match[0] for match in spans]:
            found[text] = words
    return found
