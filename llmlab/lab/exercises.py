"""The notebooks' exercises: `check("05-1", my_mask)` says that an answer is right, or what is off.

What is right the library itself says: an exercise is one of its functions, and cases on which an answer is held against
it. Solutions are in notebooks/solutions/.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from llmlab.base.errors import InputError
from llmlab.base.stats import Metric, mcnemar, wilson
from llmlab.bench.combination import recommended
from llmlab.data import Question
from llmlab.decoding.cost import best_k, expected_tokens
from llmlab.decoding.draft import Proposal, Sampling
from llmlab.decoding.verify import verify
from llmlab.measure.compare import holm
from llmlab.measure.roofline import Peaks
from llmlab.model.load import model_card
from llmlab.quantization.gptq import factorize, relative_error
from llmlab.quantization.grid import Scheme, find_grid, rtn
from llmlab.scoring.attention import ancestor_mask
from llmlab.scoring.encode import Sequence
from llmlab.scoring.perplexity import PerplexityResult
from llmlab.scoring.score import summarize
from llmlab.scoring.scores import Scores, Work
from llmlab.scoring.trie import Trie, build
from llmlab.sharding.costs import device
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import stage_layers
from llmlab.sharding.predict import Workload, predict, workload
from llmlab.sharding.timeline import simulate, tasks

Answer = Callable[..., object]


@dataclass(frozen=True)
class Exercise:
    """What an answer is held against.

    Attributes:
        right: the library's own function of the same arguments.
        cases: arguments to try, made anew each time.
        hint: what a wrong answer has probably missed.
    """

    right: Answer
    cases: Callable[[], list[tuple[object, ...]]]
    hint: str


def check(name: str, answer: Answer) -> None:
    """Print whether the answer to an exercise is right. Raises InputError for an unknown one."""
    print(f"{name}: {verdict(name, answer)}")


def verdict(name: str, answer: Answer) -> str:
    """ "right", or a sentence that says what is off. Raises InputError for an unknown exercise."""
    if name not in EXERCISES:
        raise InputError(f"unknown exercise {name!r}: choose one of {', '.join(EXERCISES)}.")
    exercise = EXERCISES[name]
    for case in exercise.cases():
        right = exercise.right(*case)
        try:
            given = answer(*case)
        except Exception as error:  # an answer is anybody's code
            return f"the function raises {type(error).__name__}: {' '.join(str(error).split())}"
        if given is None:
            return "nothing yet: write the function, then run this cell again."
        if off := _off(given, right):
            return f"not yet, the answer {off}. {exercise.hint}"
    return "right"


def _off(given: object, right: object) -> str:
    """What a given value has wrong, in words; empty if it is right."""
    if isinstance(right, str):
        return "" if given == right else f"is {given!r}, and {right!r} by the library"
    try:
        ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (right, given))
    except (TypeError, ValueError, RuntimeError):
        return f"is a {type(given).__name__}: give {'a number' if isinstance(right, int | float) else 'a tensor'}"
    if ours.shape != theirs.shape:
        return f"has the shape {list(theirs.shape)}: give {list(ours.shape)}"
    wrong = (~torch.isclose(theirs, ours, rtol=1e-4, atol=1e-9)).nonzero().tolist()
    place = tuple(wrong[0]) if wrong else ()
    where = f" at {list(place)}" if place else ""
    return f"is {float(theirs[place]):.6g}{where}, and {float(ours[place]):.6g} by the library" if wrong else ""


def _chosen(log_probs: list[float], endings: list[str]) -> int:
    question = Question("context", tuple(endings), 0)
    sequences = [Sequence(0, number, [0, 0], 1) for number in range(len(endings))]
    return summarize([question], sequences, Scores(log_probs, Work(1, 1, 1)), {}, (1.0, 1.0)).predictions_norm[0]


def _peaks(flops: float, bandwidth: float) -> Peaks:
    return Peaks("", "", Metric(flops), Metric(bandwidth), (1, 1, 1))


def _reduced(ranks: int, tokens: int) -> float:
    card, job = model_card("llama-30b"), Workload("hellaswag", tokens, 0, 0)
    return predict(card, Cuts(tensor=ranks), device("v100"), job).bytes_moved / (2 * card.layers)


def _slowest(layers: int, stages: int, head: float) -> float:
    bounds = stage_layers(layers, stages, head)
    return max(end - first + (head if end == layers else 0) for first, end in bounds)


def _predictions() -> list[tuple[object, ...]]:
    card, job = model_card("llama-30b"), workload("hellaswag")
    return [(predict(card, cuts, device("v100"), job),) for cuts in (Cuts(pipeline=4), Cuts(tensor=4))]


def _kept(drafted: list[int], own: list[int]) -> tuple[int, int]:
    accepted, following = verify(Proposal.chain(drafted), torch.empty(0), Sampling(), own)
    return len(accepted), following


def _sees(depths: list[int]) -> torch.Tensor:
    places = range(len(depths))
    ends = [next((i for i in places[j + 1 :] if depths[i] <= depths[j]), len(depths)) for j in places]
    return ancestor_mask(Trie(depths, depths, ends, []), torch.float32, torch.device("cpu")) == 0


def _trie(sequences: list[list[int]], n_context: int) -> Trie:
    rows = [Sequence(0, number, ids, n_context) for number, ids in enumerate(sequences)]
    return build(rows, list(range(len(rows))))


def _layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [32, 64] and correlated inputs [256, 64]."""
    generator = torch.Generator().manual_seed(0)
    weight, mix, noise = (torch.randn(n, 64, generator=generator) for n in (32, 64, 256))
    return weight, noise @ mix


