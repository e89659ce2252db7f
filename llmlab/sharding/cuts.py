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
        """Such as "data 2 x pipeline 2"; parts of 1 are left out."""
        parts = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        return " x ".join(f"{part} {size}" for part, size in parts.items() if size > 1) or "one device"

    def misfit(self, layers: int, kv_heads: int) -> str | None:
        """Why a model cannot be cut so; None where it can."""
        if self.tensor > kv_heads:  # whole groups of query heads and their KV head stay on one rank
            return f"cannot cut {kv_heads} KV heads {self.tensor} ways; tensor {kv_heads} is the most"
        if self.pipeline > layers:
            return f"has {self.pipeline} stages for {layers} layers"
        return None

    def check(self, size: int, layers: int, kv_heads: int) -> None:
        """Raise InputError where it does not fit the ranks or the model."""
        if min(self.data, self.tensor, self.pipeline) < 1 or self.ranks != size:
            raise InputError(f"{self.name} takes {self.ranks} ranks: there are {size}.")
        if misfit := self.misfit(layers, kv_heads):
            raise InputError(f"{self.name} {misfit}: choose another layout.")


def all_cuts(devices: int) -> list[Cuts]:
    """Every layout that uses all of `devices` devices."""
    divisors = [k for k in range(1, devices + 1) if devices % k == 0]
    return [Cuts(d, t, devices // (d * t)) for d in divisors for t in divisors if devices % (d * t) == 0]
