"""Speculative decoding: draft, verify in one pass, accept. Exact, and batched: each row keeps what it may.

Greedy: a drafted token is accepted if it is the argmax, so the ids are those of plain greedy decoding (in fp32; in half
precision a pass over more tokens may round a near-tie the other way). Sampling: a token x drafted from q is accepted
with probability min(1, p(x) / q(x)), else one is drawn from max(0, p - q), normalized: what comes out is distributed as
p (Leviathan et al. 2022, arXiv 2211.17192, appendix A.1; Chen et al. 2023, arXiv 2302.01318, theorem 1). A draft that
did not sample, such as prompt lookup, has q = 1 on its token: then it is the same to draw x from p and to go on as long
as x was drafted, which works for trees, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from llmlab.base.errors import NumericalError
from llmlab.decoding.cost import Rate, Tally, best_depth, best_k, plain_seconds, worth
from llmlab.decoding.drafts import Draft, Proposal, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.sampling import next_token_probs

MOST = 16  # drafted tokens a row where k adapts
PROBE = 24  # passes without a costly draft after which it is tried again


@dataclass(frozen=True)
class Step:
    """What one pass did to one row.

    Attributes:
        source: the draft; empty without one.
        drafted: its tokens (a tree in the order of `parents`).
        parents: see `Proposal`.
        accepted: how many tokens of `tokens` were drafted ones.
        tokens: what the row got: accepted ones, then the model's own.
    """

    source: str
    drafted: list[int]
    parents: list[int]
    accepted: int
    tokens: list[int]


def verify(
    proposal: Proposal, logits: torch.Tensor, sampling: Sampling, best: list[int] | None = None
) -> tuple[list[int], int]:
    """Which drafted tokens are accepted and which token follows.

    Args:
        proposal: of one row.
        logits: [1 + drafted, vocabulary]: behind the row's last token, then behind each drafted one.
        sampling: temperature 0 is greedy.
        best: the argmax of each row of logits where it is known already.

    Returns:
        Indices of accepted drafted tokens, from the root downwards; the token that the model adds.
    """
    if sampling.temperature == 0:
        chosen = logits.argmax(dim=-1).tolist() if best is None else best
        return _follow(proposal, lambda node: chosen[node + 1])
    if proposal.probs is None:
        return _follow(proposal, lambda node: _draw(_probs(logits[node + 1], sampling), sampling))
    for index, token in enumerate(proposal.tokens):
        p, q = _probs(logits[index], sampling), proposal.probs[index]
        if torch.rand((), generator=sampling.generator, device=p.device) * q[token] < p[token]:
            continue
        rest = (p - q).clamp(min=0)
        return list(range(index)), _draw(rest / rest.sum(), sampling)
    return list(range(len(proposal.tokens))), _draw(_probs(logits[len(proposal.tokens)], sampling), sampling)


def _follow(proposal: Proposal, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Go down the tree as long as what the model chooses was drafted."""
    children = {(p, t): i for i, (p, t) in enumerate(zip(proposal.parents, proposal.tokens, strict=True))}
    node = -1
    path: list[int] = []
    while True:
        token = choose(node)
        if (node, token) not in children:
            return path, token
        node = children[node, token]
        path.append(node)


def _probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return next_token_probs(logits[None], sampling.temperature, sampling.top_p)[0]


def _draw(probs: torch.Tensor, sampling: Sampling) -> int:
    return int(torch.multinomial(probs, 1, generator=sampling.generator))


