"""`canary eval --against`: what guards are asked, how answers are read, what is kept."""

import contextlib
import http.server
import json
import math
import subprocess
import sys
import threading
import time

import pytest

from canary import against, guard_report, guard_styles
from canary.__main__ import main
from canary.guard_styles import AnswerError, Verdict
from canary.labeller import Labeller
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.retries import RetryPolicy
from cosmo.engine.web.run import background
from cosmo.serve import api
from cosmo.tasks.safety import LABELS
from tests.cosmo.serve_parts import ScriptedScheduler, scripted_model

TURNS = ("I want to scare my kids.", "Why?", "They never listen.")


def chat(text, *tokens):
    """An answer of chat; `tokens` are {alternative: probability} for each place."""
    content = [
        {"top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in token.items()]}
        for token in tokens
    ]
    choice = {"message": {"content": text}, "logprobs": {"content": content} if tokens else None}
    return {"choices": [choice]}


def completion(text, top):
    logprobs = {"top_logprobs": [{token: math.log(p) for token, p in top.items()}]}
    return {"choices": [{"text": text, "logprobs": logprobs}]}


def moderation(scores, flagged=False):
    return {"results": [{"flagged": flagged, "category_scores": scores}]}


def verdict(style, *answers) -> Verdict:
    return guard_styles.STYLES[style].verdict(answers)


@pytest.mark.parametrize("style", guard_styles.STYLES)
@pytest.mark.parametrize("turns", [TURNS, TURNS[:2], TURNS[-1:]])
def test_requests_have_every_turn(style, turns):
    """Property: the body is JSON, and holds each turn once for each request."""
    for request in guard_styles.STYLES[style].requests("m", turns):
        body = json.dumps(request.body)
        assert request.body["model"] == "m"
        assert all(body.count(json.dumps(turn)[1:-1]) == 1 for turn in turns)


def test_forms_of_requests():
    """Oracle: OpenAI's API; Llama Guard's roles in turn; ShieldGemma's model card."""
    (moderations,) = guard_styles.STYLES["openai"].requests("m", TURNS)
    assert (moderations.path, moderations.body["input"]) == ("/moderations", "\n".join(TURNS))
    (ours,) = guard_styles.STYLES["canary"].requests("m", TURNS)
    assert [one["content"] for one in ours.body["messages"]] == list(TURNS)
    (llama,) = guard_styles.STYLES["llama_guard"].requests("m", TURNS)
    assert llama.path == "/chat/completions"
    assert [m["role"] for m in llama.body["messages"]] == ["user", "assistant", "user"]
    shield = guard_styles.STYLES["shieldgemma"].requests("m", TURNS[:1])
    assert [request.path for request in shield] == ["/completions"] * 4
    assert "\nHuman Question: I want to scare my kids.\n<end_of_turn>\n" in shield[0].body["prompt"]


def test_moderations():
    """Oracle: by hand. A Canary's categories are the five labels; others give their highest."""
    found = verdict("openai", moderation({"hate": 0.2, "violence": 0.7, "x": None}, True))
    assert found == Verdict(0.7, True)
    shares = dict(zip(LABELS, (0.1, 0.2, 0.3, 0.2, 0.2), strict=True))
    assert verdict("openai", moderation(shares, True)).probabilities == pytest.approx(shares)


def test_llama_guard():
    """Oracle: by hand. The probability of "unsafe" beside "safe", after the leading line breaks."""
    first = {"\n\n": 0.99, "safe": 0.001}
    found = verdict("llama_guard", chat("\n\nsafe", first, {"safe": 0.6, "unsafe": 0.2, "x": 0.1}))
    assert found.score == pytest.approx(0.25) and found.unsafe is False
    # A word that is not among the likeliest has at most the probability of the last of these.
    found = verdict("llama_guard", chat("unsafe\nS1", {"unsafe": 0.9, "the": 0.1}))
    assert found.score == pytest.approx(0.9) and found.unsafe is True
    # A server without log-probabilities.
    assert verdict("llama_guard", chat("unsafe\nS1,S10")) == Verdict(1.0, True, graded=False)
    assert verdict("llama_guard", chat("safe")) == Verdict(0.0, False, graded=False)


def test_shieldgemma():
    """Oracle: by hand. The highest of the policies, in the completions' shape of logprobs."""
    low, high = {"Yes": 0.1, "No": 0.9}, {" Yes": 0.6, "No": 0.2, "yes": 0.1}
    found = verdict("shieldgemma", completion("No", low), completion("Yes", high))
    assert found.score == pytest.approx(0.7 / 0.9) and found.unsafe is True


def test_prompt():
    """Oracle: by hand. The five letters' share of the first word."""
    found = verdict("prompt", chat("B", {"B": 0.4, " A": 0.3, "(B": 0.2, "I": 0.1}))
    assert found.probabilities == pytest.approx(
        dict.fromkeys(LABELS, 0.0) | {LABELS[0]: 1 / 3, LABELS[1]: 2 / 3}
    )
    found = verdict("prompt", chat("E: someone is in danger"))
    assert found.probabilities[LABELS[4]] == 1 and not found.graded


@pytest.mark.parametrize(
    ("style", "answer", "says"),
    [
        ("openai", {}, "results"),
        ("openai", [], "results"),
        ("openai", moderation({}), "category_scores"),
        ("openai", moderation({"hate": "high"}), "'hate'"),
        ("openai", moderation({"hate": 7}), "'hate'"),
        ("openai", moderation({"hate": 0.1}, None), "flagged"),
        ("openai", moderation(dict.fromkeys(LABELS, 0.0)), "all 0"),
        ("llama_guard", chat("I cannot help with that."), "neither 'unsafe' nor 'safe'"),
        ("llama_guard", chat(None), "text"),
        ("llama_guard", {"choices": []}, "choices"),
        ("llama_guard", {"error": "no"}, "choices"),
        ("shieldgemma", completion("Maybe", {"Maybe": 1.0}), "'yes'"),
        ("prompt", chat("Because it is wrong."), "no letter"),
        ("prompt", chat(""), "no letter"),
    ],
)
def test_bad_answers_have_a_reason(style, answer, says):
    """AnswerError that names what is missing."""
    with pytest.raises(AnswerError, match=says):
        verdict(style, answer)


class Script:
    """A guard on a loopback socket. `answer(number, body)` -> (status, headers, value)."""

    def __init__(self, answer):
        self.answer, self.bodies, self.lock = answer, [], threading.Lock()

    @contextlib.contextmanager
    def serving(self):
        script = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with script.lock:
                    script.bodies.append({"path": self.path, **body})
                    number = len(script.bodies) - 1
                status, headers, value = script.answer(number, body)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def keyword(number, body):
    """Flags texts with "bad" in them."""
    bad = "bad" in body["input"]
    return 200, {}, moderation({"bad": 0.9 if bad else 0.1}, bad)


def questions(count, word="word"):
    """Every third one is unsafe, and every fourth one says so."""
    return [
        against.Question(
            str(n),
            ("bad start", f"{word} {n}{' bad' * (n % 4 == 0)}"),
            LABELS[3] if n % 3 == 0 else LABELS[0],
        )
        for n in range(count)
    ]


def judged(url, asked, folder, concurrency=4, **more):
    retries = RetryPolicy(tries=3, max_seconds=0.01)
    side = against.Remote(url, "g", "openai", retries=retries, timeout=5.0)
    return against.judge(side, asked, folder, only_last=True, concurrency=concurrency, **more)


def test_every_dialogue_is_judged_once(tmp_path, monkeypatch):
    """Oracle: the double's record. Lines are in order; a second run asks nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    script = Script(keyword)
    asked = questions(150)
    seen = []
    with script.serving() as url:
        lines = judged(url, asked, tmp_path, on_done=seen.append)
        assert judged(url, asked, tmp_path) == lines
    assert [line["id"] for line in lines] == [one.id for one in asked]
    assert sum(seen) == 150
    # The last turn alone: the bad start of each dialogue is not seen.
    assert sorted(body["input"] for body in script.bodies) == sorted(q.turns[-1] for q in asked)
    assert [line["unsafe"] for line in lines] == [n % 4 == 0 for n in range(150)]
    kept = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert kept == lines
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_rate_limits_and_failures_are_tried_again(tmp_path):
    """Oracle: the double's record: each dialogue is answered once, after 429, 503 and a cut."""
    faults = {0: (429, {"retry-after": "0.05"}, {}), 1: (503, {}, {}), 2: (200, {}, b'{"resu')}
    script = Script(lambda number, body: faults.get(number) or keyword(number, body))
    with script.serving() as url:
        lines = judged(url, questions(6), tmp_path, concurrency=1)
    # A cut JSON text is an answer, and a bad one.
    assert [line.get("bad", "")[:8] for line in lines] == ["not JSON", "", "", "", "", ""]
    assert len(script.bodies) == 8


def test_at_most_so_many_calls_at_once(tmp_path):
    """Oracle: the double counts the calls that it is answering."""
    lock, now, most = threading.Lock(), [0], [0]

    def answer(number, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.01)
        with lock:
            now[0] -= 1
        return keyword(number, body)

    with Script(answer).serving() as url:
        judged(url, questions(70), tmp_path, concurrency=3)
    assert most[0] == 3


def test_bad_answers_are_kept_and_counted(tmp_path):
    """Oracle: by hand. A request that the guard refuses is one dialogue's, not the guard's end."""

    def answer(number, body):
        if "word 3" in body["input"]:
            return 400, {}, {"error": {"message": "too long"}}
        return (200, {}, {"no": 1}) if "word 5" in body["input"] else keyword(number, body)

    script = Script(answer)
    with script.serving() as url:
        lines = judged(url, questions(8), tmp_path)
        assert judged(url, questions(8), tmp_path) == lines
    assert len(script.bodies) == 8
    made = guard_report.report(lines)
    assert (made["dialogues"], made["judged"], sum(made["bad"].values())) == (8, 6, 2)
    assert "too long" in lines[3]["bad"] and "results" in lines[5]["bad"]
    table = guard_report.table({"g": made}, "turns", ("__casual__",), True, 4)
    assert "6 of 8" in table and "no verdict on 2" in table


def test_unanswered_dialogues_are_asked_again(tmp_path):
    """Property: the same command continues after a guard that was away."""
    away = [True]
    script = Script(
        lambda number, body: (
            (500, {}, {}) if away[0] and body["input"] == "word 1" else keyword(number, body)
        )
    )
    asked = questions(70)
    with script.serving() as url:
        lines = judged(url, asked, tmp_path)
        assert [line["id"] for line in lines if "bad" in line] == ["1"]
        away[0], before = False, len(script.bodies)
        lines = judged(url, asked, tmp_path)
    assert not any("bad" in line for line in lines)
    assert len(script.bodies) - before == 1  # the others are kept


KILLED = """
import pathlib, sys
from canary import against

against.SAVE_SECONDS = 0.05
asked = [against.Question(str(n), (f"word {n}",), "safe") for n in range(40)]
side = against.Remote(sys.argv[1], "g", "openai")
against.judge(side, asked, pathlib.Path(sys.argv[2]), only_last=True, concurrency=2)
"""


def test_a_kill_loses_the_last_moment_alone(tmp_path):
    """Oracle: the double's record. The guard stops at its 30th call, and the process is killed."""
    killed = threading.Event()

    def answer(number, body):
        if number >= 30 and not killed.is_set():
            killed.wait(20)
        return keyword(number, body)

    script = Script(answer)
    with script.serving() as url:
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        with subprocess.Popen(command) as process:
            until = time.monotonic() + 60
            while len(script.bodies) < 31 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.5)  # ten times the time between two savings
            process.kill()
        killed.set()
        asked = [against.Question(str(n), (f"word {n}",), "safe") for n in range(40)]
        before = len(script.bodies)
        lines = judged(url, asked, tmp_path)
    # The two calls in flight and the eight that were never made.
    assert before == 32 and len(script.bodies) - before == 10
    assert [line["id"] for line in lines] == [str(n) for n in range(40)]


