"""GPTAQ and Qronos against their own equations, in fp64 and with every inverse computed anew."""

import copy
from dataclasses import replace

import pytest
import torch
from test_gptq import problem

from llmlab.model.lm import decoder_layers
from llmlab.model.matrices import matrices
from llmlab.quantization.beside import Beside
from llmlab.quantization.calibration import layer_calls
from llmlab.quantization.gptq import Factor, Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, codes_of, group_grids
from llmlab.quantization.targets import ALPHA, BETA
from llmlab.quantization.walk import Walk, quantize

SCHEME = Scheme(3, -1, act_order=False, search=False)
COLUMNS = 64


def drifted(rows=5, columns=COLUMNS, tokens=600):
    """Weights, inputs of the quantized model, and the exact model's."""
    weight, inputs = problem(rows, columns, tokens)
    return weight, inputs, inputs + 0.2 * problem(rows, columns, tokens, seed=1)[1]


def factor_of(inputs, exact, scheme, *residual) -> Factor:
    hessian = Hessian(inputs.shape[1], inputs.device)
    hessian.add(inputs, [exact - inputs, *residual])
    return factorize(hessian.matrix(), scheme, hessian.drift())


def moments(inputs, exact, scheme=SCHEME):
    """H, damped H and D in fp64."""
    x, dx = inputs.double(), (exact - inputs).double()
    h = x.T @ x / len(x)
    return h, h + scheme.damping * h.diagonal().mean() * torch.eye(len(h)), dx.T @ x / len(x)


def outputs_lost(quantized, weight, inputs, exact):
    return float((inputs @ quantized.dequantize().T - exact @ weight.T).square().sum())


@pytest.mark.parametrize("target", ["gptaq", "qronos"])
@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(4, 32, act_order=False), Scheme(2, 64, static_groups=False)])
def test_with_the_exact_models_inputs_every_target_is_gptq(target, scheme):
    weight, inputs, _ = drifted()
    expected = gptq(weight, factor_of(inputs, inputs, scheme), scheme)
    found = gptq(weight, factor_of(inputs, inputs, scheme), replace(scheme, target=target))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    assert found.error == expected.error and found.bound == expected.bound


def test_gptaq_equals_the_papers_recursion():
    """Each column's error and its drift w_q dX_q, both made up for by the columns behind it."""
    weight, inputs, exact = drifted()
    scheme = replace(SCHEME, target="gptaq")
    found = gptq(weight, factor_of(inputs, exact, scheme), scheme)
    _, damped, d = moments(inputs, exact)
    scale, zero = (grid[:, 0] for grid in group_grids(weight, scheme))
    w, codes = weight.double().clone(), torch.empty(5, COLUMNS)
    for q in range(COLUMNS):
        codes[:, q] = codes_of(w[:, q].float(), scale, zero, scheme)
        error = w[:, q] - ((codes[:, q] - zero) * scale).double()
        inverse = torch.linalg.inv(damped[q:, q:])
        step = -torch.outer(error / inverse[0, 0], inverse[0, 1:])
        w[:, q + 1 :] += step + ALPHA * torch.outer(w[:, q], d[q, q + 1 :] @ torch.linalg.inv(damped[q + 1 :, q + 1 :]))
    assert (found.codes == codes).float().mean() > 0.98  # fp32 may tip a weight that lies between two levels
    assert (found.codes == gptq(weight, factor_of(inputs, inputs, scheme), scheme).codes).float().mean() < 0.95


def test_qronos_equals_the_papers_recursion():
    """The first column corrects the past; then all columns that are free move to where the loss is least."""
    weight, inputs, exact = drifted()
    residual = problem(rows=600, columns=5, seed=2)[0]  # what the outputs are added to is off, too
    scheme = replace(SCHEME, target="qronos")
    factor = factor_of(inputs, exact, scheme, residual)
    found = gptq(weight, factor, scheme)
    h, damped, d = moments(inputs, exact)
    pull = BETA * (weight.double() @ d + residual.double().T @ inputs.double() / len(inputs))
    best = (weight + pull @ torch.linalg.inv(damped)).float()  # whose grid it is
    scale, zero = (grid[:, 0] for grid in group_grids(best, scheme))
    w, codes = weight.double(), torch.empty(5, COLUMNS)
    others = h.clone().fill_diagonal_(0)
    rounded = ((w @ h + pull)[:, 0] - w @ others[:, 0]) / h[0, 0]
    for q in range(COLUMNS):
        codes[:, q] = codes_of(rounded.float(), scale, zero, scheme)
        done, free = slice(0, q + 1), slice(q + 1, None)
        levels = ((codes[:, done] - zero[:, None]) * scale[:, None]).double()
        if q + 1 < COLUMNS:
            right = (w @ damped + pull)[:, free] - levels @ damped[done, free]
            rounded = (right @ torch.linalg.inv(damped[free, free]))[:, 0]
    assert (found.codes == codes).float().mean() > 0.98
    assert (found.codes == gptq(weight, factor_of(inputs, inputs, scheme), scheme).codes).float().mean() < 0.95


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, static_groups=False)], ids=str)
def test_targets_come_nearer_to_the_exact_outputs(scheme):
    weight, inputs, exact = drifted(rows=48, columns=128)
    lost = {}
    for target in ("gptq", "gptaq", "qronos"):
        own = replace(scheme, target=target)
        quantized = gptq(weight, factor_of(inputs, exact, own), own)
        lost[target] = outputs_lost(quantized, weight, inputs, exact)
    assert lost["qronos"] < lost["gptaq"] < lost["gptq"]


