"""What a rank holds, where it reads it to, when it lets go of it, and when it says that it works."""

import json
import os
from types import SimpleNamespace

import pytest
import rank_jobs
import torch
from conftest import CHECKOUT

import llmlab
from llmlab.base.errors import InputError
from llmlab.jobs.over_ranks import RankGroup
from llmlab.measure.memory import peak_bytes
from llmlab.model.fill import Tensors, empty_model, local_folder
from llmlab.model.sources import read_config, resolve
from llmlab.quantization.grid import Scheme
from llmlab.quantization.settings import quant_config
from llmlab.sharding import joined, pipeline
from llmlab.sharding.assemble import Place, assemble
from llmlab.sharding.busy import Busy
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import RandomTensors, check_layout, outline
from llmlab.sharding.peers import Meeting, ThreadPeers
from llmlab.sharding.pipeline import Stage, stage_layers
from llmlab.sharding.rank import own_device
from llmlab.sharding.tensor import Cut
from llmlab.sharding.timeline import Span, Task, Timeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def four():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'tests'}")
        group = llmlab.ranks(4, device="cpu")
    with group:
        yield group


@pytest.mark.slow
def test_another_layout_takes_the_place_of_the_last_one(four, tiny_folders):
    """Nothing of a part that was scored and written with is left, nor its groups, though no collector comes by."""
    folder, questions = str(tiny_folders["llama"]), llmlab.data.everyday(4)
    for cuts in (Cuts(2, 1, 2), Cuts(2, 2, 1), Cuts(1, 2, 2), Cuts(2, 1, 2)):
        four.score(folder, questions, plan=cuts, dtype="fp32")
        assert four.run(rank_jobs.left) == [(0, 3)] * 4  # tensors of the layout before; the world and two groups
        four.generate(folder, ["The kettle boils and", "She opens"], plan=cuts, dtype="fp32", max_new_tokens=2)
        assert min(four.run(rank_jobs.watch)) > 5


def read_part(stage, stages, part, parts, device):
    """(bytes of a part of the built-in model's weights, largest piece read at once, peak of this machine's memory)"""
    model = empty_model(read_config(resolve("smollm2")), torch.float32)
    tensors = Tensors(local_folder(resolve("smollm2")), model.base_model_prefix)
    layers = stage_layers(model.config.num_hidden_layers, stages)[stage]
    peers = ThreadPeers(Meeting(stages), stage), ThreadPeers(Meeting(parts), part)
    place = Place(0, Stage(peers[0]), layers, Cut(part, parts), peers[1])
    peak = peak_bytes(lambda: assemble(model, tensors, torch.device(device), place), CPU)
    assert {weight.device.type for weight in model.parameters()} == {device}
    return sum(weight.nbytes for weight in model.parameters()), tensors.largest, peak


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "stages", "part", "parts"), [(1, 4, 0, 1), (0, 1, 1, 3)])
def test_a_rank_holds_its_part_and_reads_a_tensor_at_a_time(stage, stages, part, parts):
    weights, largest, peak = read_part(stage, stages, part, parts, "cpu")
    assert peak is None or peak <= 1.1 * weights + largest


@pytest.mark.slow
def test_onto_another_device_goes_one_tensor_at_a_time(monkeypatch):
    """Torch's device "meta" stands for a GPU: what goes there leaves this machine's memory."""
    read = Tensors.read

    def read_all(*arguments):
        tensor = read(*arguments)
        tensor.sum()  # a copy to a GPU reads it all
        return tensor

    monkeypatch.setattr(Tensors, "read", read_all)
    monkeypatch.setattr("llmlab.model.fill.finite", lambda tensor: True)  # nothing can be asked of what went there
    weights, largest, peak = read_part(0, 1, 0, 1, "meta")
    assert weights > 4 * largest and (peak is None or peak <= 1.1 * largest)


def test_random_parts_are_made_where_they_go():
    tensors = RandomTensors(torch.device("meta"))
    like = torch.empty(8, 6, dtype=torch.float16, device="meta")
    with pytest.raises(RuntimeError, match="META"):  # which has no generator: it was asked for one
        tensors.read("a.weight", like, ())
    tensors = RandomTensors(CPU)
    part = tensors.read("a.weight", like, (slice(0, 4), slice(2, 6)))
    assert (part.shape, part.dtype, tensors.largest) == ((4, 4), torch.float16, 32)
    assert torch.equal(part, tensors.read("a.weight", like, (slice(4, 8), slice(2, 6))))
    norm = torch.empty(6, device="meta")
    assert tensors.read("a.weight", norm, ()).eq(1).all() and tensors.read("a.bias", norm, ()).eq(0).all()


