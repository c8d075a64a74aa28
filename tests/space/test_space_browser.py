"""The Space in a real browser, used as a person would: by labels and buttons. What it shows is what the model says."""

import io
import shutil

import answers
import attention
import matching
import models as space_models
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from settings import Settings
from uploads import open_upload

from tests.helpers.space_page import colour_of, is_shown, nothing_hangs_out, wait_until_still
from tests.helpers.space_server import EXAMPLES, NEVER, WAIT, held_app, save_tiny, serving, until

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "microsoft-edge"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium, Chrome or Edge on this machine (apt install chromium)"
)
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
expect.set_options(timeout=1000 * WAIT)  # milliseconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def address(folders):
    with serving("--model", *folders, cwd="/") as (where, _):  # examples load from any working directory
        yield where


@pytest.fixture(scope="module")
def loaded(folders):
    return space_models.load_models([str(folder) for folder in folders], "cpu")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=1000 * WAIT)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens pages, and fails where one fetched anything from elsewhere or logged an error."""
    contexts, foreign, errors = [], [], []

    def open_page(size=WIDE, scheme="light", where=address):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * WAIT)
        local = (where, where.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(where)
        page.get_by_role("tab", name="Caption", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == [] and errors == []


def open_tab(page, name: str):
    """The panel of a tab, which on a phone may lie behind the menu of what has no room."""
    tab = page.get_by_role("tab", name=name, exact=True).first
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    panel = page.locator("div[role=tabpanel]:visible").first
    panel.wait_for()
    return panel


def upload(panel, path) -> None:
    panel.locator("input[type=file]").first.set_input_files(str(path))
    panel.get_by_role("button", name="Remove Image").first.wait_for()


def wait_in(page, condition) -> None:
    """`until`, while the page's own events go on."""
    until(lambda: condition() or page.evaluate("false"))


def style_width(element) -> float:
    """Percent of its parent that an element is wide."""
    return element.evaluate("one => 100 * one.getBoundingClientRect().width / one.parentElement.clientWidth")


def thumbnails(panel):
    """The pictures in a gallery's grid that may be changed."""
    return panel.locator(".grid-container img")


def answer_of(loaded, number, question, history=(), **changes):
    settings = Settings(**{"num_beams": 1, "max_length": 20, **changes})
    *_, (text, _) = answers.answer(loaded, open_upload(EXAMPLES[number]), question, list(history), settings)
    return text


def test_caption(visit, loaded):
    page = visit()
    panel = open_tab(page, "Caption")
    upload(panel, EXAMPLES[1])
    panel.get_by_label("Prompt").fill("a photo of")
    panel.get_by_role("button", name="Caption", exact=True).click()
    expected = answers.caption(loaded.speaker, open_upload(EXAMPLES[1]), "a photo of", Settings(), NEVER)[0]
    expect(panel.locator("#caption-text textarea")).to_have_value(expected)
    panel.get_by_role("button", name="Settings").click()
    panel.get_by_label("Nucleus sampling").check()
    panel.get_by_role("spinbutton", name="Captions").or_(panel.get_by_label("number input for Captions")).first.fill(
        "2"
    )
    panel.get_by_role("button", name="Caption", exact=True).click()
    drawn = answers.caption(
        loaded.speaker, open_upload(EXAMPLES[1]), "a photo of", Settings("nucleus", captions=2), NEVER
    )
    expect(panel.locator("#caption-text textarea")).to_have_value("\n".join(drawn))
    panel.locator("table tbody tr").nth(2).click()  # an example, captioned before
    expected = answers.caption(loaded.speaker, open_upload(EXAMPLES[2]), "a picture of", Settings(), NEVER)[0]
    expect(panel.locator("#caption-text textarea")).to_have_value(expected)
    assert is_shown(panel.locator(".image-frame img"), open_upload(EXAMPLES[2]))
    button = panel.get_by_role("button", name="Caption", exact=True)
    page.mouse.move(0, 0)
    indigo = (79, 70, 229)  # 600, as theme.py says
    until(lambda: colour_of(button, "backgroundColor") == indigo)  # the colour of a button fades


def test_an_error_is_a_toast_in_plain_words(visit, tmp_path):
    page = visit()
    panel = open_tab(page, "Caption")
    panel.get_by_role("button", name="Caption", exact=True).click()
    expect(page.get_by_text("There is no picture. Upload one")).to_be_visible()
    (tmp_path / "cut.png").write_bytes(EXAMPLES[0].read_bytes()[:3000])
    upload(panel, tmp_path / "cut.png")
    panel.get_by_role("button", name="Caption", exact=True).click()
    expect(page.get_by_text("This picture is damaged or cut off")).to_be_visible()


