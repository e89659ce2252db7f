"""Passes captured once and replayed, on CPU: a stand-in for CUDA's graphs knows every address that it was given.

Like them it does again what it saw, on the tensors that it saw, and Python does not run. It refuses what CUDA refuses
while it captures: to wait for a number.
"""

import warnings
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmlab
from llmlab.decoding.engine import Engine
from llmlab.decoding.lookup import PromptLookup
from llmlab.kernels import graphs
from llmlab.kernels.graphs import capture
from llmlab.kernels.replay import RECORD, Recorder

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    """Of the memory behind a tensor; oneDNN's tell none, so they stand for themselves."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """A graph: the operations of a captured pass, in order, with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.made = {}  # tensors by address: those that the pass made itself, and keeps
        self.reads, self.writes = {}, {}  # those from outside

    def capture(self, run):
        with self:
            return run()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.name().split(".")[0] in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = operation._schema.arguments
        written = [a for a, place in zip(args, given, strict=False) if place.alias_info and place.alias_info.is_write]
        inputs = {address(tensor): tensor for tensor in tensors((args, kwargs))}
        for where, tensor in inputs.items():
            if where not in self.made:
                self.reads[where] = tensor
        for tensor in tensors(written):
            if address(tensor) not in self.made:
                self.writes[address(tensor)] = tensor
        result = operation(*args, **kwargs)
        fresh = [tensor for tensor in tensors(result) if address(tensor) not in inputs]
        self.made |= {address(tensor): tensor for tensor in fresh}
        self.operations.append((operation, args, kwargs, result, {id(tensor) for tensor in fresh}))
        return result

    def replay(self):
        for operation, args, kwargs, result, fresh in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if id(old) in fresh:  # what the pass made lies where it lay
                    old.copy_(new)

    def strangers(self, known):
        """What the pass read from outside beyond these tensors: by the next replay it may be gone."""
        at_hand = {address(tensor) for tensor in known}
        return [tensor for where, tensor in self.reads.items() if where not in at_hand]


def captured(lm, rows, **options):
    """An engine that captures its passes, as on a GPU, and the tapes that it makes."""
    engine, tapes = Engine(lm, **options), []

    def graph():
        tapes.append(Tape())
        return tapes[-1]

    engine.recorder = Recorder(engine.model, compile=engine.compile, graph=graph)
    engine.start(len(rows), 64)
    return engine, engine.prefill(rows), tapes


PAST = [[5, 17, 99, 4], [200, 7], [31, 8, 1000, 12, 77]]


def step(engine, logits, tokens=1):
    """The next pass of greedy decoding, with drafted tokens behind it that are not kept."""
    drafted = [[token] + [(token + i) % 1000 for i in range(1, tokens)] for token in logits.argmax(-1).tolist()]
    logits = engine.forward(drafted)[:, 0]
    engine.keep([[0]] * len(drafted))
    return logits


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_replay_equals_the_eager_pass_and_touches_nothing_else(tiny, rows, width):
    eager, logits = Engine(tiny), []
    eager.recorder.records = False
    engine, first, tapes = captured(tiny, PAST[:rows])
    eager.start(rows, 64)
    logits.append(eager.prefill(PAST[:rows]))
    assert torch.equal(first, logits[0])
    replayed = [first]
    with warnings.catch_warnings(action="error", category=UserWarning):  # a capture that fails is one
        for _ in range(RECORD + 4):
            logits.append(step(eager, logits[-1], width))
            replayed.append(step(engine, replayed[-1], width))
    # Compared last: a replay may overwrite others.
    assert all(map(partial(torch.allclose, atol=1e-4), replayed, logits))
    (tape,) = tapes
    assert len(engine.recorder.replays) == 1
    cache = [tensor for pair in engine.cache.buffers.values() for tensor in pair]
    weights = [*engine.model.parameters(), *engine.model.buffers()]
    held = [tensor for module in engine.model.modules() for tensor in tensors(list(vars(module).values()))]
    assert {address(tensor) for tensor in cache} == tape.writes.keys()
    inputs = tape.strangers([*cache, *weights, *held])
    padded = len(engine._pending[0])  # tokens of a row
    # Token ids, positions, slots and the mask, where the capture has put them.
    assert sorted(tuple(t.shape[:2]) for t in inputs) == sorted([*[(rows, padded)] * 3, (rows, 1)])


