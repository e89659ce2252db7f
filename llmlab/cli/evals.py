"""The verb `eval`: tasks of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

import llmlab
from llmlab.base.errors import InputError
from llmlab.cli.options import BatchSize, Limit, Loading, Payload
from llmlab.cli.terminal import console, make_table, print_line


@dataclass
class Asking:
    """What is asked, and how."""

    tasks: Annotated[str, Option(help="Names of lm-evaluation-harness with commas: hellaswag,mmlu,gsm8k.")]
    limit: Limit = None
    num_fewshot: Annotated[int | None, Option(help="Examples before each question; by default the task's.")] = None
    include_path: Annotated[Path | None, Option(help="A folder with YAML files of your own tasks.")] = None
    batch_size: BatchSize = 8
    beside: Annotated[bool, Option("--beside", help="Run the plain harness, too, and compare.")] = False

    def check(self) -> None:
        """Raise InputError for a number out of range."""
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            if (number := getattr(self, name)) is not None and number < least:
                raise InputError(f"--{name.replace('_', '-')} {number}: give {least} or more.")


def eval(asking: Asking, loading: Loading) -> Payload:
    """Any task of lm-evaluation-harness: few-shot examples are computed once, texts are written speculatively."""
    asking.check()
    try:
        from llmlab.jobs import evaluate as harness
        from llmlab.jobs.harness import HarnessLM
    except ModuleNotFoundError as error:
        raise InputError(f"eval needs lm-evaluation-harness ({error.name}): pip install 'llmlab[dev]'.") from None
    with console.status("reading the tasks"):
        tasks = harness.load_tasks(asking.tasks.split(","), asking.include_path)
    lm, seconds = loading.load_checked(lambda _: None)
    how = {"num_fewshot": asking.num_fewshot, "limit": asking.limit}
    results = harness.evaluate(HarnessLM(lm, batch_size=asking.batch_size), tasks, **how)
    rows = [
        {"task": task, "metric": metric, "value": m.value, "n": result.n}
        | {"95 % interval": "" if m.low is None else f"{m.low:.4g} – {m.high:.4g}"}
        for task, result in results.items()
        for metric, m in result.values.items()
    ]
    console.print(make_table(lm.name, rows))
    took = next(iter(results.values())).seconds
    print_line(f"{took:.1f} s from documents to metrics")
    payload: Payload = {"tasks": {}, "seconds": took, "seconds_load": seconds}
    for task, result in results.items():
        payload["tasks"][task] = result.as_dict() | {"record": llmlab.record(lm, result).as_dict()}
    if asking.beside:
        others = harness.evaluate(harness.plain_harness(lm, asking.batch_size), tasks, **how)
        unequal = {task: numbers for task in results if (numbers := harness.differences(results[task], others[task]))}
        theirs = next(iter(others.values())).seconds
        same = f"other results for the questions {unequal}" if unequal else "equal results"
        print_line(f"{theirs:.1f} s by the plain harness, {theirs / took:.2f} times as long; {same}")
        payload["beside"] = {
            "seconds": theirs,
            "different": unequal,
            "values": {t: r.values for t, r in others.items()},
        }
    return payload
