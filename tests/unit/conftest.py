"""What several unit tests share."""

from pathlib import Path

import pytest

from tests.unit.test_config import BASE_TEXT


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file that is right; the tests change it."""
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE_TEXT)
    return path
