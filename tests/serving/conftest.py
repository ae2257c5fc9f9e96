import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest


@pytest.fixture(scope="session")
def http_server() -> Callable[[Any], AbstractContextManager[str]]:
    """Function ASGI app -> context in which it answers at the URL that the context gives."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

    @contextmanager
    def serving(app: Any) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return serving
