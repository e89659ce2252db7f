"""Steps on one device that hold every fast path against the plain one, on real values."""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable

import torch

from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import max_delta
from llmlab.bench.decoders import Decoder, own, transformers_generate
from llmlab.bench.gpu_check.given import NATS, Finding, Given
from llmlab.bench.scoring import harness_scorer
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import encode_prompts
from llmlab.jobs.own_draft import self_4bit
from llmlab.kernels.packed_linear import TOLERANCE, QuantLinear
from llmlab.kernels.packing import BITS, Quantized
from llmlab.model.lm import DTYPES, decoder_layers
from llmlab.quantization.gptq import Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, codes_of, group_grids
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import encode

GROUPS, ROWS = (32, 64, 128, -1), (1, 2, 5, 16, 17, 64)
SMALL, LARGE = (96, 256), (6656, 17920)  # outputs, inputs: the second are LLaMA-30B's, of an MLP's last matrix
ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}  # relative error of a packed product on a GPU, by dtype
TEXTS = ("The capital of France is", "one two three four one two three four one two", "def add(a, b):")
NEW_TOKENS = 16
SAME_CODES = 0.98  # share of GPTQ's codes: a rounding that lies in the middle may go either way
MATH = "aten::_scaled_dot_product_attention_math"  # attention that writes every score into memory


def kernels(given: Given) -> Finding:
    """Packed products of every width, grouping and order, for few and many rows of each dtype, against fp64."""
    errors: dict[str, list[float]] = {}
    unpacked: set[str] = set()
    cases = [(SMALL, *case) for case in itertools.product(BITS, GROUPS, (True, False))]
    cases += [(LARGE, 4, 64, True)] if given.on_gpu else []
    dtypes = [name for name in DTYPES if name in ("fp32", "fp16", given.dtype) or not given.on_gpu]
    for shape, bits, group_size, in_order in cases:
        matrix = random_matrix(shape, bits, group_size, in_order)
        exact = matrix.dequantize().double()
        linear = QuantLinear.pack(matrix, bits).to(given.device)
        for name in dtypes:
            with warnings.catch_warnings(action="ignore"):  # of what has no packed kernel, which is told below
                linear.prepare(DTYPES[name])
                for rows in ROWS:
                    x = torch.randn(rows, shape[1]).to(DTYPES[name])
                    product = linear(x.to(given.device)).cpu().double()
                    expected = x.double() @ exact.T
                    errors.setdefault(name, []).append(float((product - expected).norm() / expected.norm()))
            if linear.fast is None:
                unpacked.add(f"{bits} bits, groups of {group_size}, {name}")
    bounds = ROUNDING if given.on_gpu else dict.fromkeys(DTYPES, TOLERANCE)
    said = ", ".join(f"{name} {max(values):.1e}" for name, values in errors.items())
    said = f"{sum(map(len, errors.values()))} products, largest relative error: {said}"
    if unpacked and given.on_gpu:
        said += f"; without a packed kernel: {'; '.join(sorted(unpacked))}"
    right = all(max(values) <= bounds[name] for name, values in errors.items())  # never true of NaN
    return Finding(right and not (unpacked and given.on_gpu), said)


