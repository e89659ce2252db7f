"""Every schedule of the package ends in NCCL's order, and the one that did not is found."""

from itertools import product

import pytest
import torch
from nccl import Deadlock, Network, Peers
from test_rehearsal import config

import llmlab
from llmlab.decoding.lookup import PromptLookup
from llmlab.jobs.rank_parts import Job, generate_part, score_part
from llmlab.kernels.plain import fastest_library
from llmlab.model.card import card_from_config
from llmlab.model.fill import empty_model
from llmlab.model.lm import LM
from llmlab.model.selfcheck import Check
from llmlab.model.sources import read_tokenizer, resolve
from llmlab.scoring.encode import Sequence
from llmlab.scoring.shared import TRIES, in_tries
from llmlab.sharding import pipeline, rehearsal
from llmlab.sharding.assemble import Place, assemble
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import Shard
from llmlab.sharding.pipeline import Stage, stage_layers
from llmlab.sharding.rank import Rank
from llmlab.sharding.tensor import Cut

pytestmark = pytest.mark.slow

NAME, LAYERS = "small", 4
PASSED = {name: Check(True, 0.0) for name in (TRIES, "the static KV cache")}


@pytest.fixture(scope="module")
def whole():
    """A small model with random weights."""
    fastest_library(torch.float32)  # measured once, not by every thread
    small = config("llama")
    small.num_hidden_layers = LAYERS
    model = rehearsal.random_model(small)
    return LM(model, None, card_from_config(small, NAME, "fp32"), NAME)


@pytest.fixture(scope="module")
def writer():
    """One that knows a real tokenizer's tokens."""
    large = config("llama")
    large.num_hidden_layers, large.vocab_size = LAYERS, 49152
    card = card_from_config(large, NAME, "fp32")
    return LM(rehearsal.random_model(large), read_tokenizer(resolve("smollm2")), card, NAME)


@pytest.fixture
def network(monkeypatch):
    network = Network()
    monkeypatch.setattr("torch.distributed.barrier", network.barrier)
    monkeypatch.setattr("llmlab.base.clock.synchronize", network.synchronize)
    return network


def ranks_of(network, whole, cuts):
    """The ranks of a layout, each with its part of the model loaded."""
    ranks = []
    for index, (data, stage, part) in enumerate(product(*map(range, (cuts.data, cuts.pipeline, cuts.tensor)))):
        stages = Peers(network, ("stages", data, part), cuts.pipeline, stage)
        parts = Peers(network, ("parts", data, stage), cuts.tensor, part)
        layers = stage_layers(LAYERS, cuts.pipeline)[stage]
        place = Place(data, Stage(stages), layers, Cut(part, cuts.tensor), parts)
        model = empty_model(whole.model.config, torch.float32)
        assemble(model, rehearsal._InMemory(whole.model), torch.device("cpu"), place)
        shard = Shard(LM(model, whole.tokenizer, whole.card, NAME), place, 0.0, 0, 0)
        rank = Rank(index, cuts.ranks, torch.device("cpu"))
        rank.kept[f"{NAME} None {cuts.name} fp32"] = shard
        ranks.append(rank)
    return ranks


def questions(count):
    """Each is a pass of its own where a pass has one node; they differ in length."""
    return [
        Sequence(number, ending, [(7 * number + 3 * i + ending * (i > 4)) % 150 for i in range(6 + number % 3)], 5)
        for number in range(count)
        for ending in range(2)
    ]


LAYOUTS = [Cuts(1, tensor, stages) for stages in (2, 3, 4) for tensor in (1, 2)] + [Cuts(2, 1, 2), Cuts(2, 2, 2)]


@pytest.mark.parametrize("cuts", LAYOUTS, ids=lambda cuts: cuts.name)
@pytest.mark.parametrize("schedule", ["naive", "micro-batches"])
def test_every_schedule_ends(network, whole, cuts, schedule):
    """1 to 9 batches for each replica; and what they score is what the whole model scores."""
    ranks, job = ranks_of(network, whole, cuts), Job(NAME, cuts, "fp32", PASSED)
    alone = in_tries(whole, questions(9 * cuts.data)).log_probs
    for batches in range(1, 10):
        asked = questions(batches * cuts.data)
        parts = network.run(score_part, *((rank, job, asked, schedule, 1) for rank in ranks))
        assert {len(part.nodes) for part in parts} == {batches} == {len(part.busy) for part in parts}
        scored = {number: value for part in parts for number, value in part.log_probs.items()}
        assert [scored[number] for number in range(len(asked))] == pytest.approx(alone[: len(asked)], abs=1e-3)


