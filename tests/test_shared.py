"""Shared-prefix scoring is exact: tries, packing and attention against the definition."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.scoring import reference, shared
from llmlab.scoring.attention import TrieMasks, ancestor_mask
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.pack import profile, take
from llmlab.scoring.trie import build, question_tries


def ancestors(trie):
    """For each node the nodes from the root to it, by the intervals."""
    return [[j for j in range(i + 1) if i < trie.subtree_ends[j]] for i in range(len(trie))]


# Sequences over few token ids: endings that are equal, prefixes of one another, one token long, of different contexts.
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@st.composite
def sequence_sets(draw):
    made = []
    for question in range(draw(st.integers(1, 4))):
        context = draw(tokens)
        for ending in range(draw(st.integers(1, 5))):
            ids = context + draw(tokens)
            # Now and then the ending's first token merges with the context's last: another context of the same length.
            if draw(st.booleans()) and draw(st.booleans()):
                ids[len(context) - 1] = 9
            made.append(Sequence(question, ending, ids, len(context)))
    return made


@settings(max_examples=200, deadline=None)
@given(sequence_sets(), st.booleans())
def test_every_sequence_is_a_path_of_its_trie(sequences, share_endings):
    tries = question_tries(sequences, share_endings=share_endings)
    found = {}
    for trie in tries:
        paths = ancestors(trie)
        assert trie.depths == [len(path) - 1 for path in paths]
        for node, token, number in trie.scored:
            prefix = [trie.ids[j] for j in paths[node]]
            found.setdefault(number, []).append((prefix, token))
        if share_endings:  # no two nodes stand for the same prefix
            prefixes = [tuple(trie.ids[j] for j in path) for path in paths]
            assert len(set(prefixes)) == len(prefixes)
    for number, s in enumerate(sequences):
        assert found[number] == [(s.ids[:k], s.ids[k]) for k in range(s.n_context, len(s.ids))]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence_sets(), st.integers(1, 40))
def test_shared_equals_reference_for_any_tries_and_budget(tiny, sequences, budget):
    expected = reference.log_probs(tiny, sequences).log_probs
    scores = shared.log_probs(tiny, sequences, budget=budget)
    assert scores.log_probs == pytest.approx(expected, abs=2e-4)
    assert scores.work.tokens == sum(map(len, question_tries(sequences)))


@settings(max_examples=50, deadline=None)
@given(sequence_sets())
def test_the_mask_lets_a_node_see_its_ancestors(sequences):
    for trie in question_tries(sequences):
        mask = ancestor_mask(trie, torch.float32, torch.device("cpu"))
        assert mask.shape == (len(trie), len(trie))
        for node, path in enumerate(ancestors(trie)):
            assert (mask[node] == 0).nonzero().flatten().tolist() == path


@pytest.mark.slow
def test_real_rows_shared_equals_reference_in_fp32(smollm2, rows):
    sequences = encode(smollm2, rows[20:32])
    expected = reference.log_probs(smollm2, sequences).log_probs
    for budget in (200, 2000):
        scores = shared.log_probs(smollm2, sequences, budget=budget)
        assert np.abs(np.array(scores.log_probs) - np.array(expected)).max() <= 5e-4
        assert scores.work.tokens < 0.62 * sum(len(s.ids) for s in sequences)
        assert scores.work.asked < scores.work.tokens


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_close(tiny_folders, rows, dtype):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype=dtype)
    a = llmlab.score(lm, rows[:6], method="reference")
    b = llmlab.score(lm, rows[:6], method="shared")
    scale = np.abs(np.array(a.log_probs)).max()
    assert np.abs(np.array(a.log_probs) - np.array(b.log_probs)).max() < 0.02 * scale


def test_tokens_are_reported(tiny, rows):
    result = llmlab.score(tiny, rows[:8])
    assert result.method == "shared"
    assert result.tokens < result.tokens_full == sum(len(s.ids) for s in encode(tiny, rows[:8]))
    assert f"{result.tokens:,} tokens computed for {result.tokens_full:,}" in result.protocol
    assert result.padding == 0
    assert 0 < llmlab.score(tiny, rows[:8], method="reference").padding < 1


def test_the_example_of_the_trie_module():
    context = [1, 2, 3]
    endings = [[4, 5, 6, 7], [4, 5, 6, 8], [4, 9], [10]]
    sequences = [Sequence(0, i, context + e, 3) for i, e in enumerate(endings)]
    trie = build(sequences, [0, 1, 2, 3])
    assert trie.ids == [1, 2, 3, 4, 5, 6]
    pairs = {(node, token) for node, token, _ in trie.scored}
    assert pairs == {(2, 4), (3, 5), (4, 6), (5, 7), (5, 8), (3, 9), (2, 10)}


def test_passes_keep_to_their_budget(tiny, rows):
    tries = question_tries(encode(tiny, rows[:12]))
    longest = max(map(len, tries))
    waiting = sorted(tries, key=len)
    taken = []
    while waiting:
        batch = take(waiting, 300, TrieMasks)
        assert sum(map(len, batch)) <= max(300, longest)
        taken += batch
    assert sorted(map(id, taken)) == sorted(map(id, tries))
    assert [len(t) for t in taken] == sorted((len(t) for t in tries), reverse=True)
    batches = list(shared.passes(tiny, tries, 300))
    assert sum(batch.nodes for batch in batches) == sum(map(len, tries))
    assert sorted(n for b in batches for _, _, n in b.scored) == sorted(n for t in tries for _, _, n in t.scored)


def test_the_profile_is_measured_on_the_jobs_own_passes_and_kept(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    first = profile(tiny)
    assert first.budget() == 512
    first.observe(512, 512, 100.0)  # warm-up: not counted
    seconds = {256: 1.0, 512: 1.5, 1024: 2.5, 2048: 6.0}
    while not first.complete:
        budget = first.budget()
        first.observe(budget, budget, seconds[budget])
    assert first.budget() == 1024  # 410 nodes/s, more than 256, 341 and 341
    again = profile(tiny)
    assert again.complete
    assert again.budget() == 1024
    again.path.write_text("{")
    assert not profile(tiny).complete


def test_a_question_longer_than_every_budget_passes_alone(tiny):
    question = llmlab.Question("word " * 200, ("a", "b c", "d", "e"), 0)
    sequences = encode(tiny, [question])
    scores = shared.log_probs(tiny, sequences, budget=10)
    assert scores.work.passes == 1
    assert scores.log_probs == pytest.approx(reference.log_probs(tiny, sequences).log_probs, abs=2e-4)