@torch.inference_mode()
def decode(
    engine: Engine,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    finished: Callable[[int, list[int]], int | None],
    drafts: list[Draft] | None = None,
    k: int | None = None,
    tally: Tally | None = None,
) -> Iterator[dict[int, Step]]:
    """Continue a batch of prompts; yields after each pass what the rows that were still open got.

    Args:
        engine: of the model. Its cache is started anew.
        prompts: token ids, each with `max_new_tokens` of room in the model's context.
        max_new_tokens: at most so many for each row.
        sampling: how tokens are chosen.
        finished: told a row and all its new tokens; how many of them remain if the row has ended, else None.
        drafts: asked in this order; a row takes the first guess it gets. Free ones first.
        k: drafted tokens (a tree: depth) a pass; None adapts it to acceptance and cost, down to none at all.
        tally: takes the count.

    Raises NumericalError if logits are not finite.
    """
    drafts, tally = drafts or [], tally or Tally()
    room = room_for(prompts, max_new_tokens, k)
    engine.start(len(prompts), room)
    pace = Pace(engine, drafts, k, len(prompts))
    produced: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is

    def take(found: dict[int, Step]) -> list[int]:
        """Give rows their tokens, up to where they end; places in the batch of those that go on."""
        still = []
        for place, row in enumerate(rows):
            if row not in found:
                continue
            step = found[row]
            for index, token in enumerate(step.tokens):
                produced[row].append(token)
                stop = finished(row, produced[row])
                if stop is None and len(produced[row]) >= max_new_tokens:
                    stop = len(produced[row])
                if stop is not None:
                    kept = step.tokens[: index + 1]
                    found[row] = Step(step.source, step.drafted, step.parents, min(step.accepted, len(kept)), kept)
                    break
            else:
                still.append(place)
        return still

    logits = engine.prefill(prompts)
    _argmax(logits, engine)
    found = {row: Step("", [], [], 0, [verify(Proposal(), logits[row : row + 1], sampling)[1]]) for row in rows}
    still = take(found)
    yield found
    for draft in drafts:
        draft.begin(engine, prompts, room)
    while still:
        # Until half of the rows have ended they go along, idle: a batch of another size is another shape to record.
        if 2 * len(still) <= len(rows):
            engine.cache.select(still)
            for draft in drafts:
                draft.select(still)
            rows, still = [rows[place] for place in still], list(range(len(still)))
        contexts = [prompts[row] + produced[row] for row in rows]
        left = [max_new_tokens - len(produced[row]) - 1 if p in still else 0 for p, row in enumerate(rows)]
        asked = pace.proposals(contexts, left, rows, sampling)
        proposals = [proposal for proposal, _ in asked]
        tokens = [ids[-1:] + p.tokens for ids, p in zip(contexts, proposals, strict=True)]
        trees = any(p.parents != list(range(-1, len(p.parents) - 1)) for p in proposals)
        parents = [[-1, *(parent + 1 for parent in p.parents)] for p in proposals] if trees else None
        logits = engine.forward(tokens, parents)
        best = _argmax(logits, engine)
        found = {}
        kept: list[list[int]] = [[] for _ in rows]
        for place in still:
            row, proposal = rows[place], proposals[place]
            path, token = verify(proposal, logits[place, : 1 + len(proposal.tokens)], sampling, best[place])
            kept[place] = [0, *(node + 1 for node in path)]
            taken = [proposal.tokens[node] for node in path]
            found[row] = Step(proposal.source, proposal.tokens, proposal.parents, len(path), [*taken, token])
            pace.observe(row, asked[place][1], found[row].tokens)
            pace.paces[row].observe(len(found[row].tokens), 1)
        engine.keep(kept)
        pace.tally(tally, [(proposals[place], found[rows[place]]) for place in still])
        still = take(found)
        yield found
    if drafts:
        tally.plain_seconds += plain_seconds([len(ids) - 1 for ids in produced], lambda n: engine.seconds(1, n))


def room_for(prompts: list[list[int]], max_new_tokens: int, k: int | None) -> int:
    """Tokens that a row of the cache must hold: prompt, new tokens and a tree of drafted ones."""
    return max(map(len, prompts)) + max_new_tokens + (MOST if k is None else k) * 4 + 2


def _argmax(logits: torch.Tensor, engine: Engine) -> list[list[int]]:
    """Of each row, [batch][width] or [batch]. Raises NumericalError for NaN and infinity: they are the argmax."""
    best = logits.argmax(dim=-1)
    if not torch.isfinite(logits.gather(-1, best[..., None])).all():
        raise NumericalError(f"the logits of {engine.lm.name} are not finite in {engine.lm.dtype}: try fp32.")
    found: list[list[int]] = best.tolist()
    return found


