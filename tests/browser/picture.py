"""Draws docs/matrix.png, the picture of the page in the README: .venv/bin/python tests/browser/picture.py"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from chromium import Browser, Missing, page_of, start
from PIL import Image

from dataplane.sources.directory import read_paths

ROOT = Path(__file__).parents[2]
SHOP = "docs/shop.yaml"
PORTS = ("8080/TCP", "5432/TCP", "53/UDP")


def main(picture: Path) -> None:
    known = read_paths([ROOT / SHOP]).snapshot
    order = sorted(pod.key for pod in known.pods)
    row, column = (order.index(("orders", name)) for name in ("worker-1", "api-2"))
    driver = start()
    try:
        driver.set_window_size(1420, 1210)
        with tempfile.TemporaryDirectory() as directory:
            page = Path(directory) / "shop.html"
            page.write_text(page_of(known, PORTS, [], [SHOP]))
            browser = Browser(driver)
            browser.open(page)
            browser.choose_port("8080/TCP")
            browser.point(row, column, click=True)
            # The mouse away from the map: its cross would cover what is to be seen.
            browser.run("document.getElementById('map').dispatchEvent(new MouseEvent('mouseleave'))")
            browser.frame()
            # Few colours are in it: a palette makes it a third of the size.
            image = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/matrix.png"))
    except Missing as missing:
        sys.exit(str(missing))
