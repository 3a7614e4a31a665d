"""Exports and imports. Oracles: answers that come back as given, parsers of HTML, XML and CSV.

Results have the forms that each tool writes: Mechanical Turk's results CSV, Label Studio's JSON
export, Potato 2.12's user_state.json (its `user_state_management.to_json`).
"""

import csv
import html.parser
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest

from data_pipeline import __main__ as command
from data_pipeline.annotation import pages, views
from data_pipeline.annotation.answers import Answer, check_answer, lock_answers, read_answers
from data_pipeline.annotation.assignment import shown_order
from data_pipeline.annotation.exchange import label_studio, mturk, potato
from data_pipeline.annotation.task_files import Item, Task, read_task, write_task
from tests.data_pipeline.annotation_judges import form_of
from tests.data_pipeline.annotation_samples import GOOD, answer, item, task

PAGES = pages.names()


def run(*arguments):
    return command.main(["annotate", *map(str, arguments), "--quiet"])


@pytest.mark.parametrize("page", PAGES)
def test_a_form_gives_the_answers_back(page):
    """Oracle: equality; fields of boxes that were hidden again are left out."""
    made = task(page)
    given = form_of(GOOD[page])
    assert views.form_answers(made.page, made.items[0], given) == GOOD[page]
    hidden = given | {"new_rule": "typed before", "aspect_other": given.get("aspect_other", "x")}
    if page == "responses":
        assert views.form_answers(made.page, made.items[0], hidden) == GOOD[page]


