"""Many cases in one test."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

# Processors for the body of a test that takes a CPU long: a CPU rehearses what `pytest -m gpu` runs on a card.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SLOW_DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), CUDA]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable:
    """Decorate a test as `pytest.mark.parametrize` does, but let one test go through all cases; a failure says which
    case it comes of. For pure functions with hundreds of cases, which would each be an item of their own."""
    together = [names] if isinstance(names, str) else list(names)
    cases = list(cases)

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def every(**fixtures: Any) -> None:
            for case in cases:
                values = dict(zip(together, [case] if isinstance(names, str) else case, strict=True))
                try:
                    test(**fixtures, **values)
                except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                    raise AssertionError(
                        f"with {', '.join(f'{key}={value!r}' for key, value in values.items())}"
                    ) from error

        kept = [item for name, item in inspect.signature(test).parameters.items() if name not in together]
        every.__signature__ = inspect.Signature(kept)
        return every if cases else pytest.mark.skip(reason=f"no case of {names}")(every)

    return decorate
