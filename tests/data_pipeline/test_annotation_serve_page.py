"""Judges' pages in a real Chromium: keys, boxes that open, drafts, tabs, colours, widths."""

import json
import pathlib

import pytest

from data_pipeline.annotation.answers import read_answers
from data_pipeline.annotation.assignment import shown_order
from tests.data_pipeline.annotation_judges import form_of, served
from tests.data_pipeline.annotation_samples import GOOD, task

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in the extra dev")
from tools import annotation_screenshots, page_screenshots  # noqa: E402 after the skip

if page_screenshots.chromium() is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect = sync_api.expect
expect.set_options(timeout=10_000)
ROOT = pathlib.Path(__file__).resolve().parents[2]
OTHERS = [page for page in GOOD if page != "rots"]
WIDE = """() => [...document.body.querySelectorAll("*")]
  .filter((node) => node.checkVisibility() && !node.closest(".skip, .wide"))
  .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5)
  .map((node) => node.className || node.id || node.tagName)"""


@pytest.fixture(scope="module")
def browser():
    """One Chromium for this file."""
    with sync_api.sync_playwright() as playwright:
        browser = page_screenshots.launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Open a judge's link. At the end: nothing was asked elsewhere, no error was logged."""
    contexts, problems, outside = [], [], []

    def note(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def open_(url, token, width=1280, height=860, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.on("request", lambda request: outside.append(request.url))
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{url}/judge?token={token}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
    assert [one for one in outside if not one.startswith(("http://127.0.0.1", "data:"))] == []


def agree(page):
    page.keyboard.press("1")
    expect(page.locator("[name=consent]")).to_be_checked()
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-item]")


def by_keys(page, answers):
    """Answer with keys alone: numbers choose, Enter moves on."""
    form = form_of(answers)
    page.wait_for_load_state("load")  # the text stands before the script takes keys
    page.keyboard.press("Enter")  # to the first question
    for _ in range(40):
        kind, names, values = page.evaluate("""() => {
          const set = document.activeElement.closest("fieldset");
          if (!set) return [document.activeElement.id, [], []];
          const all = [...set.querySelectorAll("input, textarea")];
          return [all[0].type, all.map((c) => c.name), all.map((c) => c.value)];
        }""")
        if kind == "send":
            break
        assert page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        )  # the focus is visible
        if kind == "radio":
            if names[0] in form:  # a question may be optional
                page.keyboard.press(str(values.index(form[names[0]]) + 1))
        elif kind == "checkbox":
            for number, name in enumerate(names, 1):
                if name in form:
                    page.keyboard.press(str(number))
        else:
            for at, name in enumerate(names):
                if at:
                    page.keyboard.press("Tab")
                page.keyboard.type(form.get(name, ""))
        page.keyboard.press("Enter")
    else:
        raise AssertionError("the questions have no end")
    page.keyboard.press("Enter")


