"""`annotate serve` over HTTP: who gets what, what is stored, what is refused."""

import concurrent.futures
import http.client
import json
import os
import random
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.engine.base.errors import DataError, UserError
from cosmo.engine.web import run as web
from data_pipeline import __main__ as command
from data_pipeline.annotation import assignment, report
from data_pipeline.annotation.answers import append_answers, read_answers
from data_pipeline.annotation.serving import routes, tokens
from data_pipeline.annotation.serving import study as studies
from data_pipeline.annotation.task_files import write_task
from tests.data_pipeline.annotation_judges import Judge, Server, form_of, served
from tests.data_pipeline.annotation_samples import GOOD, answer, task
from tests.data_pipeline.test_annotation_assignment import study as mixed

PAGES = list(GOOD)
TIE = GOOD["prosocial"]


def run(*arguments):
    return command.main(["annotate", *map(str, arguments)])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock:
    """A clock that is set."""

    now = 1_000_000.0

    def __call__(self):
        return self.now


def test_a_whole_study(tmp_path):
    """Oracle: the rules: tests first, gold inside, two judges an item, nobody twice; the report."""
    made = mixed(5, 2, golds=2, tests=1, gold_every=2, qualification_pass=1.0, wage="12 an hour")
    with served(made, tmp_path / "a.jsonl", ("ann", "bob", "eve")) as (study, judges, _):
        first = judges["ann"].open()
        assert first.item is None and first.status == 200
        for text in (made.page.warning, made.page.consent, "12 an hour", made.page.guidelines[0]):
            assert text in first.words
        assert judges["ann"].post({"action": "consent"}).status == 422  # without the box
        assert judges["ann"].open().item is None
        bob = judges["bob"].finish("prosocial")
        ann = judges["ann"].finish("prosocial")
        eve = judges["eve"].finish("prosocial")
        state = study.status()
    assert ann[0] == bob[0] == eve[0] == "q0"
    assert {*ann, *bob} == {"q0", "g0", "g1", *(f"i{n}" for n in range(5))}
    assert len(ann) == len({*ann}) == 8 and not any(name.startswith("i") for name in eve)
    assert (state["answered"], state["missing"], state["items_complete"]) == (10, 0, 5)
    found = {one["judge"]: one for one in state["judges"]}["ann"]
    assert (found["gold_right"], found["gold_answered"], found["answered"]) == (2, 2, 8)
    kept = read_answers(made, [tmp_path / "a.jsonl"])
    assert not kept.quarantined and len(kept.kept) == 16 + len(eve)
    assert report.build(made, kept)["people"]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_is_answered(tmp_path, page):
    """Oracle: the answers given, read back from the file; all questions and texts are shown."""
    made = task(page, items=1)
    with served(made, tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].agree()
        words = " ".join(judges["ann"].open().words.split())
        assert all(
            " ".join(q.text.split()) in words for q in made.page.questions if "{" not in q.text
        )
        assert all(turn in words for turn in made.items[0].context)
        assert judges["ann"].finish(page) == ["i0"]
        assert "Your 1 answer is stored" in judges["ann"].open().words
    (kept,) = read_answers(made, [tmp_path / "a.jsonl"]).kept
    assert kept.answers == GOOD[page] and kept.judge == "ann" and kept.time.endswith("Z")


def test_who_fails_gets_no_items(tmp_path):
    """Oracle: 0 of 1 right."""
    made = mixed(2, 1, tests=1, qualification_pass=1.0)
    with served(made, tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].agree()
        assert 'value="skip"' not in judges["ann"].open().text
        judges["ann"].send("q0", {**TIE, "overall": "a"})
        page = judges["ann"].open()
        assert page.item is None and "It ends here" in page.words


def test_sent_twice_is_stored_once(tmp_path):
    """Oracle: one line; the first answer stands when another one follows."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        ann = judges["ann"]
        ann.agree()
        name = ann.open().item
        assert ann.open().item == name  # a second tab
        assert [ann.send(name, TIE).status for _ in range(2)] == [303, 303]
        other = ann.send(name, {**TIE, "overall": "a"})
        assert other.status == 409 and "first answer is kept" in other.words
    (line,) = lines(tmp_path / "a.jsonl")
    assert (line["item"], line["answers"]) == (name, TIE)


def test_many_at_once_store_one(tmp_path):
    """Oracle: one line for twelve requests at the same moment."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].agree()
        name = judges["ann"].open().item
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            sent = [pool.submit(judges["ann"].send, name, TIE) for _ in range(12)]
            assert {one.result().status for one in sent} == {303}
    assert len(lines(tmp_path / "a.jsonl")) == 1


