"""The command line's larger jobs: benchmarks and the challenge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmlab.base.errors import InputError
from llmlab.base.paths import check_writable, home
from llmlab.cli.options import Device, Dtype, Json, Model, check_outputs, finish, load_half, load_model, read_rows
from llmlab.cli.terminal import ablation_table, console, print_metrics, write_json


def challenge(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="hellaswag, everyday, or a JSON Lines file.")] = "hellaswag",
    limit: Annotated[int | None, typer.Option(help="The first N questions; by default all.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep N decoder layers of a random:SHAPE model.")] = None,
    devices: Annotated[int, typer.Option(help="Score over N ranks: GPUs, or processes on CPU.")] = 1,
    dtype: Dtype = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the page; by default report/.")] = None,
    json_file: Json = None,
) -> None:
    """The 2023 challenge's job: the whole set, both timings, accuracy, a record and a one-page report."""
    check_outputs(json_file)
    from llmlab.bench.challenge import FULL_SET
    from llmlab.bench.challenge import challenge as run
    from llmlab.lab.report.pages import write_challenge_page
    from llmlab.measure.record import append, describe

    folder = check_writable(output or home() / "report")
    questions = None if model.startswith("random:") else read_rows(data, limit)
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give a positive number of rows, or none for all.")
    lm, submission = run(
        model, questions, limit=limit or FULL_SET, dtype=dtype, device=device, layers=layers, devices=devices
    )
    record = append(describe(lm, submission))
    print_metrics(f"challenge: {model}, track {record.track}", submission.metrics(), submission.protocol)
    page = write_challenge_page(submission, record, folder)
    console.print(f"report:   {page}", highlight=False, soft_wrap=True)
    write_json(json_file, submission.as_dict() | {"track": record.track, "record": record.as_dict()})


