"""The command line: one verb a job. Exit status 0 done, 2 bad input (one line on stderr), 1 failed."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.base.errors import InputError, Interrupted
from llmlab.cli.bench import bench, challenge, quantize
from llmlab.cli.compare import compare
from llmlab.cli.lab import report, sweep
from llmlab.cli.options import (
    BatchSize,
    BitsAndBytes,
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    check_outputs,
    finish,
    load_model,
    measuring,
    read_rows,
)
from llmlab.cli.terminal import check_file, console, doctor_table, plan_table, print_metrics, write_json

if TYPE_CHECKING:
    from llmlab.decoding.draft import Draft
    from llmlab.model.lm import LM

INTERRUPTED = 128 + signal.SIGINT  # the status that shells give

app = typer.Typer(
    name="llmlab",
    help="A workbench for research on fast LLM inference. Start with: llmlab doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    check_outputs(json_file)
    from llmlab.measure.energy import joules_per_1000_tokens
    from llmlab.scoring.encode import encode
    from llmlab.scoring.score import check_options
    from llmlab.scoring.score import score as run

    check_options(method, batch_size)
    questions = read_rows(data, limit)

    def fits(lm: LM) -> None:
        encode(lm, questions)

    lm, seconds_load = load_model(model, dtype, device, bitsandbytes, revision, trust_remote_code, fits)
    result, energy = measuring(lambda: run(lm, questions, method=method, batch_size=batch_size), lm)
    result = replace(result, seconds_total=seconds_load + result.seconds_total)
    print_metrics(f"{lm.name} on {result.n} questions of {result.task}", result.metrics(), result.protocol)
    joules = joules_per_1000_tokens(energy, result.tokens)
    finish(lm, result, {"seconds_load": seconds_load}, json_file, joules_per_1000_tokens=joules)


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
    check_outputs(json_file)
    from llmlab import data as sources
    from llmlab.scoring.perplexity import check_protocol
    from llmlab.scoring.perplexity import perplexity as run

    content = sources.wikitext("test") if text is None else sources.read_text(text)

    def fits(lm: LM) -> None:
        check_protocol(lm, context, stride, max_windows, batch_size)

    lm, seconds_load = load_model(model, dtype, device, bitsandbytes, revision, trust_remote_code, fits)
    result = run(lm, content, context=context, stride=stride, max_windows=max_windows, batch_size=batch_size)
    name = "wikitext-2 test" if text is None else text.name
    result = replace(result, data=name, seconds_total=seconds_load + result.seconds_total)
    print_metrics(f"{lm.name} on {name}", result.metrics(), result.protocol)
    finish(lm, result, {"seconds_load": seconds_load}, json_file)


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
    draft: Annotated[
        str | None, typer.Option(help="Speculate: lookup, self-4bit or a model; several with commas.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Tokens drafted a pass; by default as many as pay.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End a completion at this text; several times.")] = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    device: Device = None,
    bitsandbytes: BitsAndBytes = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Continue prompts, greedily or by sampling. Without --prompt and --prompts: the built-in prompts."""
    check_outputs(json_file)
    from llmlab import data as sources
    from llmlab.decoding.generate import check_settings, encode_prompts
    from llmlab.decoding.generate import generate as run
    from llmlab.measure.energy import joules_per_1000_tokens

    if prompt and prompts:
        raise InputError("give --prompt or --prompts, not both.")
    texts = prompt or [
        p.text for p in (sources.read_prompts(prompts, limit=limit) if prompts else sources.prompts(limit=limit))
    ]
    check_settings(texts, max_new_tokens, temperature, top_p, batch_size, stop, k)

    def fits(lm: LM) -> None:
        encode_prompts(lm, texts, max_new_tokens=max_new_tokens, chat=chat)

    lm, seconds_load = load_model(model, dtype, device, bitsandbytes, revision, trust_remote_code, fits)
    drafts: list[Draft] = []
    engine = None
    if draft is not None:
        from llmlab.decoding.engine import Engine
        from llmlab.jobs.own_draft import forecast, named_drafts

        with console.status(f"preparing the draft {draft}"):
            drafts, engine = named_drafts(lm, draft), Engine(lm)
            lines = forecast(engine, drafts, batch_size)
        console.print(lines, highlight=False, markup=False)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
        "batch_size": batch_size, "chat": chat, "stop": stop, "draft": drafts, "k": k, "engine": engine,
    }  # fmt: skip
    result, energy = measuring(lambda: run(lm, texts, **options), lm)
    result = replace(result, seconds_total=seconds_load + result.seconds_total)
    for completion in result.completions:
        console.rule(style="dim")
        console.print(completion.prompt, style="dim", markup=False, highlight=False)
        console.print(completion.text, markup=False, highlight=False)
    print_metrics(f"{lm.name}, {result.n} prompts", result.metrics(), result.protocol)
    joules = joules_per_1000_tokens(energy, result.prompt_tokens + result.new_tokens)
    finish(lm, result, {"seconds_load": seconds_load}, json_file, joules_per_1000_tokens=joules)


