"""The command line's larger jobs: quantizing, the challenge, benchmarks."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

import llmlab
from llmlab.base.errors import InputError
from llmlab.base.paths import check_writable, home
from llmlab.cli.options import Data, Dtype, Limit, Payload, Place, Repeats, check_positive, finish, read_rows
from llmlab.cli.terminal import console, make_table, print_line

if TYPE_CHECKING:
    from llmlab.measure.record import Measurement

CalibrationRows = Annotated[int, Option(help="Calibration rows of 512 tokens.")]
VARIANT = (
    *("variant", "perplexity", "acc_norm", "kl", "kl_99", "top1"),
    *("bytes", "seconds", "peak_bytes", "decode_tokens_per_s"),
)
LAYOUT = ("layout", "schedule", "seconds_measured", "seconds_simulated", "bubble_measured", "bubble_simulated")
DECODER = (
    *("engine", "draft", "dtype", "kind", "batch", "tokens_per_s", "acceptance_rate"),
    *("mean_accepted", "speedup_vs_plain", "predicted_speedup", "prompts_that_differ"),
)


def challenge(
    place: Place,
    data: Data = "hellaswag",
    limit: Limit = None,
    layers: Annotated[int | None, Option(help="Keep N decoder layers of a random:SHAPE model.")] = None,
    devices: Annotated[int, Option(help="Score over N ranks: GPUs, or processes on CPU.")] = 1,
    dtype: Dtype = None,
    output: Annotated[Path | None, Option(help="Folder of the page; by default report/.")] = None,
    price: Annotated[float | None, Option(help="Of a device an hour: states the money, too.")] = None,
) -> Payload:
    """The 2023 challenge's job: the whole set, both timings, accuracy, kWh, a record and a one-page report."""
    import torch

    from llmlab.bench.bill import bills
    from llmlab.bench.challenge import challenge as run
    from llmlab.data import FULL_SET
    from llmlab.lab.report.pages import write_challenge_page
    from llmlab.measure.energy import measure_energy
    from llmlab.model.lm import check_device

    folder = check_writable(output or home() / "report")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give a positive number of rows, or none for all.")
    if price is not None and price < 0:
        raise InputError(f"price {price}: give what a device costs an hour, not less than 0.")
    questions = None if place.model.startswith("random:") else read_rows(data, limit)
    n = limit or FULL_SET
    job = partial(run, questions=questions, limit=n, dtype=dtype, layers=layers, devices=devices, **asdict(place))
    runs: list[tuple[llmlab.LM, Measurement]] = []
    on = check_device(place.device)
    counted = torch.device("cuda", on.index or 0) if on.type == "cuda" else on
    energy = measure_energy(lambda: runs.append(job()), counted, ranks=devices)
    lm, measured = runs[0]
    costs = bills(measured, energy, on, devices, price)
    track = "exact" if lm.transformation == "none" else "open"
    payload = finish(f"challenge: {lm.name}, track {track}", lm, measured)
    for cost in costs:
        print_line(cost)
    print_line(f"report:   {write_challenge_page(payload['record'], folder)}")
    return payload | {"track": track, "bills": [asdict(cost) for cost in costs]}


def gpu_check(
    device: Annotated[str, Option(help="cuda, or cpu for the steps that need no GPU.")] = "cuda",
    devices: Annotated[int | None, Option(help="Check N of them; by default all GPUs, or one CPU.")] = None,
) -> Payload:
    """Whether the GPUs here compute what the plain path computes, and how fast; under 10 minutes. Status 1 if not."""
    from llmlab.bench.gpu_check.check import gpu_check as run

    if devices is not None:
        check_positive(devices=devices)
    with console.status("gpu-check") as status:
        lm, measured = run(device, devices, on_step=status.update)
    rows = measured.details["steps"]
    styles = [{"ok": "green", "FAILED": "red"}.get(row["state"], "dim") for row in rows]
    console.print(make_table("gpu-check", rows, caption=measured.protocol, styles=styles))
    for row in rows:
        if row["state"] == "FAILED":  # on a line of its own: a command in it is to be copied
            print_line(f"{row['step']}: {row['said']}", style="red")
    return measured.details | ({"record": llmlab.record(lm, measured).as_dict()} if lm else {})


