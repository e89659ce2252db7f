"""The verb `eval`: tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

from typer import Option

import llmlab
from llmlab.base.errors import InputError
from llmlab.cli.options import Loading, Payload
from llmlab.cli.terminal import console, make_table, print_line


def eval(
    loading: Loading,
    tasks: Annotated[str, Option(help="Names of lm-evaluation-harness, with commas: hellaswag,mmlu,gsm8k.")],
    limit: Annotated[int | None, Option(min=1, help="The first N questions of each task; by default all.")] = None,
    num_fewshot: Annotated[int | None, Option(min=0, help="Examples before a question; by default the task's.")] = None,
    include_path: Annotated[Path | None, Option(help="A folder with YAML files of your own tasks.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Texts written together; of the plain harness, rows.")] = 8,
    beside: Annotated[bool, Option("--beside", help="Run the plain harness, too, and compare.")] = False,
) -> Payload:
    """Any task of lm-evaluation-harness: few-shot examples are computed once, texts are written speculatively."""
    try:
        from lm_eval.models.huggingface import HFLM

        from llmlab.jobs.evaluate import differences, evaluate, load_tasks
        from llmlab.jobs.harness import HarnessLM
    except ModuleNotFoundError as error:
        raise InputError(f"eval needs lm-evaluation-harness ({error.name}): pip install 'llmlab[dev]'.") from None
    with console.status("reading the tasks"):
        loaded = load_tasks(tasks.split(","), include_path)
    lm, seconds_load = loading.load_checked(lambda _: None)
    how = {"num_fewshot": num_fewshot, "limit": limit}
    results = evaluate(HarnessLM(lm, batch_size=batch_size), loaded, **how)
    rows = [
        {"task": task, "metric": metric, "value": m.value, "n": result.n}
        | {"95 % interval": "" if m.low is None else f"{m.low:.4g} – {m.high:.4g}"}
        for task, result in results.items()
        for metric, m in result.values.items()
    ]
    console.print(make_table(lm.name, rows))
    for protocol in dict.fromkeys(result.protocol for result in results.values()):
        print_line(protocol, "dim")
    seconds = next(iter(results.values())).seconds
    print_line(f"{seconds:.1f} s from documents to metrics")
    told = {
        task: result.as_dict() | {"record": llmlab.record(lm, result).as_dict()} for task, result in results.items()
    }
    payload: Payload = {"tasks": told, "seconds": seconds, "seconds_load": seconds_load}
    if beside:
        plain = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)
        others = evaluate(plain, loaded, **how)
        unequal = {task: numbers for task in results if (numbers := differences(results[task], others[task]))}
        theirs = next(iter(others.values())).seconds
        same = f"other results for the questions {unequal}" if unequal else "equal results"
        print_line(f"{theirs:.1f} s by the plain harness, {theirs / seconds:.2f} times as long; {same}")
        payload["beside"] = {"seconds": theirs, "different": unequal}
    return payload
