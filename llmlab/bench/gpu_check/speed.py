"""Steps on one device that say how fast it is, beside the limits that were measured on it.

The models are LLaMA's shapes with random weights. On a CPU they are small and the numbers mean nothing, but the steps
run.
"""

import importlib
import time
from functools import partial

import torch

from llmlab.base.clock import faster, seconds_of
from llmlab.base.stats import Metric
from llmlab.bench.ablation import scoring_flops
from llmlab.bench.challenge import synthetic_sequences
from llmlab.bench.decoders import bytes_per_pass
from llmlab.bench.gpu_check.exact import calls, random_matrix
from llmlab.bench.gpu_check.given import Finding, Given
from llmlab.decoding.engine import Engine
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.measure.energy import measure_energy
from llmlab.measure.memory import peak_bytes
from llmlab.model.lm import DTYPES
from llmlab.model.load import load
from llmlab.model.sources import BUILTIN
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import quantize
from llmlab.scoring.attention import tries_attend
from llmlab.scoring.shared import passes
from llmlab.scoring.trie import question_tries
from llmlab.sharding.costs import DEVICES, device

LEAST = 0.5  # of what the data sheet says, of arithmetic and of memory traffic: below it something is wrong
PASSES = {"cpu": (256,), "cuda": (2048, 4096, 8192, 16384)}  # nodes
SHAPES = {"cpu": ((576, 1536),), "cuda": ((6656, 6656), (17920, 6656), (6656, 17920))}  # outputs, inputs: LLaMA-30B's
DECODED = {"cpu": 8, "cuda": 64}  # tokens
MORE_MEMORY = 1.05  # of the weights, at the peak of loading them


def limits(given: Given) -> Finding:
    """The roofline's two limits, against the data sheet where the card has one in devices.json."""
    peaks = given.peaks
    known = (
        next((key for key in DEVICES if key in peaks.device.lower().replace(" ", "")), None) if given.on_gpu else None
    )
    said = f"{peaks.flops.value / 1e12:.3g} TFLOP/s in {peaks.dtype}, {peaks.bandwidth.value / 1e9:.0f} GB/s"
    values = {"peak_flops": peaks.flops, "peak_bandwidth": peaks.bandwidth}
    if known is None:
        return Finding(True, said, values)
    sheet = device(known)
    shares = (peaks.flops.value / sheet.flops, peaks.bandwidth.value / sheet.bandwidth)
    return Finding(min(shares) >= LEAST, f"{said}: {shares[0]:.0%} and {shares[1]:.0%} of {sheet.name}'s", values)


