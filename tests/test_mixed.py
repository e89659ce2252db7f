"""Bits a matrix: the knapsack against brute force, losses against measured divergence, and checkpoints of it."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import TINY, inputs_of, reference_kernel
from transformers import AutoModelForCausalLM

import llmlab
from llmlab import InputError
from llmlab.kernels.packed_linear import quant_linears
from llmlab.model.card import card_from_config
from llmlab.model.matrices import set_matrix
from llmlab.quantization.grid import Scheme
from llmlab.quantization.mixed import BITS, knapsack, mixed, output_gradients, sensitivities
from llmlab.quantization.walk import Walk, quantize

WIDE, NARROW = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"
MIXED = Scheme(3, 32, mixed_bits=((WIDE, 4), (NARROW, 2)))


@pytest.fixture(scope="module")
def llama(smollm2):
    """A tiny random one with 256 tokens."""
    torch.manual_seed(0)
    config = copy.deepcopy(TINY["llama"])
    config.vocab_size = 256
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return replace(smollm2, model=model, card=card_from_config(config, "tiny", "fp32"))


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


def logits(lm, ids):
    with torch.no_grad(), reference_kernel(lm):
        return lm.model(input_ids=ids).logits


@pytest.mark.parametrize("mean", [2.0, 2.3, 2.5, 3.1, 4.0])
def test_the_knapsack_finds_what_brute_force_finds(mean):
    generator = torch.Generator().manual_seed(round(10 * mean))
    sizes = [192, 192, 64, 576, 64, 1536]
    losses = torch.rand(len(sizes), len(BITS), generator=generator).sort(descending=True).values.tolist()

    def loss(picked):
        return sum(lost[BITS.index(bits)] for lost, bits in zip(losses, picked, strict=True))

    def size(picked):
        return sum(bits * weights for bits, weights in zip(picked, sizes, strict=True))

    allowed = [p for p in itertools.product(BITS, repeat=len(sizes)) if size(p) <= mean * sum(sizes)]
    picked = knapsack(losses, sizes, mean)
    assert size(picked) <= mean * sum(sizes)
    assert loss(picked) == pytest.approx(min(map(loss, allowed)))


def test_the_loss_of_a_matrix_is_the_divergence_that_it_causes(llama, rows):
    """Measured over the whole vocabulary, where nothing behind the matrix mixes tokens, whose errors count as alone."""
    squares, exact = output_gradients(llama, rows), logits(llama, rows).log_softmax(-1)
    for part in ("down_proj", "up_proj", "gate_proj"):
        name, other = f"model.layers.1.mlp.{part}", copy.deepcopy(llama.model)
        linear = other.get_submodule(name)
        inputs = inputs_of(other, name, rows).flatten(0, 1)
        error = 3e-3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
        lost = ((error @ (inputs.T @ inputs / len(inputs))) * error).sum(-1)
        set_matrix(linear, linear.weight.detach() + error)
        moved = logits(replace(llama, model=other), rows).log_softmax(-1)
        divergence = float((exact.exp() * (exact - moved)).sum(-1).mean())
        assert float((squares[name] * lost).sum() / 2) == pytest.approx(divergence, rel=0.25)


def test_a_matrix_loses_less_the_more_bits_it_has(llama, rows):
    losses, sizes = sensitivities(llama, Scheme(4, 32), rows)
    assert sizes[WIDE] == 128 * 64 and len(losses) == 14
    assert all(lost[0] > lost[1] > lost[2] > 0 for lost in losses.values())


def test_gradients_leave_the_model_as_it_was(llama, rows):
    before = logits(llama, rows[:1])
    squares = output_gradients(llama, rows[:1])
    assert squares[NARROW].shape == (32,) and all(bool((of > 0).all()) for of in squares.values())
    assert torch.equal(logits(llama, rows[:1]), before)
    assert all(p.grad is None for p in llama.model.parameters())


def test_a_mixed_checkpoint_is_read_back_exactly_and_resumed(llama, rows, tmp_path):
    walk = Walk(llama, MIXED, rows=rows, keep=tmp_path / "keep")
    q = walk.run()
    bits = {name: m.bits for name, m in q.model.named_modules() if m in quant_linears(q.model)}
    assert (bits.pop(WIDE), bits.pop(NARROW), set(bits.values())) == (4, 2, {3})
    config = q.model.config.quantization_config
    assert config["bits"] == 3 and config["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 4},
        r"+:^model\.layers\.0\.self_attn\.k_proj$": {"bits": 2},
    }
    again = llmlab.load(str(q.save(tmp_path / "mixed")), dtype="fp32")
    resumed = Walk(llama, MIXED, rows=rows, keep=tmp_path / "keep")
    for other in (again, resumed.run()):
        mine, theirs = q.model.state_dict(), other.model.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert resumed.report.linears == []


def test_bits_follow_from_the_mean(llama, rows):
    scheme = mixed(llama, 2.5, Scheme(2, 32), rows)
    q = quantize(llama, scheme=scheme, calibration=rows)
    sizes = {m: m.in_features * m.out_features for m in quant_linears(q.model)}
    mean = sum(m.bits * size for m, size in sizes.items()) / sum(sizes.values())
    assert 2.4 < mean <= 2.5
    assert mixed(llama, 3, Scheme(2, 32), rows).mixed_bits != () and mixed(llama, 2, Scheme(2, 32), rows).bits == 2


def test_what_makes_no_sense_is_refused(llama, rows):
    with pytest.raises(InputError, match=r"4\.5 bits in the mean: choose 2 to 4"):
        mixed(llama, 4.5, Scheme(2, 32), rows)
    with pytest.raises(InputError, match=r"has no matrix model\.layers\.7\.x that can be packed"):
        quantize(llama, scheme=replace(MIXED, mixed_bits=(("model.layers.7.x", 3),)), calibration=rows)
    with pytest.raises(InputError, match="5 bits: choose one of"):
        quantize(llama, scheme=replace(MIXED, mixed_bits=((WIDE, 5),)), calibration=rows)
