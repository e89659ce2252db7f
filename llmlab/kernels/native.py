"""The C++ kernels: compiled on first use by the system's compiler, kept in the cache folder, loaded as torch operators.

Only instructions are used that this process may use: the file is compiled for a level, not for the processor that
happens to compile it, and a library's name says for which level, torch, compiler and source it was made. So a cache
folder that machines share never brings one an instruction that it lacks.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, cache_folder
from llmlab.base.progress import progress

SOURCE = Path(__file__).with_name("rows.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("lanes.h", "dense.h", "step.h")]
SECONDS = 300  # after which a compiler is given up
X86 = ("x86_64", "amd64")
LEVELS = {
    "AVX-512 VNNI": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "portable C++": (),
}


@dataclass(frozen=True)
class Native:
    """Whether the C++ kernels are there.

    Attributes:
        level: of LEVELS, what they were compiled for.
        problem: why they are not there, a clause; "" if they are.
    """

    level: str
    problem: str = ""


@cache
def edition() -> str:
    """Of the operators: what was compiled around others (their layouts are compiled in) must not serve these."""
    texts = (path.read_bytes() for path in (SOURCE, *HEADERS, Path(__file__)))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


@cache
def native() -> Native:
    """Compile the kernels, or find them compiled, and load them: `torch.ops.llmlab`. Once a process.

    The first time takes about ten seconds. Without a compiler it tells so; a compiler that fails is worth a warning.
    LLMLAB_NATIVE=0 in the environment leaves the kernels out.
    """
    at, command = level(), compiler()
    if (problem := absent()) or command is None:
        return Native(at, problem)
    folder = cache_folder() / "native"
    file = folder / f"kernels-{_key(command, at)}.so"
    try:
        if not _loads(file):
            try:
                _compile(command, at, file)
            except OSError:  # a folder that cannot be written: for this process, then
                with tempfile.TemporaryDirectory() as temporary:
                    _compile(command, at, Path(temporary) / file.name)
        for name, shape in SHAPES.items():
            torch.library.register_fake(f"llmlab::{name}", shape)
    except (OSError, InputError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        warnings.warn(f"the C++ kernels could not be compiled, so packed weights use torch's: {reason}", stacklevel=2)
        return Native(at, f"the compiler failed: {reason}")
    return Native(at)


def absent() -> str:
    """Why nothing is compiled here, a clause; "" if it is tried."""
    if os.environ.get("LLMLAB_NATIVE") == "0":
        return "LLMLAB_NATIVE is 0"
    if platform.system() != "Linux":  # OpenMP's pool of threads must be torch's, which is a matter of each system
        return "they are made for Linux"
    return "" if compiler() else "there is no C++ compiler (c++, or the one that CXX names)"


def level() -> str:
    """The instructions that this process may use, of LEVELS: as torch sees them, limits of the environment included."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in X86 or not capability.startswith("AVX"):
        return "portable C++"
    cpuinfo = Path("/proc/cpuinfo")
    known = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    vnni = {"avx512bw", "avx512vl", "avx512_vnni"} <= known
    return "AVX-512 VNNI" if capability == "AVX512" and vnni else "AVX2"


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else c++, g++ or clang++; None where there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen if shutil.which(chosen[0]) else None
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _flags(at: str) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", *LEVELS[at]]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [*flags, f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def _libraries() -> list[str]:
    lib = Path(torch.__file__).parent / "lib"
    return [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]


def _key(command: list[str], at: str) -> str:
    """Of everything that a library depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False)
    parts = (edition(), *command, version.stdout, *_flags(at), *_libraries(), torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], at: str, file: Path) -> None:
    """Compile to a file that is there whole or not at all, and load it. Two processes at once do the work twice."""
    with atomic(file) as temporary, progress(1, "compiling the C++ kernels, once", "library") as bar:
        done = subprocess.run(
            [*command, *_flags(at), str(SOURCE), "-o", str(temporary), *_libraries()],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
            raise InputError(f"{shlex.join(command)} says {' '.join(errors[:1]) or f'exit {done.returncode}'}")
        bar.update()
    torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]  # untyped in torch


def _loads(file: Path) -> bool:
    """Whether the file is there and whole, and is loaded now."""
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def _product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, outputs: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _like(x: torch.Tensor, *rest: torch.Tensor | float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _rotated(query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: torch.Tensor | float | None
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3]).transpose(1, 2)


# What each operator returns, for fake tensors.
SHAPES: dict[str, Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]] = {
    "packed_rows": _product,
    "dense_rows": lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "rms_norm": _like,
    "gated": _like,
    "rotate": _rotated,
    "attend_few": _attended,
}
