"""The command line's larger jobs: quantizing, the challenge, benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

import llmlab
from llmlab.base.errors import InputError
from llmlab.base.paths import check_writable, home
from llmlab.cli.options import Data, Dtype, Limit, Payload, Place, Repeats, check_positive, finish, read_rows
from llmlab.cli.terminal import console, make_table, print_line, print_metrics


def challenge(
    place: Place,
    data: Data = "hellaswag",
    limit: Limit = None,
    layers: Annotated[int | None, Option(help="Keep N decoder layers of a random:SHAPE model.")] = None,
    devices: Annotated[int, Option(help="Score over N ranks: GPUs, or processes on CPU.")] = 1,
    dtype: Dtype = None,
    output: Annotated[Path | None, Option(help="Folder of the page; by default report/.")] = None,
) -> Payload:
    """The 2023 challenge's job: the whole set, both timings, accuracy, a record and a one-page report."""
    from llmlab.bench.challenge import challenge as run
    from llmlab.data import FULL_SET
    from llmlab.lab.report.pages import write_challenge_page

    folder = check_writable(output or home() / "report")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give a positive number of rows, or none for all.")
    questions = None if place.model.startswith("random:") else read_rows(data, limit)
    n = limit or FULL_SET
    lm, submission = run(questions=questions, limit=n, dtype=dtype, layers=layers, devices=devices, **asdict(place))
    record = llmlab.record(lm, submission)
    print_metrics(f"challenge: {lm.name}, track {record.track}", submission.metrics(), submission.protocol)
    print_line(f"report:   {write_challenge_page(submission, record, folder)}")
    return submission.as_dict() | {"track": record.track, "record": record.as_dict()}


@dataclass
class Grid:
    """How weights are rounded: the settings of a quantization scheme."""

    bits: Annotated[int, Option(help="2, 3, 4 or 8.")] = 4
    group_size: Annotated[int, Option(help="Input columns that share a grid; -1 for a whole row.")] = 64
    symmetric: Annotated[bool, Option("--symmetric", help="Zero points in the middle.")] = False
    act_order: Annotated[bool, Option(help="Columns with large activations first.")] = True
    static_groups: Annotated[bool, Option(help="With act-order, keep groups as runs of columns.")] = True


def quantize(
    calibration: Annotated[Path, Option(help="Text file; its first rows x 512 tokens are used.")],
    output: Annotated[Path, Option(help="New folder of the quantized model.")],
    place: Place,
    grid: Grid,
    method: Annotated[str, Option(help="gptq, or rtn (round-to-nearest).")] = "gptq",
    rows: Annotated[int, Option(help="Calibration rows of 512 tokens.")] = 64,
    rotate: Annotated[bool, Option("--rotate", help="Rotate the residual stream first (LLaMA-like).")] = False,
    dtype: Annotated[str, Option(help="In which the layers are read and calibrated.")] = "fp32",
) -> Payload:
    """Quantize a model layer by layer and write a checkpoint that GPTQModel and transformers read, too.

    Finished layers are kept beside the output: a killed job that is started again goes on behind them.
    """
    from llmlab.bench.quantization import quantizing
    from llmlab.quantization.grid import Scheme
    from llmlab.quantization.job import quantize_to

    scheme, text = Scheme(**asdict(grid)), llmlab.data.read_text(calibration)
    how = f"rotated {method}" if rotate else method
    lm, report = quantize_to(place.model, output, text, scheme, method=how, rows=rows, dtype=dtype, device=place.device)
    payload: Payload = {"linears": report.linears, "output": str(output)}
    payload = finish(f"{place.model}: {lm.transformation}", lm, quantizing(lm, report), payload)
    print_line(f"checkpoint: {output}")
    return payload


def scoring(
    place: Place,
    data: Data = "everyday",
    limit: Limit = None,
    repeats: Repeats = 5,
    dtype: Annotated[str, Option(help="The exact dtype; half precision is measured too, if fast here.")] = "fp32",
) -> Payload:
    """Shared-prefix scoring against lm-evaluation-harness at its best batch size, with the ablation (about 25 s a
    question for the built-in model on 2 cores)."""
    from llmlab.bench.scoring import bench_scoring, measurement

    check_positive(repeats=repeats)
    questions = read_rows(data, limit)
    lm = place.load(dtype)
    half = place.load_half(lm)
    with console.status(f"{len(questions)} questions, {repeats} rounds of all candidates, then the ablation"):
        result = bench_scoring(lm, half, questions, repeats=repeats)
    title = f"{place.model} on {len(questions)} questions of {data}"
    payload = finish(title, lm, measurement(result), result, warmup=1, repeats=repeats)
    console.print(make_table("ablation (every step keeps the ones before it)", result["ablation"]))
    return payload


