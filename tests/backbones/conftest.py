from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sd35_folder(tiny_pipeline: Callable[[str], Path]) -> Path:
    return tiny_pipeline("sd3")
