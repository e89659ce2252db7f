"""The command line: one verb a job. Exit status 0 done, 2 bad input (one line on stderr), 1 failed."""

import signal
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import llmlab
from llmlab.base.errors import InputError, Interrupted
from llmlab.cli import bench
from llmlab.cli.compare import compare
from llmlab.cli.evals import eval
from llmlab.cli.lab import report, sweep
from llmlab.cli.options import BatchSize, Data, Limit, Loading, Payload, add_verb, finish, measuring, read_rows
from llmlab.cli.terminal import console, doctor_table, make_table, print_line

if TYPE_CHECKING:
    from llmlab.decoding.sampling import Sampling

INTERRUPTED = 128 + signal.SIGINT  # the status that shells give
MOST_ROWS = 16  # of a plan's table on the terminal


def score(
    loading: Loading,
    data: Data = "everyday",
    limit: Limit = None,
    method: Annotated[str, Option(help="shared (prefixes computed once) or reference; both exact.")] = "shared",
    batch_size: Annotated[int, Option(help="Sequences in a forward pass of the reference path.")] = 8,
) -> Payload:
    """Score multiple-choice questions: acc, acc_norm (per character) and acc_norm_token (per token)."""
    from llmlab.scoring.encode import encode
    from llmlab.scoring.score import check_options

    check_options(method, batch_size)
    questions = read_rows(data, limit)
    lm, seconds = loading.load_checked(lambda lm: encode(lm, questions))
    run = partial(llmlab.score, lm, questions, method=method, batch_size=batch_size)
    result, joules = measuring(run, lm, lambda result: result.tokens)
    result = replace(result, seconds_total=seconds + result.seconds_total)
    title = f"{lm.name} on {result.n} questions of {result.task}"
    return finish(title, lm, result, joules_per_1000_tokens=joules) | {"seconds_load": seconds}


def perplexity(
    loading: Loading,
    text: Annotated[Path | None, Option(help="A UTF-8 text file; by default WikiText-2's test set.")] = None,
    context: Annotated[int | None, Option(help="Tokens in a window; by default 512.")] = None,
    stride: Annotated[int | None, Option(help="Tokens between windows; by default the context.")] = None,
    max_windows: Annotated[int | None, Option(help="Stop after N windows.")] = None,
    batch_size: BatchSize = 1,
    protocol: Annotated[str | None, Option(help="gptq-2048: the windows of GPTQ's tables, all of them.")] = None,
) -> Payload:
    """Perplexity of a text over sliding windows; the protocol is printed beside the number."""
    from llmlab.scoring.perplexity import check_protocol

    content = llmlab.data.wikitext("test") if text is None else llmlab.data.read_text(text)

    def check(lm: llmlab.LM) -> None:
        check_protocol(lm, context, stride, max_windows, batch_size, protocol)
        lm.input_ids(content)

    lm, seconds = loading.load_checked(check)
    windows = {"context": context, "stride": stride, "max_windows": max_windows}
    result = llmlab.perplexity(lm, content, batch_size=batch_size, protocol=protocol, **windows)
    name = "wikitext-2 test" if text is None else text.name
    result = replace(result, data=name, seconds_total=seconds + result.seconds_total)
    return finish(f"{lm.name} on {name}", lm, result) | {"seconds_load": seconds}


@dataclass
class Writing:
    """How prompts are continued: settings that `generate` takes by these names."""

    max_new_tokens: Annotated[int, Option(help="At most N new tokens a prompt.")] = 64
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0
    top_k: Annotated[int, Option(help="Sample from the K most probable tokens; 0 for all.")] = 0
    top_p: Annotated[float, Option(help="Sample from the nucleus of this mass.")] = 1.0
    min_p: Annotated[float, Option(help="Sample from tokens this share as probable as the most probable one.")] = 0.0
    repetition_penalty: Annotated[float, Option(help="Divides logits of tokens in prompt and output.")] = 1.0
    presence_penalty: Annotated[float, Option(help="Taken from logits of tokens in the output.")] = 0.0
    frequency_penalty: Annotated[float, Option(help="The same, for each time they stand there.")] = 0.0
    logit_bias: Annotated[list[str] | None, Option(help="ID=BIAS, added to a token's logit; several times.")] = None
    seed: Annotated[int, Option(help="Of the samples.")] = 0
    chat: Annotated[bool, Option("--chat", help="Put each prompt into the model's chat template.")] = False
    k: Annotated[int | None, Option(help="Tokens drafted a pass; by default as many as pay.")] = None
    stop: Annotated[list[str] | None, Option(help="End a completion at this text; several times.")] = None
    batch_size: BatchSize = 1

    def settings(self) -> tuple[dict[str, Any], "Sampling"]:
        """The arguments of `generate`, and how they sample. Raises InputError for a value out of range."""
        from llmlab.decoding.sampling import Sampling, seeded

        pairs = [text.partition("=") for text in self.logit_bias or []]
        try:
            bias = {int(token): float(value) for token, _, value in pairs}
        except ValueError:
            raise InputError("--logit-bias takes ID=BIAS, such as 198=-100.") from None
        settings = asdict(self) | {"logit_bias": bias}
        how = {name: settings[name] for name in Sampling.__dataclass_fields__.keys() & settings.keys()}
        return settings, Sampling(**how, generator=seeded(self.seed))