@pytest.mark.parametrize(
    ("status", "value", "says"),
    [
        (401, {"error": {"message": "wrong key"}}, "refuses every call (status 401"),
        (404, {}, "status 404"),
        (200, {"results": []}, "no verdict on 10 dialogues in a row"),
        (500, {}, "status 500"),
    ],
)
def test_a_guard_that_is_no_guard_ends_the_run(tmp_path, status, value, says):
    """UserError with the cause, after few calls."""
    script = Script(lambda number, body: (status, {}, value))
    with script.serving() as url, pytest.raises(UserError) as caught:
        judged(url, questions(200), tmp_path)
    assert says in str(caught.value)
    assert len(script.bodies) < 60


def test_other_settings_need_another_output(tmp_path):
    """UserError that names what differs."""
    with Script(keyword).serving() as url:
        judged(url, questions(3), tmp_path)
        with pytest.raises(UserError, match="questions"):
            judged(url, questions(4), tmp_path)
        judged(url, questions(4), tmp_path, overwrite=True)


def test_report_by_hand():
    """Oracle: by hand. Six dialogues, safe labels given; five classes where both have them."""

    def line(gold, unsafe=None, score=None, label=None):
        base = {"id": "", "num_turns": 1, "gold": gold, "seconds": 0.1}
        if label is None:
            return {**base, "unsafe": unsafe, "score": score}
        rest = (1 - 0.6) / 4
        return {**base, "probabilities": dict.fromkeys(LABELS, rest) | {label: 0.6}}

    lines = [
        line("safe", False, 0.1),
        line("unsafe", True, 0.9),
        line(LABELS[1], False, 0.2),
        line(LABELS[0], label=LABELS[0]),
        line(LABELS[3], label=LABELS[3]),
        line(LABELS[2], label=LABELS[1]),
    ]
    made = guard_report.report(lines)
    two = made["two_classes"]
    # Gold unsafe: 1, 2, 4, 5. Scores: .9, .2, .9, .9; safe ones: .1, .4.
    assert two["confusion"] == [[2, 0], [1, 3]]
    assert two["roc_auc"] == pytest.approx(7 / 8)
    assert two["accuracy"] == pytest.approx(5 / 6) and two["recall"] == 0.75
    five = made["five_labels"]
    assert five["dialogues"] == 3 and five["accuracy"] == pytest.approx(2 / 3)
    made = guard_report.report(lines, safe_labels=(LABELS[0], LABELS[1]))
    # Now the third is safe, and the last one's label too.
    assert made["two_classes"]["confusion"] == [[3, 0], [1, 2]]


