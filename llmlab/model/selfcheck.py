"""Self-check: a fast path serves a model only after it has given the plain forward pass's numbers for it.

    if not check(lm, "trie attention", fast, lambda: plain_logits(lm)).passed:
        ...the plain path, with one sentence

The probe is short, two rows of 27 and 40 tokens, because windows that are longer are made 16 tokens for the check, for
both paths alike (`small_windows`): what a mask does at the edge of a window does not depend on its size, and a probe
of 4,097 tokens would cost more than many jobs. An outcome is kept for these weights (a sample of every tensor), this
config, dtype, device, code and libraries: in memory and in the cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass

import torch
import transformers

from llmlab.base.paths import PACKAGE, atomic, cache_folder
from llmlab.kernels.fast import machine
from llmlab.kernels.packed_linear import quant_linears
from llmlab.model.lm import LM

WINDOW = 16  # tokens that a longer window is made for the check
LENGTHS = (40, 27)  # of the probe's rows: more than two windows, and no multiple of one
SHARED = 11  # tokens that both rows begin with
# What transformers' configs and modules call the number of tokens that a layer sees.
WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size")
# A position's difference is the root mean square over the vocabulary, in units of the log-probabilities' spread. By
# rounding alone, in two orders of the same sums, it stays below (measured on SmolLM2, 30 layers: bf16 0.044, fp16
# 0.005, fp32 3e-6 at most positions); by a wrong mask, position, cap or sink it does not, at most positions. In half
# precision rounding sends a token to another expert now and then, so a quarter of the positions may differ there.
TOLERANCE = {"fp32": 3e-4, "bf16": 0.1, "fp16": 0.02}
ALIKE = {"fp32": 1.0, "bf16": 0.75, "fp16": 0.75}  # share of the positions that must be within it
# Some tokens make huge activations, and after them the plain pass itself is off the exact one by a thousand times
# fp32's rounding (Qwen2.5-Coder 0.5B: 3e-3 at one position of the probe). What such a position may differ by is what
# the plain pass differs by when the embeddings are off by SHAKEN of their values, times eight.
SHAKEN = 2.0**-18  # 32 roundings of fp32: about as many as a value goes through from the embedding to the head


@dataclass(frozen=True)
class Check:
    """The outcome of a self-check.

    Attributes:
        passed: whether the fast path may be used.
        difference: largest |fast - plain| of log-probabilities, in nats; inf where the fast path raised.
        reason: why it did not pass, a clause without a full stop; "" if it did.
    """

    passed: bool
    difference: float
    reason: str = ""


def probe(lm: LM) -> list[list[int]]:
    """Token ids to check with: two rows of different length with a common beginning; the same every time."""
    size = min(lm.card.vocab_size, lm.model.get_input_embeddings().weight.shape[0])
    rows = [[(7919 * (i + 1) + 104729 * row * (i >= SHARED)) % size for i in range(n)] for row, n in enumerate(LENGTHS)]
    return [ids[: lm.card.context_length] for ids in rows]


@torch.inference_mode()
def plain_logits(lm: LM) -> torch.Tensor:
    """Logits of the plain forward pass for the probe, row by row: [tokens of both rows, vocabulary], fp32.

    The last model's are kept: the checks of several fast paths share them.
    """
    key = _digest(_identity(lm) | {"rows": str({linear.limit for linear in quant_linears(lm.model)})})
    if _last_plain[0] != key:
        with small_windows(lm.model):
            rows = [torch.tensor([ids], device=lm.device) for ids in probe(lm)]
            logits = [lm.model(input_ids=row, use_cache=False).logits[0].float() for row in rows]
        _last_plain[:] = [key, torch.cat(logits)]
    return _last_plain[1]  # type: ignore[return-value]  # set above


def check(lm: LM, path: str, fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> Check:
    """Whether a fast path gives the plain path's numbers; computed once, then remembered.

    Args:
        lm: the model.
        path: what the fast path is called in sentences and in `llmlab doctor`: "trie attention".
        fast, plain: functions that return logits [..., vocabulary] of the same tokens of `probe`. Both run within
            `small_windows(lm.model)`; a path with modules of its own enters it for them, too.

    Returns:
        The outcome. A fast path that raises has not passed; running out of memory and Ctrl-C go on to the caller.
        For a model that ranks share it is what they were told (see `tell`): one that broke off would let others wait.
    """
    if "forward" in vars(lm.model):  # see `sharding.pipeline.attach`
        return _told.get(path, Check(False, math.inf, f"{path} was not checked before the ranks began"))
    _paths.add(path)
    identity = _identity(lm) | {"path": path}
    key = _digest(identity)
    file = cache_folder() / "checks" / f"{key}.json"
    if key not in _outcomes:
        with suppress(OSError, ValueError, TypeError, KeyError):  # never checked, or not ours
            _outcomes[key] = Check(**json.loads(file.read_text())["outcome"])
    if key in _outcomes:
        return _outcomes[key]
    with small_windows(lm.model), torch.inference_mode():
        expected = plain().float().log_softmax(-1)
        if not expected.isfinite().all():
            return Check(False, math.nan, "the plain path's own numbers are not finite")
        outcome = _compare(path, fast, expected, _rounding(lm))
        if not outcome.passed and math.isfinite(outcome.difference) and _rounding(lm) == "fp32":
            outcome = _compare(path, fast, expected, "fp32", 8 * _relative(_shaken(lm, plain), expected))
    _outcomes[key] = outcome
    with suppress(OSError), atomic(file) as temporary:  # without a cache the next process checks again
        temporary.write_text(json.dumps(identity | {"outcome": asdict(outcome)}))
    return outcome


def _rounding(lm: LM) -> str:
    """The dtype whose rounding sets the tolerance: kernels of packed weights, which few rows take, round to bf16."""
    packed = quant_linears(lm.model) or getattr(lm.model.config, "quantization_config", None) is not None
    return "bf16" if packed and lm.dtype == "fp32" else lm.dtype


def outcomes(lm: LM) -> dict[str, Check]:
    """Path -> outcome, of those that this process asked for a model."""
    identity = _identity(lm)
    keys = {path: _digest(identity | {"path": path}) for path in _paths}
    return {path: _outcomes[key] for path, key in keys.items() if key in _outcomes}


def tell(of_family: dict[str, Check]) -> None:
    """Let this process, a rank, take these outcomes for those of the model that it shares with others."""
    _told.clear()
    _told.update(of_family)


def known() -> list[dict[str, object]]:
    """The outcomes kept for this code and these libraries: what they hold for, and what a Check has."""
    rows: list[dict[str, object]] = []
    for file in sorted((cache_folder() / "checks").glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(file.read_text())
            if kept["versions"] == versions():
                names = ("model", "transformation", "path", "dtype", "device")
                rows.append({name: kept[name] for name in names} | kept["outcome"])
    return rows


@contextmanager
def small_windows(model: torch.nn.Module) -> Iterator[None]:
    """Within the block no attention window or chunk of a model is longer than WINDOW tokens."""
    with ExitStack() as restored:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        for owner in [*configs.values(), *model.modules()]:
            for name in WINDOW_NAMES:
                size = vars(owner).get(name)
                if isinstance(size, int) and size > WINDOW:
                    setattr(owner, name, WINDOW)
                    restored.callback(setattr, owner, name, size)
        yield


@contextmanager
def unrounded(model: torch.nn.Module) -> Iterator[None]:
    """Within the block packed matrices of a model are unpacked for every product, as they are for many rows.

    Kernels for few rows round activations, which moves a token by nats where some are huge. Two paths that cut the
    same tokens into other passes are told apart by that alone, unless both are checked without it.
    """
    limits = [(linear, linear.limit) for linear in quant_linears(model)]
    try:
        for linear, _ in limits:
            linear.limit = 0
        yield
    finally:
        for linear, limit in limits:
            linear.limit = limit


def _compare(
    path: str, fast: Callable[[], torch.Tensor], expected: torch.Tensor, dtype: str, allowed: torch.Tensor | None = None
) -> Check:
    """The outcome; `allowed`, by position, widens the tolerance where it is larger."""
    try:
        logits = fast()
        given = logits.float().log_softmax(-1)
        relative = _relative(given, expected)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return Check(False, math.inf, f"{path} raised {type(error).__name__}: {text}")
    largest = float((given - expected).abs().max())
    in_tolerances = relative / TOLERANCE[dtype] if allowed is None else relative / allowed.clamp(min=TOLERANCE[dtype])
    if float(in_tolerances.quantile(ALIKE[dtype])) <= 1:  # never true of NaN
        return Check(True, largest)
    return Check(False, largest, f"{path} differs from the plain forward pass by up to {largest:.2g} nats a token")


def _relative(given: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """A difference [positions] of log-probabilities, in units of their spread."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-6)
    return (given - expected).square().mean(-1).sqrt().flatten() / spread


