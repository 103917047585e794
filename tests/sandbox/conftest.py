"""The sandbox that the tests of one file share."""

import pytest

from sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox
