"""The command line: one verb a job. Exit status 0 done, 2 bad input (one line on stderr), 1 failed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.errors import InputError
from llmlab.paths import home
from llmlab.terminal import ablation_table, check_file, console, doctor_table, plan_table, print_metrics, write_json

if TYPE_CHECKING:
    from llmlab.data import Question
    from llmlab.lab.report import Run
    from llmlab.model import LM

app = typer.Typer(
    name="llmlab",
    help="A workbench for research on fast LLM inference. Start with: llmlab doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[str, typer.Option(help="smollm2 (built in), a Hub id, a folder, a .gguf file or random:SHAPE.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default what suits the device.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")]
BitsAndBytes = Annotated[str | None, typer.Option(help="Quantize at load: int8 or nf4.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a Hub model.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result and its record to this file.")]
BatchSize = Annotated[int, typer.Option(help="Rows in one forward pass.")]


@app.command(epilog="Example: llmlab score --model smollm2 --data everyday --limit 40 --json out.json")
def score(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="everyday (built in), hellaswag, or a JSON Lines file.")] = "everyday",
    limit: Annotated[int | None, typer.Option(help="Score the first N questions.")] = None,
    method: Annotated[str, typer.Option(help="shared (prefixes computed once) or reference; both exact.")] = "shared",
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass of the reference path.")] = 8,
    dtype: Dtype = None,
    device: Device = None,
    bitsandbytes: BitsAndBytes = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Score multiple-choice questions: acc, acc_norm (per character) and acc_norm_token (per token)."""
    _check_outputs(json_file)
    from llmlab.scoring.score import score as run

    questions = _questions(data, limit)
    lm, seconds_load = _load(model, dtype, device, bitsandbytes, revision, trust_remote_code)
    result = run(lm, questions, method=method, batch_size=batch_size)
    result = replace(result, seconds_total=seconds_load + result.seconds_total)
    print_metrics(f"{lm.name} on {result.n} questions of {result.task}", result.metrics(), result.protocol)
    _finish(lm, result, {"seconds_load": seconds_load}, json_file)


