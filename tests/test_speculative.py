"""Speculation is exact: greedy ids stay the same, samples keep their distribution; it stops where it does not pay."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import llmlab
from llmlab import InputError
from llmlab.decoding.draft import Proposal, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import stream
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.model_draft import ModelDraft
from llmlab.decoding.recycling import Recycling
from llmlab.decoding.sampling import next_token_probs
from llmlab.decoding.self_draft import SelfDraft
from llmlab.decoding.suffix import Suffix
from llmlab.decoding.verify import verify
from llmlab.jobs.own_draft import forecast, named_drafts, self_4bit

pytestmark = pytest.mark.slow

DRAWS = 20_000
PROMPTS = [
    "Repeat after me: the red fox, the red fox, the red fox,",
    "The capital of France is",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n",
]


@pytest.fixture(scope="module")
def engine(smollm2):
    return Engine(smollm2)


@pytest.fixture(scope="module")
def plain(smollm2, engine):
    return [c.ids for c in llmlab.generate(smollm2, PROMPTS, max_new_tokens=24, engine=engine).completions]


@pytest.fixture(scope="module")
def packed(smollm2):
    return self_4bit(smollm2)


DRAFTS = {
    "tree": lambda smollm2, packed, tiny: [PromptLookup(longest=3, shortest=1, branches=3)],
    "self-4bit": lambda smollm2, packed, tiny: [SelfDraft(packed)],
    "model": lambda smollm2, packed, tiny: [ModelDraft(llmlab.load(tiny, dtype="fp32"))],
    "itself": lambda smollm2, packed, tiny: [ModelDraft(smollm2)],
    "recycling": lambda smollm2, packed, tiny: [Recycling()],
    "suffix": lambda smollm2, packed, tiny: [Suffix()],
    "cascade": lambda smollm2, packed, tiny: [SelfDraft(packed), PromptLookup(), Suffix(), Recycling()],
    "lookup": lambda smollm2, packed, tiny: [PromptLookup()],  # the last one stays for the whole file: it holds nothing
}


@pytest.fixture(scope="module")
def draft(request, smollm2, packed, tiny_folders):
    """A draft by its name; the next name frees it, because each has an engine of its own."""
    return DRAFTS[request.param](smollm2, packed, str(tiny_folders["llama"]))


@pytest.mark.parametrize("k, batch_size", [(4, 1), (None, 3)])
@pytest.mark.parametrize("draft", DRAFTS, indirect=True)
def test_greedy_ids_are_those_of_plain_decoding(request, smollm2, engine, plain, draft, k, batch_size):
    name = request.node.callspec.params["draft"]
    result = llmlab.generate(
        smollm2, PROMPTS, max_new_tokens=24, draft=draft, k=k, batch_size=batch_size, engine=engine
    )
    assert [c.ids for c in result.completions] == plain
    tally = result.speculation
    steps = [step for c in result.completions for step in c.steps]
    assert tally.drafted == sum(len(step.drafted) for step in steps)
    assert sum(len(step.tokens) for step in steps) == result.new_tokens
    assert all(step.tokens[: step.accepted] == _path(step) for step in steps)
    if name == "itself" and k == 4:  # a draft that is the model is never rejected
        assert tally.acceptance_rate == 1.0
    if name == "self-4bit":  # the built-in model comes from a 4-bit file: only activations are rounded
        assert tally.acceptance_rate > 0.9
    if k == 4 and name in ("lookup", "suffix") and batch_size == 1:
        assert tally.tokens_per_pass > 1.3


def test_greedy_ids_with_a_repetition_penalty_are_transformers(smollm2, engine):
    expected, end = [], smollm2.tokenizer.eos_token_id
    for prompt in PROMPTS:
        ids = torch.tensor([smollm2.encode(prompt)])
        options = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.15, "pad_token_id": 0}
        new = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        expected.append(new[: new.index(end)] if end in new else new)
    for draft, k, batch_size in ((None, None, 1), (PromptLookup(shortest=1, branches=2), 4, 3)):
        result = llmlab.generate(
            smollm2, PROMPTS, max_new_tokens=16, repetition_penalty=1.15, draft=draft, k=k, batch_size=batch_size,
            engine=engine,
        )  # fmt: skip
        assert [c.ids for c in result.completions] == expected
    assert result.speculation.drafted
    assert result.settings["repetition_penalty"] == "1.15"
    assert "repetition_penalty 1.15" in result.protocol
    assert "top_k" not in result.settings


def _path(step):
    """The accepted tokens, found in the drafted tree by hand."""
    node, found = -1, []
    for token in step.tokens[: step.accepted]:
        node = next(
            i for i, (p, t) in enumerate(zip(step.parents, step.drafted, strict=True)) if (p, t) == (node, token)
        )
        found.append(step.drafted[node])
    return found


def test_both_architectures_speculate_exactly(tiny):
    prompts = ["a b a b a b a", "the cat sat on the cat sat on", "one"]
    plain = [c.ids for c in llmlab.generate(tiny, prompts, max_new_tokens=20).completions]
    for draft in (PromptLookup(shortest=1), SelfDraft(self_4bit(tiny)), [Suffix(), Recycling()]):
        for batch_size in (1, 3):
            result = llmlab.generate(tiny, prompts, max_new_tokens=20, draft=draft, k=3, batch_size=batch_size)
            assert [c.ids for c in result.completions] == plain


def distributions(seed, tokens=6):
    """Logits of the model behind the last token and behind each of two drafted ones, and the draft's own logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, tokens, generator=generator) * 1.5, torch.randn(2, tokens, generator=generator) * 1.5


