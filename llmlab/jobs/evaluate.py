"""Any task of lm-evaluation-harness, question by question: with `HarnessLM`, or with the plain harness beside it.

tasks = load_tasks(["hellaswag", "arc_easy"])  # before the model: what cannot be had is told at once
ours = evaluate(HarnessLM(llmlab.load("smollm2")), tasks, limit=100)
print(paired(ours["arc_easy"], theirs["arc_easy"]))  # any two evals of the same questions
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.result_schema import EvalResults, SampleResult
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from llmlab.base import hub
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric, mean_score
from llmlab.jobs.harness import HarnessLM

SEED = 1234  # of the few-shot examples, the harness's own
CLUSTERS = ("source_id", "passage", "article", "paragraph")  # fields of documents: HellaSwag's video or page, a text


@dataclass(frozen=True)
class EvalResult:
    """What a model reached in one task, or in a group of tasks.

    Attributes:
        task, data: its name, and the fingerprint of its questions and targets.
        values: metric -> its value; with a 95 % interval (see `mean_score`) where it is the mean of the questions'.
        scores: metric -> the score of each of the N questions, where questions have one.
        predictions: of each question the number of the most probable choice, or the text that was written.
        log_probs: of each question's continuations, in nats; empty where texts were written.
        clusters: what each question has in common with others: a video, a text.
        n: N.
        seconds: of all tasks that ran together, from documents to metrics.
        settings: `version` of the task, `num_fewshot`, and how the model was asked.
        protocol: how the numbers came about, in one line.
        seed: of the few-shot examples.
        memory_bytes: None, the weights alone.
    """

    task: str
    data: str
    values: dict[str, Metric]
    scores: dict[str, list[float]]
    predictions: list[object]
    log_probs: list[list[float]]
    clusters: list[str]
    n: int
    seconds: float
    settings: dict[str, str]
    protocol: str
    seed: int = SEED
    memory_bytes: int | None = None

    @property
    def right(self) -> list[float]:
        """The scores by the task's first metric, for `paired`."""
        if not self.scores:
            raise InputError(f"{self.task} has no metric that scores single questions: results cannot be paired.")
        return next(iter(self.scores.values()))

    def metrics(self) -> dict[str, Metric]:
        """The measurements, for a Record."""
        return self.values

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return asdict(self)


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> TaskDict:
    """Tasks and groups with their data, by the harness's names; `include_path`: a folder with YAML files of your own.

    Raises InputError: a task is not known, its data cannot be had, or it does what is not served here.
    """
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"no folder {include_path}: --include-path takes a folder with YAML files of tasks.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    own = TaskManager(include_path=include_path, include_defaults=False)
    # The harness's own 14,000 YAML files are read only for other names, and for groups, which may hold any task.
    manager = own if {*names} <= {*own.all_subtasks} else TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"unknown task {', '.join(unknown)}: `lm-eval ls tasks` lists them; --include-path adds yours."
        )
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    with _hub_asked_once() as reachable:
        for name in names:
            try:
                for kind, found in manager.load([name]).items():
                    loaded[kind] |= found
            except Exception as error:  # whatever a task's own code, its YAML or the Hub's clients raise
                why = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
                advice = "" if reachable else " (the Hugging Face Hub cannot be reached: connect, or give local data)"
                raise InputError(f"the task {name} cannot be loaded: {why}{advice}.") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(f"the task {name} runs code that the model writes, or shows pictures: not served here.")
    return loaded


@contextmanager
def _hub_asked_once() -> Iterator[bool]:
    """Whether the Hub can be reached. If not, its clients look into their caches alone within the block: else each
    task would try for half a minute."""
    reachable = hub.ask("Rowan/hellaswag", "dataset") is not None
    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE |= not reachable
        yield reachable
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = was


def evaluate(
    model: TemplateLM, tasks: TaskDict, *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, EvalResult]:
    """Run tasks: name -> result, of tasks and then of groups. Seeds are fixed.

    Args:
        model: a `HarnessLM`, or a model of the harness itself.
        tasks: from `load_tasks`.
        num_fewshot: examples before each question; by default as many as the task says. A task that says 0 keeps to it.
        limit: the first questions of each task; by default all.
    """
    for task in tasks["tasks"].values():  # the harness's rules, of its `simple_evaluate`
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(SEED)
    random.seed(0)
    np.random.seed(SEED)
    begin = time.perf_counter()
    told = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=0)
    told["seconds"] = time.perf_counter() - begin
    results = {name: _result(name, [task], model, told) for name, task in tasks["tasks"].items()}
    groups = {name: group for name, group in tasks["groups"].items() if name in told.get("groups", {})}
    return results | {name: _result(name, group.get_all_tasks(), model, told) for name, group in groups.items()}


