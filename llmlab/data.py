"""Questions, texts and prompts: built in, from LLMLAB_DATA, from a file or from the Hub, checked on the way in."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from llmlab.base import hub
from llmlab.base.errors import InputError
from llmlab.base.paths import builtin_data

HELLASWAG_HUB = "Rowan/hellaswag"
WIKITEXT_HUB = "Salesforce/wikitext"
PROMPT_KINDS = ("summarize", "edit", "qa", "write", "extract")
FULL_SET = 10_042  # questions of HellaSwag's validation set


class Spread(NamedTuple):
    """How many tokens the texts of a set have."""

    least: int
    most: int
    mean: int
    deviation: int


# Of HellaSwag's validation set with LLaMA's tokenizer, as published (dongwonjo.github.io/portfolio/cechallenge).
QUESTION_TOKENS, ENDING_TOKENS = Spread(12, 118, 56, 20), Spread(2, 98, 33, 16)

Row = dict[str, object]  # of a JSON Lines file


@dataclass(frozen=True)
class Question:
    """A context and the endings to choose from; the text scored is `context + " " + ending`.

    Attributes:
        context: what comes before every ending; not empty.
        endings: at least two candidate continuations; HellaSwag has four.
        label: index of the right ending.
        source: the data set, which becomes the task in records.
    """

    context: str
    endings: tuple[str, ...]
    label: int
    source: str = "questions"


@dataclass(frozen=True)
class Prompt:
    """A prompt for generation and its kind: one of PROMPT_KINDS, or your own."""

    kind: str
    text: str


def everyday(limit: int | None = None) -> list[Question]:
    """The built-in set: 260 four-choice items in HellaSwag's form, written for this project (see data/README.md)."""
    return read_questions(builtin_data("everyday.jsonl"), limit=limit)


def hellaswag(limit: int | None = None) -> list[Question]:
    """HellaSwag's validation set (Zellers et al. 2019): `hellaswag*.jsonl` in the folder LLMLAB_DATA, else the Hub.

    Raises InputError if neither has it.
    """
    if (folder := _data_folder()) and (files := sorted(folder.glob("hellaswag*.jsonl"))):
        return read_questions(files[0], limit=limit, source="hellaswag")
    rows = _hub_rows(HELLASWAG_HUB, None, "validation", "hellaswag*.jsonl")
    return parse_questions(enumerate(rows, start=1), HELLASWAG_HUB, "hellaswag", limit=limit)


def wikitext(split: str = "test") -> str:
    """WikiText-2 (Merity et al. 2016), raw, as one text: `wikitext2_{test,valid}.txt` in LLMLAB_DATA, else the Hub.

    Args:
        split: "test" for perplexity, "valid" for calibration; never the other way round.

    Raises:
        InputError: for another split, or if neither place has it.
    """
    if split not in ("test", "valid"):
        raise InputError(f"unknown WikiText split {split!r}: choose test (perplexity) or valid (calibration).")
    name = f"wikitext2_{split}.txt"
    folder = _data_folder()
    if folder and (folder / name).exists():
        return read_text(folder / name)
    rows = _hub_rows(WIKITEXT_HUB, "wikitext-2-raw-v1", {"test": "test", "valid": "validation"}[split], name)
    return "\n\n".join(str(row["text"]) for row in rows)  # as GPTQ's datautils joins it


