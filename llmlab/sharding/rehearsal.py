"""A layout is rehearsed before ranks work in it: a small copy of the family, cut in just this way, on threads.

The copy has the family's code, its layers with all that its config says of each, and the layout's stages and parts;
its matrices are narrow and its weights random. What all parts compute together must be what the whole copy computes.
So a family whose layers, masks, positions or final scales a stage would miss is refused here, in a second, and not
found out, or not even that, after loading it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, cache_folder
from llmlab.model.fill import Slices, Tensors, empty_model
from llmlab.model.selfcheck import versions
from llmlab.sharding.assemble import Place, assemble
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.peers import Meeting, ThreadPeers
from llmlab.sharding.pipeline import Stage
from llmlab.sharding.tensor import Cut, kv_heads

LENGTH = 40  # tokens of a probe
WINDOW = 8  # of the copy's attention where it has one
VOCABULARY = 160
LARGEST = 250_000_000  # parameters of a copy
TOLERANCE = 1e-3  # root mean square of the difference, in units of the log-probabilities' spread
# What configs call the sizes that can shrink alone, and what they shrink to.
SMALL = {
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "vocab_size": VOCABULARY, "state_size": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW,
}  # fmt: skip
ROTARY_SIZES = ("rotary_dim", "qk_rope_head_dim")  # of heads whose size is no ratio
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def rehearse(config: PreTrainedConfig, cuts: Cuts, layers: list[tuple[int, int]]) -> None:
    """Raise InputError, with the reason, for a family that cannot be cut so. That it can is remembered.

    Args:
        config: the model's.
        cuts: the layout.
        layers: first and end layer of each stage.
    """
    identity = {"config": json.dumps(_plain(config), sort_keys=True, default=str), "layers": str(layers)}
    identity |= {"tensor": str(cuts.tensor), "versions": versions("sharding/*.py")}
    text = json.dumps(identity, sort_keys=True)
    file = cache_folder() / "checks" / f"layout-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with suppress(OSError):
        if file.exists():
            return
    if problem := _problem(config, cuts.tensor, layers):
        family = f"{config.model_type} as {Cuts(1, cuts.tensor, cuts.pipeline).name}"
        raise InputError(f"{family} cannot run over ranks: {problem}")
    with suppress(OSError), atomic(file) as temporary:  # without a cache the next process rehearses again
        temporary.write_text(text)


def _problem(config: PreTrainedConfig, tensor: int, layers: list[tuple[int, int]]) -> str:
    """Why a layout does not give the numbers of the whole model, in a sentence; "" if it does."""
    try:
        small = small_copy(config, tensor)
        whole = random_model(small)
        ids = torch.arange(2 * LENGTH).view(2, -1) * 7919 % small.vocab_size
        with torch.inference_mode():
            expected = whole(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    except InputError as error:
        return str(error)
    except Exception as error:
        return f"a small copy of it to rehearse with cannot be made ({_short(error)})."
    try:
        logits = _together(small, whole, tensor, layers, ids)
    except InputError as error:
        return str(error)
    except Exception as error:
        return f"its parts do not work together ({_short(error)}): use data parallelism or another layout."
    difference = logits.float().log_softmax(-1) - expected
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    if difference.square().mean().sqrt() <= TOLERANCE * spread:  # never true of NaN
        return ""
    return (
        f"in a rehearsal its parts were off by up to {float(difference.abs().max()):.2g} nats a token: "
        "use data parallelism or another layout."
    )


def small_copy(config: PreTrainedConfig, tensor: int) -> PreTrainedConfig:
    """The config of a small model of the same family: the same layers, as many KV heads as a cut needs, all narrow."""
    small = copy.deepcopy(config)
    vars(small).pop("quantization_config", None)
    for name, size in SMALL.items():
        if isinstance(value := getattr(small, name, None), int):
            setattr(small, name, min(value, size))
    experts = max(8, 2 * (getattr(small, "n_group", 0) or 0), getattr(small, "num_experts_per_tok", 0) or 0)
    for name in EXPERTS:
        if isinstance(value := getattr(small, name, None), int):
            setattr(small, name, min(value, experts))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    if small.hidden_size > 256:
        _fewer_heads(small, tensor)
    return small


def _fewer_heads(config: PreTrainedConfig, tensor: int) -> None:
    """Fewer and smaller heads, the KV heads cut as evenly or unevenly as before; hidden states to match."""
    heads, kv, hidden = getattr(config, "num_attention_heads", None), kv_heads(config), config.hidden_size
    if heads is None:
        config.hidden_size = 64
        return
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # of all layers, or by their type
    by_frequency = any(isinstance(value, list) for kind in kinds for value in kind.values())
    fixed = by_frequency or any(hasattr(config, name) for name in ROTARY_SIZES)
    small_dim = head_dim if fixed else min(32, head_dim)
    few = kv if kv <= 4 else max(2, tensor + kv % tensor)
    config.num_attention_heads = few * min(2, heads // kv)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, few if value == kv else config.num_attention_heads)
    if getattr(config, "head_dim", None) and not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = small_dim
    config.hidden_size = config.num_attention_heads * small_dim
    if (width := getattr(config, "word_embed_proj_dim", None)) is not None:
        config.word_embed_proj_dim = config.hidden_size if width == hidden else config.hidden_size // 2


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A small copy with random weights: all of them matter, biases and norms too.

    Raises InputError for a family of which no copy is small: its config has names of its own for its sizes.
    """
    size = sum(weight.numel() for weight in empty_model(config, torch.float32).parameters())
    if size > LARGEST:
        raise InputError(
            f"its smallest copy to rehearse with has {size / 1e6:,.0f} M parameters: load it in one process."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * (0.7 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2))
    return model


class _InMemory(Tensors):
    """The tensors of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors, self.largest = model.state_dict(), 0

    def has(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        tensor: torch.Tensor = self.tensors[name]
        return tensor[part].clone()


def _together(
    config: PreTrainedConfig, whole: PreTrainedModel, tensor: int, layers: list[tuple[int, int]], ids: torch.Tensor
) -> torch.Tensor:
    """What the parts of a model compute, each on a thread: logits [batch, tokens, vocabulary]."""
    stages = [Meeting(len(layers)) for _ in range(tensor)]
    parts = [Meeting(tensor) for _ in layers]
    members = []
    for index, bounds in enumerate(layers):
        for part in range(tensor):
            stage = Stage(ThreadPeers(stages[part], index))
            place = Place(0, stage, bounds, Cut(part, tensor), ThreadPeers(parts[index], part))
            model = empty_model(config, torch.float32)
            assemble(model, _InMemory(whole), torch.device("cpu"), place)
            members.append(_Member(model, place))
    threads = [threading.Thread(target=member.compute, args=(ids,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [member.error for member in members if member.error is not None]
    if errors:  # the others broke off for want of the one that failed first
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    assert members[-1].logits is not None
    return members[-1].logits


@dataclass
class _Member:
    """One part of the copy; what it computed, or why not."""

    model: PreTrainedModel
    place: Place
    logits: torch.Tensor | None = None
    error: Exception | None = None

    @torch.inference_mode()
    def compute(self, ids: torch.Tensor) -> None:
        try:
            self.logits = self.model(input_ids=ids, use_cache=False).logits
        except Exception as error:
            self.error = error
            for peers in (self.place.stage.peers, self.place.cut_peers):
                assert isinstance(peers, ThreadPeers)
                peers.abort()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config without what says nothing of the computation."""
    about = {"_name_or_path", "transformers_version", "dtype", "architectures", "quantization_config"}
    return {name: value for name, value in config.to_dict().items() if name not in about}
