"""Where llmlab keeps things: the checkout, or the folder named by LLMLAB_HOME."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmlab.base.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder of data/ and report/: LLMLAB_HOME, else the checkout, else the current folder."""
    if configured := os.environ.get("LLMLAB_HOME"):
        return Path(configured).expanduser()
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def figures_folder() -> Path:
    """Where notebooks draw: LLMLAB_FIGURES, else report/figures of `home`.

    Not the tracked folder figures/: only `make figures` and `make notebooks` write there.
    """
    return Path(os.environ.get("LLMLAB_FIGURES") or home() / "report" / "figures").expanduser()


def cache_folder() -> Path:
    """What can be made again: LLMLAB_CACHE, else ~/.cache/llmlab."""
    return Path(os.environ.get("LLMLAB_CACHE", "~/.cache/llmlab")).expanduser()


def builtin_data(name: str) -> Path:
    """A data file of this project: in a wheel beside the package, in a checkout under data/."""
    installed = PACKAGE / "builtin" / name
    return installed if installed.exists() else PACKAGE.parent / "data" / name


def check_writable(folder: Path) -> Path:
    """Create `folder` if it is missing and prove that a file can be written there; return it.

    Raises InputError before the expensive work, not after it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {folder} ({error.strerror}): choose another one or make it writable."
        ) from None
    return folder


def new_folder(folder: str | Path) -> Path:
    """The path of a folder that is still to be made. Raises InputError if it exists or cannot be made."""
    target = Path(folder).expanduser()
    if target.exists():
        raise InputError(f"{target} exists already: give a new folder, or remove it.")
    check_writable(target.parent)
    return target


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name of `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
