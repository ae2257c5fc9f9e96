"""Content addresses of encoded prompts: hashes of all that a record depends on, the code that makes it included."""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

# Version of the code between a prompt and its record outside of the maker's own file: `pipeline.py`, `precision.py`.
# Raise it where a change there gives other bytes for the same text, so that nobody reads records of the code before.
CODE_VERSION = 3
LIBRARIES = ("diffusers", "tokenizers", "torch", "transformers")


def address(maker: Callable, *facts: object) -> str:
    """Return a hash of all facts that a record depends on, and of the code of `maker`, the function that makes it."""
    return hashlib.blake2b(json.dumps((*code_of(maker), *facts)).encode(), digest_size=16).hexdigest()


@cache
def code_of(maker: Callable) -> tuple[int | str, ...]:
    """Return CODE_VERSION, the libraries' versions, and a hash of the file of `maker`, or its name where none is."""
    try:
        source = inspect.getsource(sys.modules[maker.__module__])
    except (KeyError, OSError, TypeError):
        source = f"{maker.__module__}.{maker.__qualname__}"
    return CODE_VERSION, *map(version, LIBRARIES), hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