@torch.inference_mode()
def scoring_passes(given: Given) -> Finding:
    """Scoring passes of several sizes: nodes a second, MFU, and what is launched in each."""
    lm = given.random_model("llama-30b", layers=8)
    sizes = PASSES[given.device.type]
    tries = question_tries(synthetic_sequences(sizes[-1] // 100 + 4, lm.card.vocab_size))
    said, values, whole = [], dict[str, Metric](), True
    for size in sizes:
        batch = next(passes(lm, tries, size))
        some, n = [], 0
        for trie in tries:  # a pass takes the first of them
            if n < batch.nodes:
                some.append(trie)
                n += len(trie)
        run = partial(lm.model, **batch.model)
        with tries_attend(lm):
            run()
            seconds = min(seconds_of(run) for _ in range(3))
            launched = sum(count for name, count in calls(run).items() if "LaunchKernel" in name)
        mfu = scoring_flops(lm, some, sum(trie.asked for trie in some)) / seconds / given.peaks.flops.value
        values |= {f"nodes_per_second {size}": Metric(batch.nodes / seconds, "node/s"), f"mfu {size}": Metric(mfu)}
        told = f", {launched} launches" if launched else ""
        said.append(f"{batch.nodes} nodes: {batch.nodes / seconds:.0f}/s, MFU {mfu:.0%}{told}")
        whole = whole and batch.nodes >= size / 2
    cut = "" if whole else "; a pass holds less than half of what it was given"
    return Finding(whole, f"{lm.name}, {lm.card.layers} layers: {'; '.join(said)}{cut}", values)


def decode_speeds(given: Given) -> Finding:
    """Tokens a second of greedy decoding: passes as they are, replayed, and with 4-bit weights; MBU beside them."""
    roomy = not given.on_gpu or torch.cuda.mem_get_info(given.device)[0] > 20e9
    lm = given.random_model("llama-7b", layers=None if roomy else 16)
    packed = quantize(lm, method="rtn", scheme=Scheme(4, 64, search=False))
    eager = Engine(lm)
    eager.recorder.records = False
    rates, values, said = dict[str, float](), dict[str, Metric](), []
    for name, engine in (("as they are", eager), ("replayed", Engine(lm)), ("4 bits", Engine(packed))):
        rates[name] = rate = _tokens_per_second(engine, DECODED[given.device.type])
        mbu = bytes_per_pass(engine.lm) * rate / given.peaks.bandwidth.value
        values |= {f"tokens_per_second {name}": Metric(rate, "token/s"), f"mbu {name}": Metric(mbu)}
        said.append(f"{name} {rate:.1f} tokens/s, MBU {mbu:.0%}")
    right = not given.on_gpu or rates["4 bits"] > rates["replayed"] > rates["as they are"]
    return Finding(right, f"{lm.name}, {lm.card.layers} layers: {'; '.join(said)}", values)


@torch.inference_mode()
def _tokens_per_second(engine: Engine, tokens: int) -> float:
    prompt = [7919 * i % engine.lm.card.vocab_size for i in range(64)]
    engine.start(1, len(prompt) + tokens + 8)
    last = [int(engine.prefill([prompt]).argmax())]

    def decode(count: int) -> None:
        for _ in range(count):
            logits = engine.forward([last])
            engine.keep([[0]])
            last[0] = int(logits[0, -1].argmax())

    decode(4)  # passes of this shape are recorded meanwhile
    return tokens / seconds_of(lambda: decode(tokens))


@torch.inference_mode()
def packed_products(given: Given) -> Finding:
    """4-bit products against those of plain weights in the fast dtype, by rows: up to where reading less is faster."""
    dtype, said, values, right = DTYPES[given.dtype], [], dict[str, Metric](), True
    for outputs, inputs in SHAPES[given.device.type]:
        linear = QuantLinear.pack(random_matrix((outputs, inputs), 4, 64, True), 4).to(given.device)
        linear.prepare(dtype)
        weight = linear.dequantize(dtype).contiguous()
        gains = {}
        for rows in (1, 4, 16, 64):
            x = torch.randn(rows, inputs, device=given.device, dtype=dtype)
            gains[rows] = faster(partial(linear, x), partial(torch.nn.functional.linear, x, weight), counted=5)
            values[f"speedup {outputs}x{inputs} {rows} rows"] = Metric(gains[rows], "x")
        told = ", ".join(f"{rows} rows {gain:.2f}x" for rows, gain in gains.items())
        said.append(f"{outputs} x {inputs} ({linear.kernel}): {told}")
        right = right and (gains[1] > 1 or not given.on_gpu)
    return Finding(right, f"over {given.dtype}: {'; '.join(said)}", values)


def power(given: Given) -> Finding:
    """Watts of two seconds of products, between an idle card's and what the card may draw."""
    x = torch.randn(4096, 4096, device=given.device, dtype=DTYPES[given.dtype])

    def work() -> None:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            seconds_of(lambda: x @ x)

    first = torch.device("cuda", 0)
    energy = measure_energy(work, first)
    if energy.joules is None:
        return Finding(None, str(energy))
    nvml = importlib.import_module("pynvml")
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    most, watts = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, energy.joules / energy.seconds
    said = f"{watts:.0f} W over {energy.seconds:.1f} s of products; the card may draw {most:.0f} W"
    return Finding(10 < watts < 1.1 * most, said, {"watts": Metric(watts, "W")})


def loading(given: Given) -> Finding:
    """What loading the built-in model takes of the GPU's memory at its peak, over the weights."""
    weights = given.fast.weight_bytes
    peak = peak_bytes(lambda: load(BUILTIN, dtype=given.dtype, device=given.device), given.device)
    assert peak is not None  # a GPU tells it always
    return Finding(peak <= MORE_MEMORY * weights, f"{peak / weights:.3f} times the weights at the peak")