@app.command(epilog="Example: llmlab plan --model opt-30b --devices 4 --memory 32GiB")
def plan(
    model: Annotated[
        str, typer.Option(help="A shipped shape such as llama-30b, or any model: only its config is read.")
    ],
    devices: Annotated[int, typer.Option(help="Number of equal devices.")] = 4,
    memory: Annotated[str | None, typer.Option(help="Of each device: 32GiB, 24GB or bytes; by default 32GiB.")] = None,
    bits: Annotated[int | None, typer.Option(help="Weight bits: 16, 8, 4, 3 or 2; by default 16 and 4.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that a replica holds at once.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of each; by default up to 2048.")] = None,
    device: Annotated[str | None, typer.Option(help="v100, a100, h100, h200, rtx4090 or cpu.")] = None,
    workload: Annotated[str | None, typer.Option(help="hellaswag or decode: predicts seconds; with --device.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of its peak that a busy device reaches, at most 0.7.")] = 0.7,
    json_file: Json = None,
) -> None:
    """Which layouts of data, tensor and pipeline parallelism fit, from a model's config alone."""
    check_file(json_file)
    from llmlab.model.load import model_card
    from llmlab.sharding.plan import plan as make

    card = model_card(model)
    plans = [
        make(
            card,
            devices=devices,
            memory=memory,
            bits=b,
            batch=batch,
            context=context,
            device=device,
            workload=workload,
            mfu=mfu,
        )
        for b in ([bits] if bits is not None else [16, 4])
    ]
    console.print(str(card), markup=False)
    for each in plans:
        console.print(plan_table(each.title, each.table()))
        best = each.layouts[0]
        verdict = f"best: {best.name}" if best.fits else "nothing fits"
        order = "fastest" if each.assumptions else "least communication"
        console.print(f"{verdict} (usable layouts come first, {order} first)", highlight=False)
        console.print(f"{each.assumptions}\n", markup=False, highlight=False)
    write_json(json_file, plans[0].as_dict() | {"plans": [each.as_dict() for each in plans]})


app.command(epilog="Example: llmlab report 00_start_here -p limit=20 --output report")(report)
app.command(epilog="Example: llmlab sweep grid.yaml --json out.json")(sweep)
app.command(epilog="Example: llmlab quantize --calibration text.txt --output checkpoints/q4")(quantize)
app.command(epilog="Example: llmlab challenge --model smollm2 --data everyday --json out.json")(challenge)
app.command(epilog="Example: llmlab compare data/reference data/runs --json changes.json")(compare)
app.add_typer(bench, name="bench")


@app.command(epilog="Example: llmlab doctor --json doctor.json")
def doctor(json_file: Json = None) -> None:
    """What this machine has: hardware, libraries, usable kernels and why others are not. Paste it in bug reports."""
    check_file(json_file)
    from llmlab.measure.environment import inventory

    found = inventory()
    console.print(doctor_table(found))
    if problem := found["hardware"]["cuda"]["problem"]:  # on a line of its own: the command in it is to be copied
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, found)


def main() -> None:
    """Entry point: turns errors of the caller into one line on stderr and status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing that was started is left
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer makes this of a KeyboardInterrupt
            _complain("interrupted.", INTERRUPTED)
    except InputError as error:
        status = _complain(str(error), 2)
    except Interrupted as stop:
        status = _complain(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        status = _complain("interrupted.", INTERRUPTED)
    except Exception as error:
        # Typer's usage errors (unknown option, missing value) derive from click's, vendored or not.
        if not hasattr(error, "format_message"):
            raise
        status = _complain(f"{' '.join(error.format_message().split())} See llmlab --help.", 2)
    sys.exit(status)


def _complain(sentence: str, status: int) -> int:
    print(f"llmlab: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