def test_chat(visit, loaded):
    page = visit()
    panel = open_tab(page, "Chat")
    upload(panel, EXAMPLES[0])
    first, second = "what colour is it ?", "is it on the left ?"
    said = answer_of(loaded, 0, first)
    bot, box = panel.locator(".bot.message"), panel.get_by_role("textbox", name="Question")
    box.fill(first)
    panel.get_by_role("button", name="Ask").click()
    expect(bot.last).to_contain_text(said)
    box.fill(second)
    box.press("Enter")
    expect(bot).to_have_count(2)
    said_next = answer_of(loaded, 0, second, [(first, said)])
    expect(bot.last).to_contain_text(said_next)
    page.get_by_role("button", name="Retry").last.click()
    expect(bot).to_have_count(2)
    expect(bot.last).to_contain_text(said_next)
    page.get_by_role("button", name="Undo").last.click()
    expect(bot).to_have_count(1)
    expect(box).to_have_value(second)
    assert is_shown(panel.locator(".image-frame img"), open_upload(EXAMPLES[0]))
    panel.locator("table tbody tr").nth(1).click()  # an example: another picture, a new chat
    expect(bot).to_have_count(0)
    box.fill(first)
    box.press("Enter")
    history = [(first, answer_of(loaded, 1, first))]
    expect(bot.last).to_contain_text(history[0][1])
    for question in ("is there a red dog on the left ?", "is there a blue dog on the right ?", first):
        box.fill(question)
        box.press("Enter")
        expect(bot).to_have_count(len(history) + 1)
        said = answer_of(loaded, 1, question, history)
        expect(bot.last).to_contain_text(said)
        history.append((question, said))
    expect(panel.get_by_text("no room for the whole chat").first).to_be_visible()
    panel.get_by_role("button", name="Clear", exact=True).last.click()
    expect(bot).to_have_count(0)


def test_clear_outruns_an_answer_that_the_page_cannot_cancel_yet(visit, loaded):
    """The page learns the number of a request, by which it cancels, only from the server's reply to it."""
    page = visit()
    panel = open_tab(page, "Chat")
    upload(panel, EXAMPLES[0])
    held, released = [], []
    page.route("**/queue/join*", lambda route: route.continue_() if released else held.append(route))
    panel.get_by_role("textbox", name="Question").fill("what is it ?")
    panel.get_by_role("textbox", name="Question").press("Enter")
    messages = panel.locator(".message")
    expect(messages.first).to_be_visible()
    wait_in(page, lambda: held)
    panel.get_by_role("button", name="Clear", exact=True).last.click()
    expect(messages).to_have_count(0)
    released.append(True)
    for route in held:  # the request for an answer comes last
        route.continue_()
    # The page waits in one line for what the model says: a caption that is there comes after the old answer.
    caption = open_tab(page, "Caption")
    upload(caption, EXAMPLES[1])
    caption.get_by_role("button", name="Caption", exact=True).click()
    expected = answers.caption(loaded.speaker, open_upload(EXAMPLES[1]), "a picture of", Settings(), NEVER)[0]
    expect(caption.locator("#caption-text textarea")).to_have_value(expected)
    open_tab(page, "Chat")
    expect(messages).to_have_count(0)


def test_a_question_outruns_the_news_of_its_picture(visit, loaded):
    """What a new picture does to the old chat may reach a busy server after the first question on it."""
    page = visit()
    panel = open_tab(page, "Chat")
    held = []
    page.route("**/run/predict*", lambda route: route.continue_() if held else held.append(route))
    upload(panel, EXAMPLES[0])
    wait_in(page, lambda: held)
    panel.get_by_role("textbox", name="Question").fill("what is it ?")
    panel.get_by_role("textbox", name="Question").press("Enter")
    expect(panel.locator(".message").first).to_be_visible()
    with page.expect_response("**/run/predict*"):
        held[0].continue_()
    said = answer_of(loaded, 0, "what is it ?")
    expect(panel.locator(".bot.message").last).to_contain_text(said)
    # The chat goes on with both: had the news emptied it, the next question would stand alone.
    panel.get_by_role("textbox", name="Question").fill("is it red ?")
    panel.get_by_role("textbox", name="Question").press("Enter")
    expect(panel.locator(".bot.message")).to_have_count(2)
    expect(panel.locator(".bot.message").last).to_contain_text(
        answer_of(loaded, 0, "is it red ?", [("what is it ?", said)])
    )