def drawn(logits, draft, sampling, accept=verify):
    """How often each pair of first tokens comes out of a speculative step and plain sampling behind it."""
    q = next_token_probs(draft, sampling.temperature, sampling.top_p)
    counts = np.zeros((logits.shape[1],) * 2)
    for _ in range(DRAWS):
        tokens = torch.multinomial(q, 1, generator=sampling.generator).squeeze(-1).tolist()
        path, token = accept(Proposal.chain(tokens, probs=q), logits, sampling)
        found = [*(tokens[i] for i in path), token]
        if len(found) < 2:
            p = next_token_probs(logits[1:2], sampling.temperature, sampling.top_p)
            found.append(int(torch.multinomial(p, 1, generator=sampling.generator)))
        counts[tuple(found[:2])] += 1
    return counts


def p_value(counts, expected):
    alive = expected > 0
    assert counts[~alive].sum() == 0
    return chisquare(counts[alive], expected[alive] * counts.sum(), sum_check=False).pvalue


def careless(proposal, logits, sampling):
    """A wrong rule: a rejected token is drawn again from p, not from the rest of p."""
    for index, token in enumerate(proposal.tokens):
        p = next_token_probs(logits[index][None], sampling.temperature, sampling.top_p)[0]
        q = proposal.probs[index]
        if torch.rand((), generator=sampling.generator) * q[token] < p[token]:
            continue
        return list(range(index)), int(torch.multinomial(p, 1, generator=sampling.generator))
    p = next_token_probs(logits[len(proposal.tokens)][None], sampling.temperature, sampling.top_p)[0]
    return list(range(len(proposal.tokens))), int(torch.multinomial(p, 1, generator=sampling.generator))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_samples_keep_the_models_distribution(temperature, top_p):
    # What follows a token does not depend on it here, so the pair's distribution is a product.
    logits, draft = distributions(1)
    sampling = Sampling(temperature, top_p, torch.Generator().manual_seed(0))
    p = next_token_probs(logits, temperature, top_p).double().numpy()
    expected = np.outer(p[0], p[1])
    assert p_value(drawn(logits, draft, sampling), expected) > 0.01
    assert p_value(drawn(logits, draft, sampling, careless), expected) < 0.01


