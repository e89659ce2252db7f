"""Every tensor of a checkpoint is accounted for, whatever files it lies in and however it was found."""

import importlib.util
import io
import json
import shutil
import sys
from functools import partial

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig

import llmlab
from llmlab import InputError
from llmlab.model import rewrite
from llmlab.model.layerwise import stream
from llmlab.model.sources import fingerprint, resolve

IDS = torch.arange(20)[None] + 60
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
load = partial(llmlab.load, dtype="fp32", device="cpu")


def logits(lm):
    with torch.inference_mode():
        return lm.model(input_ids=IDS).logits


def streamed(folder):
    """The model as `fill` reads it: what ranks and quantization read."""
    lm, read_layer = stream(str(folder))
    path = next(name for name, module in lm.model.named_modules() if isinstance(module, torch.nn.ModuleList))
    layers = [read_layer(index) for index in range(lm.model.config.num_hidden_layers)]
    lm.model.set_submodule(path, torch.nn.ModuleList(layers))
    return lm


def copied(folder, target, *, without=()):
    """A copy of a model's folder that can be changed, without some files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*without))
    return target


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder, names, save, index):
    """Replace model.safetensors by two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for file, half in zip(names, halves, strict=True):
        save({key: tensors[key].clone() for key in half}, folder / file)
    places = {key: file for file, half in zip(names, halves, strict=True) for key in half}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
as_bins = partial(split, names=BINS, save=torch.save, index=BIN_INDEX)
as_shards = partial(split, names=SHARDS, save=partial(save_file, metadata={"format": "pt"}), index=INDEX)


def without_prefix(folder, prefix="model."):
    write(
        folder, {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    )


def legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("change", [None, without_prefix], ids=["model.decoder", "decoder"])
@pytest.mark.parametrize("save", [torch.save, legacy], ids=["zip", "legacy"])
def test_bin_files_as_opt_is_published(tiny_folders, tmp_path, save, change):
    folder = copied(tiny_folders["opt"], tmp_path / "opt")
    want = logits(load(str(folder)))
    if change:
        change(folder)
    as_bins(folder, save=save)
    assert torch.equal(logits(load(str(folder))), want)
    assert torch.allclose(logits(streamed(folder)), want, atol=1e-5)


def test_one_bin_file(tiny_folders, tmp_path):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load(str(folder))), logits(load(str(tiny_folders["llama"]))))


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_a_bin_file_that_holds_code_is_not_run(tiny_folders, tmp_path, capsys):
    folder = copied(tiny_folders["llama"], tmp_path / "llama", without=["*.safetensors"])
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors"):
        load(str(folder))
    assert "unpickled" not in capsys.readouterr().out


def test_convert_writes_what_it_read(tiny_folders, tmp_path, monkeypatch):
    folder = copied(tiny_folders["opt"], tmp_path / "opt")
    tensors = load_file(folder / "model.safetensors")
    as_bins(folder)
    monkeypatch.setattr(rewrite, "SHARD_BYTES", 2**23)
    target = llmlab.convert(str(folder), tmp_path / "new")
    places = json.loads((target / INDEX).read_text())["weight_map"]
    assert places.keys() == tensors.keys() and len(set(places.values())) > 1
    assert all(torch.equal(load_file(target / file)[name], tensors[name]) for name, file in places.items())
    assert torch.equal(logits(load(str(target))), logits(load(str(tiny_folders["opt"]))))
    with pytest.raises(InputError, match="exists already"):
        llmlab.convert(str(folder), target)


def test_the_index_decides_which_files_count(tiny_folders, tmp_path):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    want, tensors = logits(load(str(folder))), load_file(folder / "model.safetensors")
    as_shards(folder)
    stale = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    write(folder, stale)
    for beside in ("model-00003-of-00003.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        save_file(stale, folder / beside)
    assert torch.equal(logits(load(str(folder))), want)
    assert torch.allclose(logits(streamed(folder)), want, atol=1e-5)
    before = fingerprint(resolve(str(folder)))
    save_file(tensors, folder / "consolidated.safetensors")
    assert fingerprint(resolve(str(folder))) == before


def missing_shard(folder):
    as_shards(folder)
    (folder / SHARDS[1]).unlink()


def pointer(name, folder):
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 134\n")


def half(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-999])


