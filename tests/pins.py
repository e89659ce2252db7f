"""What the CUDA build of torch requires, and whether constraints.txt allows it. `make pins` runs this file.

Most machines have a build of torch for CPUs, whose metadata say nothing of triton; a GPU server gets the one with CUDA,
which asks for an exact version. So its requirements are committed (torch_cuda.txt), the tests compare them with ours,
and `make pins` reads them anew from the package index: metadata alone, no wheel is downloaded.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
CUDA = Path(__file__).with_name("torch_cuda.txt")
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = "demo,dev,gpu"
# pip before 25.3 downloads what it would only have to resolve: gigabytes here.
PIP = "pip>=25.3"


def pins(text):
    """Version by normalized name of every `name==version` in a text."""
    return {canonicalize_name(name): version for name, version in re.findall(r"([A-Za-z0-9_.-]+)==([^\s]+)", text)}


def refusals(requirements, pinned, system="Linux"):
    """Every requirement that the pins do not allow, on any Python that llmlab runs on: a sentence each."""
    refused = {}
    for text in requirements:
        wanted = Requirement(text)
        version = pinned.get(canonicalize_name(wanted.name))
        places = [{"python_version": python, "platform_system": system, "extra": ""} for python in PYTHONS]
        asked = wanted.marker is None or any(wanted.marker.evaluate(place) for place in places)
        if asked and version is not None and not wanted.specifier.contains(version):
            refused[wanted.name] = f"torch asks for {wanted.name}{wanted.specifier}, pinned is {wanted.name}=={version}"
    return list(refused.values())


def resolve(pip, *arguments):
    """pip's own resolver, nothing installed: the report of what it would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Isolated: a configuration may name a folder with a CPU build, which pip would prefer.
        how = ["--isolated", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report]
        done = subprocess.run([*pip, *how, "--use-feature=fast-deps", *arguments], cwd=CHECKOUT, check=False)
        if done.returncode:
            sys.exit(f"pip cannot resolve {arguments[-1]}: see above.")
        return json.loads(report.read_text())


def main():
    """Write torch_cuda.txt from the package index, compare it with the pins, and let pip resolve everything.

    The argument is the Python to resolve for: pip knows the markers of the interpreter that runs it alone.
    """
    interpreter = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    pinned = pins((CHECKOUT / "constraints.txt").read_text())
    torch = f"torch=={pinned['torch']}"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP], check=True)
        pip = [python, "-m", "pip"]
        (wheel,) = resolve(pip, "--no-deps", torch)["install"]
        requirements = wheel["metadata"]["requires_dist"]
        if not any(Requirement(text).name == "triton" for text in requirements):
            sys.exit(f"the index has no CUDA build of {torch} for this system: {wheel['download_info']['url']}")
        head = f"# What {torch} with CUDA requires, as its wheel on the package index says: make pins writes this file."
        CUDA.write_text("\n".join([head, *sorted(requirements), ""]))
        if refused := refusals(requirements, pinned):
            sys.exit("\n".join(refused))
        report = resolve(pip, "--constraint", "constraints.txt", f".[{EXTRAS}]")
    chosen = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    version = report["environment"]["python_full_version"]
    builds = f"torch {chosen['torch']} with CUDA, triton {chosen['triton']}"
    print(f"Python {version}: .[{EXTRAS}] resolves to {len(chosen)} packages, {builds}")


if __name__ == "__main__":
    main()
