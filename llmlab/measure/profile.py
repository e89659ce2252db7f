"""Where a forward pass spends its time, by kind of module."""

from collections.abc import Callable

import pandas as pd
from torch.profiler import ProfilerActivity, profile, record_function

from llmlab.model.lm import LM

PROJECTIONS, CORE, REST = "attention projections", "attention core", "norms and the rest"
GROUPS = {
    PROJECTIONS: ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn"),
    "MLP": ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "act_fn", "activation_fn", "c_fc"),
    "output head": ("lm_head", "embed_out"),
    "embedding": ("embed_tokens", "embed_positions", "wte", "wpe"),
    CORE: ("self_attn", "attn"),  # what it does outside its projections: scores, soft-max, rotation, cache
}


def module_times(lm: LM, run: Callable[[], object], *, warmup: int = 1) -> pd.DataFrame:
    """Profile `run`, a forward pass of `lm` say, with torch's profiler and add the time up by kind of module.

    `warmup` calls come before the profiled one. Returns a row per group, longest first: `group`, `seconds` (time in
    those modules, not in their children), `share`. On a GPU the device's time, else the CPU's.
    """
    for _ in range(warmup):
        run()
    kinds, handles = {leaf: group for group, leaves in GROUPS.items() for leaf in leaves}, []
    for name, module in lm.model.named_modules():
        if group := kinds.get(name.rsplit(".", 1)[-1]):
            span = record_function(f"llmlab::{group}")
            handles.append(module.register_forward_pre_hook(lambda *_, span=span: span.__enter__() and None))
            handles.append(module.register_forward_hook(lambda *_, span=span: span.__exit__(None, None, None)))
    on_gpu = lm.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    try:
        with profile(activities=activities) as profiler, record_function("llmlab::" + REST):
            run()
    finally:
        for handle in handles:
            handle.remove()
    # Ranges nest: what a range's own children took belongs to them. Totals include children, so subtract those that
    # stand directly below: projections below the attention core, everything below the outermost range.
    field = "device_time_total" if on_gpu else "cpu_time_total"
    ours = [event for event in profiler.key_averages() if event.key.startswith("llmlab::")]
    seconds = pd.Series({event.key.removeprefix("llmlab::"): getattr(event, field) / 1e6 for event in ours})
    everything = seconds.pop(REST)
    seconds[CORE] = max(0.0, seconds.get(CORE, 0.0) - seconds.get(PROJECTIONS, 0.0))
    seconds[REST] = max(0.0, everything - seconds.sum())
    table = seconds.rename_axis("group").reset_index(name="seconds").assign(share=lambda t: t["seconds"] / everything)
    return table.sort_values("seconds", ascending=False, ignore_index=True)