def generate(
    loading: Loading,
    writing: Writing,
    prompt: Annotated[list[str] | None, Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, Option(help="A JSON Lines file with a field `prompt`.")] = None,
    limit: Annotated[int | None, Option(help="Take the first N prompts of the file.")] = None,
    draft: Annotated[
        str | None, Option(help="Speculate: lookup, suffix, recycling, self-4bit or a model; some with commas.")
    ] = None,
) -> Payload:
    """Continue prompts, greedily or by sampling. Without --prompt and --prompts: the built-in prompts."""
    from llmlab.decoding.generate import check_settings, encode_prompts
    from llmlab.decoding.plain_engine import engine_for
    from llmlab.jobs.own_draft import forecast, named_drafts

    if prompt and prompts:
        raise InputError("give --prompt or --prompts, not both.")
    rows = llmlab.data.read_prompts(prompts, limit=limit) if prompts else llmlab.data.prompts(limit=limit)
    texts = prompt or [row.text for row in rows]
    most, batch_size = writing.max_new_tokens, writing.batch_size
    settings, sampling = writing.settings()
    check_settings(texts, most, batch_size, writing.stop, writing.k)

    def check(lm: llmlab.LM) -> None:
        sampling.check_vocabulary(lm.card.vocab_size)
        encode_prompts(lm, texts, max_new_tokens=most, chat=writing.chat)

    lm, seconds = loading.load_checked(check)
    if draft is not None:
        engine = engine_for(lm)
        settings |= {"engine": engine}
        if isinstance(engine, llmlab.Engine):
            with console.status(f"preparing the draft {draft}"):
                settings |= {"draft": (drafts := named_drafts(lm, draft))}
                lines = forecast(engine, drafts, batch_size)
            print_line(lines)
    run = partial(llmlab.generate, lm, texts, **settings)
    result, joules = measuring(run, lm, lambda result: result.prompt_tokens + result.new_tokens)
    result = replace(result, seconds_total=seconds + result.seconds_total)
    for completion in result.completions:
        console.rule(style="dim")
        print_line(completion.prompt, "dim")
        print_line(completion.text)
    return finish(f"{lm.name}, {result.n} prompts", lm, result, joules_per_1000_tokens=joules) | {
        "seconds_load": seconds
    }


@dataclass
class Cluster:
    """Devices, and what they shall do: settings that `plan` takes by these names."""

    devices: Annotated[int, Option(help="Number of equal devices.")] = 4
    memory: Annotated[str | None, Option(help="Of each device: 32GiB, 24GB or bytes; by default 32GiB.")] = None
    batch: Annotated[int, Option(help="Sequences that a replica holds at once.")] = 1
    context: Annotated[int | None, Option(help="Tokens of each; by default up to 2048.")] = None
    device: Annotated[str | None, Option(help="v100, a100, h100, h200, rtx4090 or cpu.")] = None
    workload: Annotated[str | None, Option(help="hellaswag or decode: predicts seconds and kWh; with --device.")] = None
    questions: Annotated[int, Option(help="How many, for hellaswag; by default its full set.")] = llmlab.data.FULL_SET
    matmul: Annotated[float | None, Option(help="Share of its peak that large matmuls reach, if measured.")] = None
    per_node: Annotated[int | None, Option(help="Devices of a node; by default all stand in one.")] = None
    network: Annotated[str, Option(help="A second, one way, from a node to the others.")] = "25GB"
    price: Annotated[float | None, Option(help="Of a device an hour: predicts the money, too.")] = None


