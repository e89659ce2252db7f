"""What a rank holds: a module of its own, for each rank imports what it is asked to run."""

import gc

import torch

from llmlab.decoding.engine import storage_bytes
from llmlab.jobs.rank_parts import Job
from llmlab.sharding.rank import Rank


def held_bytes(rank: Rank, job: Job) -> int:
    """Load a shard; bytes of all tensors that are alive on this rank's device then."""
    job.load(rank)
    alive = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return storage_bytes(t for t in alive if t.device == rank.device)