def old_naive(network, rank, batches, synchronize):
    """The naive schedule as it was: each receive posted a batch ahead, and a wait for the whole device."""
    place, model = rank.kept[next(iter(rank.kept))].place, rank.kept[next(iter(rank.kept))].lm.model
    stage, peers = place.stage, place.stage.peers
    sending, coming = [], pipeline._receive(model, stage, batches[:1])
    for number, batch in enumerate(batches):
        if number and stage.first:
            peers.receive(torch.empty(1), stage.size - 1)()
        if coming is not None:
            wait, stage.hidden_states = coming
            wait()
            coming = pipeline._receive(model, stage, batches[number + 1 : number + 2])
        output = pipeline._compute(model, stage, batch)
        if synchronize:
            network.synchronize()
        if not stage.last:
            sending.append(peers.send(output, stage.index + 1))
        elif number + 1 < len(batches):
            peers.send(torch.empty(1), 0)()
    for wait in sending:
        wait()


@pytest.mark.parametrize(
    ("stages", "count", "synchronize", "ends"),
    [(2, 1, True, True), (2, 3, True, False), (3, 3, True, False), (4, 3, True, False),
     (2, 3, False, False), (3, 3, False, True)],
)  # fmt: skip
def test_the_old_order_of_the_naive_schedule_is_found(network, whole, stages, count, synchronize, ends):
    """Its posted receive waits for a send that hangs on the word of who waits; of two stages also without that wait,
    because the word would travel behind that receive."""
    ranks = ranks_of(network, whole, Cuts(pipeline=stages))
    batch = {"input_ids": torch.arange(5)[None], "use_cache": False, "logits_to_keep": 1}
    arguments = [(network, rank, [batch] * count, synchronize) for rank in ranks]
    if ends:
        network.run(old_naive, *arguments)
        return
    with pytest.raises(Deadlock):
        network.run(old_naive, *arguments)


PROMPTS = ["one two three one two three one two three one two", "A cat sat. A cat sat. A cat sat. A cat"]
DECODED = [(Cuts(pipeline=2), False), (Cuts(tensor=2, pipeline=2), True), (Cuts(pipeline=3), True),
           (Cuts(pipeline=4), False), (Cuts(data=2, pipeline=2), True)]  # fmt: skip


def write(network, writer, cuts, drafting):
    """The ids that each rank's replica writes, where each rank has a clock of its own: to some wide passes are dear."""
    ranks, job = ranks_of(network, writer, cuts), Job(NAME, cuts, "fp32", PASSED)
    options = {"max_new_tokens": 8, "batch_size": 2}

    def part(rank):
        return generate_part(rank, job, PROMPTS, options | ({"draft": [PromptLookup()]} if drafting else {}))

    return network.run(part, *((rank,) for rank in ranks))


@pytest.fixture
def clocks(network, monkeypatch):
    """Seconds of a pass that differ from rank to rank: on every other one wide passes are dear."""

    def seconds_of(run):
        width = len(run.args[0][0])
        if width < 3:  # some are enough
            run()
        return 1.0 + 10 * width * (network.here.rank % 2)

    monkeypatch.setattr("llmlab.decoding.timing.seconds_of", seconds_of)


@pytest.mark.parametrize(("cuts", "drafting"), DECODED, ids=str)
def test_decoding_ends_with_the_ids_of_one_device(network, writer, clocks, cuts, drafting):
    alone = llmlab.generate(writer, PROMPTS, max_new_tokens=8, batch_size=2)
    ids = [completion.ids for completion in alone.completions]
    for data, result in filter(None, write(network, writer, cuts, drafting)):
        assert [completion.ids for completion in result.completions] == ids[data :: cuts.data]
        assert not drafting or result.speculation.drafted


def test_clocks_that_differ_are_found_where_ranks_do_not_agree(network, writer, clocks, monkeypatch):
    monkeypatch.setattr(Shard, "agree", lambda shard, seconds: seconds)
    with pytest.raises(Deadlock):
        write(network, writer, Cuts(pipeline=2), drafting=True)
