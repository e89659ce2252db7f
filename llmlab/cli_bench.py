"""The command line's larger jobs: benchmarks and the challenge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmlab.errors import InputError
from llmlab.options import Device, Dtype, Json, Model, check_outputs, finish, load_model, read_rows
from llmlab.paths import check_writable, home
from llmlab.terminal import ablation_table, console, print_metrics, write_json


def challenge(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="hellaswag, everyday, or a JSON Lines file.")] = "hellaswag",
    limit: Annotated[int | None, typer.Option(help="The first N questions; by default all.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep N decoder layers of a random:SHAPE model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the page; by default report/.")] = None,
    json_file: Json = None,
) -> None:
    """The 2023 challenge's job: the whole set, both timings, accuracy, a record and a one-page report."""
    check_outputs(json_file)
    from llmlab.lab.report import write_challenge_page
    from llmlab.measure.challenge import FULL_SET
    from llmlab.measure.challenge import challenge as run
    from llmlab.measure.record import append, describe

    folder = check_writable(output or home() / "report")
    questions = None if model.startswith("random:") else read_rows(data, limit)
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give a positive number of rows, or none for all.")
    lm, submission = run(model, questions, limit=limit or FULL_SET, dtype=dtype, device=device, layers=layers)
    record = append(describe(lm, submission))
    print_metrics(f"challenge: {model}, track {record.track}", submission.metrics(), submission.protocol)
    page = write_challenge_page(submission, record, folder)
    console.print(f"report:   {page}", highlight=False, soft_wrap=True)
    write_json(json_file, submission.as_dict() | {"track": record.track, "record": record.as_dict()})


bench = typer.Typer(help="Measure against the peers, interleaved in one process.", no_args_is_help=True)


@bench.command("scoring", epilog="Example: llmlab bench scoring --data everyday --limit 40 --json out.json")
def bench_scoring(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="everyday (built in), hellaswag, or a JSON Lines file.")] = "everyday",
    limit: Annotated[int | None, typer.Option(help="Use the first N questions.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted rounds, interleaved.")] = 5,
    dtype: Annotated[str, typer.Option(help="The exact dtype; bf16 (fp16 beside fp16) is measured too.")] = "fp32",
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Shared-prefix scoring against lm-evaluation-harness at its best batch size, with the ablation (about 25 s a
    question for the built-in model on 2 cores)."""
    check_outputs(json_file)
    from llmlab.measure import bench_scoring as bench_module

    if repeats < 1:
        raise InputError(f"{repeats} repeats: give a positive number.")
    questions = read_rows(data, limit)
    lm, _ = load_model(model, dtype, device, None, None, False)
    half, _ = load_model(model, "fp16" if lm.dtype == "fp16" else "bf16", device, None, None, False)
    with console.status(f"{len(questions)} questions, {repeats} rounds of five candidates, then the ablation"):
        result = bench_module.bench_scoring(lm, half, questions, repeats=repeats)
    measured = bench_module.measurement(result)
    print_metrics(f"{model} on {len(questions)} questions of {data}", measured.metrics(), measured.protocol)
    console.print(ablation_table(result["ablation"]))
    finish(lm, measured, result, json_file, warmup=1, repeats=repeats)
