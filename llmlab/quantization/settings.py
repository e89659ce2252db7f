"""How a checkpoint says how it was quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmlab.base.version import __version__
from llmlab.quantization.grid import Scheme


def quant_config(
    scheme: Scheme, method: str, kept: Iterable[str] = (), mixed_bits: Iterable[tuple[str, int]] = ()
) -> dict[str, object]:
    """The `quantization_config` by which AutoGPTQ, GPTQModel and transformers know such a checkpoint.

    `kept`: names of matrices that were left as they were; `mixed_bits`: of those with other bits. GPTQModel calls both
    `dynamic` exceptions; transformers without GPTQModel's loader knows one number of bits alone and refuses these.
    """
    dynamic: dict[str, object] = {f"-:^{re.escape(name)}$": {} for name in kept}
    dynamic |= {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in mixed_bits}
    return ({"dynamic": dynamic} if dynamic else {}) | {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        # Readers permute the columns where this is set; with static groups there is nothing to permute.
        "desc_act": scheme.act_order and not scheme.static_groups and scheme.group_size != -1,
        "static_groups": scheme.static_groups,
        "true_sequential": True,
        "damp_percent": scheme.damping,
        "lm_head": False,
        "checkpoint_format": "gptq",
        # GPTQModel takes asymmetric grids from its own version 0.9 on alone: older writers let a zero point overflow.
        # Ours is 1 or more, so what is written is what that version writes.
        "meta": {"quantizer": [f"llmlab:{__version__}", "gptqmodel:0.9.0"], "method": method},
    }
