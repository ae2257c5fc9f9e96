from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import pytest

from align_cluster.serving.config import Limits


@pytest.fixture(scope="session")
def http_server() -> Callable[..., AbstractContextManager[str]]:
    """Function (ASGI app, limits) -> context in which it answers at the URL that the context gives."""
    pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
    from align_cluster.serving.listening import bound, listening

    @contextmanager
    def serving(app: Any, limits: Limits = Limits()) -> Iterator[str]:  # noqa: B008 - frozen
        with closing(bound("127.0.0.1", 0)) as listener, listening(app, listener, limits):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"

    return serving
