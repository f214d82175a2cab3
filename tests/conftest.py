"""Fixtures that tests of several kinds share, and the order of kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from guard_page import GuardPage
from hypothesis import HealthCheck, settings

# No test asserts how long something takes: a machine may be busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Their API server may still be being built, in the background.
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


@pytest.fixture(scope="session")
def guard() -> Iterator[GuardPage]:
    page = GuardPage()
    yield page
    page.close()


def pytest_runtest_teardown() -> None:
    """A command that a test runs in this process sets logging up, for a stderr that goes with the test."""
    structlog.reset_defaults()
