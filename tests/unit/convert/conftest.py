"""What tests of exports share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def code_of_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy the code of exports into a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
