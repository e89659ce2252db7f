"""Where a forward pass spends its time, by kind of module."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from llmlab.model.lm import LM

GROUPS = {
    "attention projections": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn"),
    "MLP": ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "act_fn", "activation_fn", "c_fc"),
    "output head": ("lm_head", "embed_out"),
    "embedding": ("embed_tokens", "embed_positions", "wte", "wpe"),
}
CORE = "attention core"  # what an attention module does outside its projections: scores, soft-max, rotation, cache
REST = "norms and the rest"


def module_times(lm: LM, run: Callable[[], object], *, warmup: int = 1) -> pd.DataFrame:
    """Profile `run` with torch's profiler and add the time up by kind of module.

    Args:
        lm: the model that `run` calls.
        run: a forward pass, say.
        warmup: calls before the profiled one.

    Returns:
        A row per group, longest first: `group`, `seconds` (time in those modules, not in their children), `share`.
        On a GPU the device's time, else the CPU's.
    """
    for _ in range(warmup):
        run()
    on_gpu = lm.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    handles = []
    for name, group in _module_groups(lm).items():
        handles += _marked(lm.model.get_submodule(name), record_function(f"llmlab::{group}"))
    try:
        with profile(activities=activities) as profiler, record_function("llmlab::" + REST):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return _table(profiler, on_gpu)


def _marked(module: torch.nn.Module, span: record_function) -> list[RemovableHandle]:
    """Hooks that open a range of the profiler before a module's forward pass and close it behind."""

    def enter(*_: object) -> None:
        span.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def leave(*_: object) -> None:
        span.__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _module_groups(lm: LM) -> dict[str, str]:
    kind = {leaf: group for group, leaves in GROUPS.items() for leaf in leaves}
    groups = {}
    for name, _ in lm.model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in kind:
            groups[name] = kind[leaf]
        elif leaf in ("self_attn", "attn"):
            groups[name] = CORE
    return groups


def _table(profiler: profile, on_gpu: bool) -> pd.DataFrame:
    # Ranges nest: what a range's own children took belongs to them. Totals include children, so subtract those that
    # stand directly below: projections below the attention core, everything below the outermost range.
    field = "device_time_total" if on_gpu else "cpu_time_total"
    ours = [event for event in profiler.key_averages() if event.key.startswith("llmlab::")]
    totals = {event.key.removeprefix("llmlab::"): getattr(event, field) / 1e6 for event in ours}
    everything = totals.pop(REST)
    totals[CORE] = max(0.0, totals.get(CORE, 0.0) - totals.get("attention projections", 0.0))
    totals[REST] = max(0.0, everything - sum(totals.values()))
    table = pd.DataFrame({"group": list(totals), "seconds": list(totals.values())})
    table["share"] = table["seconds"] / everything
    return table.sort_values("seconds", ascending=False, ignore_index=True)