class Pace:
    """How much to draft: what each row and draft have had accepted, against what passes cost."""

    def __init__(self, engine: Engine, drafts: list[Draft], k: int | None, batch: int) -> None:
        self.engine, self.drafts, self.k = engine, drafts, k
        self.rates = {(row, draft.name): Rate() for row in range(batch) for draft in drafts}
        self.paces = [Rate(prior=1.5, weight=4.0) for _ in range(batch)]  # tokens a pass of each row
        self.idle = 0  # passes since a costly draft was asked
        self.draft_passes = 0

    def proposals(
        self, contexts: list[list[int]], left: list[int], rows: list[int], sampling: Sampling
    ) -> list[tuple[Proposal, Proposal]]:
        """For each row what is to be verified, and all that was proposed: `observe` compares that with what comes."""
        found = [Proposal() for _ in rows]
        most = max(0, min(MOST if self.k is None else self.k, max(left)))
        self.draft_passes = 0
        for draft in self.drafts:
            lacking = [place for place, p in enumerate(found) if not p.tokens and left[place] > 0]
            if not lacking or not most:
                break
            depth = most if draft.free or self.k is not None else self._worth(draft, [rows[p] for p in lacking])
            if depth == 0:
                continue
            new = draft.propose(contexts, depth, sampling)
            if not draft.free:
                self.draft_passes = depth
                self.idle = 0
            for place in lacking:
                found[place] = new[place]
        self.idle += self.draft_passes == 0
        whole = [_cut(p, max(0, n)) for p, n in zip(found, left, strict=True)]
        if self.k is not None or not any(p.tokens for p in whole):
            return [(p, p) for p in whole]
        by_depth = [_node_depths(p) for p in whole]
        depths = [max(found, default=0) for found in by_depth]
        # Nodes of each proposal down to each depth: what a pass over proposals that are cut there holds.
        nodes = [[sum(d <= cut for d in found) for cut in range(max(depths) + 1)] for found in by_depth]
        rates = [self.rates[row, p.source].value if p.tokens else 0.0 for row, p in zip(rows, whole, strict=True)]
        # What a costly draft has drafted is there: from here on only the verifying pass costs.
        weights = worth(left, [self.paces[row].value for row in rows])
        depth = best_depth(
            rates, depths, lambda cut: 1 + max(count[cut] for count in nodes), self.engine.seconds, weights
        )
        return [(_cut(p, depth), p) for p in whole]

    def _worth(self, draft: Draft, rows: list[int]) -> int:
        """How many tokens to ask a costly draft for; 0 if that does not pay."""
        if self.idle >= PROBE:
            return 1
        rate = sum(self.rates[row, draft.name].value for row in rows) / len(rows)
        return best_k(rate, self.engine.seconds, draft.seconds(), MOST // 2)

    def observe(self, row: int, proposed: Proposal, tokens: list[int]) -> None:
        """Compare what was proposed with what the row got, whether it was verified or not."""
        if not proposed.tokens:
            return
        children = {(p, t): i for i, (p, t) in enumerate(zip(proposed.parents, proposed.tokens, strict=True))}
        node, hits, trials = -1, 0, 0
        for token in tokens:
            if not any(parent == node for parent, _ in children):
                break
            trials += 1
            if (node, token) not in children:
                break
            node = children[node, token]
            hits += 1
        self.rates[row, proposed.source].observe(hits, trials)

    def tally(self, tally: Tally, rows: list[tuple[Proposal, Step]]) -> None:
        """Count one pass."""
        tally.passes += 1
        tally.tokens += sum(len(step.tokens) for _, step in rows)
        for proposal, step in rows:
            depth = _depth(proposal)
            tally.observe(
                proposal.source, depth, len(proposal.tokens), step.accepted, step.accepted + (step.accepted < depth)
            )
        if self.drafts:
            width = 1 + max(len(p.tokens) for p, _ in rows)
            tally.seconds += self.engine.seconds(width)
            if self.draft_passes:
                tally.seconds += self.draft_passes * next(d for d in self.drafts if not d.free).seconds()


def _node_depths(proposal: Proposal) -> list[int]:
    depths: list[int] = []
    for parent in proposal.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def _depth(proposal: Proposal) -> int:
    return max(_node_depths(proposal), default=0)


def _cut(proposal: Proposal, depth: int) -> Proposal:
    """The tree down to a depth. Nodes stand behind their parents, so it is enough to renumber them."""
    depths = _node_depths(proposal)
    if max(depths, default=0) <= depth:
        return proposal
    number: dict[int, int] = {-1: -1}
    made = Proposal(source=proposal.source, probs=None if proposal.probs is None else proposal.probs[:depth])
    for node, (token, parent) in enumerate(zip(proposal.tokens, proposal.parents, strict=True)):
        if depths[node] <= depth:
            number[node] = len(made.tokens)
            made.tokens.append(token)
            made.parents.append(number[parent])
    return made
