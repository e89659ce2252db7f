"""Drafts without a model by hand: trees, what they learn, and the rule that accepts what was sampled."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from llmlab.decoding.draft import Proposal, Sampling, grow
from llmlab.decoding.recycling import KEPT, Recycling, likeliest
from llmlab.decoding.suffix import Automaton, Suffix
from llmlab.decoding.verify import verify

GREEDY = Sampling(0.0, 1.0, torch.Generator())
DRAWS = 5_000


def paths(tree):
    """Every drafted token as the tokens on the way to it."""
    ways = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        ways.append(((*ways[parent], token)) if parent >= 0 else (token,))
    return ways


def test_a_tree_grows_where_it_is_likeliest_and_is_cut_where_it_is_not():
    after = {0: [(1, 0.6, 1), (2, 0.3, 2)], 1: [(3, 0.9, 3), (4, 0.1, 4)], 2: [(5, 0.5, 5)], 3: [(6, 0.01, 6)]}
    tree = grow("draft", 0, lambda token: after.get(token, []), 4, 3)
    assert paths(tree) == [(1,), (1, 3), (2,), (2, 5)]  # 0.6, 0.54, 0.3, 0.15; then would follow 0.06
    assert tree.reach == pytest.approx([0.6, 0.54, 0.3, 0.15])
    assert paths(tree.best(3)) == [(1,), (1, 3), (2,)]
    assert paths(tree.cut(1)) == [(1,), (2,)]
    assert paths(grow("draft", 0, lambda token: after.get(token, []), 9, 1)) == [(1,), (2,)]
    assert not grow("draft", 7, lambda token: after.get(token, []), 9, 3).tokens


def test_joined_trees_share_what_they_have_in_common():
    both = Proposal.chain([1, 2], "a").calibrated(0.5).joined(Proposal.chain([1, 3], "b").calibrated(0.8))
    assert (both.source, paths(both), both.chances) == ("a and b", [(1,), (1, 2), (1, 3)], [0.8, 0.5, 0.8])
    sampled = Proposal.chain([4], "c", torch.ones(1, 5) / 5)
    assert both.joined(sampled) is both and Proposal().joined(sampled) is sampled
    # 1 was right as promised, behind it one of 2 and 3 should have been: 4 was wrong.
    assert both.tested([1, 4]) == (1, 2, pytest.approx(0.8 + 1.0))
    assert both.tested([1, 3, 9]) == (2, 2, pytest.approx(0.8 + 1.0))
    assert Proposal().tested([1]) == (0, 0, 0.0)


@pytest.mark.parametrize("tokens", [2, 5])
def test_an_automaton_knows_all_substrings_and_how_often_they_occur(tokens):
    text = torch.randint(tokens, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    automaton = Automaton()
    for end, token in enumerate(text, start=1):
        automaton.append(token)
        seen = text[:end]
        # The longest end of the text that occurs before, by hand.
        earlier = [n for n in range(1, end) if any(seen[i : i + n] == seen[-n:] for i in range(end - n))]
        assert automaton.length[automaton.link[automaton.last]] == max(earlier, default=0)
    for n in range(1, 6):
        for first in range(len(text) - n + 1):
            part, state = text[first : first + n], 0
            for token in part:
                state = automaton.follow[state][token]
            assert automaton.count[state] == sum(text[i : i + n] == part for i in range(len(text) - n + 1))
    assert len(automaton.link) <= 2 * len(text)


def test_suffix_guesses_by_frequency_and_remembers_answers():
    suffix = Suffix()
    suffix.begin(None, [[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]], 0)
    (tree,) = suffix.propose([[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]], 1, GREEDY)
    chances = dict(zip(tree.tokens, tree.chances, strict=True))
    # Two tokens alike are trusted 2/3; "1 2" went on with 3 twice, with 4 once. No shorter end has more places.
    assert chances == pytest.approx({3: 2 / 3 * 2 / 3, 4: 2 / 3 * 1 / 3})
    suffix.propose([[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 7, 8, 9, 7]], 1, GREEDY)
    suffix.begin(None, [[5, 7, 8], [6, 6]], 0)
    tree, again = suffix.propose([[5, 7, 8], [6, 6]], 2, GREEDY)
    assert paths(tree)[:2] == [(9,), (9, 7)]  # the answer before went on so; its prompt is no answer
    assert 3 not in tree.tokens and again.tokens == [6, 6]
    suffix.select([1])
    assert suffix.propose([[6, 6, 6]], 1, GREEDY)[0].tokens == [6]


def test_recycling_guesses_what_stood_behind_a_token_and_counts_which_rank_was_right():
    def logits(*successors):
        scores = torch.zeros(1, 1, 600)
        for rank, token in enumerate(successors):
            scores[0, 0, token] = 100 - rank
        return scores

    recycling = Recycling()
    assert recycling.propose([[5]], 3, GREEDY)[0].tokens == []
    recycling.learn([[5]], logits(500, 7, 8))
    recycling.learn([[500]], logits(6, 7))
    before, trials = list(recycling.hits), recycling.trials
    recycling.learn([[5]], logits(7, 500))  # it was second, and comes first from now on
    assert [new - old for new, old in zip(recycling.hits, before, strict=True)] == [0, 1] + [0] * (KEPT - 2)
    assert recycling.trials == trials + 1
    (tree,) = recycling.propose([[1, 5]], 2, GREEDY)
    assert paths(tree)[:2] == [(7,), (500,)] and (500, 6) in paths(tree)


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_the_likeliest_tokens_are_those_of_topk(vocabulary):
    logits = torch.randn(2, 3, vocabulary, generator=torch.Generator().manual_seed(0))
    assert torch.equal(likeliest(logits, 8), logits.topk(min(8, vocabulary)).indices)


# Block verification. What follows a token depends on it alone: P[x] is the model's distribution, Q[x] the draft's.
# The last rows are of the first token.
P = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]])
Q = torch.tensor([[0.05, 0.2, 0.75], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.6, 0.2, 0.2]])


def draw(probs, sampling):
    return int(torch.multinomial(probs, 1, generator=sampling.generator))


def counts(p, q, rule):
    """How often each pair of tokens comes from two drafted ones, what is left of it drawn plainly; accepted a pass."""
    sampling = Sampling(1.0, 1.0, torch.Generator().manual_seed(0))
    firsts = torch.multinomial(q[-1], DRAWS, replacement=True, generator=sampling.generator)
    seconds = torch.multinomial(q[firsts], 1, generator=sampling.generator).squeeze(1)
    fills = torch.multinomial(p, DRAWS, replacement=True, generator=sampling.generator).tolist()
    pairs, accepted = np.zeros((p.shape[1],) * 2), 0
    for number, (first, second) in enumerate(zip(firsts.tolist(), seconds.tolist(), strict=True)):
        chain = Proposal.chain([first, second], probs=q[[-1, first]])
        path, token = rule(chain, p[[-1, first, second]].log(), sampling)
        tokens = [*(chain.tokens[i] for i in path), token]
        pairs[tokens[0], tokens[1] if len(tokens) > 1 else fills[tokens[0]][number]] += 1
        accepted += len(path)
    return pairs, accepted / DRAWS


def careless(chain, logits, sampling):
    """A wrong rule: accepts as block verification does, then draws from the rest that belongs to the rule by tokens."""
    path, token = verify(chain, logits, sampling)
    if len(path) == len(chain.tokens):
        return path, token
    rest = (logits[len(path)].exp() - chain.probs[len(path)]).clamp(min=0)
    return path, draw(rest / rest.sum(), sampling)


def test_block_verification_keeps_the_distribution_and_the_test_rejects_a_careless_rule():
    expected = (P[3][:, None] * P[:3]).double().numpy().ravel() * DRAWS  # p(a) p(b | a)
    assert chisquare(counts(P, Q, verify)[0].ravel(), expected, sum_check=False).pvalue > 0.01
    assert chisquare(counts(P, Q, careless)[0].ravel(), expected, sum_check=False).pvalue < 1e-6


def test_block_verification_accepts_as_many_tokens_as_the_paper_says():
    # Its motivating example: token by token 10/9 would be accepted of two, together 11/9.
    p, q = torch.tensor([[1 / 3, 2 / 3]]).repeat(2, 1), torch.tensor([[2 / 3, 1 / 3]]).repeat(2, 1)
    assert counts(p, q, verify)[1] == pytest.approx(11 / 9, abs=0.04)


def test_a_draft_that_is_the_model_is_accepted_whole():
    assert counts(P, P, verify)[1] > 1.999
