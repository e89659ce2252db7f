"""Finished layers on disk, so that a killed job that is started again goes on behind them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.matrices import matrices, matrix_of


class FinishedLayers:
    """Finished layers in a folder, one safetensors file each, written atomically.

    Args:
        folder: made if it is missing.
        job: what the layers depend on, ready for JSON.

    Raises InputError if the folder holds the layers of another job.
    """

    def __init__(self, folder: Path, job: dict[str, object]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "settings.json"
        if settings.exists() and settings.read_text() != json.dumps(job):
            raise InputError(
                f"{folder} holds layers of another job (other model, settings or calibration text): remove it."
            )
        with atomic(settings) as path:
            path.write_text(json.dumps(job))

    def has(self, index: int) -> bool:
        """Whether layer `index` is there."""
        return self._file(index).exists()

    def write(self, index: int, layer: torch.nn.Module) -> None:
        """Keep a quantized layer."""
        with atomic(self._file(index)) as path:
            save_file({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, path)

    def read(self, index: int, layer: torch.nn.Module) -> None:
        """Turn the plain layer `index`, its experts split, into the one that was kept."""
        tensors = load_file(self._file(index))
        for name, module in matrices(layer).items():
            if f"{name}.scales" in tensors:
                groups, rows = tensors[f"{name}.scales"].shape
                columns = matrix_of(module).shape[1]
                bits = 32 * len(tensors[f"{name}.qweight"]) // columns
                layer.set_submodule(name, QuantLinear(columns, rows, bits, groups, module.bias is not None))
        layer.load_state_dict(tensors)

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"