def test_minimum_time(tmp_path):
    """Oracle: a clock that is set: after 2 s of 5 it is refused, after 5 s it is stored."""
    clock = Clock()
    made = task("rots", min_seconds=5)
    with served(made, tmp_path / "a.jsonl", clock=clock) as (_, judges, _url):
        ann = judges["ann"]
        assert "at least 5 seconds" in ann.open().words
        ann.agree()
        page = ann.open()
        assert 'data-wait="5.000"' in page.text and "at least 5 seconds" in page.words
        clock.now += 2
        early = ann.send(page.item, GOOD["rots"])
        assert early.status == 422 and "again in 3 seconds" in early.words
        # All that was filled in is still there.
        assert GOOD["rots"]["response"] in early.words
        assert re.search(r'value="previous" required checked', early.text)
        assert re.search(r'name="chosen_rules-3" checked', early.text)
        assert not (tmp_path / "a.jsonl").exists()
        clock.now += 3
        assert ann.send(page.item, GOOD["rots"]).status == 303
    assert lines(tmp_path / "a.jsonl")[0]["seconds"] == 5


def test_a_page_that_is_not_sent_is_given_to_others(tmp_path):
    """Oracle: one item for one judge; the clock decides who holds it."""
    clock = Clock()
    with served(
        task(items=1, judges_per_item=1), tmp_path / "a.jsonl", clock=clock, hold_seconds=60
    ) as (_, judges, _url):
        ann, bob = judges["ann"], judges["bob"]
        for judge in (ann, bob):
            judge.agree()
        assert ann.open().item == "i0"
        wait = bob.open()
        assert (
            wait.item is None
            and "Please wait" in wait.words
            and 'http-equiv="refresh"' in wait.text
        )
        clock.now += 61
        assert bob.open().item == "i0"
        late = ann.send("i0", TIE)
        assert late.status == 409 and "has enough answers" in late.words
        assert bob.send("i0", TIE).status == 303
    assert [line["judge"] for line in lines(tmp_path / "a.jsonl")] == ["bob"]


def test_a_late_answer_counts_where_there_is_room(tmp_path):
    """Oracle: nobody else took the page."""
    clock = Clock()
    with served(task(), tmp_path / "a.jsonl", clock=clock, hold_seconds=60) as (_, judges, _url):
        judges["ann"].agree()
        name = judges["ann"].open().item
        clock.now += 3600
        assert judges["ann"].send(name, TIE).status == 303


def test_a_restart_changes_nothing(tmp_path):
    """Oracle: the same page and progress for both judges; what was open can still be sent."""
    made, path = task(items=5), tmp_path / "a.jsonl"
    with served(made, path) as (_, judges, _url):
        judges["ann"].finish("prosocial", most=2)
        before = judges["ann"].open()
        judges["bob"].agree()
        other = judges["bob"].open().item
    with served(made, path) as (study, judges, _url):
        after = judges["ann"].open()
        assert after.item == before.item and "3 of 5" in before.words and "3 of 5" in after.words
        assert study.status()["pages_open"] == 2
        assert judges["bob"].send(other, TIE).status == 303
        assert judges["ann"].finish("prosocial")[0] == before.item
    assert len(read_answers(made, [path]).kept) == 6


def test_strangers(tmp_path, caplog):
    """Oracle: no word of the study without a token; no token in the log."""
    caplog.set_level("INFO", "cosmo.web")
    made = task()
    with served(made, tmp_path / "a.jsonl") as (study, judges, url):
        front = judges["ann"].ask("GET", "/")
        assert front.status == 200 and "You need a link" in front.words
        for token in ("", "x", "token-of-ann-012345678", "ü" * 9, "a" * 2000):
            guess = Judge(url, token)
            for reply in (guess.open(), guess.agree(), guess.send("i0", TIE)):
                assert reply.status == 403 and "This link does not work" in reply.words
                assert made.page.title not in reply.words
        judges["ann"].agree()
        state = json.loads(judges["ann"].ask("GET", "/status").text)
        assert state["wrong_tokens"] == 15 and not study.answers
    assert "token-of-ann" not in caplog.text and "/judge 403" in caplog.text