def test_another_cache_is_captured_anew(tiny):
    engine, logits, tapes = captured(tiny, PAST)
    for _ in range(RECORD + 1):
        logits = step(engine, logits)
    engine.start(3, 1000)
    logits = engine.prefill(PAST)
    expected = Engine(tiny)
    expected.start(3, 1000)
    plain = expected.prefill(PAST)
    for _ in range(RECORD + 2):
        logits, plain = step(engine, logits), step(expected, plain)
        assert torch.allclose(logits, plain, atol=1e-4)
    assert len(tapes) == 2
    assert not tapes[1].writes.keys() & tapes[0].writes.keys()


@pytest.mark.slow
def test_speculation_over_captured_passes_is_exact(tiny):
    prompts = ["a b c d a b c d a b", "one two one two one"]
    plain = llmlab.generate(tiny, prompts, max_new_tokens=24, batch_size=2)
    engine, _, tapes = captured(tiny, PAST)
    tree = PromptLookup(longest=3, shortest=1, branches=3)
    found = llmlab.generate(tiny, prompts, max_new_tokens=24, batch_size=2, engine=engine, draft=tree, k=3)
    assert [c.ids for c in found.completions] == [c.ids for c in plain.completions]
    assert len(tapes) > 1  # passes of several widths


def test_a_pass_that_waits_for_a_number_runs_uncaptured(tiny):
    engine, _, _ = captured(tiny, PAST[:1])
    inputs = (torch.tensor([[3]]), torch.tensor(2))

    def waits(ids, start):
        return torch.ones(1, int(start), 5) * ids[..., None]

    with pytest.warns(
        UserWarning, match="passes run uncaptured, with Python between their kernels: operation not perm"
    ):
        for _ in range(RECORD + 2):
            assert torch.equal(engine.recorder.run(waits, inputs, engine.cache), torch.full((1, 2, 5), 3))
    assert not engine.recorder.replays


@pytest.mark.parametrize("kind", ["replaced", "baked in"])
def test_a_pass_that_depends_on_more_than_its_inputs_is_not_replayed(tiny, kind):
    """A tensor allocated anew for every pass, and a number of Python's: a graph keeps those of the capture."""
    engine, _, _ = captured(tiny, PAST[:1])
    buffer = {"now": torch.zeros(1, 1, 5)}

    def run(ids):
        if kind == "replaced":
            buffer["now"] = buffer["now"] + ids[..., None]
            return buffer["now"]
        buffer["count"] = buffer.get("count", 0) + 1
        return ids[..., None] * torch.full((1, 1, 5), 1.0) * buffer["count"]

    with pytest.warns(UserWarning, match="run unrecorded: replayed logits differ"):
        for _ in range(RECORD):
            engine.recorder.run(run, (torch.tensor([[3]]),), engine.cache)
    assert not engine.recorder.replays


def test_the_stand_in_sees_what_would_go_wrong_on_a_gpu():
    state, elsewhere = torch.zeros(3), torch.ones(3)
    tape = Tape()
    replay = capture(tape, lambda x: x.add_(1) + state.add_(x) * elsewhere, (torch.zeros(3),))
    assert state.data_ptr() != elsewhere.data_ptr()
    assert [tensor is elsewhere for tensor in tape.strangers([state])].count(True) == 1
    assert address(state) in tape.writes and len(tape.writes) == 2  # and an input, which the next replay would find so
    assert torch.equal(replay(torch.ones(3)), torch.full((3,), 2.0 + 3.0))  # the capture added 1 to the state, this 2


def test_two_kernels_are_compared_by_their_replays_on_a_gpu(monkeypatch):
    speeds, ran, x = iter([2.0, 1.5, 0.9]), [], torch.ones(8)

    def kernel(rows):
        ran.append(rows)
        return x[:rows] + 1

    def faster(first, second, counted):
        first(), second()
        return next(speeds)

    monkeypatch.setattr(graphs, "CudaGraph", lambda device: Tape())
    monkeypatch.setattr(graphs, "faster", faster)
    assert graphs.rows_up_to((1, 2, 4, 8), kernel, kernel, torch.device("cuda")) == 2
    assert ran == [1] * 4 + [2] * 4 + [4] * 4  # each is compiled and captured; a replay runs no Python
