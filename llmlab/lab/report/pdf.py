"""PDF of the report's pages, printed by a Chromium that is installed; nothing is fetched."""

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
    if path := next(filter(None, map(shutil.which, BROWSERS)), None):
        return path
    raise InputError("a PDF needs Chromium or Chrome, and none is on the PATH: install one, or leave --pdf out.")


def write_pdf(chromium: str, page: Path) -> None:
    """Print a self-contained HTML page to a PDF of the same name beside it, whole or not at all.

    Links to other files of the report are left out: in a PDF they would hold the paths of this machine.

    Raises RuntimeError if Chromium failed or took longer than `TIMEOUT` seconds.
    """
    with tempfile.TemporaryDirectory() as scratch, atomic(page.with_suffix(".pdf")) as target:
        copy = Path(scratch) / page.name
        text = page.read_text(encoding="utf-8")
        copy.write_text(re.sub(r'<a\b[^>]*href="(?!https?:|#)[^"]*"', "<a", text), encoding="utf-8")
        options = [f"--user-data-dir={scratch}/profile", "--no-pdf-header-footer", f"--print-to-pdf={target}"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to start as root with a sandbox
        run = [chromium, "--headless", "--disable-gpu", *options, copy.as_uri()]
        try:
            done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"Chromium did not print {page.name} within {TIMEOUT} s.") from None
        if done.returncode or not target.exists():
            raise RuntimeError(f"Chromium did not print {page.name}: {done.stderr.strip()[-500:]}")