def test_random_weights_of_a_quantized_config_are_one_sentence(tiny_folders, tmp_path):
    config = json.loads((tiny_folders["llama"] / "config.json").read_text())
    config["quantization_config"] = quant_config(Scheme(4, 32), "gptq")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for begin in (
        lambda: outline(f"random:{tmp_path}", "fp16", CPU),
        lambda: check_layout(f"random:{tmp_path}", Cuts(tensor=2), 2),
    ):
        with pytest.raises(InputError, match="ranks make plain random weights"):
            begin()


def test_a_random_weight_that_is_no_number_is_named(tiny_folders, monkeypatch):
    monkeypatch.setattr(RandomTensors, "read", lambda self, name, like, part: torch.full(like.shape, torch.nan))
    with pytest.raises(InputError, match=r"random weights: the tensor model\.embed_tokens\.weight holds NaN"):
        outline(f"random:{tiny_folders['llama']}", "fp32", CPU)


def test_an_outline_knows_the_model_and_holds_its_embedding(tiny_folders):
    folder = str(tiny_folders["llama"])
    whole, lm = llmlab.load(folder, dtype="fp32", device="cpu"), outline(folder, "fp32", CPU)
    assert (lm.card, lm.revision, lm.weight_bytes, lm.dtype) == (whole.card, whole.revision, whole.weight_bytes, "fp32")
    assert lm.device == CPU and lm.encode("a cat") == whole.encode("a cat")
    held = [name for name, weight in lm.model.named_parameters() if not weight.is_meta]
    assert held == ["model.embed_tokens.weight"]
    assert outline(f"random:{folder}", "fp16", CPU, layers=1).card.layers == 1


def test_a_process_of_torchrun_talks_through_its_own_gpu(monkeypatch):
    done = []
    numbers = {"LOCAL_RANK": "3", "RANK": "7", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(joined, "check_world", lambda size, device: "cuda")
    monkeypatch.setattr(joined, "_meet", lambda backend, timeout: done.append((backend, timeout)))
    monkeypatch.setattr(joined.Joined, "run", lambda self, function: None)
    rank = joined.Joined(timeout=5).rank
    assert done == [torch.device("cuda", 3), ("nccl", 5)]
    assert (rank.index, rank.device, rank.timeout) == (7, torch.device("cuda", 3), 5)
    assert own_device("cpu", 3) == CPU and len(done) == 2


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_ranks_compute_in_what_their_gpus_are_built_for(monkeypatch, tiny_folders, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    group = RankGroup(SimpleNamespace(size=2, device="cuda", index=0, run=None))
    folder = str(tiny_folders["llama"])
    assert group.job(folder, Cuts(data=2)).dtype == dtype
    assert group.job(folder, Cuts(data=2), "float32").dtype == "fp32"


class Gpu:
    """A GPU's clock: work and waiting, as they are asked for, take their time on it."""

    now = 0.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = Gpu.now

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

        def synchronize(self):
            """As a stream, too."""


class LatePeers:
    """The second of two stages, whose receives take 5 seconds of the GPU."""

    index, size = 1, 2

    def receive(self, tensor, source):
        def wait():
            Gpu.now += 5
            tensor.zero_()

        return wait

    def send(self, tensor, to):
        return lambda: None


@pytest.mark.parametrize("naive", [True, False])
def test_on_a_gpu_waiting_for_others_is_no_work(monkeypatch, naive):
    """The events lie behind the wait in the GPU's stream: a bubble of 5 in 6, where a clock here would tell of none."""
    monkeypatch.setattr(torch.cuda, "Event", Gpu.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Gpu.Event(True))
    monkeypatch.setattr(Gpu, "now", 0.0)
    config = read_config(resolve("random:opt-125m"))
    config.num_hidden_layers, config.vocab_size = 1, 16
    model = empty_model(config, torch.float32).to_empty(device="cpu")
    stage = Stage(LatePeers(), busy=Busy(torch.device("cuda")))
    pipeline.attach(model, stage)

    def finish(number, logits):
        Gpu.now += 1

    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "use_cache": False}
    with torch.inference_mode():
        pipeline.stream(model, stage, [batch] * 4, finish, naive=naive)
    spans = stage.busy.spans()
    assert spans == [(6.0 * n + 5, 6.0 * n + 6) for n in range(4)]
    timeline = Timeline(1, [Span(Task(0, 0, 0, 0.0), 0.0, 0.0), *(Span(Task(0, 0, 0, 1.0), *span) for span in spans)])
    assert timeline.bubble == pytest.approx(5 / 6)
