"""A headless Chromium that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Browser, Missing, start


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        driver = start()
    except Missing as missing:
        pytest.skip(str(missing))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
