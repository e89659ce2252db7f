"""What the verbs share: how a function becomes a verb, options and groups of them, the steps around a measurement."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Option

import llmlab
from llmlab.base.errors import InputError
from llmlab.cli.terminal import check_file, console, print_line, print_metrics, write_json

if TYPE_CHECKING:
    from llmlab.measure.record import Result

T = TypeVar("T")
Payload = dict[str, Any]  # what --json writes

Model = Annotated[
    str, Option(help="smollm2 (built in), owner/name[@revision] on the Hub, a folder, a .gguf or random:SHAPE.")
]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:N or mps; by default an NVIDIA GPU where there is one.")]
Dtype = Annotated[str | None, Option(help="fp32, bf16 or fp16; by default what suits the device.")]
Data = Annotated[str, Option(help="everyday (built in), hellaswag, or a JSON Lines file.")]
Limit = Annotated[int | None, Option(help="Use the first N questions; by default all.")]
Repeats = Annotated[int, Option(help="Counted runs of each candidate, interleaved.")]
BatchSize = Annotated[int, Option(help="Rows in one forward pass.")]
Json = Annotated[Path | None, Option("--json", help="Write the result and its record to this file.")]


def add_verb(app: typer.Typer, function: Callable[..., Payload], example: str, *, records: bool = False) -> None:
    """Make a function a verb: its parameters become options, its docstring the help.

    A parameter whose type is a dataclass stands for the fields of that class: a group of options. Every verb has
    --json, a file with what the function returns; the status is 1 if that says that something `failed`. `example`
    calls the verb, "llmlab" left out. If it appends `records`, it is proved first that one can be written.
    """
    groups: dict[str, type] = {}
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            options |= inspect.signature(group, eval_str=True).parameters
        else:
            options[name] = parameter

    def command(json_file: Json = None, **values: object) -> None:
        check_file(json_file)
        if records:
            from llmlab.measure.record import check_store

            check_store()
        for name, group in groups.items():
            values[name] = group(**{option: values.pop(option) for option in inspect.signature(group).parameters})
        payload = function(**values)
        write_json(json_file, payload)
        if payload.get("failed"):
            raise typer.Exit(1)

    options["json_file"] = inspect.signature(command, eval_str=True).parameters["json_file"]
    by_name = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]
    command.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]  # typer reads it
    app.command(
        function.__name__.replace("_", "-"), help=inspect.getdoc(function), epilog=f"Example: llmlab {example}"
    )(command)


@dataclass
class Place:
    """A model, and the device that it runs on."""

    model: Model = "smollm2"
    device: Device = None

    def load(self, dtype: str | None = None, **options: Any) -> llmlab.LM:
        """The model in a dtype, by default the one that suits the device; other options as in `llmlab.load`."""
        with console.status(f"loading {self.model}"):
            return llmlab.load(self.model, dtype=dtype, device=self.device, **options)

    def load_both(self, dtype: str = "fp32") -> tuple[llmlab.LM, llmlab.LM | None]:
        """The model in a dtype and in the half precision that is fast there; None, and why is printed, without one."""
        from llmlab.kernels.fast import advice, half_dtype

        lm = self.load(dtype)
        if not (half := half_dtype(lm.device)):
            print_line(f"half precision is left out: {advice(lm.device)}")
        return lm, self.load(half) if half else None


@dataclass
class Loading(Place):
    """A model and everything that can be said of how it is loaded."""

    dtype: Dtype = None
    bitsandbytes: Annotated[str | None, Option(help="Quantize at load: int8, nf4 or fp4.")] = None
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a Hub model.")] = None
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run code of a Hub model.")] = False

    def load_checked(self, check: Callable[[llmlab.LM], object]) -> tuple[llmlab.LM, float]:
        """The model and the seconds that loading took; `check` may refuse it before a weight is read."""
        begin, options = time.perf_counter(), asdict(self)
        del options["model"], options["device"]
        return self.load(check=check, **options), time.perf_counter() - begin


def read_rows(data: str, limit: int | None) -> list[llmlab.Question]:
    """The questions of --data: a known set or a file."""
    known = {"everyday": llmlab.data.everyday, "hellaswag": llmlab.data.hellaswag}
    return known[data](limit) if data in known else llmlab.data.read_questions(data, limit=limit)


def check_positive(**numbers: int) -> None:
    """Raise InputError for the first number below 1; the names say what is counted."""
    for what, number in numbers.items():
        if number < 1:
            raise InputError(f"{number} {what.replace('_', ' ')}: give positive numbers.")


def measuring(run: Callable[[], T], lm: llmlab.LM, tokens: Callable[[T], int]) -> tuple[T, llmlab.Metric | None]:
    """What `run` returns, and the joules for 1,000 of its `tokens`, where energy can be measured on the device."""
    from llmlab.measure.energy import joules_per_1000_tokens, measure_energy

    results: list[T] = []
    energy = measure_energy(lambda: results.append(run()), lm.device)
    print_line(f"energy: {energy}")
    return results[0], joules_per_1000_tokens(energy, tokens(results[0]))


def finish(title: str, lm: llmlab.LM, result: Result, **how: Any) -> Payload:
    """Print a result, append its record (`how` as in `llmlab.record`) and return what --json tells: all of both."""
    print_metrics(title, result.metrics(), result.protocol)
    return result.as_dict() | {"record": llmlab.record(lm, result, **how).as_dict()}