@dataclass
class Grid:
    """How weights are rounded: the settings of a quantization scheme."""

    bits: Annotated[
        float, Option(help="2, 3, 4 or 8; or a mean from 2 to 4, such as 2.5, dealt out by sensitivity.")
    ] = 4
    group_size: Annotated[int, Option(help="Input columns that share a grid; -1 for a whole row.")] = 64
    symmetric: Annotated[bool, Option("--symmetric", help="Zero points in the middle.")] = False
    act_order: Annotated[bool, Option(help="Columns with large activations first.")] = True
    static_groups: Annotated[bool, Option(help="With act-order, keep groups as runs of columns.")] = True
    target: Annotated[str, Option(help="gptq, or gptaq or qronos, which make up for earlier layers' errors.")] = "gptq"
    grid: Annotated[str, Option(help="How grids are searched: shrink, neuqi, or gptq (by GPTQ's own loss).")] = "shrink"
    sweeps: Annotated[int, Option(help="Over GPTQ's codes, each behind a new fit of the scales.")] = 0
    head_bits: Annotated[int | None, Option(help="Of the output head; by default it stays as it is.")] = None


def quantize(
    calibration: Annotated[Path, Option(help="Text file; its first rows x 512 tokens are used.")],
    output: Annotated[Path, Option(help="New folder of the quantized model.")],
    place: Place,
    grid: Grid,
    method: Annotated[str, Option(help="gptq, or rtn (round-to-nearest).")] = "gptq",
    rows: CalibrationRows = 64,
    rotate: Annotated[bool, Option("--rotate", help="Rotate the residual stream first (LLaMA-like).")] = False,
    dtype: Annotated[str, Option(help="In which the layers are read and calibrated.")] = "fp32",
) -> Payload:
    """Quantize a model layer by layer and write a checkpoint that GPTQModel and transformers read, too.

    Finished layers are kept beside the output: a killed job that is started again goes on behind them.
    """
    from llmlab.bench.quantization import quantizing
    from llmlab.quantization.calibration import calibration_rows
    from llmlab.quantization.grid import Scheme
    from llmlab.quantization.job import quantize_to
    from llmlab.quantization.mixed import mixed
    from llmlab.quantization.rotate import rotated

    scheme, text = Scheme(**asdict(grid) | {"bits": int(grid.bits)}), llmlab.data.read_text(calibration)
    if grid.bits % 1:
        lm = place.load("fp32")
        scheme = mixed(rotated(lm) if rotate else lm, grid.bits, scheme, calibration_rows(lm, text, rows=rows))
    how = f"rotated {method}" if rotate else method
    lm, report = quantize_to(place.model, output, text, scheme, method=how, rows=rows, dtype=dtype, device=place.device)
    payload = finish(f"{place.model}: {lm.transformation}", lm, quantizing(lm, report))
    print_line(f"checkpoint: {output}")
    return payload | {"linears": report.linears, "output": str(output)}


def scoring(
    place: Place,
    data: Data = "everyday",
    limit: Limit = None,
    repeats: Repeats = 5,
    dtype: Annotated[str, Option(help="The exact dtype; half precision is measured too, if fast here.")] = "fp32",
) -> Payload:
    """Shared-prefix scoring against lm-evaluation-harness at its best batch size, with the ablation (about 25 s a
    question for the built-in model on 2 cores)."""
    from llmlab.bench.scoring import bench_scoring

    check_positive(repeats=repeats)
    questions = read_rows(data, limit)
    lm, half = place.load_both(dtype)
    with console.status(f"{len(questions)} questions, {repeats} rounds of all candidates, then the ablation"):
        measured = bench_scoring(lm, half, questions, repeats=repeats)
    title = f"{place.model} on {len(questions)} questions of {data}"
    payload = finish(title, lm, measured, warmup=1, repeats=repeats)
    console.print(make_table("ablation (every step keeps the ones before it)", measured.details["ablation"]))
    return payload


