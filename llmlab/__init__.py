"""llmlab: a workbench for research on fast LLM inference. This file is the public face, nothing else.

import llmlab
lm = llmlab.load("smollm2")
result = llmlab.score(lm, llmlab.data.everyday(limit=40))
llmlab.record(lm, result)
llmlab.records()
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from llmlab.base.version import __version__ as __version__

if TYPE_CHECKING:
    from llmlab import data as data
    from llmlab.base.errors import InputError as InputError
    from llmlab.base.errors import NumericalError as NumericalError
    from llmlab.base.errors import RankError as RankError
    from llmlab.base.stats import Metric as Metric
    from llmlab.data import Prompt as Prompt
    from llmlab.data import Question as Question
    from llmlab.decoding.drafts import ModelDraft as ModelDraft
    from llmlab.decoding.drafts import PromptLookup as PromptLookup
    from llmlab.decoding.drafts import SelfDraft as SelfDraft
    from llmlab.decoding.engine import Engine as Engine
    from llmlab.decoding.generate import generate as generate
    from llmlab.decoding.generate import stream as stream
    from llmlab.jobs.over_ranks import ranks as ranks
    from llmlab.jobs.own_draft import self_4bit as self_4bit
    from llmlab.lab.sweep import sweep as sweep
    from llmlab.measure.record import Measurement as Measurement
    from llmlab.measure.record import records as records
    from llmlab.model.card import ModelCard as ModelCard
    from llmlab.model.convert import with_dtype as with_dtype
    from llmlab.model.lm import LM as LM
    from llmlab.model.load import load as load
    from llmlab.model.load import model_card as model_card
    from llmlab.quantization.walk import quantize as quantize
    from llmlab.scoring.perplexity import perplexity as perplexity
    from llmlab.scoring.score import score as score
    from llmlab.sharding.plan import plan as plan

# The torch profiler would write its own log lines into notebooks, as errors. It reads this when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# Where each public name lives; imported on first use, so that `llmlab --help` does not wait for torch.
_HOME = {
    "Engine": "llmlab.decoding.engine",
    "LM": "llmlab.model.lm",
    "InputError": "llmlab.base.errors",
    "Measurement": "llmlab.measure.record",
    "Metric": "llmlab.base.stats",
    "ModelCard": "llmlab.model.card",
    "ModelDraft": "llmlab.decoding.drafts",
    "NumericalError": "llmlab.base.errors",
    "Prompt": "llmlab.data",
    "PromptLookup": "llmlab.decoding.drafts",
    "Question": "llmlab.data",
    "generate": "llmlab.decoding.generate",
    "load": "llmlab.model.load",
    "model_card": "llmlab.model.load",
    "perplexity": "llmlab.scoring.perplexity",
    "plan": "llmlab.sharding.plan",
    "quantize": "llmlab.quantization.walk",
    "RankError": "llmlab.base.errors",
    "ranks": "llmlab.jobs.over_ranks",
    "records": "llmlab.measure.record",
    "score": "llmlab.scoring.score",
    "self_4bit": "llmlab.jobs.own_draft",
    "SelfDraft": "llmlab.decoding.drafts",
    "stream": "llmlab.decoding.generate",
    "sweep": "llmlab.lab.sweep",
    "with_dtype": "llmlab.model.convert",
}
__all__ = [*sorted(_HOME), "__version__", "data", "record"]


def record(lm: LM, result: Any, **how: Any) -> Any:
    """Append the Record of a result on a model to data/runs/ and return it; `how` as in `measure.record.describe`."""
    from llmlab.measure.record import append, describe

    return append(describe(lm, result, **how))


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("llmlab.data")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'llmlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
