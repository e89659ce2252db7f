"""Where llmlab keeps things: the checkout, or the folder named by LLMLAB_HOME."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmlab.base.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    return Path(os.environ.get("LLMLAB_CACHE") or "~/.cache/llmlab").expanduser()


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
    """Yield a temporary path beside `path`; it takes the name of `path` only when the block ends without an error.

    Its mode is what the umask says, whatever the writer makes of it (safetensors keeps its files to their owner).
    Raises InputError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with _enough_space(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remember(path: Path, text: str) -> None:
    """Write a file of the cache, if that is possible: one that is not there costs time and nothing else."""
    with suppress(OSError, InputError), atomic(path) as temporary:
        temporary.write_text(text)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """The same for a folder that is still to be made. If another process made it meanwhile, that one's stays."""
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with _enough_space(target):
            staging.mkdir(parents=True)
            yield staging
        mode = staging.stat().st_mode
        for path in staging.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _enough_space(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and tokenizers tell the system's errors in types of their own
        reason = next((os.strerror(number) for number in FULL if os.strerror(number) in str(error)), None)
        if reason is None:
            raise
        raise InputError(f"cannot write {target} ({reason}): make room there; nothing of it was kept.") from error
