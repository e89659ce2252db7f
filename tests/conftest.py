"""Models and rows for the tests. No test uses the network; nothing is written into the checkout."""

import ctypes
import gc
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# Before llmlab or transformers is imported: no network, and records go to a folder of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
# No GPUs either: what is tested is the same everywhere. tests/test_gpu.py sees them, in a process of its own.
os.environ["VISIBLE_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["LLMLAB_HOME"] = tempfile.mkdtemp(prefix="llmlab-tests-")
# `make test` runs two processes side by side, which share the cores: with more threads than cores, small products wait.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import llmlab
from llmlab.cli.main import main
from llmlab.kernels.packed_linear import QuantLinear

# So that glibc gives memory back which a test has freed; engines come and go here by the dozen.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def memory_given_back():
    """After each file, what its tests held is free for others: the suite fits a small laptop."""
    yield
    gc.collect()
    if TRIM:
        TRIM(0)


@pytest.fixture(scope="session")
def smollm2():
    """The real built-in model in fp32."""
    return llmlab.load("smollm2", dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def rows():
    """Real questions: HellaSwag where LLMLAB_DATA has it, else the built-in set."""
    folder = os.environ.get("LLMLAB_DATA")
    if folder and list(Path(folder).glob("hellaswag*.jsonl")):
        return llmlab.data.hellaswag(limit=200)
    return llmlab.data.everyday()


@contextmanager
def reference_kernel(*models):
    """Within the block packed weights are dequantized and multiplied, however few rows there are."""
    linears = [m for lm in models for m in lm.model.modules() if isinstance(m, QuantLinear)]
    limits = [linear.limit for linear in linears]
    for linear in linears:
        linear.limit = 0
    try:
        yield
    finally:
        for linear, limit in zip(linears, limits, strict=True):
            linear.limit = limit


def inputs_of(model, name, ids):
    """What the module of that name is given [tokens, features] when a model reads token ids."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0]


TINY = {
    "llama": LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    ),
    "opt": OPTConfig(
        vocab_size=49152, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folders(smollm2, tmp_path_factory):
    """Folders with tiny random models of each architecture and the built-in tokenizer."""
    folders = {}
    for name, config in TINY.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # larger than the usual 0.02, so that predictions differ
            torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.eos_token_id = smollm2.tokenizer.eos_token_id
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        smollm2.tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny(request, tiny_folders):
    """A tiny random LLaMA and a tiny random OPT, one after the other."""
    return llmlab.load(str(tiny_folders[request.param]), dtype="fp32", device="cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit status, stdout, stderr)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return command