def prompts(kind: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The built-in prompts: ten of each of the five PROMPT_KINDS; `kind` keeps one kind."""
    if kind is not None and kind not in PROMPT_KINDS:
        raise InputError(f"unknown prompt kind {kind!r}: choose one of {', '.join(PROMPT_KINDS)}.")
    ours = read_prompts(builtin_data("prompts.jsonl"))
    return [p for p in ours if kind in (None, p.kind)][: _checked_limit(limit)]


def read_questions(path: str | Path, *, limit: int | None = None, source: str | None = None) -> list[Question]:
    """Four-choice rows from a JSON Lines file in HellaSwag's form.

    A row has `endings` (four), `label` (0-3) and either the Hub's `activity_label`, `ctx_a`, `ctx_b`, or only `ctx`.

    Args:
        path: the file.
        limit: read this many rows.
        source: name of the set; the file's stem by default.

    Raises:
        InputError: names the line that cannot be used, and why.
    """
    path = Path(path)
    return parse_questions(_json_lines(path), str(path), source or path.stem, limit=limit)


def parse_questions(
    rows: Iterable[tuple[int, Row]], where: str, source: str, *, limit: int | None = None
) -> list[Question]:
    """Numbered raw rows to checked questions, with lm-evaluation-harness's text rules."""
    questions = []
    for number, row in islice(rows, _checked_limit(limit)):
        try:
            questions.append(_question(row, source))
        except ValueError as error:
            raise InputError(f"{where}, line {number}: {error}.") from None
    if not questions:
        raise InputError(f"{where} holds no rows: expected JSON Lines with ctx, endings and label.")
    return questions


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """Prompts from a JSON Lines file with `prompt` and, optionally, `kind`. Raises InputError that names the line."""
    read = []
    for number, row in _json_lines(Path(path)):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}, line {number}: the field 'prompt' is missing, no text or empty.")
        read.append(Prompt(str(row.get("kind", "prompt")), text))
    if not read:
        raise InputError(f"{path} holds no prompts: expected JSON Lines with a field 'prompt'.")
    return read[: _checked_limit(limit)]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file that is not empty. Raises InputError."""
    text = _contents(Path(path))
    if not text.strip():
        raise InputError(f"the text file {path} is empty.")
    return text


def clean(text: str) -> str:
    """HellaSwag's text rules, equal to lm-evaluation-harness's: marks left by WikiHow's pages go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def fingerprint(questions: list[Question]) -> str:
    """SHA-256 over the texts and labels, so that two records can be known to be of the same questions."""
    return _sha256([question.context, question.endings, question.label] for question in questions)


def ids_fingerprint(rows: Iterable[Sequence[int]]) -> str:
    """SHA-256 over token ids that a model reads: another text, BOS, chat template or tokenization gives another one."""
    return _sha256(map(list, rows))


def _sha256(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def _question(row: Row, source: str) -> Question:
    """A checked row. Raises ValueError that says what is wrong."""
    if missing := [name for name in ("endings", "label") if name not in row]:
        raise ValueError(f"the field {missing[0]!r} is missing")
    endings, label = row["endings"], str(row["label"])  # the Hub stores labels as text
    if not isinstance(endings, list) or len(endings) != 4:
        count = len(endings) if isinstance(endings, list) else type(endings).__name__
        raise ValueError(f"expected four endings, got {count}")
    for index, ending in enumerate(endings):
        if not isinstance(ending, str) or not clean(ending):
            raise ValueError(f"ending {index} is empty or no text")
    if label not in {"0", "1", "2", "3"}:
        raise ValueError(f"the label must be 0, 1, 2 or 3, got {row['label']!r}")
    return Question(_context(row), tuple(map(clean, endings)), int(label), source)


def _context(row: Row) -> str:
    names = ["activity_label", "ctx_a", "ctx_b"]  # as on the Hub; other files may have one field
    if not set(names) <= row.keys():
        names = ["ctx"]
        if "ctx" not in row:
            raise ValueError("the field 'ctx' is missing")
    parts = [row[name] for name in names]
    texts = [part for part in parts if isinstance(part, str)]
    if texts != parts:
        raise ValueError(f"{', '.join(names)} must be text")
    context = clean(texts[0] if len(texts) == 1 else f"{texts[0]}: {texts[1]} {texts[2].capitalize()}")
    if not context:
        raise ValueError("the context is empty")
    return context


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_contents(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: invalid JSON ({error.msg} at column {error.colno}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        yield number, row


def _contents(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: byte {error.start} is not UTF-8.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or type(error).__name__}.") from None


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: give a positive number of rows, or none for all.")
    return limit


def _data_folder() -> Path | None:
    configured = os.environ.get("LLMLAB_DATA")
    if not configured:
        return None
    folder = Path(configured).expanduser()
    if not folder.is_dir():
        raise InputError(f"LLMLAB_DATA names {folder.absolute()}, which is no folder.")
    return folder


def _hub_rows(repo: str, subset: str | None, split: str, local_name: str) -> Iterable[Row]:
    if hub.ask(repo, "dataset") is None:
        raise InputError(
            f"the Hugging Face Hub cannot be reached for {repo!r}: set LLMLAB_DATA to a folder with {local_name}, or "
            "use the built-in set (everyday)."
        )
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError("reading from the Hub needs the package datasets: run pip install 'llmlab[demo]'.") from None
    rows: Iterable[Row] = datasets.load_dataset(repo, subset, split=split)
    return rows