def half_bin(folder):
    as_bins(folder)
    data = (folder / BINS[0]).read_bytes()
    (folder / BINS[0]).write_bytes(data[: len(data) // 2])


def both_bins(folder):
    as_bins(folder)
    torch.save({}, folder / "pytorch_model.bin")


def no_index(folder):
    as_shards(folder)
    (folder / INDEX).unlink()


def cut_index(folder):
    as_shards(folder)
    (folder / INDEX).write_text('{"weight_map": {"a"')


def no_metadata(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


def outside(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))


@pytest.mark.parametrize(
    "damage, says",
    [
        (missing_shard, f"lacks {SHARDS[1]}, which its index names"),
        (partial(pointer, "model.safetensors"), "model.safetensors is a Git LFS pointer, not the file itself"),
        (partial(pointer, "tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
        (partial(pointer, "config.json"), "config.json is a Git LFS pointer"),
        (half, "model.safetensors, it may be truncated: download it again"),
        (half_bin, "it is truncated"),
        (both_bins, "delete the one that is out of date"),
        (no_index, f"no {INDEX} that says which count"),
        (cut_index, f"{INDEX}, it may be truncated"),
        (no_metadata, 'has no "metadata"'),
        (outside, "expected files of its own folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors file, no pytorch_model.bin"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_folders_are_one_sentence(tiny_folders, tmp_path, damage, says):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    damage(folder)
    for read in (load, streamed):
        with pytest.raises(InputError) as caught:
            read(str(folder))
        assert says in str(caught.value) and "\n" not in str(caught.value)


LAYER = "model.layers.1."
DOWN = f"{LAYER}mlp.down_proj.weight"


def changed(**edits):
    def change(tensors):
        for name, tensor in edits.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        return tensors

    return change


def poisoned(value):
    def change(tensors):
        tensors[DOWN][3, 5] = value
        return tensors

    return change


@pytest.mark.parametrize(
    "change, says",
    [
        (changed(**{DOWN: None}), f"{DOWN} .*is missing|{DOWN} is missing"),
        (changed(**{"lm_head.weight": None}), "lm_head.weight .*is missing|lm_head.weight is missing"),
        (changed(**{f"{LAYER}mlp.extra.weight": torch.ones(3)}), f"{LAYER}mlp.extra.weight has no place in a llama"),
        (changed(**{f"{LAYER}self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias has no place"),
        (changed(**{f"{LAYER}attn.bias": torch.ones(1, 1, 4, 4)}), "attn.bias has no place"),
        (changed(**{DOWN: torch.ones(64, 64)}), rf"{DOWN} is \[64, 64\], expected \[64, 128\]"),
        (poisoned(float("nan")), f"{DOWN} holds NaN"),
        (poisoned(float("inf")), f"{DOWN} holds NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tiny_folders, tmp_path, change, says):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    write(folder, change(load_file(folder / "model.safetensors")))
    for read in (load, streamed):
        with pytest.raises(InputError, match=says):
            read(str(folder))


def test_a_weight_that_the_dtype_cannot_hold_is_named(tiny_folders, tmp_path):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    write(folder, poisoned(1e6)(load_file(folder / "model.safetensors")))
    assert load(str(folder)).dtype == "fp32"
    with pytest.raises(InputError, match=f"{DOWN} holds NaN or infinity as torch.float16"):
        llmlab.load(str(folder), dtype="fp16", device="cpu")


HARMLESS = {
    f"{LAYER}self_attn.rotary_emb.inv_freq": 1 / 10000 ** (torch.arange(0, 16, 2) / 16),
    f"{LAYER}self_attn.q_proj.bias": torch.zeros(64),
    f"{LAYER}attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
    f"{LAYER}attn.masked_bias": torch.tensor(-1e4),
    "model.position_ids": torch.arange(8),
}


def test_harmless_tensors_of_old_checkpoints_change_nothing(tiny_folders, tmp_path):
    folder = copied(tiny_folders["llama"], tmp_path / "llama")
    want = logits(load(str(folder)))
    write(folder, load_file(folder / "model.safetensors") | HARMLESS)
    assert torch.equal(logits(load(str(folder))), want)
    assert torch.allclose(logits(streamed(folder)), want, atol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_copy_of_a_tied_head(tiny_folders, tmp_path, same):
    folder = copied(tiny_folders["opt"], tmp_path / "opt")  # OPT ties its head
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    write(folder, tensors | {"lm_head.weight": embedding.clone() if same else embedding + 1})
    for read in (load, streamed):
        if same:
            assert torch.allclose(logits(read(str(folder))), logits(load(str(tiny_folders["opt"]))), atol=1e-5)
        else:
            with pytest.raises(InputError, match="differs from the embedding to which"):
                read(str(folder))


TINY = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
FAMILIES = [
    MixtralConfig(**TINY, num_local_experts=4),  # w1, w2, w3 of each expert are merged on reading
    DeepseekV3Config(  # and a buffer that is a weight
        **TINY, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=2,
        topk_group=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_tensors_that_transformers_renames_or_merges(smollm2, tmp_path, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in _:
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path / "m")
    smollm2.tokenizer.save_pretrained(tmp_path / "m")
    want = logits(llmlab.LM(model, None, None, ""))
    assert torch.allclose(logits(load(str(tmp_path / "m"))), want, atol=1e-4)
    assert torch.allclose(logits(streamed(tmp_path / "m")), want, atol=1e-4)
    expert = next(name for name in load_file(tmp_path / "m/model.safetensors") if "experts.2." in name)
    tensors = load_file(tmp_path / "m/model.safetensors")
    del tensors[expert]
    write(tmp_path / "m", tensors)
    for read in (load, streamed):
        with pytest.raises(InputError, match="experts"):
            read(str(tmp_path / "m"))


# The resolver: one for every job.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the Hub with a function that puts a folder there: (repository, folder, branch)."""
    place = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setenv("HF_HUB_CACHE", str(place))  # for ranks, which are new processes

    def put(repo, folder, branch="main"):
        commit = f"{abs(hash((repo, branch))):040x}"[-40:]
        model = place / f"models--{repo.replace('/', '--')}"
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / branch).write_text(commit)
        shutil.copytree(folder, model / "snapshots" / commit)
        return commit

    return put


def test_opt_by_its_name_from_bin_files(tiny_folders, tmp_path, hub_cache):
    folder = copied(tiny_folders["opt"], tmp_path / "opt")
    as_bins(folder)
    commit = hub_cache("facebook/opt-30b", folder)
    lm = load("facebook/opt-30b")
    assert torch.equal(logits(lm), logits(load(str(tiny_folders["opt"]))))
    assert lm.revision == commit
    assert torch.allclose(logits(streamed("facebook/opt-30b")), logits(lm), atol=1e-5)
    assert resolve("opt-30b").revision == commit  # a shipped shape's name is that of its Hub model


def test_a_revision_means_config_and_weights_for_every_job(tiny_folders, hub_cache):
    main = hub_cache("someone/both", tiny_folders["llama"])
    other = hub_cache("someone/both", tiny_folders["opt"], "other")
    for lm in (load("someone/both", revision="other"), load("someone/both@other"), streamed("someone/both@other")):
        assert (lm.card.model_type, lm.revision) == ("opt", other)
        assert torch.allclose(logits(lm), logits(load(str(tiny_folders["opt"]))), atol=1e-5)
    assert (load("someone/both").card.model_type, resolve("someone/both").revision) == ("llama", main)
    with pytest.raises(InputError, match="at revision 'third' is not in its local cache"):
        load("someone/both@third")


@pytest.mark.slow
def test_ranks_read_the_same_files(tiny_folders, tmp_path, hub_cache):
    folder = copied(tiny_folders["opt"], tmp_path / "opt")
    as_bins(folder)
    torch.save({"stale": torch.ones(1)}, folder / "pytorch_model-00003-of-00003.bin")
    hub_cache("facebook/opt-30b", tiny_folders["llama"])
    commit = hub_cache("facebook/opt-30b", folder, "bins")
    rows = llmlab.data.everyday(3)
    want = llmlab.score(load(str(tiny_folders["opt"])), rows)
    with llmlab.ranks(2, device="cpu") as two:
        for layout in ({"tensor": 2}, {"pipeline": 2}):
            found = two.score("facebook/opt-30b@bins", rows, dtype="fp32", **layout)
            for a, b in zip(found.log_probs, want.log_probs, strict=True):
                assert a == pytest.approx(b, abs=1e-3)
        (folder / BINS[1]).unlink()
        with pytest.raises(InputError, match=f"lacks {BINS[1]}, which its index names"):
            two.score(str(folder), rows, dtype="fp32", pipeline=2)
    assert resolve("facebook/opt-30b@bins").revision == commit


def test_a_folder_named_like_an_owner_hides_no_hub_model(tiny_folders, tmp_path, hub_cache, monkeypatch):
    hub_cache("owner/model", tiny_folders["llama"])
    monkeypatch.chdir(tmp_path)
    copied(tiny_folders["opt"], tmp_path / "owner" / "other")
    assert load("owner/model").card.model_type == "llama"
    assert load("owner/other").card.model_type == "opt"
    with pytest.raises(InputError, match=rf"'owner/third' is not in its local cache.* no folder .*{tmp_path}"):
        load("owner/third")
    (tmp_path / "owner" / "model").mkdir()
    with pytest.raises(InputError, match="rename it if you mean the Hub's model"):
        load("owner/model")


def test_a_tokenizer_that_needs_sentencepiece_says_so(tiny_folders, tmp_path, monkeypatch):
    folder = copied(tiny_folders["llama"], tmp_path / "llama", without=["tokenizer*", "special*"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")

    def absent(*_):
        raise ImportError("no sentencepiece")

    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "sentencepiece" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(sys.modules["transformers.convert_slow_tokenizer"], "SentencePieceExtractor", absent)
    monkeypatch.setattr("importlib.util.find_spec", hidden)
    with pytest.raises(InputError, match="package sentencepiece: run pip install sentencepiece"):
        load(str(folder))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LLaMATokenizer"])
def test_a_tokenizer_of_sentencepiece_alone(tiny_folders, tmp_path, name):
    """LLaMA 1 has no tokenizer.json; its first copies name a class that is no more, with empty special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="an installation from before llmlab needed it")
    folder = copied(tiny_folders["llama"], tmp_path / "llama", without=["tokenizer*", "special*"])
    text, model = " ".join(f"{q.context} {q.endings[0]}" for q in llmlab.data.everyday()), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split(".")),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as LLaMA's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = ["<unk>", "<s>", "</s>"] if name == "LlamaTokenizer" else [""] * 3
    settings = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True)) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lm, pieces = load(str(folder)), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for line in ("The kettle boils", "a  zebra's quilt: 3 \u00e9"):
        assert lm.encode(line) == [1, *pieces.encode(line)]
    assert lm.decode(lm.encode("The kettle")) == "The kettle"
