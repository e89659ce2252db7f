"""All steps of `llmlab gpu-check` in order, and what they add up to."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.gpu_check import exact, ranks, speed
from llmlab.bench.gpu_check.given import Finding, Given, Step
from llmlab.bench.gpu_check.software import software
from llmlab.kernels.cuda import nvidia, usable
from llmlab.measure.record import Measurement, Row
from llmlab.model.lm import LM

STEPS = (
    Step("driver, builds, memory", software, cuda=True),
    Step("packed kernels", exact.kernels),
    Step("scoring", exact.scoring),
    Step("decoding, drafts", exact.decoding),
    Step("replayed passes", exact.replay),
    Step("GPTQ", exact.quantizing),
    Step("attention kernels", exact.attention, cuda=True),
    Step("memory of loading", speed.loading, cuda=True),
    Step("roofline", speed.limits),
    Step("scoring passes", speed.scoring_passes),
    Step("decoding speed", speed.decode_speeds),
    Step("4 bits against plain", speed.packed_products),
    Step("energy", speed.power, cuda=True),
    Step("links", ranks.links, cuda=True, several=True),
    Step("layouts", ranks.scores, several=True),
    Step("decoding over layouts", ranks.completions, several=True),
    Step("full depth", ranks.full_depth, several=True),
    Step("switching layouts", ranks.switching, several=True),
    Step("failing ranks", ranks.failures, several=True),
    Step("torchrun", ranks.torchrun, several=True),
)
WORDS = {True: "ok", False: "FAILED", None: "not here"}


def gpu_check(
    device: str = "cuda", devices: int | None = None, *, on_step: Callable[[str], object] = lambda name: None
) -> tuple[LM | None, Measurement]:
    """Run the steps; one that fails leaves the others to run, but for the first: without it no other makes sense.

    Args:
        device: "cuda", or "cpu" for all steps that are not about CUDA itself.
        devices: how many; by default all GPUs that torch can use, and one CPU. Steps over several need two.
        on_step: called with the name of each step when it begins.

    Returns:
        The built-in model as it was checked (None where the first step failed), and the findings: in `details` a row a
        step with `step`, `state` ("ok", "FAILED", "not here"), `said`, `seconds`, and the number that `failed`.

    Raises InputError for a device that is not here at all.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: choose cpu or cuda.")
    if device == "cuda" and not nvidia().cards:
        raise InputError("there is no NVIDIA GPU here: --device cpu runs the steps that need none.")
    count = devices or (max(1, len(usable(nvidia()))) if device == "cuda" else 1)
    findings: dict[str, Finding] = {}
    rows: list[Row] = []
    with Given(torch.device(device), count) as given:
        for step in STEPS:
            on_step(step.name)
            begin = time.perf_counter()
            findings[step.name] = finding = _find(step, given)
            seconds = time.perf_counter() - begin
            rows.append({"step": step.name, "state": WORDS[finding.passed], "said": finding.said, "seconds": seconds})
            if step is STEPS[0] and finding.passed is False:
                break
        lm = given.lm if len(rows) > 1 else None
    failed = [name for name, finding in findings.items() if finding.passed is False]
    tried = sum(finding.passed is not None for finding in findings.values())
    values = {"steps_equal": Metric(tried - len(failed)), "steps_failed": Metric(len(failed))}
    for name, finding in findings.items():
        values |= {f"{name}: {what}": metric for what, metric in finding.values.items()}
    protocol = (
        f"{tried} steps on {count} {device}; every fast path against the plain one, speeds beside measured limits"
    )
    details: Row = {"steps": rows, "failed": len(failed), "metrics": {k: asdict(m) for k, m in values.items()}}
    settings = {"device": device, "devices": str(count)}
    return lm, Measurement("gpu check", values, tried, protocol, settings=settings, details=details)


def _find(step: Step, given: Given) -> Finding:
    if step.cuda and not given.on_gpu:
        return Finding(None, "not on this device: it is about CUDA itself")
    if step.several and given.devices < 2:
        return Finding(None, "takes two devices or more")
    try:
        return step.run(given)
    except Exception as error:  # whatever it is, it is what this command looks for
        given.end_ranks()
        return Finding(False, f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}")
    finally:
        gc.collect()
        if given.on_gpu:
            torch.cuda.empty_cache()