def _shaken(lm: LM, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The plain path's log-probabilities with every value of the embeddings off by up to SHAKEN of it."""
    random = torch.Generator().manual_seed(0)

    def shake(_: torch.nn.Module, __: object, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * (1 + SHAKEN * (2 * torch.rand(embedded.shape, generator=random) - 1).to(embedded))

    hook = lm.model.get_input_embeddings().register_forward_hook(shake)
    _last_plain[:] = [None, None]
    try:
        return plain().float().log_softmax(-1)
    finally:
        hook.remove()
        _last_plain[:] = [None, None]


_outcomes: dict[str, Check] = {}
_paths: set[str] = set()  # that were asked for
_told: dict[str, Check] = {}  # by path
_last_plain: list[str | torch.Tensor | None] = [None, None]  # for which model, and the logits


def _identity(lm: LM) -> dict[str, str]:
    """What an outcome holds for."""
    on_gpu = lm.device.type == "cuda"
    return {
        "model": lm.name,
        "revision": str(lm.revision),
        "transformation": lm.transformation,
        "weights": _sample(lm),
        "config": json.dumps(lm.model.config.to_dict(), sort_keys=True, default=str),
        "dtype": lm.dtype,
        "device": torch.cuda.get_device_name(lm.device) if on_gpu else f"CPU {machine()}",
        "versions": versions(),
    }


def _sample(lm: LM) -> str:
    """A few values of every tensor: they tell models apart that are in memory only, or were changed there."""
    tensors = [*lm.model.parameters(), *(b for m in quant_linears(lm.model) for b in m.buffers())]
    flat = [t.detach().reshape(-1)[:: max(1, t.numel() // 4)][:4] for t in tensors if t.device.type != "meta"]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for values in flat:
        by_device.setdefault(values.device, []).append(values.float())
    names = "".join(f"{type(m).__name__} " for m in lm.model.modules())
    digest = hashlib.sha256(names.encode())
    for values_there in by_device.values():
        digest.update(torch.cat(values_there).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def versions(files: str = "**/*.py") -> str:
    """Libraries, and this package's own code in these files: after a change of it a check must be made again."""
    code = hashlib.sha256()
    for file in sorted(PACKAGE.glob(files)):
        code.update(file.read_bytes())
    return f"llmlab {code.hexdigest()[:12]}, torch {torch.__version__}, transformers {transformers.__version__}"


def _digest(identity: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
