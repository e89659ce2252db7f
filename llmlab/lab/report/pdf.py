"""PDF of the report's pages, printed by a Chromium that is installed; nothing is fetched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
TIMEOUT = 120  # seconds for one page


def find_chromium() -> str:
    """The path of an installed Chromium, Chrome or Edge. Raises InputError if there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise InputError("a PDF needs Chromium or Chrome, and none is on the PATH: install one, or leave --pdf out.")


def write_pdf(chromium: str, page: Path) -> Path:
    """Print a self-contained HTML page to a PDF of the same name beside it, whole or not at all.

    Links to other files of the report are left out: in a PDF they would hold the paths of this machine.

    Raises:
        RuntimeError: Chromium failed or took longer than `TIMEOUT` seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / page.name
        text = page.read_text(encoding="utf-8")
        copy.write_text(re.sub(r'<a\b[^>]*href="(?!https?:|#)[^"]*"', "<a", text), encoding="utf-8")
        with atomic(page.with_suffix(".pdf")) as target:
            options = [f"--user-data-dir={scratch}/profile", "--no-pdf-header-footer", f"--print-to-pdf={target}"]
            if os.geteuid() == 0:
                options.append("--no-sandbox")  # Chromium has no sandbox for root and refuses to start with one
            try:
                done = subprocess.run(
                    [chromium, "--headless", "--disable-gpu", *options, copy.as_uri()],
                    capture_output=True, text=True, timeout=TIMEOUT, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"Chromium did not print {page.name} within {TIMEOUT} s.") from None
            if done.returncode or not target.exists():
                raise RuntimeError(f"Chromium did not print {page.name}: {done.stderr.strip()[-500:]}")
    return page.with_suffix(".pdf")