def quantize(
    calibration: Annotated[Path, typer.Option(help="Text file; its first rows x 512 tokens are used.")],
    output: Annotated[Path, typer.Option(help="New folder of the quantized model.")],
    model: Model = "smollm2",
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input columns that share a grid; -1 for a whole row.")] = 64,
    method: Annotated[str, typer.Option(help="gptq, or rtn (round-to-nearest).")] = "gptq",
    rows: Annotated[int, typer.Option(help="Calibration rows of 512 tokens.")] = 64,
    rotate: Annotated[bool, typer.Option("--rotate", help="Rotate the residual stream first (LLaMA-like).")] = False,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Zero points in the middle.")] = False,
    act_order: Annotated[bool, typer.Option(help="Columns with large activations first.")] = True,
    static_groups: Annotated[bool, typer.Option(help="With act-order, keep groups as runs of columns.")] = True,
    dtype: Annotated[str, typer.Option(help="In which the layers are read and calibrated.")] = "fp32",
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Quantize a model layer by layer and write a checkpoint that GPTQModel and transformers read, too.

    Finished layers are kept beside the output: a killed job that is started again goes on behind them.
    """
    check_outputs(json_file)
    from llmlab.bench.quantization import quantizing
    from llmlab.data import read_text
    from llmlab.quantization.grid import Scheme
    from llmlab.quantization.job import quantize_to

    scheme = Scheme(bits, group_size, symmetric, act_order, static_groups)
    text = read_text(calibration)
    lm, report = quantize_to(
        model, output, text, scheme, method=method, rows=rows, turned=rotate, dtype=dtype, device=device
    )
    measured = quantizing(lm, report)
    print_metrics(f"{model}: {lm.transformation}", measured.metrics(), measured.protocol)
    console.print(f"checkpoint: {output}", highlight=False, soft_wrap=True)
    finish(lm, measured, {"linears": report.linears, "output": str(output)}, json_file)


bench = typer.Typer(help="Measure against the peers, interleaved in one process.", no_args_is_help=True)


@bench.command("scoring", epilog="Example: llmlab bench scoring --data everyday --limit 40 --json out.json")
def bench_scoring(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="everyday (built in), hellaswag, or a JSON Lines file.")] = "everyday",
    limit: Annotated[int | None, typer.Option(help="Use the first N questions.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted rounds, interleaved.")] = 5,
    dtype: Annotated[str, typer.Option(help="The exact dtype; half precision is measured too, if fast here.")] = "fp32",
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Shared-prefix scoring against lm-evaluation-harness at its best batch size, with the ablation (about 25 s a
    question for the built-in model on 2 cores)."""
    check_outputs(json_file)
    from llmlab.bench import scoring as bench_module

    if repeats < 1:
        raise InputError(f"{repeats} repeats: give a positive number.")
    questions = read_rows(data, limit)
    lm, _ = load_model(model, dtype, device, None, None, False)
    half = load_half(lm, model, device)
    with console.status(f"{len(questions)} questions, {repeats} rounds of all candidates, then the ablation"):
        result = bench_module.bench_scoring(lm, half, questions, repeats=repeats)
    measured = bench_module.measurement(result)
    print_metrics(f"{model} on {len(questions)} questions of {data}", measured.metrics(), measured.protocol)
    console.print(ablation_table(result["ablation"]))
    finish(lm, measured, result, json_file, warmup=1, repeats=repeats)


@bench.command("quantization", epilog="Example: llmlab bench quantization --json out.json")
def bench_quantization(
    model: Model = "smollm2",
    calibration: Annotated[Path | None, typer.Option(help="Text file; by default WikiText-2 (validation).")] = None,
    rows: Annotated[int, typer.Option(help="Calibration rows of 512 tokens.")] = 64,
    data: Annotated[str, typer.Option(help="hellaswag, everyday, or a JSON Lines file.")] = "hellaswag",
    limit: Annotated[int, typer.Option(help="Use the first N questions.")] = 40,
    repeats: Annotated[int, typer.Option(help="Counted rounds of the speeds, interleaved.")] = 5,
    peers: Annotated[bool, typer.Option(help="Measure bitsandbytes and GPTQModel too.")] = True,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Bits x method -> perplexity, accuracy, divergence, size and speed (about 40 minutes for the built-in model on
    2 cores)."""
    check_outputs(json_file)
    from llmlab.bench import quantization as bench_module
    from llmlab.data import read_text, wikitext
    from llmlab.quantization.walk import calibration_rows

    if repeats < 1:
        raise InputError(f"{repeats} repeats: give a positive number.")
    text = read_text(calibration) if calibration else wikitext("valid")
    test, questions = wikitext("test"), read_rows(data, limit)
    lm, _ = load_model(model, "fp32", device, None, None, False)
    result = bench_module.bench_quantization(
        lm, calibration_rows(lm, text, rows=rows), test, questions, peers=peers, repeats=repeats,
        on_row=lambda row: console.print(bench_module.line(row), highlight=False),
    )  # fmt: skip
    measured = bench_module.measurement(result)
    print_metrics(f"{model}: quantization", measured.metrics(), measured.protocol)
    finish(lm, measured, result, json_file, warmup=1, repeats=repeats)


@bench.command("sharding", epilog="Example: llmlab bench sharding --devices 4 --limit 60 --json out.json")
def bench_sharding(
    model: Model = "smollm2",
    devices: Annotated[int, typer.Option(help="How many ranks.")] = 4,
    data: Annotated[str, typer.Option(help="everyday (built in), hellaswag, or a JSON Lines file.")] = "everyday",
    limit: Annotated[int | None, typer.Option(help="Use the first N questions.")] = 60,
    repeats: Annotated[int, typer.Option(help="Runs of each layout, interleaved.")] = 3,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Every layout of data, tensor and pipeline parallelism against the naive split and one process, measured and
    simulated (about 6 minutes for the built-in model on 2 cores)."""
    check_outputs(json_file)
    from llmlab.bench import sharding as bench_module
    from llmlab.jobs.over_ranks import ranks
    from llmlab.scoring.score import score

    if repeats < 1:
        raise InputError(f"{repeats} repeats: give a positive number.")
    questions = read_rows(data, limit)
    with ranks(devices, device=device) as group:
        lm, _ = load_model(model, None, device, None, None, False)
        alone = score(lm, questions)
        result = bench_module.bench_sharding(
            group, model, questions, alone, repeats=repeats,
            on_row=lambda row: console.print(bench_module.line(row), highlight=False, soft_wrap=True),
        )  # fmt: skip
    measured = bench_module.measurement(result)
    print_metrics(f"{model} on {devices} ranks", measured.metrics(), measured.protocol)
    console.print(result["projection"], highlight=False, markup=False)
    finish(lm, measured, result, json_file, warmup=1, repeats=repeats)


@bench.command("decoding", epilog="Example: llmlab bench decoding --prompts mine.jsonl --json out.json")
def bench_decoding(
    model: Model = "smollm2",
    prompts: Annotated[Path | None, typer.Option(help="JSON Lines with prompt and kind; by default built in.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens a prompt.")] = 128,
    per_kind: Annotated[int, typer.Option(help="Prompts of each kind at batch 1.")] = 2,
    repeats: Annotated[int, typer.Option(help="Counted runs of each engine on each prompt, interleaved.")] = 3,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile, too (it compiles for minutes first).")] = True,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Our engine plain, compiled, 4-bit and with each draft, against transformers and llama.cpp (about 25 minutes for
    the built-in model on 2 cores)."""
    check_outputs(json_file)
    from llmlab import data as sources
    from llmlab.bench import decoding as bench_module
    from llmlab.jobs.own_draft import self_4bit
    from llmlab.model.sources import resolve

    if min(repeats, per_kind, max_new_tokens) < 1:
        raise InputError(f"{repeats} repeats of {per_kind} prompts, {max_new_tokens} tokens: give positive numbers.")
    texts = sources.read_prompts(prompts) if prompts else sources.prompts()
    source = resolve(model)
    lm, _ = load_model(model, "fp32", device, None, None, False)
    half = load_half(lm, model, device)
    with console.status(f"{len(texts)} prompts, {repeats} rounds"):
        result = bench_module.bench_decoding(
            lm, half, self_4bit(lm), texts, gguf=source.location if source.kind == "gguf" else None,
            new_tokens=max_new_tokens, units_per_kind=per_kind, repeats=repeats, compile=compiled,
            on_row=lambda row: console.print(bench_module.line(row), highlight=False, soft_wrap=True),
        )  # fmt: skip
    measured = bench_module.measurement(result)
    print_metrics(f"{model}: decoding", measured.metrics(), measured.protocol)
    finish(lm, measured, result, json_file, warmup=1, repeats=repeats)
