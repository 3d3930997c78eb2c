"""Opens pages in headless Chromium."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.programs import needs_program

needs_chromium = needs_program("chromium", "apt-get install chromium")


def photograph(page: Path, name: str, size: tuple[int, int], dark: bool = False) -> list[str]:
    """Take a picture of `page` and give back what its console said.

    The picture lies beside the page, or in the directory DETOUR_SCREENSHOTS names: that is how docs/images is made.
    """
    folder = Path(os.environ.get("DETOUR_SCREENSHOTS", page.parent)).absolute()
    picture = folder / f"{name}.png"
    ran = subprocess.run(
        [
            *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--disable-dev-shm-usage", f"--user-data-dir={page.parent}/chromium"),
            *(["--force-dark-mode"] if dark else []),
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.read_bytes().startswith(b"\x89PNG"), ran.stderr
    return [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
