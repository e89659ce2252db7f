"""GPTQModel as a peer, in an environment of its own.

Run this file with the Python of that environment. It reads one JSON object from standard input and writes one JSON
object as the last line of standard output; whatever the libraries print goes to standard error. Two jobs:

    {"job": "logits", "folder": DIR, "ids": [[...], ...], "loader": "gptqmodel" | "transformers", "output": FILE}
        loads a GPTQ checkpoint on the CPU in float32, runs the token rows (all of one length) as one batch and saves
        the float32 logits under the key "logits" of a safetensors file. "seconds" is the time of the forward pass.
    {"job": "quantize", "model": DIR, "output": DIR, "bits": 4, "group_size": 64, "desc_act": bool, "sym": bool,
     "ids": [[...], ...], "options": {...}}
        quantizes a plain transformers folder, which must hold a tokenizer, with GPTQ in float32, calibrated on
        exactly these token rows (longer ones are cut to the model's positions), and saves it. The options are more
        arguments of QuantizeConfig, such as {"gptaq": {"alpha": 0.25}}.
        "seconds" is the time of quantize() alone.

The answer is {"seconds": ..., "versions": {...}}, or {"error": "one sentence"} with exit status 1.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

# GPTQModel takes half of the cores by default and refuses to quantize with a single worker.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# It also compiles its packing code, which costs seconds for every shape of a layer and changes no result.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGES = ("gptqmodel", "transformers", "optimum", "torch", "numpy")


def load(folder: str, loader: str) -> Any:
    """The quantized model of a folder in float32 on the CPU, opened by GPTQModel or by transformers itself."""
    import torch

    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        # This kernel refuses float32 at load time, so the loaded model is converted.
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
        return model.float()
    if loader == "transformers":
        from transformers import AutoModelForCausalLM, GPTQConfig

        # Of this config transformers takes the backend alone; bits and the rest come from the checkpoint.
        config = GPTQConfig(bits=4, backend="gptq_torch")
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.float32, quantization_config=config
        )
    raise ValueError(f"unknown loader {loader!r}")


def logits(request: dict[str, Any]) -> float:
    """Runs the token rows through a quantized checkpoint, saves the logits and returns the seconds it took."""
    import torch
    from safetensors.torch import save_file

    model = load(request["folder"], request["loader"]).eval()
    ids = torch.tensor(request["ids"])
    with torch.inference_mode():
        start = time.perf_counter()
        result = model(input_ids=ids, use_cache=False).logits
        seconds = time.perf_counter() - start
    save_file({"logits": result.float().contiguous()}, request["output"])
    return seconds


def quantize(request: dict[str, Any]) -> float:
    """Quantizes a folder with GPTQ on exactly the given token rows, saves it and returns the seconds of quantize()."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        desc_act=request["desc_act"],
        sym=request["sym"],
        fallback=None,  # no round-to-nearest where GPTQ fails
        device="cpu",
        offload_to_disk=False,
        **request["options"],
    )
    model = GPTQModel.load(request["model"], config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in request["ids"]]
    start = time.perf_counter()
    # By default rows of up to ten tokens are dropped and the others sorted by length.
    settings = {"calibration_sort": None, "calibration_data_min_length": 0, "backend": BACKEND.GPTQ_TORCH}
    logs = model.quantize(rows, batch_size=1, **settings)  # of each pass: GPTAQ's exact one has none
    seconds = time.perf_counter() - start
    # GPTQModel notes such a loss where it had no usable Hessian.
    solved = [row for log in logs.values() for row in log]
    failed = [row["module"] for row in solved if float(row["loss"]) >= 999999999]
    if failed or not solved:
        raise RuntimeError(f"GPTQ did not run on {', '.join(failed) or 'any layer'}")
    model.save(request["output"])
    return seconds


def main() -> int:
    """Answers one request; returns the exit status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and their C code print
    try:
        request = json.load(sys.stdin)
        jobs = {"logits": logits, "quantize": quantize}
        if request.get("job") not in jobs:
            raise ValueError(f"unknown job {request.get('job')!r}")
        seconds = jobs[request["job"]](request)
        answer: dict[str, Any] = {"seconds": seconds, "versions": {name: version(name) for name in PACKAGES}}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
