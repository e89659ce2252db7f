"""A layout: how a model is cut over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.base.errors import InputError


@dataclass(frozen=True)
class Cuts:
    """Data x tensor x pipeline: how many replicas, how each layer and how the stack of layers is cut."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return self.data * self.tensor * self.pipeline

    @property
    def name(self) -> str:
        """Such as "data 2 x pipeline 2"."""
        parts = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        return " x ".join(f"{part} {size}" for part, size in parts.items() if size > 1) or "one device"

    def check(self, size: int, layers: int, kv_heads: int) -> None:
        """Raise InputError where it does not fit the ranks or the model."""
        if min(self.data, self.tensor, self.pipeline) < 1 or self.ranks != size:
            raise InputError(f"{self.name} takes {self.ranks} ranks: there are {size}.")
        if self.pipeline > layers:
            raise InputError(f"{self.pipeline} stages for {layers} layers: use at most {layers}.")
        if self.tensor > kv_heads:
            raise InputError(f"tensor {self.tensor} for {kv_heads} KV heads: use at most tensor {kv_heads}.")
