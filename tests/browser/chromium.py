"""A page in headless Chromium: what a person would see of it and do to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from dataplane.model import Snapshot
from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.report.page import render

INSTALL = "as root: apt-get install chromium chromium-driver"
PATIENCE = 120  # seconds, on a machine however busy


def page_of(known: Snapshot, ports: Sequence[str], externals: Sequence[str], files: Sequence[str]) -> str:
    """The page that `podgate matrix -o html` prints."""
    resolved = in_force(known)
    reach = reachability(resolved, [parse_port(port) for port in ports], externals)
    return render(reach, known, resolved, files)


class Missing(Exception):
    """There is no browser to drive here; says what to do."""


def start() -> webdriver.Chrome:
    """Chromium without a window. Raises Missing."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing = "chromium" if chromium is None else "chromium-driver"
        raise Missing(f"needs {missing}: {INSTALL} (Ubuntu has it as a snap only, which no container runs)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-quic",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses to start for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    except WebDriverException as error:
        if b"snap" in Path(chromium).read_bytes()[:4096]:
            raise Missing(
                f"{chromium} only starts a snap, which cannot run here: {INSTALL} on Debian"
            ) from None
        raise RuntimeError(f"Chromium does not start: {error.msg}") from None
    driver.set_page_load_timeout(PATIENCE)
    driver.set_script_timeout(PATIENCE)
    return driver


class Browser:
    """Opens pages from files and looks at them as a person would: colours, texts, keys, the mouse."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("performance")  # what came before
        self.driver.get(path.as_uri())
        self.until("return document.body.dataset.drawn")

    def until(self, script: str, *arguments: Any) -> Any:
        """What a script returns as soon as that is true."""
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(
            lambda driver: driver.execute_script(script, *arguments)
        )

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """Every address that the page asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, css)]

    def text(self, css: str) -> str:
        return self.find(css).text

    def keys(self, *keys: str) -> None:
        """Typed where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def search(self, side: str, text: str) -> None:
        """Replace what stands in one of the two search boxes."""
        box = self.find(f"#{side}")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE)
        box.send_keys(text)

    def drawn(self, size: str) -> None:
        """Wait until the map shows so many rows and columns."""
        self.until("return document.body.dataset.drawn === arguments[0]", size)

    def choose_port(self, port: str) -> None:
        """Click a port's button; `all` for the overview."""
        buttons = self.driver.find_elements(By.CSS_SELECTOR, "#ports label")
        wanted = "All ports" if port == "all" else port
        next(button for button in buttons if button.text == wanted).click()
        self.until("return document.getElementById('map').dataset.port === arguments[0]", port)
        self.frame()

    def frame(self) -> None:
        """Wait until what was changed has been drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()));"
        )

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """A point of the cell near its upper left corner, where no mark is drawn; from the map's corner."""
        left, top, cell, x, y = self.run(
            "const map = document.getElementById('map'), at = map.dataset;"
            "return [+at.left, +at.top, +at.cell, map.scrollLeft, map.scrollTop]"
        )
        inside = min(2.0, cell / 2)
        return int(left + column * cell - x + inside), int(top + row * cell - y + inside)

    def colour(self, row: int, column: int) -> str:
        """The colour a cell has on the screen, as `#rrggbb`; the cell must be in view."""
        self.frame()
        red, green, blue = self.run(
            "const canvas = document.getElementById('canvas'), ratio = devicePixelRatio;"
            "return [...canvas.getContext('2d').getImageData("
            "Math.round(arguments[0] * ratio), Math.round(arguments[1] * ratio), 1, 1).data].slice(0, 3)",
            *self._corner(row, column),
        )
        return f"#{red:02x}{green:02x}{blue:02x}"

    def point(self, row: int, column: int, *, click: bool = False) -> None:
        """Move the mouse onto a cell in view, and click."""
        self.frame()
        box = self.run(
            "const map = document.getElementById('map'), box = map.getBoundingClientRect();"
            "return [box.left + map.clientLeft, box.top + map.clientTop]"
        )
        x, y = self._corner(row, column)
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(int(box[0] + x), int(box[1] + y))
        if click:
            actions.w3c_actions.pointer_action.click()
        actions.perform()
        if click:
            self.until("return !document.getElementById('panel').hidden")
