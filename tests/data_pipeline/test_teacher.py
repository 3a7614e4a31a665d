"""The scripted teacher by itself."""

import json

import pytest

from data_pipeline.co3 import prompts
from data_pipeline.co3.teacher import server, voice

PROMPTS = prompts.load()
STORY = "Ann takes the first step, and Ann moves closer to the goal."
ASKED = {
    "narrative": dict(literal="Ann took the first step. Ann moves a step closer to the goal."),
    "speaker": dict(narrative=STORY, x="Ann"),
    "dialogue": dict(narrative=STORY, x="Ann", y="her coach"),
    "continuation": dict(
        narrative=STORY, x="Ann", y="her coach", so_far="Ann: Hi.\nCoach: Hello.", next="Ann"
    ),
    "human": dict(speaker="Coach"),
    "head": dict(context=STORY, question="Ann moves, is this true?"),
    "head_alone": dict(question="Ann moves, is this true?"),
}


def request(stage: str, form: str) -> tuple[str, bytes]:
    asked = PROMPTS.request(stage, "t1", **ASKED[stage])
    body = {"model": "teacher", "logprobs": 5 if form == "completion" else True}
    if form == "completion":
        return "/v1/completions", json.dumps({**body, "prompt": asked.prompt}).encode()
    messages = [{"role": role, "content": text} for role, text in asked.messages]
    return "/v1/chat/completions", json.dumps({**body, "messages": messages}).encode()


@pytest.mark.parametrize("form", ["completion", "chat"])
@pytest.mark.parametrize("stage", ASKED)
def test_prompts_are_recognised_and_answered_alike(stage, form):
    """Oracle: the stage that the prompt was made for; the same question, the same answer."""
    path, data = request(stage, form)
    asked = json.loads(data)
    words = asked["prompt"] if form == "completion" else asked["messages"]
    assert voice.Voice(PROMPTS).recognise(form, words)[0] == stage
    first, second = (server.Teacher(server.Manners()).answer("POST", path, "", data) for _ in "12")
    assert first == second and first[0] == 200
    choice = json.loads(first[1])["choices"][0]
    text = choice["message"]["content"] if form == "chat" else choice["text"]
    assert text.strip()
    assert (choice["logprobs"] is not None) == (stage in ("human", "head", "head_alone"))
    other = server.Teacher(server.Manners(seed=1)).answer("POST", path, "", data)
    assert json.loads(other[1])["id"] != json.loads(first[1])["id"]


def test_misbehaviour_comes_at_its_rate():
    """Oracle: 30% of 3,000 questions, within four standard deviations; all kinds occur."""
    taught = server.Teacher(server.Manners(misbehave=0.3))
    for number in range(3000):
        data = json.dumps({"model": "teacher", "prompt": f"Question {number}"}).encode()
        taught.answer("POST", "/v1/completions", "", data)
    assert not taught.counts["errors"]
    bad = {name: n for name, n in taught.counts.items() if name.startswith("misbehaved")}
    # Two draws (answers that last, and ways to fail) that may both hit: 1 - (1-a)(1-b).
    share = 1 - (1 - 0.3 * 3 / 8) * (1 - 0.3 * 5 / 8)
    assert abs(sum(bad.values()) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    assert len(bad) == 8


@pytest.mark.parametrize("kind", server.LASTING)
def test_spoilt_answers_can_be_said(kind):
    """Every phrase of a kind. Oracle: no error, and only "empty" says nothing."""
    for seed in range(60):
        assert bool(voice.spoiled(kind, seed).text) == (kind != "empty")
