"""llama.cpp as a peer, in an environment of its own.

Run this file with the Python of that environment. It reads one JSON object from standard input and writes one JSON
object as the last line of standard output; whatever the library prints goes to standard error. Two jobs:

    {"job": "about"}
        "gpu": whether it was built to compute on a GPU.
    {"job": "generate", "model": FILE.gguf, "prompts": [[ids], ...], "max_new_tokens": 128, "ends": [ids],
     "threads": 2, "gpu": bool, "lookup": bool}
        decodes greedily, one prompt after the other, each at most so many tokens or up to an end token.
        "completions" holds for each its "ids" (the end token included), "seconds_first" (prompt to first token) and
        "seconds_decode" (the tokens after it). The model is loaded and warmed up before the clock runs.

The answer is {"completions": [...], "versions": {...}}, or {"error": "one sentence"} with exit status 1.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Decodes the prompts and returns what came out, with times."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    most = max(map(len, request["prompts"])) + request["max_new_tokens"] + 64
    draft = LlamaPromptLookupDecoding(max_ngram_size=4, num_pred_tokens=10) if request["lookup"] else None
    threads = request["threads"]
    model = Llama(
        request["model"],
        n_ctx=most,
        n_threads=threads,
        n_threads_batch=threads,
        draft_model=draft,
        verbose=False,
        n_gpu_layers=-1 if request.get("gpu") else 0,
    )

    def decode(prompt: list[int], limit: int) -> dict[str, Any]:
        model.reset()
        ids: list[int] = []
        begin = first = time.perf_counter()
        for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            if not ids:
                first = time.perf_counter()
            ids.append(int(token))
            if len(ids) == limit or token in request["ends"]:
                break
        return {"ids": ids, "seconds_first": first - begin, "seconds_decode": time.perf_counter() - first}

    decode(request["prompts"][0], 8)
    return [decode(prompt, request["max_new_tokens"]) for prompt in request["prompts"]]


def about() -> dict[str, Any]:
    """What this build can do."""
    from llama_cpp import llama_supports_gpu_offload

    return {"gpu": bool(llama_supports_gpu_offload())}


def main() -> int:
    """Answers one request; returns the exit status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library and its C code print
    try:
        request = json.load(sys.stdin)
        jobs = {"generate": lambda: {"completions": generate(request)}, "about": about}
        if request.get("job") not in jobs:
            raise ValueError(f"unknown job {request.get('job')!r}")
        answer: dict[str, Any] = jobs[request["job"]]()
        answer["versions"] = {"llama-cpp-python": version("llama-cpp-python")}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