def test_guesses_without_a_distribution_keep_it_too_in_a_tree():
    logits = distributions(2)[0]
    tree = Proposal([0, 1, 2], [-1, -1, 0])  # 0 and 1 side by side, 2 behind 0
    logits = torch.cat([logits, logits[1:2]])[[0, 1, 2, 3]]  # behind the past, 0, 1, and 2
    sampling = Sampling(1.0, 1.0, torch.Generator().manual_seed(0))
    first = np.zeros(6)
    behind_0 = np.zeros(6)
    for _ in range(DRAWS):
        path, token = verify(tree, logits, sampling)
        found = [*(tree.tokens[i] for i in path), token]
        first[found[0]] += 1
        if found[0] == 0:
            behind_0[found[1]] += 1
    p = next_token_probs(logits, 1.0, 1.0).double().numpy()
    assert p_value(first, p[0]) > 0.01
    assert p_value(behind_0, p[1]) > 0.01


def test_next_tokens_of_the_real_model_keep_their_marginals(smollm2, engine, packed):
    """The model's own distribution against a draft that differs from it: its 4-bit copy, half as hot."""
    ids = smollm2.encode("The weather in the mountains was")
    engine.start(1, 64)
    logits = engine.prefill([ids])
    draft = Engine(packed)
    draft.start(1, 64)
    q = next_token_probs(draft.prefill([ids]).float(), 0.5, 0.9)[0]
    p = next_token_probs(logits, 0.8, 0.9)[0]
    support = torch.nonzero((p > 0) | (q > 0)).squeeze(-1)  # tokens beyond both nuclei cannot come
    p, q = p[support], q[support]
    sampling = Sampling(1.0, 1.0, torch.Generator().manual_seed(0))
    counts, wrong = np.zeros(len(p)), np.zeros(len(p))
    both = p.log().expand(2, -1)
    for found, rule in ((counts, verify), (wrong, careless)):
        for token in torch.multinomial(q, DRAWS, replacement=True, generator=sampling.generator).tolist():
            path, other = rule(Proposal.chain([token], probs=q[None]), both, sampling)
            found[token if path else other] += 1
    p = p.double().numpy()
    # Tokens with fewer than 20 expected draws are taken together.
    common = np.flatnonzero(p * DRAWS >= 20)
    expected = np.append(p[common], 1 - p[common].sum())

    def binned(found):
        return np.append(found[common], DRAWS - found[common].sum())

    assert len(common) > 5
    assert counts[p == 0].sum() == 0
    assert p_value(binned(counts), expected) > 0.01
    assert p_value(binned(wrong), expected) < 0.01


def test_sampling_with_drafts_repeats_with_the_seed_and_runs_in_batches(smollm2, engine, packed):
    def draw(seed, batch_size):
        cascade = [PromptLookup(), Recycling(), SelfDraft(packed)]  # recycling remembers: each draw has its own
        result = llmlab.generate(
            smollm2, PROMPTS, max_new_tokens=12, temperature=0.9, top_p=0.9, seed=seed, k=3,
            draft=cascade, batch_size=batch_size, engine=engine,
        )  # fmt: skip
        return [c.ids for c in result.completions]

    assert draw(1, 3) == draw(1, 3) != draw(2, 3)
    assert all(draw(1, 1))


def test_it_stops_speculating_where_that_does_not_pay(smollm2, engine):
    class Wrong(SelfDraft):
        """Costs as much as the model and is never right."""

        def propose(self, contexts, k, sampling):
            proposals = super().propose(contexts, k, sampling)
            for proposal in proposals:
                proposal.tokens = [token + 1 for token in proposal.tokens]
            return proposals

    result = llmlab.generate(smollm2, PROMPTS[1:2], max_new_tokens=64, draft=Wrong(smollm2), engine=engine)
    assert result.speculation.acceptance_rate < 0.3
    assert result.speculation.drafted < 24  # of the 64 x 8 that a fixed k = 8 would have drafted


def test_stop_strings_may_span_tokens(smollm2, engine):
    whole = llmlab.generate(smollm2, PROMPTS[1:2], max_new_tokens=20, engine=engine).completions[0]
    pieces = [smollm2.decode([i]) for i in whole.ids]
    # From the middle of one token to the middle of the next but one.
    stop = pieces[4][-1:] + pieces[5] + pieces[6][:1]
    for draft in (None, PromptLookup(shortest=1)):
        result = llmlab.generate(
            smollm2, PROMPTS[1:2], max_new_tokens=20, stop=[stop], draft=draft, engine=engine
        ).completions[0]
        assert result.stopped
        assert result.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize("draft", [None, PromptLookup(shortest=1)])
