"""What the tests let ranks do: ranks import functions by module and name."""

import gc
import os
import signal
import time
import weakref

import torch
import torch.distributed as dist

from llmlab import InputError


def where(rank):
    total = torch.tensor([float(rank.index)])
    dist.all_reduce(total)
    return rank.index, rank.size, os.getpid(), total.item()


def count(rank):
    rank.kept["calls"] = rank.kept.get("calls", 0) + 1
    return rank.kept["calls"]


def fail(rank, index, how):
    """Rank `index` fails while the others wait for it in a collective."""
    if rank.index == index:
        if how == "raise":
            raise ValueError(f"no luck on {index}")
        if how == "input":
            raise InputError("seven is no size.")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    dist.barrier()


def pids(rank):
    return os.getpid()


def sleep(rank, seconds):
    print(f"rank {rank.index} sleeps")
    time.sleep(seconds)


def load_then_die(rank, name, index, cuts):
    from llmlab.sharding.load import load_shard

    if rank.index == index:
        os.kill(os.getpid(), signal.SIGKILL)
    load_shard(rank, name, cuts, "fp32")


def die_in_gather(rank, index):
    if rank.index == index:
        os.kill(os.getpid(), signal.SIGKILL)
    found = [None] * rank.size
    dist.all_gather_object(found, rank.index)


def shard_sizes(rank, name, cuts):
    """(bytes of this part, largest piece read, peak of resident memory above what was there before)"""
    from llmlab.measure.memory import peak_bytes
    from llmlab.sharding.load import load_shard

    made = []
    peak = peak_bytes(lambda: made.append(load_shard(rank, name, cuts, "fp32")), rank.device)
    return made[0].weight_bytes, made[0].largest_tensor, peak


WATCHED = []


def watch(rank):
    """How many tensors of the model that this rank keeps are watched from now on; no collector comes by unasked."""
    gc.disable()
    [shard] = rank.kept.values()
    WATCHED[:] = [weakref.ref(weight) for weight in shard.lm.model.parameters()]
    return len(WATCHED)


def left(rank):
    """(watched tensors that are still there, process groups)"""
    return sum(watched() is not None for watched in WATCHED), len(dist.distributed_c10d._world.pg_map)