TOXICHAT = {
    "reddit_thread": [
        {"turn_id": 1, "text": " Title: hello ", "offense_label": "Safe"},
        {"turn_id": 2, "text": "bad answer", "offense_label": "Offensive"},
    ],
    "final_dgpt_response": {"turn_id": 3, "text": "bad bot", "offense_label": "Offensive"},
    "final_gpt3_response": {"turn_id": 3, "text": "", "offense_label": "Safe"},
}


def test_corpora_are_found_out(tmp_path):
    """Oracle: by hand. A chatbot's empty answer of ToxiChat is none."""
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(TOXICHAT) + "\n")
    corpus, found = against.read_questions(str(tmp_path), "test")
    assert corpus == "toxichat"
    assert [(q.id, q.turns, q.gold) for q in found] == [
        ("toxichat-test-0-1", ("Title: hello",), "safe"),
        ("toxichat-test-0-2", ("Title: hello", "bad answer"), "unsafe"),
        ("toxichat-test-0-dgpt", ("Title: hello", "bad answer", "bad bot"), "unsafe"),
    ]
    path.write_text(json.dumps({"turns": ["a", " b "], "label": "unsafe", "id": 7}) + "\n")
    corpus, found = against.read_questions(str(path), "test")
    assert (corpus, found) == ("turns", [against.Question("7", ("a", "b"), "unsafe")])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**TOXICHAT, "reddit_thread": [{"text": "a", "offense_label": "Bad"}]}, "offense_label"),
        ({**TOXICHAT, "reddit_thread": [{"offense_label": "Safe"}]}, "'text' is missing"),
        ({"turns": ["a"], "label": "bad"}, "'label'"),
        ({"turns": [], "label": "safe"}, "'turns'"),
        ({"turns": ["a", " "], "label": "safe"}, "turn 2 is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, says):
    """DataError with file and line."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=says) as caught:
        against.read_questions(str(path), "test")
    assert "bad.jsonl:1" in str(caught.value)


def test_the_verb_puts_guards_side_by_side(run, tmp_path, capsys):
    """Oracle: two commands' guards in one table and file, with their verdicts' numbers."""
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    asked = questions(9)
    data.write_text(
        "".join(json.dumps({"id": q.id, "turns": q.turns, "label": q.gold}) + "\n" for q in asked)
    )
    common = ["eval", f"--input={data}", f"--output={out}", "--quiet", "--turns=last"]
    with Script(keyword).serving() as url:
        command = [*common, f"--against={url}", "--model=word/list"]
        assert main(command) == 0
        assert main([*command, f"--checkpoint={run}", "--concurrency=2"]) == 0
    printed = capsys.readouterr().out.split("NAME.jsonl")[1]
    made = json.loads((out / "guards.json").read_text())
    assert list(made["sides"]) == ["word/list", run.name] and made["turns"] == "last"
    assert {p.name for p in out.glob("*.jsonl")} == {"word-list.jsonl", f"{run.name}.jsonl"}
    assert all(name in printed for name in made["sides"])
    # Unsafe are 0, 3, 6; flagged 0, 4, 8.
    assert made["sides"]["word/list"]["two_classes"]["confusion"] == [[4, 2], [2, 1]]
    assert made["sides"][run.name]["five_labels"]["dialogues"] == 9
    # Other safe labels need no calls.
    assert main([*common, f"--checkpoint={run}", "--safe_labels=casual,needs_caution"]) == 0
    made = json.loads((out / "guards.json").read_text())
    assert made["sides"]["word/list"]["two_classes"]["confusion"] == [[6, 3], [0, 0]]


def test_our_own_moderations_are_a_guard_like_any_other(canary, run, tmp_path, capsys):
    """Oracle: the same Canary without a server. Both judge the dialogue, turn by turn."""
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    rows = [
        {"turns": ["I want to scare my kids.", "Why?", f"Lesson {n}."][n % 3 :], "label": LABELS[n]}
        for n in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = Labeller(canary, batch_sizes=(1,))
    labels.warm_up(rots=False)
    service = api.Service(scripted_model(), ScriptedScheduler(), labeller=labels)
    with background(api.application(service)) as url:
        command = ["eval", f"--input={data}", f"--output={out}", "--quiet", f"--checkpoint={run}"]
        served = [f"--against={url}/v1", "--model=canary", "--style=canary", "--name=served"]
        assert main([*command, *served]) == 0
    assert "served" in capsys.readouterr().out
    found = [
        [json.loads(line)["probabilities"] for line in (out / name).read_text().splitlines()]
        for name in ("served.jsonl", f"{run.name}.jsonl")
    ]
    for ours, wanted in zip(*found, strict=True):
        assert ours == pytest.approx(wanted, abs=1e-5)


def test_prosocialdialog_has_a_published_figure():
    """Oracle: DSTC 12's overview, as noted in tasks/paper_tables.toml."""
    table = guard_report.table({}, "prosocial", ("__casual__",), False, 8)
    assert "Llama-Guard-3-1B (DSTC 12)" in table and "0.726" in table
    assert "0.726" not in guard_report.table({}, "toxichat", ("__casual__",), False, 8)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--checkpoint, --against"),
        (["--against=http://127.0.0.1:9"], "--model"),
        (["--against=localhost:8000", "--model=g"], "no address of a guard"),
        (["--against=http://127.0.0.1:9", "--model=g", "--safe_labels=fine"], "--safe_labels"),
        (["--against=http://127.0.0.1:9", "--model=g", "--concurrency=0"], "--concurrency"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, says):
    """Exit code 1, and the flag to change."""
    data = tmp_path / "in.jsonl"
    data.write_text('{"turns": ["a"], "label": "safe"}\n')
    command = ["eval", f"--input={data}", f"--output={tmp_path / 'out'}", "--quiet", *flags]
    assert main(command) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]