def test_the_error_is_what_is_lost_above_the_least_possible(monkeypatch):
    monkeypatch.setattr("llmlab.quantization.targets.BETA", 1)
    weight, inputs, exact = drifted(rows=48, columns=128)
    scheme = Scheme(3, 32, target="qronos", damping=1e-6)
    factor = factor_of(inputs, exact, scheme)
    found = gptq(weight, factor, scheme)
    best = torch.linalg.lstsq(inputs.double(), (exact @ weight.T).double()).solution
    least = float((inputs.double() @ best - exact @ weight.T).square().sum())
    energy = float((inputs.double() @ best).square().sum())
    assert found.error == pytest.approx((outputs_lost(found, weight, inputs, exact) - least) / energy, rel=0.02)


def test_babais_bound_is_kept_and_near():
    """Without clipping; the mean loss is a third of the bound, where errors are uniform in their cells."""
    weight, inputs, _ = drifted(rows=48, columns=128)
    weight[:, 0] = 20  # rounded first, so that no other weight comes near the ends of its grid
    scheme = Scheme(8, -1, symmetric=True, act_order=False, search=False)
    found = gptq(weight, factor_of(inputs, inputs, scheme), scheme)
    assert ((found.codes > 0) & (found.codes < scheme.levels))[:, 1:].all()
    assert 0.2 * found.bound < found.error < found.bound


def test_what_is_off_adds_up_to_how_far_the_layers_outputs_are_off(tiny):
    """The second layer, with another input and its first Linear changed: its last one could make up for both."""
    rows = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    layer, call = copy.deepcopy(decoder_layers(tiny.model)[1][1]), layer_calls(tiny, rows)[1][1]
    own = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1))
    linears, beside, inputs = matrices(layer), Beside(own + 0.1), dict[str, torch.Tensor]()
    with torch.no_grad():
        beside.pass_through(layer, call, linears)
        first, last = beside.residual
        assert first.endswith(("o_proj", "out_proj")) and last.endswith(("down_proj", "fc2"))
        linears[first].weight.mul_(0.9)
        beside.watch(own, linears)
        for name in (first, last):
            linears[name].register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        output = call(layer, own)
        assert torch.allclose(beside.off(first, inputs[first])[1], torch.full_like(own, 0.1), atol=1e-6)
        x = inputs[last]
        dx, r = beside.off(last, x)
        off = r + (linears[last](x + dx) - linears[last](x)).view(r.shape)
    assert torch.allclose(off, beside.hidden_states - output, atol=1e-5)
    assert beside.off(last, x) == []  # it is solved: nothing is held any longer


def test_the_walk_carries_the_exact_model_beside_the_quantized_one(tiny, tmp_path):
    """The first Linears' inputs are the same, so their codes are; others' differ. A resumed job ends the same."""
    rows = torch.randint(0, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    plain = quantize(tiny, scheme=Scheme(3, 32), calibration=rows).model.state_dict()
    for target in ("gptaq", "qronos"):
        scheme = Scheme(3, 32, target=target)
        walk = Walk(tiny, scheme, rows=rows, keep=tmp_path / target)
        made = walk.run()
        assert made.transformation == f"{target} 3 bits, group 32"
        found = made.model.state_dict()
        names = [name for name in found if name.endswith("qweight")]
        same = {name: (plain[name] == found[name]).float().mean() for name in names}
        first = [name for name in names if ".0." in name and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")]
        assert all(same[name] == 1 for name in first)
        assert min(same.values()) < 0.9
        last = max(path.name for path in (tmp_path / target).glob("layer*"))
        (tmp_path / target / last).unlink()
        resumed = Walk(tiny, scheme, rows=rows, keep=tmp_path / target).run().model.state_dict()
        assert all(torch.equal(resumed[name], found[name]) for name in found)
