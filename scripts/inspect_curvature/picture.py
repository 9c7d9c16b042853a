"""A picture of a report, and how fast it shows: python -m scripts.inspect_curvature.picture RUN/report.html OUT.png"""

from __future__ import annotations

import argparse
from pathlib import Path

from errors import InputError, exit_with
from scripts.inspect_curvature.browser import CHROMIUM, Browser

FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.inspect_curvature.picture", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--height", type=int, default=1900, help="pixels from the top of the page; 0: all of it")
    parser.add_argument("--width", type=int, default=1366)
    arguments = parser.parse_args()
    if not arguments.report.is_file():
        raise InputError(f"{arguments.report}: no such report; make it with python -m scripts.inspect_curvature RUN")
    if CHROMIUM is None:
        raise InputError("no chromium on PATH (Debian: apt-get install chromium)")
    with Browser(arguments.width) as browser:
        browser.emulate(arguments.theme)
        browser.open(arguments.report, wait_for="document.body.dataset.drawn")
        height = arguments.height or browser.evaluate("document.documentElement.scrollHeight")
        browser.screenshot(arguments.picture, x=0, y=0, width=arguments.width, height=height)
        paint = browser.evaluate(FIRST_PAINT)
        plots = browser.evaluate("document.body.dataset.drawn")
    size = arguments.report.stat().st_size / 1e6
    print(f"{arguments.picture}: {plots} plots; report {size:.1f} MB, first contentful paint after {paint:.0f} ms")
    return 0


if __name__ == "__main__":
    exit_with(main)
