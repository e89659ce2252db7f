"""Steps over several devices: links, layouts, failures. `python -m` this file, under torchrun, is one of them."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from llmlab.base.clock import seconds_of
from llmlab.base.errors import RankError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import max_delta
from llmlab.bench.challenge import synthetic_sequences
from llmlab.bench.gpu_check.exact import NEW_TOKENS, TEXTS
from llmlab.bench.gpu_check.failing import fail, meet
from llmlab.bench.gpu_check.given import NATS, Finding, Given
from llmlab.bench.gpu_check.held import held_bytes
from llmlab.data import FULL_SET, Question
from llmlab.decoding.generate import generate
from llmlab.decoding.lookup import PromptLookup
from llmlab.jobs.over_ranks import SCHEDULES, ranks, timeline
from llmlab.model.card import ModelCard
from llmlab.model.load import model_card
from llmlab.model.sources import BUILTIN
from llmlab.sharding.cuts import Cuts, all_cuts
from llmlab.sharding.plan import plan

COPIED = 2**28  # bytes
ALL_END = 10.0  # seconds until no rank is left when one of them fails
GROWTH = 1.01  # of what a rank holds, when it goes back to a layout


def layouts(given: Given, card: ModelCard) -> list[Cuts]:
    """Every layout of a model over all devices; on CPU the first two, which have stages and parts of layers."""
    fitting = [cuts for cuts in all_cuts(given.devices) if not cuts.misfit(card.layers, card.kv_heads)]
    return fitting if given.on_gpu else fitting[:2]


def links(given: Given) -> Finding:
    """Which GPUs reach one another's memory, and how many bytes a second go from each to each."""
    pairs = list(permutations(range(given.devices), 2))
    apart = [f"{a} to {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    rates = []
    for a, b in pairs:
        source, target = (torch.empty(COPIED, dtype=torch.uint8, device=f"cuda:{index}") for index in (a, b))
        target.copy_(source)
        rates.append(COPIED / min(seconds_of(partial(target.copy_, source)) for _ in range(3)))
    told = f"no peer access from {', '.join(apart)}" if apart else "every pair has peer access"
    said = f"{told}; {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s from one to another"
    return Finding(min(rates) > 1e9, said, {"link_slowest": Metric(min(rates), "B/s")})


def scores(given: Given) -> Finding:
    """Every layout under both schedules, several passes each: the numbers of one device."""
    right = _flat(given.scored.log_probs)
    deltas, few = dict[str, float](), []
    for cuts in layouts(given, given.lm.card):
        for schedule in SCHEDULES if cuts.pipeline > 1 else SCHEDULES[:1]:
            result = given.group.score(  # a question a pass
                BUILTIN, given.questions, plan=cuts, dtype="fp32", schedule=schedule, nodes=1
            )
            deltas[f"{cuts.name}, {schedule}"] = max_delta(right, _flat(result.log_probs))
            few += [cuts.name] if cuts.pipeline > 1 and result.passes < 5 * cuts.data else []
    worst = max(deltas, key=lambda name: deltas[name])
    said = f"{len(deltas)} layouts and schedules, at most {deltas[worst]:.1e} nats off one device ({worst})"
    return Finding(deltas[worst] <= NATS and not few, said + (f"; under 5 passes: {few}" if few else ""))


def completions(given: Given) -> Finding:
    """Greedy ids of every layout, plain and with prompt lookup: those of one device."""
    prompts = [TEXTS[k % len(TEXTS)] for k in range(given.devices)]
    right = [completion.ids for completion in generate(given.lm, prompts, max_new_tokens=NEW_TOKENS).completions]
    wrong, tried = [], 0
    for cuts in reversed(layouts(given, given.lm.card)):  # the last one is loaded
        own = prompts[: cuts.data]  # one for each replica
        for draft in (None, PromptLookup()):
            options = {"max_new_tokens": NEW_TOKENS, "draft": draft}
            ids = [completion.ids for completion in given.group.completions(BUILTIN, own, cuts, "fp32", options)]
            wrong += [f"{cuts.name}, {draft.name if draft else 'plain'}"] if ids != right[: cuts.data] else []
            tried += 1
    told = f"differ: {'; '.join(wrong)}" if wrong else "the ids of one device"
    return Finding(not wrong, f"{NEW_TOKENS} tokens a prompt, {tried} layouts and drafts: {told}")


def switching(given: Given) -> Finding:
    """Two layouts in turn, three times (on CPU twice): what a rank holds does not grow."""
    first, last, *_ = layouts(given, given.lm.card)
    held: list[list[int]] = [
        given.group.run(held_bytes, given.group.job(BUILTIN, cuts, "fp32"))
        for cuts in [first, last] * (3 if given.on_gpu else 2)
    ]
    growth = max(after / before for k in (0, 1) for before, after in zip(held[k], held[k - 2], strict=True))
    said = f"{first.name} and {last.name} in turn: a rank holds {growth:.3f} times what it held at first"
    return Finding(growth <= GROWTH, said)


def full_depth(given: Given) -> Finding:
    """Questions through LLaMA-30B's shape at full depth, by pipeline and by tensors: seconds, bubble."""
    name, n = ("random:llama-30b", 200) if given.on_gpu else (BUILTIN, 4)
    card, values, said = model_card(name), dict[str, Metric](), []
    # Random weights know no text: they are asked token ids.
    asked: Any = synthetic_sequences(n, card.vocab_size) if given.on_gpu else given.questions[:n]
    memory = torch.cuda.get_device_properties(0).total_memory if given.on_gpu else psutil.virtual_memory().total
    planned = {layout.name: layout for layout in plan(card, devices=given.devices, memory=memory).layouts}
    for cuts in (Cuts(pipeline=given.devices), Cuts(tensor=given.devices)):
        if cuts not in layouts(given, card):
            continue
        if problem := planned[cuts.name].problem:
            said.append(f"{cuts.name}: {problem}")
            continue
        given.group.score_parts(name, asked[:4], cuts, dtype=given.dtype)  # loads and warms up
        parts = given.group.score_parts(name, asked, cuts, dtype=given.dtype)
        seconds = max(part.seconds for part in parts)
        bubble = timeline(parts).bubble
        values |= {f"seconds_full_set {cuts.name}": Metric(seconds * FULL_SET / n, "s")}
        values |= {f"bubble {cuts.name}": Metric(bubble)}
        said.append(f"{cuts.name}: {seconds * FULL_SET / n:.0f} s for the full set, bubble {bubble:.1%}")
    return Finding(bool(values) or None, f"{name}, {n} questions: {'; '.join(said)}", values)


def failures(given: Given) -> Finding:
    """One rank raises, is killed, or runs out of memory while the others wait: all end soon, and give memory back."""
    index, said, right = min(2, given.devices - 1), [], True
    before = _free(given)
    for how in ("raise", "kill", "memory") if given.on_gpu else ("kill", "memory"):  # on CPU memory raises, too
        group = given.group
        group.run(meet)
        begin, who = time.monotonic(), None
        try:
            group.run(fail, index, how)
        except RankError as error:
            who = error.rank
        seconds = time.monotonic() - begin
        given.end_ranks()
        left = [child.pid for child in psutil.Process().children() if "llmlab.sharding.rank" in child.cmdline()]
        returned = all(now > 0.95 * free for now, free in zip(_free(given), before, strict=True))
        said.append(f"{how}: all ended after {seconds:.1f} s{'' if returned else ', memory is not back'}")
        right = right and who == index and seconds <= ALL_END and not left and returned
    return Finding(right, f"rank {index}; {'; '.join(said)}")


def _free(given: Given) -> list[int]:
    """Free bytes of each GPU; nothing to compare elsewhere."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(given.devices)] if given.on_gpu else []


def torchrun(given: Given) -> Finding:
    """The same questions by processes that torchrun starts."""
    given.end_ranks()  # their memory
    right = _flat(given.scored.log_probs)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.json"
        processes = given.devices if given.on_gpu else 2
        count = ["--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", "torch.distributed.run", *count, "-m", __name__]
        command += [given.device.type, str(given.devices), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            return Finding(False, f"status {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
        delta = max_delta(right, json.loads(out.read_text()))
    return Finding(delta <= NATS, f"{processes} processes, {delta:.1e} nats off one device")


def joined(device: str, devices: int, out: Path) -> None:
    """What each process of torchrun runs: score the questions in a pipeline of all, and write what came out."""
    with ranks(device=device) as group:
        questions: list[Question] = Given(torch.device(device), devices).questions
        result = group.score(BUILTIN, questions, pipeline=group.size, dtype="fp32", nodes=1)
        if group.rank == 0:
            out.write_text(json.dumps(_flat(result.log_probs)))


def _flat(log_probs: list[list[float]]) -> list[float]:
    return [float(value) for value in np.concatenate(log_probs)]


if __name__ == "__main__":
    joined(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