def test_stop_ends_an_answer_that_is_being_written(visit, folders, loaded, tmp_path):
    """An answer that comes to its fifth word and ends only when it is told to stop."""
    with serving("--model", *folders, script=held_app(tmp_path)) as (where, _):
        page = visit(where=where)
        panel = open_tab(page, "Chat")
        upload(panel, EXAMPLES[0])
        panel.get_by_role("button", name="Settings").click()
        for name in ("Shortest", "Longest"):
            panel.get_by_label(f"number input for {name}").fill("40")
        box = panel.get_by_role("textbox", name="Question")
        box.fill("what is it ?")
        box.press("Enter")
        bot = panel.locator(".bot.message")
        whole = answer_of(loaded, 0, "what is it ?", min_length=40, max_length=40)
        expect(bot.last).to_contain_text(" ".join(whole.split()[:3]))
        until((tmp_path / "held").exists)
        panel.get_by_role("button", name="Stop").click()
        # The model is free again, or the next answer would never come, and the chat goes on: once the page knows that the
        # answer has ended, before which Gradio takes no second one.
        until((tmp_path / "freed").exists)
        expect(panel.locator(".generating")).to_have_count(0)
        for name in ("Shortest", "Longest"):
            panel.get_by_label(f"number input for {name}").fill("3")
        box.fill("is it red ?")
        box.press("Enter")
        expect(bot).to_have_count(2)
        expect(bot.last).not_to_have_text("…")
        said = bot.first.inner_text().split()
        assert 3 <= len(said) <= 5 and whole.split()[: len(said)] == said
        page.close()


def test_match(visit, loaded):
    page = visit()
    panel = open_tab(page, "Match")
    panel.locator("input[type=file]").first.set_input_files(str(EXAMPLES[0]))
    panel.get_by_label("Texts, one on each line").fill("a red circle\nthe blue dog")
    expect(thumbnails(panel)).to_have_count(1)
    panel.get_by_role("button", name="Match", exact=True).click()
    texts = ["a red circle", "the blue dog"]
    scores = matching.match(loaded, [open_upload(EXAMPLES[0])], texts, NEVER, print)
    chart = panel.locator("#match-chart")
    for row in (scores["itc"][0], scores["itm"][0]):
        for value in row:
            expect(chart).to_contain_text(f"{value:.3f}")
    expect(chart.locator(".bar-fill")).to_have_count(4)
    widths = [style_width(fill) for fill in chart.locator(".bar-fill").all()]
    expected = [100 * min(max(value, 0), 1) for pair in zip(scores["itc"][0], scores["itm"][0]) for value in pair]
    assert widths == pytest.approx(expected, abs=1)
    panel.get_by_role("button", name="Load example pictures").click()
    expect(thumbnails(panel)).to_have_count(3)
    panel.get_by_role("button", name="Match", exact=True).click()
    expect(chart.locator("tbody td")).to_have_count(6)
    scores = matching.match(loaded, [open_upload(path) for path in EXAMPLES[:3]], texts, NEVER, print)
    expect(chart).to_contain_text(f"{scores['itm'][2][1]:.3f}")
    for number in range(3):
        assert is_shown(chart.locator("thead img").nth(number), open_upload(EXAMPLES[number]))


def test_search(visit, loaded):
    page = visit()
    panel = open_tab(page, "Search")
    panel.get_by_role("button", name="Load example pictures").click()
    expect(thumbnails(panel)).to_have_count(6)
    panel.get_by_label("Query").fill("a red circle")
    panel.get_by_label("Query").press("Enter")
    pictures = [open_upload(path) for path in EXAMPLES]
    best = matching.rank_images(loaded, pictures, "a red circle", 16, NEVER, print)[0]
    expect(panel.locator("#found .caption-label").first).to_contain_text(
        f"1. ITC {best['itc']:.2f}, ITM {best['itm']:.2f}"
    )
    expect(panel.locator("#found .caption-label")).to_have_count(6)
    assert is_shown(panel.locator("#found .grid-container img").first, pictures[best["image"]])
    page.get_by_role("tab", name="Texts for a picture").click()
    other = page.locator("div[role=tabpanel]:visible").last
    upload(other, EXAMPLES[0])
    other.get_by_label("Texts, one on each line").fill("a red circle\nthe blue dog")
    other.get_by_role("button", name="Rank texts").click()
    first = matching.rank_texts(loaded, pictures[0], ["a red circle", "the blue dog"], 16, NEVER, print)[0]["text"]
    expect(other.locator("#text-ranking li").first).to_contain_text(first)