def mturk_results(path, made, judges=("W1", "W2"), fingerprint=None, **changes):
    rows = list(csv.DictReader(io.StringIO(mturk.items_csv(made, list(made.items)))))
    results = []
    for row in rows:
        one = made.by_id[html.unescape(row["item"])]
        for judge in judges:
            order = shown_order(made, one, judge)
            form = form_of(GOOD[made.page.name]) | {"order": ",".join(map(str, order))}
            results.append({
                "HITId": "H", "AssignmentId": "A", "WorkerId": judge,
                "AssignmentStatus": "Submitted", "WorkTimeInSeconds": "40",
                "SubmitTime": "Sat Nov 28 10:00:00 PST 2026",
                "Input.task": fingerprint or row["task"], "Input.item": row["item"],
                "Answer.item": one.id, "Answer.seconds": "33.5",
                **{f"Answer.{k}": v for k, v in form.items()}, **changes,
            })  # fmt: skip
    names = list(dict.fromkeys(name for row in results for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(results)
    return path


def label_studio_results(path, made, judges=("a@x.org", 7), fingerprint=None):
    rows = json.loads(label_studio.tasks(made, list(made.items)))
    for row in rows:
        row["data"]["task"] = fingerprint or row["data"]["task"]
        row["annotations"] = [
            {"completed_by": {"id": 1, "email": j} if isinstance(j, str) else j, "lead_time": 31.0,
             "created_at": "2026-11-28T10:00:00Z", "was_cancelled": False,
             "result": label_studio_result(made)}
            for j in judges
        ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


def label_studio_result(made):
    texts = {q.id: {c.id: c.text for c in q.choices} for q in made.page.questions}
    result = []
    for key, value in GOOD[made.page.name].items():
        name, known = key.replace(".", "__"), texts[key.partition(".")[0]]
        if isinstance(value, dict):
            result += [
                {"from_name": f"{name}-{n}", "type": "textarea", "value": {"text": [t]}}
                for n, t in value.items()
            ]
            continue
        if isinstance(value, str) and not known:
            result.append({"from_name": name, "type": "textarea", "value": {"text": [value]}})
            continue
        chosen = [known[value]] if known else ["Yes"] if value is True else list(map(str, value))
        if chosen:
            result.append({"from_name": name, "type": "choices", "value": {"choices": chosen}})
    return result


def potato_results(folder, made, judges=("ann", "bob"), rename=None):
    texts = {q.id: {c.id: c.text for c in q.choices} for q in made.page.questions}
    labels = []
    for key, value in GOOD[made.page.name].items():
        known = texts[key.partition(".")[0]]
        if isinstance(value, dict):
            labels += [[{"schema": f"{key}-{n}", "name": "text_box"}, t] for n, t in value.items()]
        elif isinstance(value, str) and not known:
            labels.append([{"schema": key, "name": "text_box"}, value])
        else:
            names = [known[value]] if known else ["Yes"] if value is True else map(str, value)
            labels += [[{"schema": key, "name": name}, "true"] for name in names]
    for judge in judges:
        place = folder / potato.OUTPUT / judge
        place.mkdir(parents=True)
        ids = [rename or one.id for one in made.items]
        state = {
            "user_id": judge,
            "instance_id_to_label_to_value": dict.fromkeys(ids, labels),
            "instance_id_to_behavioral_data": {name: {"total_time_ms": 32000} for name in ids},
        }
        (place / "user_state.json").write_text(json.dumps(state))
    return folder


WRITERS = {
    "mturk": mturk_results, "label_studio": label_studio_results, "potato": potato_results,
}  # fmt: skip


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("page", PAGES)
def test_results_come_back_as_they_were_given(tmp_path, tool, page):
    """Oracle: GOOD, for each item and judge; a second import adds nothing."""
    made = task(page, items=2)
    write_task(tmp_path / "task.jsonl", made)
    place = tmp_path / "results"
    place.mkdir()
    source = place if tool == "potato" else place / "results"
    WRITERS[tool](source, made)
    out = tmp_path / "answers.jsonl"
    flags = [f"--source={tool}", f"--task={tmp_path / 'task.jsonl'}", f"--answers={out}"]
    for _ in range(2):
        assert run("collect", *flags, f"--input={source}", "--strict") == 0
        found = read_answers(made, [out])
        assert [x.answers for x in found.kept] == [GOOD[page]] * 4 and not found.quarantined
        assert {x.seconds for x in found.kept} <= {33.5, 31.0, 32.0}
        assert len({(x.item, x.judge) for x in found.kept}) == 4


def test_answers_that_a_server_has_open_are_refused(tmp_path, capsys):
    """Oracle: one error while the lock is held, and nothing is written; afterwards all count."""
    made = task(items=1)
    write_task(tmp_path / "task.jsonl", made)
    mturk_results(tmp_path / "results", made)
    out = tmp_path / "answers.jsonl"
    flags = ["--source=mturk", f"--task={tmp_path / 'task.jsonl'}", f"--answers={out}"]
    with lock_answers(out):
        assert run("collect", *flags, f"--input={tmp_path / 'results'}") == 1
        printed = capsys.readouterr().err
        assert "is in use by another process, such as `annotate serve`" in printed
        assert not out.exists()
    assert run("collect", *flags, f"--input={tmp_path / 'results'}") == 0
    assert len(read_answers(made, [out]).kept) == 2


@pytest.mark.parametrize("tool", WRITERS)
def test_results_of_another_task_are_refused(tmp_path, capsys, tool):
    """Oracle: one line; nothing is written."""
    made, other = task(items=1), task("responses", items=1)
    write_task(tmp_path / "task.jsonl", other)
    source = tmp_path if tool == "potato" else tmp_path / "results"
    more = {"rename": "z9"} if tool == "potato" else {}
    WRITERS[tool](source, made, **more)
    out = tmp_path / "answers.jsonl"
    flags = [f"--source={tool}", f"--task={tmp_path / 'task.jsonl'}", f"--answers={out}"]
    assert run("collect", *flags, f"--input={source}") == 1
    assert "of another task" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("tool", "content", "problem"),
    [
        ("mturk", "", "not a results CSV"),
        ("mturk", "a,b\n1,2\n", "not a results CSV"),
        ("mturk", 'WorkerId,Input.task,Answer.item\nW,"x', "results"),
        ("label_studio", "[]", "not a JSON export"),
        ("label_studio", '[{"data": {"task": "x"}}', "not a JSON export"),
        ("potato", "{}", "not a state"),
    ],
)
def test_files_that_are_no_results(tmp_path, capsys, tool, content, problem):
    """Oracle: one line that names the file."""
    write_task(tmp_path / "task.jsonl", task())
    source = tmp_path / "results"
    source.write_text(content)
    flags = [f"--source={tool}", f"--task={tmp_path / 'task.jsonl'}", f"--input={source}"]
    assert run("collect", *flags, f"--answers={tmp_path / 'a.jsonl'}") == 1
    printed = capsys.readouterr().err
    assert problem in printed and "results" in printed and len(printed.splitlines()) == 1


def test_bad_rows_are_set_aside(tmp_path):
    """Oracle: rejected, doubled with other answers, an order that is none, an item not shown."""
    made = task(items=1)
    write_task(tmp_path / "task.jsonl", made)
    out = tmp_path / "answers.jsonl"
    flags = ["--source=mturk", f"--task={tmp_path / 'task.jsonl'}", f"--answers={out}"]
    changes = [{}, {"Answer.overall": "a"}, {"AssignmentStatus": "Rejected"}, {"Answer.order": "2"},
               {"Input.item": "i7"}]  # fmt: skip
    expected = ["", "doubled", "rejected", "order", "of another item"]
    for change, reason in zip(changes, expected, strict=True):
        source = mturk_results(tmp_path / "r.csv", made, ("W1",), **change)
        assert run("collect", *flags, f"--input={source}") == 0
        assert run("collect", *flags, f"--input={source}", "--strict") == bool(reason)
        aside = tmp_path / "answers.jsonl.quarantined.jsonl"
        assert aside.exists() == bool(reason)
        assert not reason or reason in aside.read_text()
    source = mturk_results(tmp_path / "r.csv", made, ("model:W1",))
    assert run("collect", *flags, f"--input={source}", "--strict") == 1  # it would count as a model
    assert len(read_answers(made, [out]).kept) == 1


class Tags(html.parser.HTMLParser):
    """All tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.outside, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.outside += [given[k] for k in ("src", "href", "data") if k in given]

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("page", PAGES)
def test_the_page_of_mechanical_turk_needs_nothing_else(page):
    """Oracle: an HTML parser: no link, one form, the item's texts unchanged, and no tag of them."""
    evil = "<script>alert(\"${item}\")</script> & 'x' 😀"
    one = item(f"i {evil}", page)
    made = task(page, content=[one])
    text, rows = mturk.page_html(made), mturk.items_csv(made, [one])
    values = next(csv.DictReader(io.StringIO(rows)))
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= set(values) and text.isascii()
    assert rows.isascii() and len(rows.splitlines()) == 2
    filled = re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], text)
    tags = Tags(filled)
    assert tags.outside == [] and tags.tags.count("form") == 1 and tags.tags.count("script") == 1
    assert "@import" not in filled and "url(" not in filled
    for turn in one.context:
        assert turn in tags.words
    assert 'action="https://www.mturk.com/mturk/externalSubmit"' in text
    names = set(re.findall(r'name="([^"]+)"', filled))
    assert set(form_of(GOOD[page])) | {"assignmentId", "task", "item", "order"} <= names