@app.command(epilog="Example: llmlab perplexity --model smollm2 --text book.txt --context 512 --json out.json")
def perplexity(
    model: Model = "smollm2",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file; by default WikiText-2's test set.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; by default the context.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after N windows.")] = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    device: Device = None,
    bitsandbytes: BitsAndBytes = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Perplexity of a text over sliding windows; the protocol is printed beside the number."""
    _check_outputs(json_file)
    from llmlab import data as sources
    from llmlab.scoring.perplexity import perplexity as run

    content = sources.wikitext("test") if text is None else sources.read_text(text)
    lm, seconds_load = _load(model, dtype, device, bitsandbytes, revision, trust_remote_code)
    result = run(lm, content, context=context, stride=stride, max_windows=max_windows, batch_size=batch_size)
    name = "wikitext-2 test" if text is None else text.name
    result = replace(result, data=name, seconds_total=seconds_load + result.seconds_total)
    print_metrics(f"{lm.name} on {name}", result.metrics(), result.protocol)
    _finish(lm, result, {"seconds_load": seconds_load}, json_file)


@app.command(epilog="Example: llmlab generate --model smollm2 --prompt 'The capital of France is' --max-new-tokens 16")
def generate(
    model: Model = "smollm2",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A JSON Lines file with a field `prompt`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first N prompts of the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most N new tokens a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the nucleus of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    device: Device = None,
    bitsandbytes: BitsAndBytes = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Continue prompts, greedily or by sampling. Without --prompt and --prompts: the built-in prompts."""
    _check_outputs(json_file)
    from llmlab import data as sources
    from llmlab.decoding.generate import check_settings
    from llmlab.decoding.generate import generate as run

    if prompt and prompts:
        raise InputError("give --prompt or --prompts, not both.")
    texts = prompt or [
        p.text for p in (sources.read_prompts(prompts, limit=limit) if prompts else sources.prompts(limit=limit))
    ]
    check_settings(texts, max_new_tokens, temperature, top_p, batch_size)
    lm, seconds_load = _load(model, dtype, device, bitsandbytes, revision, trust_remote_code)
    result = run(
        lm,
        texts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        chat=chat,
    )
    result = replace(result, seconds_total=seconds_load + result.seconds_total)
    for completion in result.completions:
        console.rule(style="dim")
        console.print(completion.prompt, style="dim", markup=False, highlight=False)
        console.print(completion.text, markup=False, highlight=False)
    print_metrics(f"{lm.name}, {result.n} prompts", result.metrics(), result.protocol)
    _finish(lm, result, {"seconds_load": seconds_load}, json_file)


@app.command(epilog="Example: llmlab plan --model opt-30b --devices 4 --memory 32GiB")
def plan(
    model: Annotated[
        str, typer.Option(help="A shipped shape such as llama-30b, or any model: only its config is read.")
    ],
    devices: Annotated[int, typer.Option(help="Number of equal devices.")] = 4,
    memory: Annotated[str, typer.Option(help="Of each device: 32GiB, 24GB or bytes.")] = "32GiB",
    bits: Annotated[int | None, typer.Option(help="Weight bits: 16, 8, 4, 3 or 2; by default 16 and 4.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that a replica holds at once.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of each; by default up to 2048.")] = None,
    json_file: Json = None,
) -> None:
    """Which layouts of data, tensor and pipeline parallelism fit, from a model's config alone."""
    check_file(json_file)
    from llmlab.model import model_card
    from llmlab.sharding.plan import plan as make

    card = model_card(model)
    plans = [
        make(card, devices=devices, memory=memory, bits=b, batch=batch, context=context)
        for b in ([bits] if bits is not None else [16, 4])
    ]
    console.print(str(card), markup=False)
    for each in plans:
        console.print(plan_table(each.title, each.table()))
        best = each.layouts[0]
        verdict = f"best: {best.name}" if best.fits else "nothing fits"
        console.print(f"{verdict} (usable layouts come first, least communication first)\n", highlight=False)
    write_json(json_file, plans[0].as_dict() | {"plans": [each.as_dict() for each in plans]})


@app.command(epilog="Example: llmlab report 00_start_here -p limit=20 --output report")
def report(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Names, numbers or paths; by default all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; by default report/.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE (JSON or text) for the notebooks.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Run notebooks with papermill and render them to HTML with an index page. Status 1 if a notebook failed."""
    check_file(json_file)
    try:
        from llmlab.lab import report as lab
    except ModuleNotFoundError as error:
        raise InputError(f"the report needs the package {error.name}: run pip install 'llmlab[demo]'.") from None

    values = _parameters(parameter or [])
    chosen = lab.find_notebooks(notebooks or [])
    folder = output or home() / "report"

    def start(name: str) -> None:
        console.print(f"running   {name} ...", highlight=False)

    def end(run: Run) -> None:
        state = f"[red]failed[/red]    {run.name}" if run.failed else f"[green]finished[/green]  {run.name}"
        console.print(f"{state} in {run.seconds:.1f} s", highlight=False)
        if run.error:
            console.print(f"          {run.error}", markup=False, highlight=False)

    runs = lab.report(chosen, output=folder, parameters=values, on_start=start, on_end=end)
    console.print(f"report:   {folder / 'index.html'}", highlight=False, soft_wrap=True)
    write_json(json_file, {"index": str(folder / "index.html"), "runs": [vars(run) for run in runs]})
    if any(run.failed for run in runs):
        raise typer.Exit(1)


bench = typer.Typer(help="Measure against the peers, interleaved in one process.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("scoring", epilog="Example: llmlab bench scoring --data everyday --limit 40 --json out.json")
def bench_scoring(
    model: Model = "smollm2",
    data: Annotated[str, typer.Option(help="everyday (built in), hellaswag, or a JSON Lines file.")] = "everyday",
    limit: Annotated[int | None, typer.Option(help="Use the first N questions.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted rounds, interleaved.")] = 5,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Shared-prefix scoring against lm-evaluation-harness at its best batch size, with the ablation (about 12 s a
    question for the built-in model on 2 cores)."""
    _check_outputs(json_file)
    from llmlab.measure import bench_scoring as bench_module

    if repeats < 1:
        raise InputError(f"{repeats} repeats: give a positive number.")
    questions = _questions(data, limit)
    lm, _ = _load(model, None if device else "fp32", device, None, None, False)
    half, _ = _load(model, "bf16" if lm.dtype != "fp16" else "fp16", device, None, None, False)
    with console.status(f"{len(questions)} questions, {repeats} rounds of five candidates, then the ablation"):
        result = bench_module.bench_scoring(lm, half, questions, repeats=repeats)
    measured = bench_module.measurement(result)
    print_metrics(f"{model} on {len(questions)} questions of {data}", measured.metrics(), measured.protocol)
    console.print(ablation_table(result["ablation"]))
    _finish(lm, measured, result, json_file, warmup=1, repeats=repeats)


@app.command(epilog="Example: llmlab doctor --json doctor.json")
def doctor(json_file: Json = None) -> None:
    """What this machine has: hardware, libraries, usable kernels and why others are not. Paste it in bug reports."""
    check_file(json_file)
    from llmlab.measure.environment import inventory

    found = inventory()
    console.print(doctor_table(found))
    write_json(json_file, found)


def main() -> None:
    """Entry point: turns errors of the caller into one line on stderr and status 2."""
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        status = _complain(str(error), 2)
    except KeyboardInterrupt:
        status = _complain("interrupted.", 1)
    except Exception as error:
        # Typer's usage errors (unknown option, missing value) derive from click's, vendored or not.
        if not hasattr(error, "format_message"):
            raise
        status = _complain(f"{' '.join(error.format_message().split())} See llmlab --help.", 2)
    sys.exit(status)


def _complain(sentence: str, status: int) -> int:
    print(f"llmlab: {sentence}", file=sys.stderr)
    return status


def _check_outputs(json_file: Path | None) -> None:
    """Everything that is written at the end must be writable at the beginning."""
    check_file(json_file)
    from llmlab.measure.record import check_store

    check_store()


def _questions(data: str, limit: int | None) -> list[Question]:
    from llmlab import data as sources

    if data == "everyday":
        return sources.everyday(limit)
    if data == "hellaswag":
        return sources.hellaswag(limit)
    return sources.read_questions(data, limit=limit)


def _load(
    model: str, dtype: str | None, device: str | None, bitsandbytes: str | None, revision: str | None, trust: bool
) -> tuple[LM, float]:
    from llmlab.model import load

    begin = time.perf_counter()
    with console.status(f"loading {model}"):
        lm = load(
            model,
            dtype=dtype,
            device=device,
            bitsandbytes=bitsandbytes,
            revision=revision,
            trust_remote_code=trust,
        )
    return lm, time.perf_counter() - begin


def _finish(lm: LM, result: Any, extra: dict[str, Any], json_file: Path | None, **how: Any) -> None:
    from llmlab.measure.record import append, describe

    record = append(describe(lm, result, **how))
    own = result.as_dict() if hasattr(result, "as_dict") else {}
    write_json(json_file, own | extra | {"record": record.as_dict()})


def _parameters(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InputError(f"parameter {pair!r}: write NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


if __name__ == "__main__":
    main()