def plan(
    model: Annotated[str, Option(help="A shipped shape such as llama-30b, or any model: only its config is read.")],
    cluster: Cluster,
    bits: Annotated[int | None, Option(help="Weight bits: 16, 8, 4, 3 or 2; by default 16 and 4.")] = None,
) -> Payload:
    """Which layouts of data, tensor and pipeline parallelism fit, from a model's config alone."""
    from llmlab.quantization.calibration import CONTEXT, ROWS
    from llmlab.quantization.grid import Scheme
    from llmlab.quantization.memory import memory_needed

    card = llmlab.model_card(model)
    plans = [llmlab.plan(card, bits=b, **asdict(cluster)) for b in ([16, 4] if bits is None else [bits])]
    print_line(card)
    for result in plans:
        table, best = result.table(), result.layouts[0]
        if result.assumptions:  # a terminal has no room for both
            table = table.drop(columns=["weights", "KV cache", "activations", "reserve", "GB moved"])
        rows = table.round(2).to_dict("records")
        styles = ["" if row["verdict"] == "fits" else "dim" for row in rows]
        more = f"; {len(rows) - MOST_ROWS} more layouts in --json" if len(rows) > MOST_ROWS else ""
        caption = f"GiB on the fullest device{more}"
        console.print(make_table(result.title, rows[:MOST_ROWS], caption=caption, styles=styles[:MOST_ROWS]))
        order = "fastest" if result.assumptions else "least communication"
        verdict = f"best: {best.name}" if best.fits else "nothing fits"
        if costs := best.predicted:
            verdict += f", {costs.seconds:,.4g} s and {costs.kwh:.3g} kWh, projected"
            if cluster.price is not None:
                verdict += f", {costs.price(cluster.devices, cluster.price):,.2f} at {cluster.price:g} a device an hour"
        print_line(f"{verdict} (usable layouts come first, {order} first)\n{result.assumptions}\n")
    quantizing = {}
    for result in plans:
        if result.bits < 16:
            cpu, gpu = (memory_needed(card, Scheme(result.bits), ROWS * CONTEXT, device=on) for on in ("cpu", "cuda"))
            fits = "fits" if gpu.total <= result.memory else "does not fit"
            print_line(
                f"quantizing it to {result.bits} bits, layer by layer in fp32, {ROWS} x {CONTEXT} calibration tokens: "
                f"{gpu} on a GPU ({fits} one device), {cpu.total / 2**30:.2f} GiB on a CPU"
            )
            quantizing[result.bits] = {"cpu": cpu.total, "gpu": gpu.total} | asdict(gpu)
    return plans[0].as_dict() | {"plans": [result.as_dict() for result in plans], "quantizing": quantizing}


def convert(
    name: Annotated[str, Argument(help="A Hub id, a folder with .bin files, or a .gguf file.")],
    folder: Annotated[Path, Argument(help="A new folder.")],
) -> Payload:
    """Write a model of .bin or .gguf files as safetensors, once; shard by shard, whatever its size."""
    with console.status(f"converting {name}"):
        written = llmlab.convert(name, folder)
    print_line(f"written: {written}")
    return {"folder": str(written)}


def doctor() -> Payload:
    """What this machine has: hardware, libraries, usable kernels and why others are not. Paste it in bug reports."""
    from llmlab.measure.environment import inventory

    machine = inventory()
    console.print(doctor_table(machine))
    if problem := machine["hardware"]["cuda"]["problem"]:  # on a line of its own: the command in it is to be copied
        print_line(problem, style="red")
    return machine


WELCOME = "A workbench for research on fast LLM inference. Start with: llmlab doctor"
app = typer.Typer(
    name="llmlab", help=WELCOME, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
peers = typer.Typer(help="Measure against the peers, interleaved in one process.", no_args_is_help=True)
app.add_typer(peers, name="bench")

add_verb(app, score, "score --model smollm2 --data everyday --limit 40 --json out.json", records=True)
add_verb(app, eval, "eval --tasks hellaswag,arc_easy,gsm8k --limit 100 --beside", records=True)
add_verb(app, perplexity, "perplexity --model smollm2 --text book.txt --context 512 --json out.json", records=True)
add_verb(app, generate, "generate --prompt 'The capital of France is' --max-new-tokens 16", records=True)
add_verb(app, plan, "plan --model opt-30b --devices 4 --memory 32GiB")
add_verb(app, convert, "convert facebook/opt-30b models/opt-30b")
add_verb(app, report, "report 00_start_here -p limit=20 --output report")
add_verb(app, sweep, "sweep grid.yaml --json out.json")
add_verb(app, bench.quantize, "quantize --calibration text.txt --output checkpoints/q4", records=True)
add_verb(app, bench.challenge, "challenge --model smollm2 --data everyday --json out.json", records=True)
add_verb(app, compare, "compare data/reference data/runs --json changes.json")
add_verb(app, bench.gpu_check, "gpu-check --devices 4 --json check.json", records=True)
add_verb(app, doctor, "doctor --json doctor.json")
add_verb(peers, bench.scoring, "bench scoring --data everyday --limit 40 --json out.json", records=True)
add_verb(peers, bench.quantization, "bench quantization --json out.json", records=True)
add_verb(peers, bench.sharding, "bench sharding --devices 4 --limit 60 --json out.json", records=True)
add_verb(peers, bench.decoding, "bench decoding --prompts mine.jsonl --json out.json", records=True)


def main() -> None:
    """Entry point: turns errors of the caller into one line on stderr and status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing that was started is left
    try:
        status = app(standalone_mode=False)
        complaint = "interrupted." if status == INTERRUPTED else ""  # typer makes this of a KeyboardInterrupt
    except InputError as error:
        status, complaint = 2, str(error)
    except (Interrupted, KeyboardInterrupt) as stop:
        status, complaint = INTERRUPTED, str(stop) or "interrupted."
    except typer.TyperException as error:  # an unknown option, a missing value
        status, complaint = 2, f"{' '.join(error.format_message().split())} See llmlab --help."
    if complaint:
        print(f"llmlab: {complaint}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