@pytest.mark.parametrize("page", PAGES)
def test_the_files_of_label_studio_and_potato(tmp_path, page):
    """Oracle: parsers of XML, JSON and YAML; each control has a target, each variable a value."""
    yaml = pytest.importorskip("yaml")
    made = task(page, items=2)
    write_task(tmp_path / "t.jsonl", made)
    for tool in ("label_studio", "potato"):
        assert run("export", f"--to={tool}", f"--task={tmp_path / 't.jsonl'}",
                   f"--output={tmp_path / tool}") == 0  # fmt: skip
    view = ElementTree.fromstring((tmp_path / "label_studio/config.xml").read_text())
    data = json.loads((tmp_path / "label_studio/tasks.json").read_text())[0]["data"]
    shown = {e.get("value")[1:] for e in view.iter() if (e.get("value") or "").startswith("$")}
    assert shown <= set(data)
    objects = {e.get("name") for e in view.iter("Text")}
    controls = [e for tag in ("Choices", "TextArea") for e in view.iter(tag)]
    names = [e.get("name") for e in controls]
    assert {e.get("toName") for e in controls} <= objects and len(names) == len(set(names))
    assert {e.get("whenTagName") for e in controls} - {None} <= set(names)
    config = yaml.safe_load((tmp_path / "potato/config.yaml").read_text())
    rows = [json.loads(s) for s in (tmp_path / "potato/items.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["i0", "i1"] and config["max_annotations_per_item"] == 3
    assert "<script" not in rows[0]["text"] and "😀" not in rows[0]["text"]
    schemes = [one["name"] for one in config["annotation_schemes"]]
    assert len(schemes) == len(set(schemes))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "wrapped"), [*((p, False) for p in PAGES), ("dialogues", True)])