def test_another_judges_page(tmp_path):
    """Oracle: a page that was not given, and one without consent, store nothing."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        assert judges["ann"].send("i0", TIE).status == 409
        judges["ann"].agree()
        given_ = judges["ann"].open().item
        other = next(f"i{n}" for n in range(4) if f"i{n}" != given_)
        assert judges["ann"].send(other, TIE).status == 409
        assert not (tmp_path / "a.jsonl").exists()


def test_bad_forms(tmp_path):
    """Oracle: status and words for each fault; nothing is stored, the server goes on."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        ann = judges["ann"]
        ann.agree()
        name = ann.open().item
        most = {k: v for k, v in TIE.items() if k != "overall"}
        good = {"action": "answer", "item": name, **form_of(TIE)}
        kind = {"content-type": "application/x-www-form-urlencoded"}
        for status, text, reply in (
            (422, "This needs an answer: Which response suits", ann.send(name, most)),
            (422, "This needs one of", ann.send(name, {**TIE, "prosocial": "c"})),
            (400, "unknown field", ann.send(name, {**TIE, "more": "x"})),
            (400, "none of this study", ann.send("i99", TIE)),
            (400, "action", ann.post({**good, "action": "drop"})),
            (415, "expected a form", ann.post(good, {"content-type": "application/json"})),
            (400, "twice", ann.ask("POST", "/judge", "item=a&item=b", kind)),
            (400, "cannot be read", ann.ask("POST", "/judge", b"item=\xff", kind)),
            (400, "cannot be read", ann.ask("POST", "/judge", "item=%ff", kind)),
            (400, "cannot be read", ann.ask("POST", "/judge", "a=&" * 2000, kind)),
            (413, "more than", ann.post({**good, "_feedback": "x" * 2**20})),
            (403, "other origins", ann.post(good, {"origin": "http://example.org"})),
            (405, "not allowed", ann.ask("PUT", "/judge", "x", kind)),
            (404, "no such page", ann.ask("GET", "/answers.jsonl")),
        ):  # fmt: skip
            assert reply.status == status and text in reply.words, (status, reply.words)
            assert reply.headers["content-type"].startswith("text/html")
            assert (
                reply.headers["content-security-policy"]
                == routes.HEADERS["Content-Security-Policy"]
            )
        assert not (tmp_path / "a.jsonl").exists()
        assert ann.post(good).status == 303


