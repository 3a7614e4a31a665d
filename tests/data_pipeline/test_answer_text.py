# ruff: noqa: E501 -- one case, one line
"""What models leave around an answer, and what is left after it is taken off."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.calls import answer_text, client
from data_pipeline.calls.answer_text import ALONE, MIXED, USED_UP, mark_in, separated

SAID = "Ann: Hi, Bob.\nBob: Hello, Ann."
# Reasoning holds a line that would be read as a turn.
REASONED = "Okay, who speaks?\nMia: I am no turn.\n"

REASONING = {
    "think": f"<think>\n{REASONED}</think>\n\n{SAID}",
    "the opening tag stood in the prompt": f"{REASONED}</think>\n\n{SAID}",
    "twice": f"<think>a</think>\n<think>{REASONED}</think>\n{SAID}",
    "a tag named in the reasoning": f"<think>The <think> tag: {REASONED}</think> so</think>{SAID}",
    "empty, as of a model told not to reason": f"<think>\n\n</think>\n\n{SAID}",
    "in the middle": f"Ann: Hi, <think>{REASONED}</think>Bob.\nBob: Hello, Ann.",
    "an attribute": f'<think duration="3">{REASONED}</think>{SAID}',
    "spaces and case": f"< THINK >{REASONED}< / Think >{SAID}",
    "escaped": f"&lt;think&gt;{REASONED}&lt;/think&gt;\n{SAID}",
    "wide brackets": f"\uff1cthink\uff1e{REASONED}\uff1c/think\uff1e{SAID}",
    "Kimi": f"\u25c1think\u25b7{REASONED}\u25c1/think\u25b7{SAID}",
    "Seed": f"<seed:think>{REASONED}</seed:think>{SAID}",
    "Magistral": f"[THINK]{REASONED}[/THINK]{SAID}",
    "a pair in small letters": f"[thinking]{REASONED}[/thinking]\n{SAID}",
    "thinking": f"<thinking>{REASONED}</thinking>\n{SAID}",
    "thought": f"<thought>{REASONED}</thought>\n{SAID}",
    "reasoning": f"<reasoning>{REASONED}</reasoning>\n{SAID}",
    "reflection": f"<reflection>{REASONED}</reflection>\n{SAID}",
    "scratchpad": f"<scratchpad>{REASONED}</scratchpad>\n{SAID}",
    "bars": f"<|think|>{REASONED}<|/think|>{SAID}",
    "begin and end": f"<|begin_of_thought|>{REASONED}<|end_of_thought|>\n<|begin_of_solution|>{SAID}<|end_of_solution|>",
    "Command": f"<|START_THINKING|>{REASONED}<|END_THINKING|><|START_RESPONSE|>{SAID}<|END_RESPONSE|>",
    "harmony": f"<|channel|>analysis<|message|>{REASONED}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}<|return|>",
    "harmony, commentary": f"<|channel|>analysis<|message|>{REASONED}<|end|><|start|>assistant<|channel|>commentary<|message|>Mia: No.<|end|><|start|>assistant<|channel|>final<|message|>{SAID}",
    "harmony without its tokens": f"analysis{REASONED}assistantfinal{SAID}",
    "a channel with one bar": f"<|channel>thought\n{REASONED}<channel|>{SAID}",
    "numbered tokens": f"<unused94>thought\n{REASONED}<unused95>{SAID}",
    "details": f'<details type="reasoning" done="true">\n<summary>Thought</summary>\n{REASONED}</details>\n{SAID}',
    "a fence": f"```thinking\n{REASONED}```\n{SAID}",
    "a wrapper": f"<think>{REASONED}</think>\n<answer>\n{SAID}\n</answer>",
    "a role of its own": f"<|im_start|>think\n{REASONED}<|im_end|>\n<|im_start|>assistant\n{SAID}<|im_end|>",
}
TEMPLATES = {
    "ChatML": f"<|im_start|>assistant\n{SAID}<|im_end|>",
    "ChatML goes on": f"{SAID}<|im_end|>\n<|im_start|>user\nMia: More!",
    "Llama 3": f"<|start_header_id|>assistant<|end_header_id|>\n\n{SAID}<|eot_id|>",
    "Llama 3 without its tokens": f"assistant\n\n{SAID}",
    "Llama 3 goes on without its tokens": f"{SAID}assistant\n\nMia: More!",
    "Llama 2": f" [INST] Write. [/INST] {SAID}",
    "Llama 2 goes on": f"{SAID} [INST] Mia: More!",
    "system": f"<<SYS>>Be kind.<</SYS>>{SAID}",
    "sentence": f"<s>{SAID}</s>",
    "after the end": f"{SAID}</s>Mia: More!",
    "Gemma": f"<start_of_turn>model\n{SAID}<end_of_turn>",
    "one bar": f"<|turn>model\n{SAID}<turn|>",
    "Phi": f"<|assistant|>{SAID}<|end|><|user|>Mia: More!",
    "DeepSeek": f"<\uff5cAssistant\uff5c>{SAID}<\uff5cend\u2581of\u2581sentence\uff5c>",
    "Granite": f"<|start_of_role|>assistant<|end_of_role|>{SAID}<|end_of_text|>",
    "T5": f"<pad> {SAID}</s>",
    "padding": f"<bos>{SAID}<eos><pad><pad>",
    "Alpaca": f"### Response:\n{SAID}\n\n### Instruction:\nMia: More!",
    "a prompt that came back": f"<|im_start|>user\nMia: Write.<|im_end|>\n<|im_start|>assistant\n{SAID}",
    "cut in a token": f"{SAID}<|im_",
    "fence": f"```\n{SAID}\n```",
    "fence with a language": f"```text\n{SAID}\n```",
    "fence in the line": f"```{SAID}```",
    "waves": f"~~~\n{SAID}\n~~~",
    "NUL": SAID.replace("H", "\x00H"),
    "terminal": f"\x1b[1m{SAID}\x1b[0m",
    "controls": SAID.replace(" ", " \x07\x9f\ufffe"),
    "windows": SAID.replace("\n", "\r\n"),
    "byte order mark": f"\ufeff{SAID}",
    "tag": f"<dialogue>\n{SAID}\n</dialogue>",
}  # fmt: skip


@pytest.mark.parametrize("case", [*REASONING, *TEMPLATES])
def test_the_answer_alone_is_left(case):
    """Oracle: the same answer without anything around it; no mark is found in it."""
    text = (REASONING | TEMPLATES)[case]
    answer, fault, reasoned = separated(text)
    assert (answer.strip(), fault) == (SAID, "") and not mark_in(answer)
    assert reasoned == (case in REASONING)


@pytest.mark.parametrize(
    "text",
    [
        " Hi there.\nBob: Hello.",
        "I <3 you. 2 < 3 > 1. Write to <ann@x.org>.",
        "Ann: [thinking] Well...\nBob: <laughs> Oh. [smiles]",
        "Ann: The user manual is thick.\nBob: I think so.",
        " I need to write a letter to my aunt.",
        " Thinking about it, no.",
        "Ann bought a fine sense of self.\n\n1. Yes",
        "\u0915\u0939\u093e\u0928\u0940 \U0001f600",
    ],
)
def test_what_only_looks_like_a_mark_stays(text):
    """Oracle: the text itself; a completion keeps the space that it begins with."""
    assert separated(text) == (text, "", False) and mark_in(text) == ""


@pytest.mark.parametrize(
    ("text", "finish", "fault"),
    [
        (f"<think>{REASONED}", "length", USED_UP),
        (f"<think>{REASONED}</think>\n", "length", USED_UP),
        (f"<|channel|>analysis<|message|>{REASONED}", "length", USED_UP),
        (f"analysis{REASONED}", "length", USED_UP),
        ("Okay, the user wants a story about", "length", USED_UP),
        (f"<think>{REASONED}", "stop", ALONE),
        (f"{SAID}</think>", "stop", ALONE),
        (f"[THINK]{REASONED}", "stop", ALONE),
        (f"{SAID}\n<think>{REASONED}", "stop", MIXED),
        (f"{SAID}\n<think>{REASONED}", "length", MIXED),
        ("Okay, the user wants a story. Ann runs.", "stop", MIXED),
        ("We need to write a short story. Ann runs.", "stop", MIXED),
    ],
)
def test_what_cannot_be_told_apart_is_a_fault(text, finish, fault):
    """Oracle: no text; reasoning at the token limit is named as that."""
    assert separated(text, finish) == ("", fault, True)


def test_text_is_composed():
    """Oracle: NFC of Unicode: one character for e with acute."""
    assert separated("Jose\u0301: Hi.")[0] == "Jos\u00e9: Hi."


PIECES = [*"<>[]|/ \n`", "<think>", "</think>", "<|im_end|>", "<|channel|>", "analysis", "final",
          "[INST]", "[/INST]", "```", "&lt;", "assistant", "\x00", "Ann: Hi.", "</s>", "<", "\u25c1"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(["stop", "length"]))  # fmt: skip
def test_any_text_is_an_answer_or_has_a_fault(text, finish):
    """Property: no exception; a fault leaves no text; an answer holds no whole block."""
    answer, fault, _ = separated(text, finish)
    assert not (answer and fault)
    assert "\x00" not in answer and "<think>" not in answer and "</think>" not in answer


def reply(message=None, **choice) -> str:
    choice = {"finish_reason": "stop", "message": message, **choice}
    return json.dumps({"choices": [choice]})


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": SAID}],
        [{"type": "output_text", "text": SAID}],
        ["Ann: Hi, ", {"type": "text", "text": "Bob.\nBob: Hello, Ann."}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "Mia: No."}]}, {"type": "text", "text": SAID}],
        {"type": "text", "text": SAID},
        [{"type": "text", "text": {"value": SAID, "annotations": []}}],
    ],
)  # fmt: skip
def test_content_in_parts_is_read(content):
    """Oracle: the text of its parts; a part of reasoning is none."""
    assert client.parse_answer(reply({"content": content}), "chat").text == SAID


def test_fields_of_reasoning_are_no_answer():
    """Oracle: content alone; none at the token limit is a fault."""
    found = client.parse_answer(reply({"content": SAID, "reasoning_content": "Mia: No."}), "chat")
    assert found.text == SAID and not found.fault
    for name in client.REASONING_FIELDS:
        message = {"content": None, name: "Mia: No."}
        found = client.parse_answer(reply(message, finish_reason="length"), "chat")
        assert (found.text, found.fault) == ("", USED_UP)
    found = client.parse_answer(reply({"content": ""}, finish_reason="MAX_TOKENS"), "chat")
    assert (found.finish_reason, found.fault) == ("length", USED_UP)
    with pytest.raises(client.AnswerError, match="part"):
        client.parse_answer(reply({"content": [{"type": "image_url", "image_url": {}}]}), "chat")


def test_the_first_tokens_of_reasoning_are_no_answer():
    """ "No" opens the reasoning, "Yes" is the answer. Oracle: the log-probabilities are left out."""
    token = {"token": "No", "logprob": -0.1, "top_logprobs": [{"token": "No", "logprob": -0.1}]}
    text = reply({"content": "No idea yet.</think>Yes"}, logprobs={"content": [token]})
    found = client.parse_answer(text, "chat")
    assert (found.text, found.logprobs) == ("Yes", None)
    assert answer_text.separated("No")[2] is False
