"""AutoGPTQ 0.7.1 as a peer, in an environment of its own.

Run this file with the Python of that environment. It reads one JSON object from standard input and writes one JSON
object as the last line of standard output; whatever the libraries print goes to standard error. Two jobs:

    {"job": "logits", "folder": DIR, "ids": [[...], ...], "loader": "auto_gptq", "output": FILE}
        loads a GPTQ checkpoint on the CPU in float32, runs the token rows (all of one length) as one batch and saves
        the float32 logits under the key "logits" of a safetensors file. "seconds" is the time of the forward pass.
    {"job": "quantize", "model": DIR, "output": DIR, "bits": 4, "group_size": 64, "desc_act": bool, "sym": bool,
     "ids": [[...], ...]}
        quantizes a plain transformers folder with GPTQ in float32, calibrated on exactly these token rows, and saves
        it. "seconds" is the time of quantize() alone.

The answer is {"seconds": ..., "versions": {...}}, or {"error": "one sentence"} with exit status 1.

AutoGPTQ quantizes on a CUDA device alone, although its arithmetic is plain PyTorch. Without one this file puts the CPU
in the place of that device and leaves out the wait for it; the algorithm stays as it was published.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGES = ("auto-gptq", "transformers", "peft", "torch", "numpy")


@contextmanager
def readable(folder: str) -> Iterator[str]:
    """The same folder, by links, with the configuration in the words of transformers 4.

    transformers 5 writes the base of the rotary positions as rope_parameters, which version 4 passes over in silence
    and takes 10,000 instead. AutoGPTQ reads its settings from quantize_config.json alone.
    """
    source = Path(folder).resolve()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in source.iterdir():
            if file.name != "config.json":
                (copy / file.name).symlink_to(file)
        config = json.loads((source / "config.json").read_text())
        rope = dict(config.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        (copy / "config.json").write_text(json.dumps(config))
        settings = copy / "quantize_config.json"
        if "quantization_config" in config and not settings.exists():
            settings.write_text(json.dumps(config["quantization_config"]))
        yield name


def logits(request: dict[str, Any]) -> float:
    """Runs the token rows through a quantized checkpoint, saves the logits and returns the seconds it took."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM
    from safetensors.torch import save_file

    if request["loader"] != "auto_gptq":
        raise ValueError(f"unknown loader {request['loader']!r}")
    # The ExLlama kernels run on CUDA alone; without them AutoGPTQ unpacks the weights with PyTorch.
    with readable(request["folder"]) as folder:
        model = AutoGPTQForCausalLM.from_quantized(
            folder, device="cpu", torch_dtype=torch.float32, disable_exllama=True, disable_exllamav2=True
        ).model.eval()
    model.tie_weights()  # a checkpoint with tied embeddings need not hold the output layer; AutoGPTQ leaves it unset
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
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        _base.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda device=None: None
    config = BaseQuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        desc_act=request["desc_act"],
        sym=request["sym"],
        model_file_base_name="model",  # the name by which every other library looks for the file
    )
    # Its own from_pretrained() does this and asks for a CUDA device first.
    with readable(request["model"]) as folder:
        plain = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    plain.seqlen = plain.config.max_position_embeddings
    model = GPTQ_CAUSAL_LM_MODEL_MAP[plain.config.model_type](plain, False, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in request["ids"]]
    start = time.perf_counter()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - start
    model.save_quantized(request["output"])
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