def _result(name: str, tasks: list[Task], model: TemplateLM, told: EvalResults) -> EvalResult:
    """What the harness found, question by question; of a group the questions of all its tasks."""
    samples = [(task, sample) for task in tasks for sample in told["samples"][task.task_name]]
    first = {task.task_name: told["samples"][task.task_name][0]["filter"] for task in tasks}  # of several, of answers
    questions = [(task, sample) for task, sample in samples if sample["filter"] == first[task.task_name]]
    clusters = [_cluster(task, sample) for task, sample in questions]
    values, scores = {}, {}
    for key, value in (told["groups"] if name in told.get("groups", {}) else told["results"])[name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        values[label] = Metric(float(value))
        own = [sample.get(metric) for _, sample in samples if sample["filter"] == chosen]
        if len(own) == len(questions) and all(isinstance(score, int | float | np.number) for score in own):
            scores[label] = [float(score) for score in own]
            if math.isclose(sum(scores[label]) / len(own), value):
                values[label] = mean_score(scores[label], clusters)
    answers = [_answer(task.OUTPUT_TYPE, sample) for task, sample in questions]
    asked = json.dumps([[sample["doc_hash"], sample["target_hash"]] for _, sample in questions])
    kinds = _joined(task.OUTPUT_TYPE for task in tasks)
    if isinstance(model, HarnessLM):
        how = model.settings["generate_until" if kinds == "generate_until" else "loglikelihood"]
    else:
        how = {"method": type(model).__name__}
    return EvalResult(
        task=name,
        data=f"sha256:{hashlib.sha256(asked.encode()).hexdigest()[:16]}",
        values=values,
        scores=scores,
        predictions=[prediction for prediction, _ in answers],
        log_probs=[log_probs for _, log_probs in answers],
        clusters=clusters,
        n=len(questions),
        seconds=told["seconds"],
        settings=how
        | {
            "version": _joined(task.VERSION for task in tasks),
            "num_fewshot": _joined(task.get_config("num_fewshot") for task in tasks),
        },
        protocol=f"lm-evaluation-harness {lm_eval.__version__}, {kinds}, few-shot seed "
        f"{SEED}; 95 % intervals of {len(set(clusters))} clusters",
    )


def _joined(words: Iterator[object]) -> str:
    """Different words, in their order."""
    return ", ".join(dict.fromkeys(map(str, words)))


def _cluster(task: Task, sample: SampleResult) -> str:
    """What a question has in common with others; else its own number."""
    document = sample["doc"] if isinstance(sample["doc"], dict) else {}
    common = next((str(document[field]) for field in CLUSTERS if document.get(field)), "")
    mark = hashlib.sha256(common.encode()).hexdigest()[:12] if common else sample["doc_id"]
    return f"{task.task_name} {mark}"


def _answer(kind: str, sample: SampleResult) -> tuple[object, list[float]]:
    """The prediction for a question, and the log-probabilities of its continuations."""
    responses = sample["filtered_resps"]
    if kind == "generate_until":
        return responses[0], []
    log_probs = [float(response[0] if isinstance(response, tuple) else response) for response in responses]
    if kind != "multiple_choice":  # whether greedy decoding writes it
        return responses[0][1] if isinstance(responses[0], tuple) else None, log_probs
    choices = len(log_probs) // (2 if "acc_mutual_info" in sample["metrics"] else 1)  # then all again, without context
    return int(np.argmax(log_probs[:choices])), log_probs


def differences(ours: EvalResult, theirs: EvalResult) -> list[int]:
    """The questions with another prediction or another score."""
    sides = [zip(side.predictions, *side.scores.values(), strict=True) for side in (ours, theirs)]
    return [number for number, (a, b) in enumerate(zip(*sides, strict=True)) if a != b]


def read_results(path: Path) -> dict[str, EvalResult]:
    """Task -> result, from a file of `llmlab eval --json`. Raises InputError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        own = [{name: row[name] for name in EvalResult.__dataclass_fields__} for row in rows.values()]
        values = [{name: Metric(**metric) for name, metric in row["values"].items()} for row in own]
        return {row["task"]: EvalResult(**row | {"values": metrics}) for row, metrics in zip(own, values, strict=True)}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no file that llmlab eval --json wrote.") from None
