"""Fixtures that tests of several kinds share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guard_page import GuardPage


@pytest.fixture(scope="session")
def guard() -> Iterator[GuardPage]:
    page = GuardPage()
    yield page
    page.close()