def random_matrix(shape: tuple[int, int], bits: int, group_size: int, in_order: bool) -> Quantized:
    """A quantized matrix [outputs, inputs] of random codes, scales and zero points; groups are runs if `in_order`."""
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    groups = torch.arange(columns) // size
    zeros = torch.randint(1, 1 << bits, (rows, columns // size), dtype=torch.uint8)
    scales = torch.rand(rows, columns // size).half() / (1 << bits)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    return Quantized(codes, scales, zeros, (groups if in_order else groups[torch.randperm(columns)]).int())


def scoring(given: Given) -> Finding:
    """Shared prefixes against one sequence an ending and against lm-evaluation-harness in fp32; the fast dtype."""
    sequences = encode(given.lm, given.questions)
    values = shared.log_probs(given.lm, sequences).log_probs
    deltas = {"reference": max_delta(values, reference.log_probs(given.lm, sequences).log_probs)}
    try:
        deltas["lm-eval"] = max_delta(values, harness_scorer(given.lm, given.questions, 8)())
        without = ""
    except InputError as error:  # it is no dependency of a server
        without = f"; {error}"
    check = shared.trie_check(given.fast)
    told = ", ".join(f"{delta:.1e} nats off {name}" for name, delta in deltas.items())
    half = f"{given.dtype}: {check.reason or f'{check.difference:.1e} nats a token off the plain pass'}"
    right = check.passed and max(deltas.values()) <= NATS
    return Finding(right, f"{len(values)} endings, {told}; {half}{without}")


def decoding(given: Given) -> Finding:
    """Greedy ids of the engine, plain and with every draft, against those of transformers."""
    texts = TEXTS if given.on_gpu else TEXTS[1:2]
    prompts = encode_prompts(given.writer, list(texts), max_new_tokens=NEW_TOKENS, chat=False)
    engine = Engine(given.writer)
    packed = self_4bit(given.writer)
    right = _ids(transformers_generate(given.writer, NEW_TOKENS), prompts)
    drafts = ("", "lookup", "self-4bit", "lookup, self-4bit")[:: 1 if given.on_gpu else 3]
    others = {draft or "plain": _ids(own(engine, NEW_TOKENS, draft, packed), prompts) for draft in drafts}
    wrong = [draft for draft, ids in others.items() if ids != right]
    said = (
        f"{sum(map(len, right))} tokens, {', '.join(others)}: {'the ids of transformers' if not wrong else 'differ: '}"
    )
    return Finding(not wrong, said + ", ".join(wrong))


def _ids(decoder: Decoder, prompts: list[list[int]]) -> list[list[int]]:
    return [decoder.run([prompt]).ids[0] for prompt in prompts]


@torch.inference_mode()
def replay(given: Given) -> Finding:
    """Passes that are recorded and replayed (on a GPU: CUDA graphs) against the same passes as they are."""
    eager, recorded = Engine(given.writer), Engine(given.writer)
    eager.recorder.records = False
    prompt, tokens = given.writer.encode(TEXTS[1]), given.writer.encode(TEXTS[2])
    logits = []
    for engine in (eager, recorded):
        engine.start(1, 64)
        rows = [engine.prefill([prompt])]
        for token in tokens + tokens:
            rows.append(engine.forward([[token]])[:, 0])
            engine.keep([[0]])
        logits.append(torch.cat(rows).float().log_softmax(-1))
    difference = float((logits[0] - logits[1]).abs().max())
    replays = len(recorded.recorder.replays)
    said = f"{replays} shapes of passes replayed, {difference:.1e} nats off the passes as they are"
    return Finding(replays > 0 and difference <= NATS, said)


@torch.inference_mode()
def quantizing(given: Given) -> Finding:
    """GPTQ's codes of a real matrix for real inputs, against the same algorithm column by column in fp64."""
    _, layers = decoder_layers(given.lm.model)
    size, scheme = 256, Scheme(4, 64)
    weight = layers[0].get_parameter("self_attn.q_proj.weight")[:size, :size]
    text = " ".join(q.context for q in given.questions)
    inputs = given.lm.model.get_input_embeddings()(torch.tensor(given.lm.encode(text), device=given.device))[:, :size]
    hessian = Hessian(size, given.device)
    hessian.add(inputs / inputs.std())
    factor = factorize(hessian.matrix(), scheme)
    codes = gptq(weight, factor, scheme).codes.cpu()
    right = plain_gptq(weight.cpu(), hessian.matrix().cpu(), scheme, factor.damping)
    same = float((codes == right).double().mean())
    return Finding(same >= SAME_CODES, f"{same:.2%} of {codes.numel():,} codes equal those of fp64, column by column")


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, damping: float) -> torch.Tensor:
    """Codes of GPTQ as eq. 2 of its paper states it: the inverse is computed anew for the columns that are left.

    weight [rows, columns], hessian [columns, columns]; for act-order with grids that are fixed beforehand.
    """
    scales, zeros = group_grids(weight.float(), scheme, hessian.diagonal())
    order = torch.argsort(hessian.diagonal(), descending=True)
    h = hessian.double()[order][:, order]
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    w, codes = weight.double()[:, order], torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        inverse = torch.linalg.inv(h[j:, j:])
        scale, zero = scales[:, column // scheme.group_size], zeros[:, column // scheme.group_size]
        q = codes_of(w[:, j].float(), scale, zero, scheme)
        error = (w[:, j] - (q - zero) * scale) / inverse[0, 0]
        w[:, j:] -= torch.outer(error, inverse[0])
        codes[:, column] = q
    return codes.to(torch.uint8)


def attention(given: Given) -> Finding:
    """No attention of a scoring pass and of decoding by torch's slow kernel that keeps every score."""
    sequences = encode(given.fast, given.questions)
    prompts = encode_prompts(given.fast, list(TEXTS[:1]), max_new_tokens=4, chat=False)
    work: dict[str, Callable[[], object]] = {
        "scoring": lambda: shared.log_probs(given.fast, sequences),
        "decoding": lambda: own(Engine(given.fast), 4).run(prompts),
    }
    slow = {name: calls(run)[MATH] for name, run in work.items()}
    told = ", ".join(f"{count} times in {name}" for name, count in slow.items())
    return Finding(
        not any(slow.values()), f"{given.dtype}: the slow kernel {told}", {"slow_attention": Metric(sum(slow.values()))}
    )


def calls(run: Callable[[], object]) -> Counter[str]:
    """How often each operation was called, and on a GPU each call of its driver, while `run` ran."""
    with torch.profiler.profile() as profile:
        run()
    return Counter({event.key: event.count for event in profile.key_averages()})