def test_a_worker_fills_in_each_page_in_chromium(tmp_path, page, wrapped):
    """Oracle: the request that the form sends has the answers given, in the order of the coin."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("no chromium")
    made = task(page, items=1)
    values = mturk.variables(made, made.items[0])
    filled = re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], mturk.page_html(made))
    if wrapped:  # as the requester's editor does
        outer = '<form method="post" action="https://www.mturk.com/mturk/externalSubmit">'
        outer += '<input type="hidden" name="assignmentId" value="A1">'
        filled = filled.replace("<body>", f"<body>{outer}")
    sent = []

    def handle(route):
        if route.request.method == "POST":
            sent.append(route.request.post_data)
            return route.fulfill(body="thanks")
        return route.fulfill(body=filled, content_type="text/html")

    with sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        problems = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.route("**/*", handle)
        tab.goto("https://www.mturk.com/page?assignmentId=A1&workerId=W1")
        order = shown_order(made, made.items[0], "W1")
        if order and page == "prosocial":
            first = tab.inner_text("#dialoga")
            assert first == ("First of i0", "Second of i0")[order[0]]
        tab.click("button")  # not yet: questions are open
        assert not sent
        if made.page.consent:
            tab.check("[name=consent]")
        for name, value in form_of(GOOD[page]).items():
            control = tab.locator(f'[name="{name}"]')
            if value == "on":
                control.check()
            elif control.first.get_attribute("type") == "radio":
                tab.check(f'[name="{name}"][value="{value}"]')
            else:
                control.fill(value)
        tab.click("button")
        tab.wait_for_load_state()
        browser.close()
    assert not problems and len(sent) == 1
    from urllib.parse import parse_qsl

    form = dict(parse_qsl(sent[0], keep_blank_values=True))
    assert form["assignmentId"] == "A1" and form["task"] == made.fingerprint
    assert form["order"] == ",".join(map(str, order)) and float(form["seconds"]) >= 0
    back = views.form_answers(made.page, made.items[0], form)
    check_answer(made, Answer(made.fingerprint, form["item"], "W1", back, 1.0, "", order))
    assert back == GOOD[page]


def test_an_item_of_another_page_is_not_exported(tmp_path):
    """Oracle: the qualification item stays out."""
    content = [item("q", role="qualification", expected={"overall": ["tie"]}), item("i")]
    write_task(tmp_path / "t.jsonl", task(content=content))
    assert run("export", "--to=mturk", f"--task={tmp_path / 't.jsonl'}",
               f"--output={tmp_path / 'm'}") == 0  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "m/items.csv").open()))
    assert [row["item"] for row in rows] == ["i"]
    assert read_task(tmp_path / "t.jsonl").by_id["q"].role == "qualification"
    assert answer(task(), "i0").order in ((0, 1), (1, 0))


def test_a_page_that_shows_nothing_has_a_text_for_label_studio():
    """Oracle: every question is about a text of the page, which Label Studio demands."""
    made = Task(pages.load("survey"), (Item("survey"),))
    root = ElementTree.fromstring(label_studio.config(made))
    texts = {one.get("name") for one in root.iter("Text")}
    asked = [one.get("toName") for one in root.iter("Choices")]
    assert texts == {"item"} and asked == ["item"] * len(made.page.questions)