@pytest.mark.parametrize(
    "name", ["rots", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_a_judge_finishes_a_batch_by_keys(name, opened, tmp_path):
    """Oracle: the answers given, in the file, for each item; A was the order's first."""
    made = task(name, items=2)
    with served(made, tmp_path / "a.jsonl") as (_, judges, url):
        page = opened(url, judges["ann"].token)
        assert made.page.warning in page.inner_text("body")
        agree(page)
        for number in (1, 2):
            expect(page.locator(".progress label")).to_have_text(f"{number} of 2")
            item = made.by_id[page.get_attribute("[data-item]", "data-item")]
            if item.options:
                first = page.inner_text(".dialoga")
                assert item.options[shown_order(made, item, "ann")[0]][0] in first
            by_keys(page, GOOD[name])
        expect(page.locator("h1")).to_have_text("Thank you")
        assert "Your 2 answers are stored" in page.inner_text("main")
        page.fill("[name=_feedback]", "All was clear.")
        page.click("text=Send the remark")
        expect(page.locator("main")).to_contain_text("Your remark is stored")
    kept = read_answers(made, [tmp_path / "a.jsonl"])
    assert [one.answers for one in kept.kept] == [GOOD[name]] * 2 and not kept.quarantined
    assert "All was clear." in (tmp_path / "a.jsonl.events.jsonl").read_text()


@pytest.mark.slow
def test_boxes_open_only_where_they_are_asked(opened, tmp_path):
    """Oracle: the conditions of the page `rots`; the counters of a text."""
    with served(task("rots"), tmp_path / "a.jsonl") as (_, judges, url):
        page = opened(url, judges["ann"].token)
        agree(page)
        new, chosen = page.locator("[name=new_rule]"), page.locator("[name=chosen_rules-1]")
        better = page.locator("[name=better_rule]")
        for value, shown in (("new", (1, 0)), ("previous", (0, 1)), ("none", (0, 0))):
            page.check(f"[name=rule][value={value}]")
            assert (new.is_visible(), chosen.is_visible(), better.is_visible()) == (*shown, False)
        page.check("[name=rule][value=previous]")
        page.check("[name=rule_wrong]")
        assert better.is_visible()
        numbers = page.locator("legend .number:visible").all_inner_texts()
        assert numbers == [*"123456"]  # without a gap
        page.fill("[name=response]", "Hello. Hello there.")
        expect(page.locator(".count").first).to_have_text("2 sentences, 19 characters")
        page.click("#send")  # too short: the browser holds it back
        assert page.locator("[name=response]").evaluate("node => !node.checkValidity()")
        assert not (tmp_path / "a.jsonl").exists()


def test_tabs_back_and_reload_lose_and_double_nothing(opened, tmp_path):
    """Oracle: the file: one line an item, the first answer of each; the draft after a reload."""
    made = task("prosocial", items=3)
    with served(made, tmp_path / "a.jsonl") as (_, judges, url):
        page = opened(url, judges["ann"].token)
        agree(page)
        other = page.context.new_page()
        other.goto(page.url)
        item = page.get_attribute("[data-item]", "data-item")
        assert other.get_attribute("[data-item]", "data-item") == item
        page.check("[name=overall][value=a]")
        page.reload()
        expect(page.locator("[name=overall][value=a]")).to_be_checked()
        by_keys(page, GOOD["prosocial"])
        expect(page.locator(".progress label")).to_have_text("2 of 3")
        by_keys(other, {**GOOD["prosocial"], "overall": "b"})
        expect(other.locator("main")).to_contain_text("Your first answer is kept")
        other.click("text=Go on")
        expect(other.locator(".progress label")).to_have_text("2 of 3")
        page.go_back()
        page.wait_for_selector("[data-item]")
        for question in made.page.questions:
            page.check(f"[name={question.id}][value=tie]")
        page.dblclick("#send")
        page.wait_for_load_state()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({line["item"] for line in lines}) == len(lines) <= 2
    assert all(line["answers"] == GOOD["prosocial"] for line in lines)


@pytest.mark.slow
def test_the_minimum_time_is_told(opened, tmp_path):
    """Oracle: nothing is sent before it is over; then it is."""
    with served(task(min_seconds=2), tmp_path / "a.jsonl") as (_, judges, url):
        page = opened(url, judges["ann"].token)
        agree(page)
        by_keys(page, GOOD["prosocial"])
        expect(page.locator("#wait")).to_contain_text("more second")
        assert not (tmp_path / "a.jsonl").exists()
        page.wait_for_timeout(2000)
        page.keyboard.press("Enter")
        expect(page.locator(".progress label")).to_have_text("2 of 4")


@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_contrast_and_phone_width(colours, opened, tmp_path):
    """Oracle: WCAG 2.2's ratio (4.5 for text); no element reaches beyond 360 points."""
    from tests.cosmo.test_serve_page import CONTRASTS

    for name in ("safety", "dialogues"):
        with served(task(name), tmp_path / f"{name}.jsonl") as (_, judges, url):
            page = opened(url, judges["ann"].token, 360, 740, color_scheme=colours)
            found = page.evaluate(CONTRASTS)
            assert page.evaluate(WIDE) == []
            agree(page)
            page.keyboard.press("1")
            found += page.evaluate(CONTRASTS)
            assert page.evaluate(WIDE) == []
            bright = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(bright.split("(")[1].split(",")[0]) > 128) == (colours == "light")
            page.goto(f"{url}/status")
            found += page.evaluate(CONTRASTS)
            assert len(found) > 60 and [one for one in found if one[0] < one[1]] == []


@pytest.mark.slow
def test_labels(opened, tmp_path):
    """Oracle: the accessible names that Chromium computes."""
    made = task("proofreading")
    with served(made, tmp_path / "a.jsonl") as (_, judges, url):
        page = opened(url, judges["ann"].token)
        agree(page)
        for turn in made.items[0].context:
            expect(page.get_by_role("textbox", name=turn)).to_have_count(1)
        expect(page.get_by_role("group", name="Rewrite at least one utterance")).to_have_count(1)
        expect(page.get_by_role("progressbar", name="1 of 4")).to_have_count(1)


@pytest.mark.slow
def test_pictures_of_the_docs(browser, tmp_path):
    """Oracle: PNGs; those in docs/images have at most 150 kB."""
    files = annotation_screenshots.take(browser, tmp_path)
    assert [file.stem for file in files] == list(annotation_screenshots.PICTURES)
    for file in files:
        shown = ROOT / "docs" / "images" / file.name
        assert file.read_bytes()[:4] == shown.read_bytes()[:4] == b"\x89PNG"
        assert shown.stat().st_size <= 150_000
