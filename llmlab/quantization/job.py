"""The whole job, from a model's name to a checkpoint folder: streamed, resumable, atomic."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmlab.base.errors import InputError
from llmlab.base.paths import new_folder
from llmlab.model.layerwise import stream
from llmlab.model.lm import LM, check_device
from llmlab.quantization.calibration import ROWS, calibration_rows
from llmlab.quantization.fit import check_quantizable
from llmlab.quantization.grid import Scheme
from llmlab.quantization.memory import check_job
from llmlab.quantization.report import Report
from llmlab.quantization.rotate import rotate
from llmlab.quantization.walk import Walk


def quantize_to(
    name: str,
    folder: str | Path,
    text: str,
    scheme: Scheme,
    *,
    method: str = "gptq",
    rows: int = ROWS,
    dtype: str = "fp32",
    device: str | None = None,
) -> tuple[LM, Report]:
    """Quantize a model and save it.

    Decoder layers are read one by one. Finished ones are kept in `.FOLDER.layers` beside the folder until that is
    complete: a killed job that is started again goes on behind them.

    Args:
        name: as for `llmlab.load`, not quantized.
        folder: a new folder.
        text: calibration text.
        scheme: bits, groups, order.
        method: "gptq" or "rtn"; "rotated gptq" and "rotated rtn" rotate the residual stream first (see `rotate`).
        rows: calibration rows of 512 tokens.
        dtype: in which layers are read and calibrated; fp32 is best.
        device: where; by default a GPU where there is one.

    Raises:
        InputError: before the expensive work, for anything unusable, and where memory will not do.
        NumericalError: see `quantize`.
    """
    scheme.check()
    if scheme.zero_points == "real":
        raise InputError("real zero points fit into no GPTQ checkpoint: give a scheme with integer ones.")
    target = new_folder(folder)
    if rows < 1:
        raise InputError(f"{rows} calibration rows: give a positive number.")
    solver = method.removeprefix("rotated ")
    lm, read_layer = stream(name, dtype=dtype, device=check_device(device))
    check_quantizable(lm, scheme, solver)
    calibration = calibration_rows(lm, text, rows=rows) if solver == "gptq" else None
    check_job(lm, scheme, calibration)
    if solver != method:
        lm, read_layer = rotate(lm, read_layer=read_layer)
    keep = target.parent / f".{target.name}.layers"
    walk = Walk(lm, scheme, solver, calibration, read_layer=read_layer, keep=keep)
    quantized = walk.run()
    quantized.save(target)
    shutil.rmtree(keep)
    return quantized, walk.report
