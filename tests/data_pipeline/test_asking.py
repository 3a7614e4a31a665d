"""From a question to its answer: what is kept of odd replies, and when a run is given up."""

import asyncio
import json

import pytest

from data_pipeline.asking import Asker, Patience
from data_pipeline.client import Reply, Server
from data_pipeline.errors import UserError
from data_pipeline.journal import Journal, entries
from data_pipeline.limits import Allowance, Limits
from data_pipeline.requests import Request

GOOD = json.dumps({"choices": [{"text": "Yes"}], "usage": {"completion_tokens": 1}})


async def answers(journal, replies: list, count: int = 1, body: str = "{}") -> list[str]:
    """The answers to `count` questions of a server with these replies, the last for ever."""

    async def post(form, data):
        return replies.pop(0) if len(replies) > 1 else replies[0]

    server = Server("http://x/v1", "m", extra_body=body)
    asker = Asker(post, server, journal, Limits(Allowance()), Patience(3, 0.0, 0.0))
    return [(await asker.ask(Request(f"t{n}", "head", 0, "Is it?"))).text for n in range(count)]


def test_a_broken_answer_is_kept_before_another_is_asked_for(tmp_path):
    """It may have been paid for. Oracle: the replies, in their order."""
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(200, GOOD[:20]), Reply(200, GOOD)])) == ["Yes"]
    kept = [(entry.kind, entry.raw) for entry in entries(tmp_path)]
    assert kept == [("failure", GOOD[:20]), ("answer", GOOD)]


def test_a_server_that_only_redirects_stops_the_run(tmp_path):
    """Oracle: an error that names the flag, not a rejection of every triple."""

    async def all_of_them(journal):
        for number in range(30):
            try:
                await answers_of.ask(Request(f"t{number}", "head", 0, "Is it?"))
            except UserError as error:
                return number, str(error)
            except Exception:
                continue

    async def post(form, data):
        return Reply(307, "")

    with Journal(tmp_path) as journal:
        answers_of = Asker(post, Server("http://x/v1", "m"), journal, Limits(Allowance()))
        number, said = asyncio.run(all_of_them(journal))
    assert number == 19 and "--base_url" in said


def test_fields_added_to_the_body_are_another_question(tmp_path):
    """Oracle: the answer given to these fields, not the one that was there to others."""
    other = GOOD.replace("Yes", "No")
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(200, GOOD)])) == ["Yes"]
        cold = '{"temperature": 0}'
        assert asyncio.run(answers(journal, [Reply(200, other)], body=cold)) == ["No"]
        assert asyncio.run(answers(journal, [Reply(500, "")])) == ["Yes"]


def test_an_index_that_fails_stops_the_run(tmp_path):
    """Oracle: an error that says what to do; the shards, from which the answer comes then."""
    with Journal(tmp_path) as journal:
        asyncio.run(answers(journal, [Reply(200, GOOD)]))
        journal.spent()
        journal._index.execute("DROP TABLE answers")
        with pytest.raises(UserError, match=r"index\.sqlite"):
            asyncio.run(answers(journal, [Reply(200, GOOD)]))
    (tmp_path / "index.sqlite").unlink()
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(500, "")])) == ["Yes"]
