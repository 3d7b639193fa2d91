"""An answer that its template opens, "<think>": read with the prompt, scored with the rest.

What a template is: test_template.py. Here is how its opening goes through prompt, samples, rewards,
results and what is learnt. Oracles: the published chat template, and transformers' logits.
"""

import json
from dataclasses import replace

import pytest
import torch
from prompts import completions, logp_of, reference_logits
from tiny_checkpoint import make_checkpoint, picture
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import sft
from data import Processor
from evaluate import evaluate, prompt_of
from example import Example
from grading import load_rewards
from model import Qwen2VL
from rewards import format
from rollout import sample, score
from sft import fit, opened, taught
from tally import reward_table
from template import find_template

OPENS = "{Question}{Answer}<think>"
BASE = "{Base}{Image}User: {Question}\nAssistant:{Answer} <think>"
SAID = "<think> one, two </think><answer> 2 </answer>"
ROWS = [taught(Example("How many?", "2", (picture(0, 56, 56),), row="a:1"), SAID),
        taught(Example("one, two,", "2", row="a:2"), SAID)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder, OPENS)


@pytest.fixture(scope="module")
def learnt(folder, processor):
    """A model that was taught to answer both rows, under a template that opens the answers."""
    model = Qwen2VL.from_pretrained(folder)
    cfg = sft.Config(steps=30, batch=2, micro=2, lr=1e-2)
    losses = [row["nll"] for row in fit(model, processor, ROWS, cfg)]
    assert losses[0] > 4 and losses[-1] < 0.1
    return model


# ---------------------------------------------------------------------------------------- prompts


def test_a_prompt_ends_with_the_opening_as_one_text_with_the_turn(processor, folder):
    """The ids are those of the published chat template's text and the opening, encoded whole."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = processor.prompt(ROWS[1])
    chat = [{"role": "user", "content": "one, two,"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text += "<think>"
    assert prompt.text == text and prompt.opening == "<think>"
    assert prompt.ids.tolist() == tokenizer(text)["input_ids"]
    assert replace(processor, template=find_template("{Question}")).prompt(ROWS[1]).opening == ""


def test_a_base_models_prompt_is_text_and_picture_alone(processor, folder):
    base = replace(processor, template=find_template(BASE))
    seen = "<|vision_start|><|image_pad|><|vision_end|>User: How many?\nAssistant: <think>"
    assert base.prompt(ROWS[0]).text == seen
    assert base.prompt(ROWS[1]).text == "User: one, two,\nAssistant: <think>"
    ids = AutoTokenizer.from_pretrained(folder)(seen.replace("<|image_pad|>", "<|image_pad|>" * 4))
    assert base.prompt(ROWS[0]).ids.tolist() == ids["input_ids"]


def test_a_row_with_a_system_message_is_refused_for_a_base_model_by_its_place(processor):
    base = replace(processor, template=find_template(BASE))
    with pytest.raises(ValueError, match=r"^a:2: it has a system message"):
        base.prompt(replace(ROWS[1], extra={"system": "Be kind."}))


# ---------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("template", [OPENS, BASE])
def test_the_opening_is_text_and_no_sampled_token(folder, processor, template):
    """Log-probs are those of transformers after the whole prompt; none is of the opening."""
    asked = replace(processor, template=find_template(template))
    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    prompts = [asked.prompt(row) for row in ROWS]
    model = Qwen2VL.from_pretrained(folder)
    out = sample(model, asked, prompts, 2, 8, seed=3)
    scored, _ = score(model, out, 1.0, asked.banned_ids)
    for b, prompt in enumerate(prompts):
        for g, ids in enumerate(completions(out)[b]):
            assert out.texts[b][g] == asked.template.opening + asked.decode(ids)
            with torch.no_grad():
                logits = reference_logits(reference, prompt, ids)
            expected = logp_of(logits, ids, 1.0, asked.banned_ids)
            for found in (out.logp[b, g, : len(ids)], scored[b, g, : len(ids)]):
                assert (found - expected).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------- learning


def test_what_is_learnt_leaves_the_opening_out(processor):
    """To the token what would be sampled: " one, two </think>…" and the end of a turn."""
    said = SAID.removeprefix("<think>")
    end = processor.tokenizer.token_to_id("<|im_end|>")
    assert processor.target(SAID) == [*processor.encode(said), end]
    base = replace(processor, template=find_template("{Base}{Question}"))
    end = processor.tokenizer.token_to_id("<|endoftext|>")
    assert base.target(SAID) == [*processor.encode(SAID), end]
    with pytest.raises(ValueError, match=r"opens with ' <think> a', the template's with '<think>'"):
        processor.target(" <think> a")


def test_completions_that_open_otherwise_are_refused_or_left_out(processor, capsys):
    rows = [ROWS[0], taught(ROWS[1], "<answer> 2 </answer>")]
    with pytest.raises(ValueError, match=r"1 of 2 completions do not open with the template's "
                                         r"'<think>', the first is a:2; .*--bad_rows skip"):
        opened(processor, rows)
    assert opened(processor, rows, "skip") == rows[:1] and "left out" in capsys.readouterr().err
    assert opened(replace(processor, template=find_template("r1v")), rows) is rows


def test_rewards_and_results_see_the_whole_answer(learnt, processor):
    """What was taught is said again, opening and all; its length is of what was sampled."""
    prompts = [processor.prompt(row) for row in ROWS]
    out = sample(learnt, processor, prompts, 1, 64, temperature=0)
    assert out.texts == [[SAID], [SAID]]
    assert out.lengths.tolist() == [[len(processor.target(SAID))]] * 2
    table = reward_table(out, load_rewards(("accuracy", "format", "r1v_format")))
    assert table.eq(1).all()
    assert format(SAID.removeprefix("<think>"), ROWS[0]) == 0  # so the test could fail
    found = evaluate(learnt, processor, ROWS, max_new=64)
    assert (found["accuracy"], found["format"]) == (1, 1)
    assert [row["model_output"] for row in found["results"]] == [SAID, SAID]
    assert found["results"][0]["prompt"].endswith("assistant\n<think>")


def test_an_evaluation_asks_as_the_run_did(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"template": BASE, "system": None}))
    asked = prompt_of(str(tmp_path / "step_000002"), None, None)
    assert asked["template"] == BASE and asked["system"] is None
    assert prompt_of(str(tmp_path / "step_000002"), "direct", None)["template"] == "direct"