def test_a_stream_is_the_completion_in_pieces(smollm2, engine, draft):
    prompt = "Emoji: 😀 é 😀 é 😀 é"
    whole = llmlab.generate(smollm2, [prompt], max_new_tokens=16, engine=engine).texts[0]
    pieces = list(stream(smollm2, prompt, max_new_tokens=16, draft=draft, engine=engine))
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    assert "\ufffd" not in "".join(pieces[:-1])
    with pytest.raises(TypeError, match="batch_size"):
        stream(smollm2, prompt, batch_size=2)
    held_back = list(stream(smollm2, prompt, max_new_tokens=16, stop=[whole[4:8]], engine=engine))
    assert "".join(held_back) == whole[: whole.index(whole[4:8])]


def test_an_end_token_among_accepted_ones_ends_the_row(smollm2, engine, plain):
    ending = copy.copy(smollm2.model.generation_config)
    ending.eos_token_id = plain[0][3]
    kept, smollm2.model.generation_config = smollm2.model.generation_config, ending
    try:
        result = llmlab.generate(
            smollm2, PROMPTS[:1], max_new_tokens=24, draft=ModelDraft(smollm2), k=4, engine=engine
        ).completions[0]
    finally:
        smollm2.model.generation_config = kept
    assert result.stopped
    assert result.ids == plain[0][: plain[0].index(ending.eos_token_id)]


def test_lookup_finds_the_longest_and_latest_match():
    lookup = PromptLookup(longest=3, shortest=1, branches=2)
    lookup.begin(None, [[]], 0)
    sampling = Sampling(0.0, 1.0, torch.Generator())
    (found,) = lookup.propose([[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]], 3, sampling)
    # "1 2 3" stood at the start, before 4; "2 3" later, before 5: two guesses with no common start.
    assert found.tokens == [4, 9, 2, 5, 1, 2]
    assert found.parents == [-1, 0, 1, -1, 3, 4]
    (none,) = lookup.propose([[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3, 77]], 3, sampling)
    assert none.tokens == []


def test_named_drafts_and_their_forecast(smollm2, engine):
    *free, own = named_drafts(smollm2, "lookup, suffix,recycling, self-4bit")
    assert [draft.name for draft in free if draft.free] == ["lookup", "suffix", "recycling"] and not own.free
    text = forecast(engine, [*free, own], 1)
    assert "milliseconds of a pass" in text and own.name in text and "head 8 bits" in own.name
    for wrong, message in (("", "takes lookup"), ("nothing-here", "nothing-here")):
        with pytest.raises(InputError, match=message):
            named_drafts(smollm2, wrong)


def test_drafts_that_do_not_fit_say_why(smollm2, packed, tiny_folders):
    tiny = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    other = copy.copy(tiny.tokenizer)
    vocabulary = dict(other.get_vocab())
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    other.get_vocab = lambda: vocabulary
    stranger = copy.copy(tiny)
    object.__setattr__(stranger, "tokenizer", other)
    with pytest.raises(InputError, match=rf"the token '{first}' is number 300 in one and 301 in the other"):
        llmlab.generate(smollm2, ["a"], draft=stranger)
    with pytest.raises(InputError, match="is not a version of"):
        llmlab.generate(smollm2, ["a"], draft=SelfDraft(tiny))
    with pytest.raises(InputError, match="quantized: its own 4-bit copy is itself"):
        self_4bit(packed)
    with pytest.raises(InputError, match="has a context of 256 tokens"):
        llmlab.generate(smollm2, ["word " * 300], draft=tiny, max_new_tokens=8)
    with pytest.raises(InputError, match="k = 65"):
        llmlab.generate(smollm2, ["a"], draft=PromptLookup(), k=65)
    with pytest.raises(InputError, match="empty stop string"):
        llmlab.generate(smollm2, ["a"], stop=[""])
    with pytest.raises(InputError, match="not a range"):
        PromptLookup(longest=1, shortest=2)
