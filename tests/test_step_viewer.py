import pytest

import llmlab
from llmlab import InputError
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.loop import Step
from llmlab.decoding.result import Completion
from llmlab.lab import widgets
from llmlab.lab.widgets.steps import read_passes, step_html

EVIL = "<script>alert(1)</script> $x$ & \"'"


@pytest.fixture(scope="module")
def completion(smollm2):
    prompt = f"Repeat exactly: The cat sat on the mat. The dog sat on the log and {EVIL}. Repeat:"
    return llmlab.generate(smollm2, [prompt], max_new_tokens=32, draft=PromptLookup(branches=2), k=4).completions[0]


@pytest.mark.slow
def test_step_viewer(smollm2, completion):
    view = widgets.step_viewer(completion, smollm2.tokenizer)
    slider = view.controls["step"]
    assert slider.max == len(completion.steps) - 1
    seen = []
    for step in range(slider.max + 1):
        slider.value = step
        seen.append(view.picture.value)
    assert len(set(seen)) == len(completion.steps)
    assert all("<script" not in html for html in seen)
    assert "&lt;script&gt;alert(1)" in seen[0]
    play = view.box.children[0].children[0]
    assert (play.min, play.max) == (0, slider.max)
    assert any(step.accepted for step in completion.steps)


@pytest.mark.slow
def test_passes_add_up_to_the_completion(smollm2, completion):
    passes = read_passes(completion, smollm2)
    assert "".join(text for one in passes for text in one.tokens).startswith(completion.text)
    for one, step in zip(passes, completion.steps, strict=True):
        assert one.drafted == len(step.drafted)
        assert len(one.accepted) == step.accepted


def test_a_tree_is_shown_by_its_branches(smollm2):
    ids = {word: smollm2.encode(word)[0] for word in (" cat", " sat", " lay", " down", " ran")}
    drafted = [ids[word] for word in (" cat", " sat", " lay", " down", " ran")]
    # cat ── sat          cat and lay are accepted: sat, down and ran are not
    #   └─── lay ── down
    #         └──── ran
    steps = [
        Step("", [], [], 0, [ids[" cat"]]),
        Step("lookup", drafted, [-1, 0, 0, 2, 2], 2, [ids[" cat"], ids[" lay"], ids[" sat"]]),
        Step("lookup", drafted[:2], [-1, 0], 1, [ids[" cat"]]),  # cut off by the end
    ]
    passes = read_passes(Completion("A", " cat cat lay sat cat", [], True, steps), smollm2)
    assert passes[1].accepted == [" cat", " lay"]
    assert passes[1].rejected == [[" sat"], [" down"], [" ran"]]
    assert passes[1].own == " sat"
    assert (passes[2].accepted, passes[2].rejected, passes[2].own) == ([" cat"], [[" sat"]], None)
    assert "lookup drafted 5, 2 accepted" in step_html("A", passes, 1)
    assert "where the completion ended" in step_html("A", passes, 2)


def test_characters_of_several_tokens_stay_whole(smollm2):
    text = " a 😀 数 <b> \n$x$"
    ids = smollm2.encode(text)
    assert any("\ufffd" in smollm2.decode([token]) for token in ids)
    steps = [Step("draft", ids[:-1], list(range(-1, len(ids) - 2)), len(ids) - 1, ids)]
    passes = read_passes(Completion("p", text, ids, False, steps), smollm2)
    assert "".join(passes[0].tokens) == text
    assert "> &lt;</span>" in step_html("p", passes, 0)


def test_what_cannot_be_stepped_through(smollm2):
    with pytest.raises(InputError, match="no steps"):
        widgets.step_viewer(Completion("p", "t", [1], False), smollm2)
    random = llmlab.load("random:opt-125m", layers=1)
    with pytest.raises(InputError, match="no tokenizer"):
        widgets.step_viewer(Completion("p", "t", [1], False), random)
