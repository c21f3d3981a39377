"""Make a picture of a page for the documentation, with a Chromium that shows nothing on the screen.

    python scripts/drift_screenshot.py PAGE OUT.png [--width 1100] [--height 1600] [--dark]

The whole page is drawn at this width; what is below the height is cut off. Needs chromium or google-chrome on PATH.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NARROWEST = 500
"""No window of Chromium is narrower, so a narrower page is drawn in a frame."""


def browser() -> str:
    """The first browser that is there.

    Raises:
        SystemExit: if none is.
    """
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise SystemExit(f"No browser was found on PATH (looked for {', '.join(BROWSERS)}). Install Chromium.")


def screenshot(page: Path, out: Path, width: int = 1100, height: int = 1600, dark: bool = False) -> Path:
    """Draw a page.

    Args:
        page: an HTML file.
        out: the picture, PNG.
        width: of the page, in CSS pixels.
        height: of the picture.
        dark: for readers who prefer dark.

    Raises:
        SystemExit: if there is no page or no browser, or the browser fails, with what it said.
    """
    if not page.is_file():
        raise SystemExit(f"There is no page {page}. Give the HTML file that write_drift_report wrote.")
    with tempfile.TemporaryDirectory() as folder:
        shown = page.resolve()
        if width < NARROWEST:
            shown = Path(folder) / "frame.html"
            frame = (
                f'<iframe src="{page.resolve().as_uri()}" style="border:0;width:{width}px;height:{height}px"></iframe>'
            )
            shown.write_text(f'<body style="margin:0">{frame}</body>', encoding="utf-8")
        done = subprocess.run(
            [
                browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--force-device-scale-factor=2", f"--user-data-dir={folder}/profile",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={width},{height}", f"--screenshot={out.resolve()}", shown.as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    if done.returncode or not out.is_file():
        raise SystemExit(f"The browser made no picture (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return out


def main(arguments: list[str]) -> None:
    """Read the command line and draw."""
    read = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    read.add_argument("page", type=Path)
    read.add_argument("out", type=Path)
    read.add_argument("--width", type=int, default=1100)
    read.add_argument("--height", type=int, default=1600)
    read.add_argument("--dark", action="store_true")
    asked = read.parse_args(arguments)
    screenshot(asked.page, asked.out, asked.width, asked.height, asked.dark)


if __name__ == "__main__":
    main(sys.argv[1:])