def test_a_full_disk_confirms_nothing(tmp_path, monkeypatch):
    """Oracle: status 503, then the same form is stored once."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].agree()
        name = judges["ann"].open().item

        def full(path, answers):
            raise UserError("cannot write: No space left on device", setting="answers")

        with monkeypatch.context() as patch:
            patch.setattr(studies, "append_answers", full)
            reply = judges["ann"].send(name, TIE)
        assert reply.status == 503 and "could not be stored" in reply.words
        assert "No space" not in reply.words  # that is for the operator
        assert judges["ann"].open().item == name
        assert judges["ann"].send(name, TIE).status == 303
    assert len(lines(tmp_path / "a.jsonl")) == 1


def test_an_answer_is_synced_before_it_is_confirmed(tmp_path, monkeypatch):
    """Oracle: the order of fsync of the file and of the reply."""
    order, sync = [], os.fsync

    def noted(number):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        sync(number)

    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].agree()
        name = judges["ann"].open().item
        monkeypatch.setattr(os, "fsync", noted)
        judges["ann"].send(name, TIE)
        order.append("reply")
    assert order[0] == "a.jsonl" and order.index("reply") > order.index("a.jsonl")


def test_skip_remarks_and_limits(tmp_path):
    """Oracle: the skipped item never comes back; the remark is in the journal; 2 items a judge."""
    made = task(items=4, judges_per_item=1)
    with served(made, tmp_path / "a.jsonl", per_judge=2) as (study, judges, _url):
        ann = judges["ann"]
        ann.agree()
        page = ann.open()
        assert "1 of 2" in page.words
        assert ann.post({"action": "skip", "item": page.item}).status == 303
        name = ann.open().item
        form = {"action": "answer", "item": name, **form_of(TIE), "_feedback": "Nice\r\none"}
        assert ann.post(form).status == 303
        assert ann.finish("prosocial") != [] and page.item not in study._own["ann"]
        assert ann.open().item is None and len(study._own["ann"]) == 2
        assert ann.post({"action": "feedback", "_feedback": "Bye"}).status == 200
        assert judges["bob"].finish("prosocial") and study.status()["missing"] == 0
        assert study.status()["judges"][0]["skipped"] == 1
    found = [e for e in lines(tmp_path / "a.jsonl.events.jsonl") if e["event"] == "feedback"]
    assert [(e.get("item", ""), e["text"]) for e in found] == [(name, "Nice\none"), ("", "Bye")]


def test_the_status_is_for_this_machine(tmp_path):
    """Oracle: JSON and a page; refused through a proxy and under another name."""
    with served(task(), tmp_path / "a.jsonl") as (_, judges, _url):
        judges["ann"].finish("prosocial", most=2)
        ask = judges["ann"].ask
        state = json.loads(ask("GET", "/status").text)
        assert (state["wanted"], state["answered"], state["missing"]) == (12, 2, 10)
        assert [one["answered"] for one in state["judges"]] == [2, 0]
        page = ask("GET", "/status", headers={"accept": "text/html"})
        assert "2 of 12 answers" in page.words and "token-of" not in page.text
        for headers in ({"x-forwarded-for": "1.2.3.4"}, {"host": "study.example.org"}):
            assert ask("GET", "/status", headers=headers).status == 403
        assert json.loads(ask("GET", "/health").text) == {"status": "ok"}


@settings(max_examples=30, deadline=None)
@given(
    items=st.integers(1, 6), golds=st.integers(0, 3), tests=st.integers(0, 2),
    before=st.integers(0, 5), most=st.none() | st.integers(1, 6), seed=st.integers(0, 50),
)  # fmt: skip
def test_the_total_is_what_a_judge_gets_alone(items, golds, tests, before, most, seed):
    """Oracle: going on alone until nothing is left."""
    made = mixed(items, 2, golds, tests, seed=seed, gold_every=2)
    answers = [answer(made, f"i{n}", judge) for n in range(min(before, items)) for judge in "xy"]
    skipped = {"i0", "g0"} & {one.id for one in made.items} if seed % 2 else set()
    promised = assignment.remaining(made, answers, "ann", {}, skipped, most)
    done = 0
    while (found := assignment.assign(made, answers, "ann", {}, skipped)).item is not None:
        regular = sum(one.judge == "ann" and one.item[0] == "i" for one in answers)
        if found.item.role == "item" and regular == most:
            break
        answers.append(answer(made, found.item.id, "ann"))
        done += 1
    assert promised == done


def test_two_judges_of_one_name(tmp_path, capsys):
    """Oracle: an error that names the line, for each way to name judges."""
    write_task(tmp_path / "t.jsonl", task())
    common = ("serve", f"--task={tmp_path / 't.jsonl'}", f"--answers={tmp_path / 'a.jsonl'}")
    (tmp_path / "names.txt").write_text("Ann\nBob\n\nann \n")
    (tmp_path / "tokens.csv").write_text(
        "judge,token,link\nAnn,0123456789abcdef,\nAnn,0123456789abcdeg,\n"
    )
    (tmp_path / "same.csv").write_text("judge,token\nAnn,0123456789abcdef\nBob,0123456789abcdef\n")
    for flag, problem in (
        (f"--judges_file={tmp_path / 'names.txt'}", "names.txt:4: two judges of one name"),
        (f"--tokens={tmp_path / 'tokens.csv'}", "tokens.csv:3: two judges of one name"),
        (f"--tokens={tmp_path / 'same.csv'}", "same.csv:3: a token that cannot be used"),
        ("--judges=ann,Bob,ANN", "two judges of one name"),
        ("--judges=model:x,ann", "a name with 'model:' is a model's"),
        ("--judges=0", "give 1 to 10,000"),
        ("--tokens=/nowhere.csv", "nobody may judge"),
    ):
        assert run(*common, flag) == 1
        error = capsys.readouterr().err
        assert problem in error and "0123456789abcdef" not in error
    assert not (tmp_path / "a.jsonl.judges.csv").exists()


def test_tokens_stay_as_they_were(tmp_path):
    """Oracle: the file, for its owner alone; a judge who is added gets a new token."""
    path = tmp_path / "j.csv"
    first = tokens.judges(path, ["ann", 'B, "x"'])
    tokens.write_tokens(path, first, "https://study.example.org/")
    assert path.stat().st_mode & 0o777 == 0o600
    assert f"https://study.example.org/judge?token={first['ann']}" in path.read_text()
    assert tokens.judges(path, []) == first
    second = tokens.judges(path, ["ann", "eve"])
    assert second["ann"] == first["ann"] and second.keys() == {"ann", "eve"}
    assert len({*first.values(), *second.values()}) == 3
    with pytest.raises(UserError, match="give one name"):
        tokens.judges(path, ["Ann"])


def test_answers_of_another_task(tmp_path, capsys):
    """Oracle: an error, and the file as it was."""
    write_task(tmp_path / "t.jsonl", task())
    other = task("safety")
    append_answers(tmp_path / "a.jsonl", [answer(other)])
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(DataError, match="of another task"):
        studies.Study(task(), tmp_path / "a.jsonl")
    assert run("serve", f"--task={tmp_path / 't.jsonl'}", f"--answers={tmp_path / 'a.jsonl'}",
               "--judges=2", "--port=0") == 1  # fmt: skip
    assert "of another task" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_cut_line_is_set_aside(tmp_path):
    """Oracle: two of three lines count, the cut one is named, new answers begin a line."""
    made, path = task(), tmp_path / "a.jsonl"
    append_answers(path, [answer(made, f"i{n}") for n in range(3)])
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "a.jsonl.events.jsonl").write_bytes(b'{"task": "x", "jud')
    with served(made, path) as (study, judges, _url):
        assert study.status()["lines_set_aside"] == 1 and len(study.answers) == 2
        assert "cut or damaged" in (tmp_path / "a.jsonl.quarantined.jsonl").read_text()
        items = judges["ann"].finish("prosocial")
    assert "i2" in items and len(items) == 2
    found = read_answers(made, [path])
    assert len(found.kept) == 4 and len(found.quarantined) == 1
    with served(made, path) as (_, judges, _url):
        assert "ann" in judges and judges["ann"].open().item is None  # consent was kept


def test_port_and_answers_in_use(tmp_path, capsys):
    """Oracle: one line each; nothing is written."""
    write_task(tmp_path / "t.jsonl", task())
    listener = web.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    common = ("serve", f"--task={tmp_path / 't.jsonl'}", f"--answers={tmp_path / 'a.jsonl'}")
    assert run(*common, "--judges=2", f"--port={port}") == 1
    assert f"port {port} at 127.0.0.1 is in use" in capsys.readouterr().err
    listener.close()
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]
    study = studies.Study(task(), tmp_path / "a.jsonl")
    assert run(*common, "--judges=2", "--port=0") == 1
    assert "is in use by another process" in capsys.readouterr().err
    study.close()
    # A digit, and no number: a name.
    assert run(*common, "--judges=²", "--port=99999") == 1
    assert "port 99999" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert run(*common, "--judges=2", "--port=0", f"--answers={tmp_path / 'folder'}") == 1
    assert "folder is a folder: give the path of a file" in capsys.readouterr().err
    for flag in ("--per_judge=0", "--hold_minutes=0", "--address=example.org", "--port=99999"):
        assert run(*common, "--judges=2", flag) == 1
        assert flag.split("=")[0].strip("-").split("_")[0] in capsys.readouterr().err


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_judges_answer(tmp_path, kills):
    """The server is killed again and again. Every answer that was confirmed is stored, none twice.

    Oracle: what each judge was told, against the file; two people for every item at the end.
    """
    made, names = task("responses", items=max(3 * kills, 20), judges_per_item=2), "abcd"
    write_task(tmp_path / "t.jsonl", made)
    server = Server(
        f"--task={tmp_path / 't.jsonl'}", f"--answers={tmp_path / 'a.jsonl'}",
        f"--judges={','.join(names)}", "--port=0",
    )  # fmt: skip
    address, confirmed, problems, threads = {}, {}, [], []
    source = random.Random(kills)
    wanted, ended = 2 * len(made.items), threading.Event()

    def work(name):
        # A browser sends a form again when its connection broke; so does this judge.
        def until_answered(send):
            while not ended.is_set():
                try:
                    return send(Judge(address["url"], address[name]))
                except (OSError, http.client.HTTPException):
                    time.sleep(0.005)
            raise SystemExit

        try:
            until_answered(lambda judge: judge.agree())
            while not ended.is_set() and len(confirmed) < wanted:
                found = until_answered(lambda judge: judge.open()).item
                if found is None:
                    time.sleep(0.01)
                    continue
                answers = {**GOOD["responses"], "reasons": f"{name} about {found}"}
                reply = until_answered(lambda judge: judge.send(found, answers))  # noqa: B023
                if reply.status != 303 or (name, found) in confirmed:
                    problems.append((name, found, reply.status, reply.words))
                confirmed[name, found] = answers
        except SystemExit:
            pass
        except Exception as error:
            problems.append(error)

    def start():
        address["url"] = server.start()

    try:
        start()
        address |= tokens.read_tokens(tmp_path / "a.jsonl.judges.csv")
        threads += [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30 + 3 * kills
        for number in range(kills):
            while len(confirmed) < number * wanted / (kills + 1) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(source.random() * 0.02)
            server.kill()
            start()
        while len(confirmed) < wanted and not problems and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        ended.set()
        for thread in threads:
            thread.join(10)
        server.end()
    assert not problems and len(confirmed) == wanted
    found = read_answers(made, [tmp_path / "a.jsonl"])
    assert {(one.judge, one.item): one.answers for one in found.kept} == confirmed
    assert not found.quarantined or all("cut" in one.reason for one in found.quarantined)