def heat_of(part, query):
    """The first example under the heat of a query, or of all."""
    picture = open_upload(EXAMPLES[0])
    heat = attention.average_map(attention.query_maps(part, picture, None, None), query)
    return attention.drawn(part, picture, [heat])[0]


def test_look(visit, loaded):
    page = visit()
    panel = open_tab(page, "Look")
    upload(panel, EXAMPLES[0])
    panel.get_by_role("button", name="Show where it looks").click()
    expect(panel.locator("#heat img")).to_be_visible()
    assert is_shown(panel.locator("#heat img"), heat_of(loaded.speaker, None))
    before = panel.locator("#heat img").get_attribute("src")
    panel.get_by_label("Query").click()
    page.get_by_role("option", name="3", exact=True).click()
    expect(panel.locator("#heat img")).not_to_have_attribute("src", before)
    assert is_shown(panel.locator("#heat img"), heat_of(loaded.speaker, 3))
    panel.get_by_role("button", name="Caption, word").click()
    settings = Settings(num_beams=1, max_length=20)
    words, _ = attention.word_weights(loaded.speaker, open_upload(EXAMPLES[0]), "a picture of", settings, NEVER)
    expect(panel.locator("#words .caption-label")).to_have_text(words)


def test_about(visit, loaded):
    panel = open_tab(visit(), "About")
    for text in ("Parameters", "float32", "cpu", "Licence", "Limits of all such models", "GB of the process"):
        expect(panel).to_contain_text(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_on_a_phone(visit, loaded, scheme):
    page = visit(PHONE, scheme)
    for name in ("Caption", "Chat", "Match", "Search", "Look", "About"):
        panel = open_tab(page, name)
        assert nothing_hangs_out(page), name
        box = panel.bounding_box()
        assert box["width"] > 0.8 * PHONE["width"] and box["height"] > 100, name  # not folded to a strip
    wait_until_still(page)
    shades = [np.mean(colour_of(page.locator("body"), name)) for name in ("backgroundColor", "color")]
    assert shades == sorted(shades, reverse=scheme == "light")  # dark on light, or light on dark
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert abs(np.median(shot) - shades[0]) < 16  # that background is what is seen
    panel = open_tab(page, "Chat")
    upload(panel, EXAMPLES[0])
    panel.get_by_role("textbox", name="Question").fill("is it red ?")
    panel.get_by_role("button", name="Ask").click()
    expect(panel.locator(".bot.message").last).to_contain_text(answer_of(loaded, 0, "is it red ?"))


def test_two_visitors_do_not_see_one_another(visit, loaded):
    one, two = visit(), visit()
    for page, number in ((one, 0), (two, 1)):
        panel = open_tab(page, "Chat")
        upload(panel, EXAMPLES[number])
        panel.get_by_role("textbox", name="Question").fill("is it red ?")
    for page in (one, two):
        page.get_by_role("button", name="Ask").first.click()
    for page, number in ((one, 0), (two, 1)):
        expect(page.locator(".bot.message").last).to_contain_text(answer_of(loaded, number, "is it red ?"))
        expect(page.locator(".bot.message")).to_have_count(1)


def test_a_stage1_checkpoint_switches_the_chat_off_with_a_sentence(visit, folders):
    with serving("--model", folders[1]) as (where, _):
        page = visit(where=where)
        panel = open_tab(page, "Chat")
        expect(panel).to_contain_text("has no language model")
        expect(panel.get_by_role("button", name="Ask")).to_have_count(0)
        page.close()


GRADIOS_OWN = {"aria-prohibited-attr"}  # the label of the empty gallery is in Gradio's own markup


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_and_contrast(visit, scheme):
    """axe-core's rules of WCAG A and AA."""
    axe = Axe()
    page = visit(scheme=scheme)
    found = {}
    for name in ("Caption", "Chat", "Match", "Search", "Look", "About"):
        open_tab(page, name)
        wait_until_still(page)
        for violation in axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]:
            for node in violation["nodes"]:
                found.setdefault(violation["id"], set()).add(node["html"][:160])
    assert {rule: nodes for rule, nodes in found.items() if rule not in GRADIOS_OWN} == {}
