"""Options and steps that several verbs of the command line share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.terminal import check_file, console, write_json

if TYPE_CHECKING:
    from llmlab.data import Question
    from llmlab.measure.energy import Energy
    from llmlab.model.lm import LM

Model = Annotated[str, typer.Option(help="smollm2 (built in), a Hub id, a folder, a .gguf file or random:SHAPE.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default what suits the device.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")]
BitsAndBytes = Annotated[str | None, typer.Option(help="Quantize at load: int8, nf4 or fp4.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a Hub model.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result and its record to this file.")]
BatchSize = Annotated[int, typer.Option(help="Rows in one forward pass.")]


def check_outputs(json_file: Path | None) -> None:
    """Everything that is written at the end must be writable at the beginning."""
    check_file(json_file)
    from llmlab.measure.record import check_store

    check_store()


def read_rows(data: str, limit: int | None) -> list[Question]:
    """The questions of --data: a known set or a file."""
    from llmlab import data as sources

    if data == "everyday":
        return sources.everyday(limit)
    if data == "hellaswag":
        return sources.hellaswag(limit)
    return sources.read_questions(data, limit=limit)


def load_model(
    model: str,
    dtype: str | None,
    device: str | None,
    bitsandbytes: str | None,
    revision: str | None,
    trust: bool,
    check: Callable[[LM], object] | None = None,
) -> tuple[LM, float]:
    """Load the model of --model; returns it and the seconds that took."""
    from llmlab.model.load import load

    begin = time.perf_counter()
    with console.status(f"loading {model}"):
        lm = load(
            model,
            dtype=dtype,
            device=device,
            bitsandbytes=bitsandbytes,
            revision=revision,
            trust_remote_code=trust,
            check=check,
        )
    return lm, time.perf_counter() - begin


def load_half(lm: LM, model: str, device: str | None) -> LM | None:
    """The same model in the half precision that is fast on its device; None, with a sentence, where none is."""
    from llmlab.kernels.fast import advice, half_dtype

    dtype = half_dtype(lm.device)
    if dtype is None:
        console.print(f"half precision is left out: {advice(lm.device)}", highlight=False, soft_wrap=True)
        return None
    return load_model(model, dtype, device, None, None, False)[0]


def measuring(run: Callable[[], Any], lm: LM) -> tuple[Any, Energy]:
    """What `run` returns, and the energy that it took on the model's device, where that can be measured."""
    from llmlab.measure.energy import measure_energy

    found: list[Any] = []
    energy = measure_energy(lambda: found.append(run()), lm.device)
    console.print(f"energy: {energy}", highlight=False, markup=False)
    return found[0], energy


def finish(lm: LM, result: Any, extra: dict[str, Any], json_file: Path | None, **how: Any) -> None:
    """Append the record of a result and write the file of --json."""
    from llmlab.measure.record import append, describe

    record = append(describe(lm, result, **how))
    own = result.as_dict() if hasattr(result, "as_dict") else {}
    write_json(json_file, own | extra | {"record": record.as_dict()})