def quantization(
    place: Place,
    calibration: Annotated[Path | None, Option(help="Text file; by default WikiText-2 (validation).")] = None,
    rows: Annotated[int | None, Option(help="Calibration rows; by default 64, of 512 tokens each.")] = None,
    data: Data = "hellaswag",
    limit: Limit = 40,
    repeats: Repeats = 5,
    peers: Annotated[bool, Option(help="Measure bitsandbytes and GPTQModel too.")] = True,
    reproduce: Annotated[
        str | None, Option(help="gptq-opt-125m: the paper's own protocol and table instead; --model may be a copy.")
    ] = None,
) -> Payload:
    """Bits x method -> perplexity, accuracy, divergence, size and speed (about 40 minutes for the built-in model on
    2 cores)."""
    from llmlab.bench.quantization import bench_quantization
    from llmlab.quantization.calibration import ROWS, calibration_rows

    if reproduce is not None:
        return _reproduce(reproduce, place, calibration, rows)
    check_positive(repeats=repeats)
    text = llmlab.data.read_text(calibration) if calibration else llmlab.data.wikitext("valid")
    test, questions = llmlab.data.wikitext("test"), read_rows(data, limit)
    lm = place.load("fp32")
    ids = calibration_rows(lm, text, rows=ROWS if rows is None else rows)

    def show(row: Payload) -> None:
        print_line(f"{row['variant']:<30} perplexity {row['perplexity']:.2f}   acc_norm {row['acc_norm']:.3f}")

    measured = bench_quantization(lm, ids, test, questions, peers=peers, repeats=repeats, on_row=show)
    _print_rows("variants", measured.details["rows"], VARIANT)
    return finish(f"{place.model}: quantization", lm, measured, warmup=1, repeats=repeats)


def _reproduce(name: str, place: Place, calibration: Path | None, rows: int | None) -> Payload:
    """What --reproduce does instead."""
    from llmlab.bench.reproduce import reproduce
    from llmlab.model.sources import BUILTIN

    def show(row: Payload) -> None:
        print_line(f"{row['variant']:<14} perplexity {row['perplexity']:.2f}   published {row['published']:g}")

    model = None if place.model == BUILTIN else place.model
    lm, measured = reproduce(
        name, model, calibration=calibration, rows=rows, device=place.device, say=print_line, on_row=show
    )
    console.print(make_table(name, measured.details["rows"], caption=measured.protocol))
    return finish(f"{lm.name}: {name}", lm, measured)


def sharding(
    place: Place,
    devices: Annotated[int, Option(help="How many ranks.")] = 4,
    data: Data = "everyday",
    limit: Limit = 60,
    repeats: Repeats = 3,
) -> Payload:
    """Every layout of data, tensor and pipeline parallelism against the naive split and one process, measured and
    simulated (about 6 minutes for the built-in model on 2 cores)."""
    from llmlab.bench.sharding import bench_sharding
    from llmlab.sharding.launch import check_world
    from llmlab.sharding.load import outline

    check_positive(repeats=repeats)
    check_world(devices, place.device)
    questions = read_rows(data, limit)
    lm = place.load()
    alone = llmlab.score(lm, questions)
    lm = outline(place.model, lm.dtype, lm.device)  # the whole model makes room for the ranks' parts
    with llmlab.ranks(devices, device=place.device) as group:
        measured = bench_sharding(group, lm, questions, alone, repeats=repeats)
    _print_rows("layouts", measured.details["layouts"], LAYOUT)
    payload = finish(f"{place.model} on {devices} ranks", lm, measured, warmup=1, repeats=repeats)
    for said in (measured.details["left_out"], measured.details["projection"]):
        print_line(said)
    return payload


def decoding(
    place: Place,
    prompts: Annotated[Path | None, Option(help="JSON Lines with prompt and kind; by default built in.")] = None,
    max_new_tokens: Annotated[int, Option(help="At most this many tokens a prompt.")] = 96,
    per_kind: Annotated[int, Option(help="Prompts of each kind at batch 1.")] = 1,
    repeats: Repeats = 3,
    compiled: Annotated[bool, Option(help="Measure torch.compile, too (it compiles for minutes first).")] = True,
) -> Payload:
    """Our engine plain, compiled, 4-bit and with each draft, against transformers and llama.cpp (about 45 minutes for
    the built-in model on 2 cores)."""
    from llmlab.bench.decoding import bench_decoding

    check_positive(repeats=repeats, prompts_of_a_kind=per_kind, new_tokens=max_new_tokens)
    texts = llmlab.data.read_prompts(prompts) if prompts else llmlab.data.prompts()
    lm, half = place.load_both()
    measured = bench_decoding(
        lm, half, texts, new_tokens=max_new_tokens, per_kind=per_kind, repeats=repeats, compile=compiled
    )
    _print_rows("decoders", measured.details["rows"], DECODER)
    return finish(f"{place.model}: decoding", lm, measured, warmup=1, repeats=repeats)


def _print_rows(title: str, rows: list[Payload], columns: tuple[str, ...]) -> None:
    console.print(make_table(title, [{name: row.get(name, "") for name in columns} for row in rows]))