def _per_word(nll: float, tokens: int, words: int) -> float:
    return PerplexityResult([nll], [tokens], 2, 2, 1, 0.0, 0.0, tokens, words, 1).word_perplexity.value


def _points() -> pd.DataFrame:
    columns = ["name", "precision", "draft", "answers_kept", "perplexity_ratio", "scoring_speedup", "decode_speedup"]
    rows = [
        ("fp32", "fp32", "", 1.0, 1.0, 1.0, 1.0),
        ("fp32, lookup", "fp32", "lookup", 1.0, 1.0, 1.0, 1.6),
        ("bf16", "bf16", "", 0.99, 1.001, 2.2, 1.5),
        ("4 bits", "4 bits", "", 0.97, 1.025, 2.0, 2.5),
        ("3 bits", "3 bits", "", 0.9, 1.2, 2.0, 2.6),
    ]
    return pd.DataFrame(rows, columns=columns)


def _advice(points: pd.DataFrame, loss: float) -> str:
    best = recommended(points, (loss,))
    return str(best.loc[best["job"] == "writing", "use"].iloc[0])


ROUNDED = Scheme(4, 32, search=False)
PASSES = [1.0, 1.1, 1.2, 1.35, 1.5, 1.8, 2.1, 2.4, 2.7]  # seconds of a pass over 1, 2, .. tokens, for a draft's cost
SEQUENCES = [[5, 1, 2, 3, 4], [5, 1, 2, 3, 9, 8], [5, 1, 2, 7], [5, 1, 6, 6, 6]]  # two tokens of context