def quantization(
    place: Place,
    calibration: Annotated[Path | None, Option(help="Text file; by default WikiText-2 (validation).")] = None,
    rows: Annotated[int, Option(help="Calibration rows of 512 tokens.")] = 64,
    data: Data = "hellaswag",
    limit: Limit = 40,
    repeats: Repeats = 5,
    peers: Annotated[bool, Option(help="Measure bitsandbytes and GPTQModel too.")] = True,
) -> Payload:
    """Bits x method -> perplexity, accuracy, divergence, size and speed (about 40 minutes for the built-in model on
    2 cores)."""
    from llmlab.bench.quantization import bench_quantization, line, measurement
    from llmlab.quantization.calibration import calibration_rows

    check_positive(repeats=repeats)
    text = llmlab.data.read_text(calibration) if calibration else llmlab.data.wikitext("valid")
    test, questions = llmlab.data.wikitext("test"), read_rows(data, limit)
    lm = place.load("fp32")
    result = bench_quantization(
        lm, calibration_rows(lm, text, rows=rows), test, questions, peers=peers, repeats=repeats,
        on_row=lambda row: print_line(line(row)),
    )  # fmt: skip
    return finish(f"{place.model}: quantization", lm, measurement(result), result, warmup=1, repeats=repeats)


def sharding(
    place: Place,
    devices: Annotated[int, Option(help="How many ranks.")] = 4,
    data: Data = "everyday",
    limit: Limit = 60,
    repeats: Repeats = 3,
) -> Payload:
    """Every layout of data, tensor and pipeline parallelism against the naive split and one process, measured and
    simulated (about 6 minutes for the built-in model on 2 cores)."""
    from llmlab.bench.sharding import bench_sharding, line, measurement

    check_positive(repeats=repeats)
    questions = read_rows(data, limit)
    with llmlab.ranks(devices, device=place.device) as group:
        lm = place.load()
        result = bench_sharding(
            group, place.model, questions, llmlab.score(lm, questions), repeats=repeats,
            on_row=lambda row: print_line(line(row)),
        )  # fmt: skip
    title = f"{place.model} on {devices} ranks"
    payload = finish(title, lm, measurement(result), result, warmup=1, repeats=repeats)
    print_line(result["projection"])
    return payload


def decoding(
    place: Place,
    prompts: Annotated[Path | None, Option(help="JSON Lines with prompt and kind; by default built in.")] = None,
    max_new_tokens: Annotated[int, Option(help="At most this many tokens a prompt.")] = 128,
    per_kind: Annotated[int, Option(help="Prompts of each kind at batch 1.")] = 2,
    repeats: Repeats = 3,
    compiled: Annotated[bool, Option(help="Measure torch.compile, too (it compiles for minutes first).")] = True,
) -> Payload:
    """Our engine plain, compiled, 4-bit and with each draft, against transformers and llama.cpp (about 25 minutes for
    the built-in model on 2 cores)."""
    from llmlab.bench.decoding import Effort, bench_decoding, line, measurement
    from llmlab.model.sources import resolve

    check_positive(repeats=repeats, prompts_of_a_kind=per_kind, new_tokens=max_new_tokens)
    texts = llmlab.data.read_prompts(prompts) if prompts else llmlab.data.prompts()
    source = resolve(place.model)
    lm = place.load("fp32")
    half = place.load_half(lm)
    with console.status(f"{len(texts)} prompts, {repeats} rounds"):
        result = bench_decoding(
            lm, half, llmlab.self_4bit(lm), texts, gguf=source.location if source.kind == "gguf" else None,
            effort=Effort(max_new_tokens, per_kind, repeats, compiled), on_row=lambda row: print_line(line(row)),
        )  # fmt: skip
    return finish(f"{place.model}: decoding", lm, measurement(result), result, warmup=1, repeats=repeats)
