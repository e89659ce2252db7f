"""`llmlab bench quantization --reproduce gptq-opt-125m`: a paper's own protocol, its figures beside ours.

What differs from GPTQ's code stands in the protocol of the result: a layer's matrices are solved one after another on
inputs that are quantized already (its --true-sequential), and checkpoints know no zero point of 0.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from llmlab.base import hub
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.published import published
from llmlab.data import WIKITEXT_HUB, read_text, wikitext
from llmlab.measure.record import Measurement, Row
from llmlab.model.convert import dequantized
from llmlab.model.lm import LM, check_device
from llmlab.model.load import load, model_card
from llmlab.model.sources import SHAPES, resolve
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme
from llmlab.quantization.memory import check_memory, memory_needed
from llmlab.quantization.walk import quantize
from llmlab.scoring.perplexity import PROTOCOLS, check_protocol, perplexity

C4_HUB, C4_FILE, C4_GB = "allenai/c4", "en/c4-train.00000-of-01024.json.gz", 0.32
WIKITEXT_GB = 0.01
PROTOCOL, ROWS = "gptq-2048", 128
DRAWS = 1000  # of documents for each segment; of C4's, one in fifty is long enough


@dataclass(frozen=True)
class Paper:
    """A model of a paper's table: what all three are called in data/published, and the model's shape."""

    paper: str
    table: str
    model: str
    shape: str


PAPERS = {"gptq-opt-125m": Paper("GPTQ", "3", "OPT-125M", "opt-125m")}


def reproduce(
    name: str,
    model: str | None = None,
    *,
    calibration: Path | None = None,
    rows: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
    on_row: Callable[[Row], None] = lambda row: None,
) -> tuple[LM, Measurement]:
    """A paper's model, unquantized and by each of its methods, under its protocol.

    Args:
        name: of PAPERS.
        model: a local copy of the paper's model, or another one; by default the Hub's.
        calibration: a text whose first rows are taken; by default C4's first file, sampled as GPTQ's code samples it.
        rows: of calibration, 2,048 tokens each; 128 by default.
        device: where; by default a GPU where there is one.
        say: is told first what is needed and how large it is.
        on_row: is given each row as it is measured.

    Returns:
        The unquantized model and a measurement whose details have `rows`: `variant`, `method`, `bits`, `perplexity`,
        `published`, `status`, `ratio` (ours over published), `seconds`.

    Raises InputError before anything is computed: an unknown name, what cannot be had, too little memory.
    """
    if name not in PAPERS:
        raise InputError(f"unknown result {name!r}: choose {' or '.join(PAPERS)}.")
    paper, rows = PAPERS[name], ROWS if rows is None else rows
    local = model is not None and resolve(model).kind != "hub"
    say(f"{name} needs {_needs(None if local else model or paper.shape, calibration)}; what is not here is downloaded.")
    resolve(model or paper.shape)
    calibrate = partial(_from_text, read_text(calibration)) if calibration else partial(_from_c4, _c4())
    test = wikitext("test")
    where = check_device(device)
    check = partial(_check_fits, rows=rows, device=where)
    lm = load(model or paper.shape, dtype="fp32", device=where, check=check)
    ids = calibrate(lm, rows)
    table: list[Row] = []
    expected = published("quantization", paper=paper.paper, model=paper.model, table=paper.table)
    for method, bits, value, status in expected[["method", "bits", "value", "status"]].itertuples(index=False):
        begin, variant = time.perf_counter(), lm
        if bits < 16:
            scheme = Scheme(int(bits), -1, act_order=False, search=False)
            how = "gptq" if method == "GPTQ" else "rtn"
            variant = dequantized(quantize(lm, method=how, scheme=scheme, calibration=ids if how == "gptq" else None))
        seconds, result = time.perf_counter() - begin, perplexity(variant, test, protocol=PROTOCOL)
        ours = result.perplexity.value
        row: Row = {"variant": f"{method} {bits} bits", "method": method, "bits": int(bits), "perplexity": ours}
        table.append(row | {"published": value, "status": status, "ratio": ours / value, "seconds": seconds})
        on_row(table[-1])
    other = (
        "" if lm.card.parameters == model_card(paper.shape).parameters else f"{lm.name} in the place of {paper.model}; "
    )
    source = "C4's first file" if calibration is None else calibration.name
    protocol = (
        f"{other}{result.protocol}; weights by row, no search, no act-order; {len(ids)} x {ids.shape[1]} calibration "
        f"tokens of {source}; unlike GPTQ's code: fp32, true-sequential, zero points from 1"
    )
    values = {f"perplexity_{row['method'].lower()}_{row['bits']}bit": Metric(row["perplexity"]) for row in table}
    told = {"reproduced": name, "rows": table, "protocol": protocol}
    return lm, Measurement(f"reproduce {name}", values, result.n, protocol, data="wikitext-2 test", details=told)


def _check_fits(lm: LM, rows: int, device: torch.device) -> None:
    """Raise InputError, before a weight is read, if the model cannot be measured so or quantizing it takes too much."""
    if rows < 1:
        raise InputError(f"{rows} calibration rows: give a positive number.")
    context, _ = check_protocol(lm, None, None, None, 1, PROTOCOL)
    needed = memory_needed(lm.card, Scheme(4, -1), rows * context, device=device.type)
    whole = replace(needed, model=needed.model + 4 * lm.card.linear_parameters)  # the exact model stays beside it
    check_memory(lm.name, whole, device)


def _needs(model: str | None, calibration: Path | None) -> str:
    """What has to be had from elsewhere, a Hub model (half precision) among it or not, with its size, for people."""
    gigabytes = {f"the model {_on_hub(model)}": 2 * model_card(model).parameters / 1e9} if model else {}
    gigabytes |= {} if calibration else {f"C4's first file ({C4_HUB})": C4_GB}
    gigabytes[f"WikiText-2 ({WIKITEXT_HUB}, or LLMLAB_DATA)"] = WIKITEXT_GB
    return ", ".join(f"{what}: {size:.2f} GB" for what, size in gigabytes.items())


def _on_hub(model: str) -> str:
    return str(SHAPES[model]["hub"]) if model in SHAPES else model


def _c4() -> Path:
    """C4's first training file. Raises InputError if neither the Hub nor its local cache has it."""
    offline = hub.ask(C4_HUB, "dataset") is None
    try:
        return Path(hf_hub_download(C4_HUB, C4_FILE, repo_type="dataset", local_files_only=offline))
    except (OSError, ValueError):
        raise InputError(
            f"{C4_FILE} of {C4_HUB} ({C4_GB} GB) cannot be had from the Hugging Face Hub or its local cache: check "
            "the network, or calibrate on a text of yours (--calibration FILE)."
        ) from None


def _from_text(text: str, lm: LM, rows: int) -> torch.Tensor:
    return calibration_rows(lm, text, rows=rows, context=PROTOCOLS[PROTOCOL])


def _from_c4(path: Path, lm: LM, rows: int, seed: int = 0) -> torch.Tensor:
    """Segments of documents drawn at random, [rows, 2048]: get_c4 of GPTQ's datautils, with its seed.

    Documents that are no longer than a segment are drawn again.
    """
    size, draw = PROTOCOLS[PROTOCOL], random.Random(seed)
    with gzip.open(path) as file:
        documents = file.readlines()
    segments: list[list[int]] = []
    for _ in range(DRAWS * rows):
        ids = lm.input_ids(json.loads(documents[draw.randint(0, len(documents) - 1)])["text"])
        if len(ids) > size:
            start = draw.randint(0, len(ids) - size - 1)
            segments.append(ids[start : start + size])
        if len(segments) == rows:
            return torch.tensor(segments)
    raise InputError(f"{path} holds too few documents of more than {size} tokens: {DRAWS * rows} draws found too few.")