EXERCISES = {
    "00-1": Exercise(
        wilson, lambda: [(12, 40), (1, 10), (30, 40)], "The centre is not hits / n: it lies nearer to one half."
    ),
    "00-2": Exercise(
        _chosen,
        lambda: [([-20.0, -12.0, -30.0], ["a long ending, indeed", "short", "no better, but long"])],
        "Divide each sum by the characters of its ending, then take the largest.",
    ),
    "01-1": Exercise(
        lambda flops, read, peak, bandwidth: flops / _peaks(peak, bandwidth).attainable(flops / read),
        lambda: [(1e9, 1e9, 1e11, 2e10), (1e12, 1e9, 1e11, 2e10)],
        "Both limits hold at once: the slower one decides.",
    ),
    "01-2": Exercise(
        lambda name: model_card(name).kv_bytes_per_token,
        lambda: [("llama-30b",), ("smollm2",)],
        "Each layer keeps a key and a value for each KV head, which may be fewer than the heads, in 2 bytes a number.",
    ),
    "01-3": Exercise(
        lambda size, peak, bandwidth: math.ceil(_peaks(peak, bandwidth).ridge * size / 2),
        lambda: [(4, 238e9, 28.5e9), (2, 125e12, 900e9), (0.5, 125e12, 900e9)],
        "n tokens do 2 n FLOPs with each weight that is fetched: when is that the ridge?",
    ),
    "02-1": Exercise(
        lambda stages, batches: simulate(tasks([[1.0] * stages] * batches, "micro-batches")).bubble,
        lambda: [(4, 1), (4, 13), (2, 7)],
        "The pipeline works for batches + stages - 1 steps; a stage is busy in as many as there are batches.",
    ),
    "02-2": Exercise(
        _reduced,
        lambda: [(2, 1), (4, 4096)],
        "In a ring each of t ranks sends 2 (t - 1) / t of the tensor; asked is what all of them send, in bytes.",
    ),
    "02-3": Exercise(
        _slowest,
        lambda: [(60, 4, 0.4), (30, 4, 8.0), (30, 4, 2.0)],
        "Whole layers, and the head stands on the last stage: try every number of layers for that one.",
    ),
    "03-1": Exercise(
        lambda weight, bits: find_grid(weight, Scheme(bits, symmetric=True, search=False))[0],
        lambda: [(_layer()[0], bits) for bits in (4, 3)],
        "The range reaches from -max |w| to max |w| in 2^bits - 1 steps, and checkpoints keep its scale in fp16.",
    ),
    "03-2": Exercise(
        lambda weight, _, inputs: relative_error(weight, rtn(weight, ROUNDED), inputs.T @ inputs / len(inputs)),
        lambda: [(_layer()[0], rtn(_layer()[0], ROUNDED).dequantize(), _layer()[1])],
        "The energy of what the outputs X W^T lose, over the energy of the outputs.",
    ),
    "03-3": Exercise(
        lambda inputs: factorize(inputs.T @ inputs / len(inputs), Scheme()).order,
        lambda: [(_layer()[1],)],
        "The Hessian's diagonal is each column's mean squared input, and the largest comes first.",
    ),
    "04-1": Exercise(
        expected_tokens,
        lambda: [(0.5, 1), (0.8, 4), (1.0, 3), (0.0, 3)],
        "The pass brings the model's own token, too, and a rate of 1 must not divide by zero.",
    ),
    "04-2": Exercise(
        lambda rate, seconds, draft: best_k(rate, lambda width: seconds[width - 1], draft, len(seconds) - 1),
        lambda: [(0.7, PASSES, 0.0), (0.9, PASSES, 0.3), (0.3, PASSES, 0.6)],
        "Expected tokens over t(k + 1) + k d, for every k from 0 on: none is a choice, too.",
    ),
    "04-3": Exercise(
        _kept,
        lambda: [([7, 8, 9], [7, 8, 1, 4]), ([7, 8], [7, 8, 5]), ([3], [4, 9]), ([7, 8, 9], [1, 8, 9, 2])],
        "Behind the first wrong guess nothing counts, and the model's own token stands where it was.",
    ),
    "05-1": Exercise(
        _sees,
        lambda: [([0, 1, 2, 2, 3],), (_trie(SEQUENCES, 2).depths,)],
        "Node i sees j if j does not come later and nothing from behind j up to i stands as high as j.",
    ),
    "05-2": Exercise(
        lambda sequences: len(_trie(sequences, 2)),
        lambda: [(SEQUENCES,), (SEQUENCES[:1],)],
        "A node is a beginning of some sequence, counted once; a last token needs none.",
    ),
    "05-3": Exercise(
        lambda sequences, n_context: _trie(sequences, n_context).asked,
        lambda: [(SEQUENCES, 2), (SEQUENCES, 1)],
        "Asked is a node that predicts an ending's token, once for all endings that share it.",
    ),
    "06-1": Exercise(
        _advice,
        lambda: [(_points(), loss) for loss in (0.0, 0.01, 0.03, 0.5)],
        "Of those whose perplexity_ratio is at most 1 + loss the one with the largest decode_speedup; at 0 fp32 alone.",
    ),
    "06-2": Exercise(
        lambda gained, lost: mcnemar([True] * lost + [False] * gained, [False] * lost + [True] * gained),
        lambda: [(0, 2), (1, 6), (3, 3), (12, 30)],
        "Twice the chance of a tail of gained + lost fair coins, and never more than 1.",
    ),
    "07-1": Exercise(
        lambda prediction: prediction.mfu,
        _predictions,
        "FLOPs that were needed, over what four times 125e12 FLOP/s could have done in these seconds.",
    ),
    "07-2": Exercise(
        lambda prediction: prediction.kwh,
        _predictions,
        "A device draws 66 W always and 234 W more while it works, a share 1 - bubble of the time; 1 kWh is 3.6e6 J.",
    ),
    "08-1": Exercise(
        _per_word,
        lambda: [(3.2, 1000, 750), (2.5, 400, 400)],
        "exp of the nats of all tokens over the number of words.",
    ),
    "08-2": Exercise(
        holm,
        lambda: [([0.04, 0.01, 0.03],), ([0.02, 0.9, 0.8],), ([0.001, 0.2, 0.011, 0.011, 0.5],)],
        "Times m for the smallest, m - 1 for the next; then the running maximum, at most 1, in the order given.",
    ),
}
