"""llmlab: a workbench for research on fast LLM inference. This file is the public face, nothing else.

import llmlab
lm = llmlab.load("smollm2")
result = llmlab.score(lm, llmlab.data.everyday(limit=40))
llmlab.record(lm, result)
llmlab.records()
"""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.base.version import __version__ as __version__

if TYPE_CHECKING:  # "import X as X" makes X public: type checkers read these lines, and `_homes` does at run time
    from llmlab import data as data
    from llmlab.base.errors import InputError as InputError
    from llmlab.base.errors import NumericalError as NumericalError
    from llmlab.base.errors import RankError as RankError
    from llmlab.base.stats import Metric as Metric
    from llmlab.data import Prompt as Prompt
    from llmlab.data import Question as Question
    from llmlab.decoding.engine import Engine as Engine
    from llmlab.decoding.generate import generate as generate
    from llmlab.decoding.generate import stream as stream
    from llmlab.decoding.lookup import PromptLookup as PromptLookup
    from llmlab.decoding.model_draft import ModelDraft as ModelDraft
    from llmlab.decoding.recycling import Recycling as Recycling
    from llmlab.decoding.self_draft import SelfDraft as SelfDraft
    from llmlab.decoding.suffix import Suffix as Suffix
    from llmlab.jobs.over_ranks import ranks as ranks
    from llmlab.jobs.own_draft import self_4bit as self_4bit
    from llmlab.lab.sweep import sweep as sweep
    from llmlab.measure.record import Measurement as Measurement
    from llmlab.measure.record import Record, Result
    from llmlab.measure.record import records as records
    from llmlab.model.card import ModelCard as ModelCard
    from llmlab.model.convert import with_dtype as with_dtype
    from llmlab.model.lm import LM as LM
    from llmlab.model.load import load as load
    from llmlab.model.load import model_card as model_card
    from llmlab.model.rewrite import convert as convert
    from llmlab.quantization.walk import quantize as quantize
    from llmlab.scoring.perplexity import perplexity as perplexity
    from llmlab.scoring.score import score as score
    from llmlab.sharding.plan import plan as plan

# The torch profiler would write its own log lines into notebooks, as errors. It reads this when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _homes() -> dict[str, str]:
    """The module of each public name, read from the imports above, so that they are written once.

    They are not carried out before a name is first used: `llmlab --help` does not wait for torch.
    """
    imports = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names if alias.asname}


_HOMES = _homes()
__all__ = [*sorted(_HOMES), "record"]


def record(lm: LM, result: Result, **how: Any) -> Record:
    """Append the Record of a result on a model to data/runs/ and return it; `how` as in `measure.record.describe`."""
    from llmlab.measure.record import append, describe

    return append(describe(lm, result, **how))


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("llmlab.data")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
