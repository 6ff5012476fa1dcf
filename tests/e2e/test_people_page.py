"""The page at which people compare answers, in a real browser: by keyboard, over a kill of its server, in two themes and on a small screen."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from people import said, until
from toy_runs import pairs

from onlinerl.people.queue import Question, Queue
from onlinerl.people.server import Server

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and chromedriver")

TOKEN = "a-token-for-tests-only"
SHOTS = os.environ.get("ONLINERL_SCREENSHOTS")
"""A folder that gets pictures of the page, for people."""
LONG = "\n\n".join(f"Paragraph {n}: {'word ' * 60}" for n in range(12))
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><b>bold?</b> & &amp;"


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def enter(self, address: str, name: str = "ann") -> None:
        """Open the link and give a name."""
        self.browser.get(address)
        self.element("name").send_keys(name + Keys.ENTER)

    def element(self, identifier: str) -> Any:
        return self.browser.find_element(By.ID, identifier)

    def text(self, identifier: str) -> str:
        return str(self.element(identifier).get_property("textContent"))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.browser.find_element(By.TAG_NAME, "body").send_keys(key)

    def shows(self, question: Question) -> bool:
        return self.element("ask").is_displayed() and (self.text("left"), self.text("right")) == (question.left, question.right)

    def reads(self, identifier: str, words: str) -> None:
        until(lambda: words in self.text(identifier), f"{words!r} in {identifier}")

    def picture(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(f"{SHOTS}/{name}.png")

    def theme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def page(browser):
    return Page(browser)


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Queue, str]]:
    """A queue and the link to its page."""
    queue = Queue(tmp_path / "oracle")
    with Server(("127.0.0.1", 0), queue, TOKEN) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield queue, f"http://127.0.0.1:{server.server_address[1]}/#token={TOKEN}"
        server.shutdown()


def question(number: int, **more: Any) -> Question:
    usual = {"left": f"left {number}", "right": f"right {number}", "prompt": f"prompt {number}", "messages": (), "iteration": 1}
    return Question(id=f"q{number}", **{**usual, **more})


def started(run: Path, port: int, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The real command; returns its process and the link that it prints."""
    environment = {**os.environ, "ONLINERL_PEOPLE_TOKEN": TOKEN, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "onlinerl.cli", "people", str(run), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    assert process.stdout is not None
    printed = process.stdout.readline()
    link = re.search(r"http://\S+", printed)
    assert link is not None, printed
    return process, link[0]


def test_twenty_by_keyboard_over_a_kill_of_the_server_are_what_the_run_trains_on(toy_config, warm_cli, tmp_path, page):
    run = tmp_path / "runs/toy"
    keys = {"oracle.name": "human", "oracle.max_wait_s": 600.0, "oracle.undo_s": 0.5, "iterations": 1}
    process, out = warm_cli.start(
        "run", toy_config(tmp_path, {**keys, "prompts.per_iteration": 20, "metrics.prometheus": False})
    )
    queue = Queue(run / "oracle")
    until(lambda: (queue.look(), len(queue.questions()) == 20)[1], "twenty questions")
    server, link = started(run, 0, tmp_path)
    port = int(re.findall(r":(\d+)/", link)[0])
    chosen: dict[tuple[str, str], str] = {}

    def compare(number: int) -> None:
        seen = page.text("left"), page.text("right")
        choice = ("left", "right", "right", "left", "tie", "skip")[number % 6]
        page.press({"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "tie": "t", "skip": "s"}[choice])
        chosen[seen] = choice
        until(
            lambda: (page.text("left"), page.text("right")) != seen or page.element("empty").is_displayed(),
            f"what follows {seen}",
        )

    try:
        page.enter(link)
        page.reads("counts", "20 open")
        for number in range(10):
            compare(number)
        server.send_signal(signal.SIGKILL)
        server.wait(30)
        seen = page.text("left"), page.text("right")
        page.press(Keys.ARROW_LEFT)  # nobody hears it; the page keeps it and sends it again
        page.reads("notice", "is not reached")
        server, _ = started(run, port, tmp_path)
        chosen[seen] = "left"
        until(lambda: (page.text("left"), page.text("right")) != seen, "the next one, once the server is back")
        for number in range(11, 20):
            compare(number)
        done = warm_cli.finish(process, out, timeout=300)
        assert done.returncode == 0, done.message
    finally:
        server.kill()
        server.wait(30)
    queue.look()
    given = {(q.left, q.right): [answer.choice for answer in queue.answers(q.id)] for q in queue.questions()}
    assert given == {seen: [choice] for seen, choice in chosen.items()}
    assert len(given) == 20
    decided = {seen: choice for seen, choice in chosen.items() if choice in ("left", "right")}
    better = Counter(seen if choice == "left" else seen[::-1] for seen, choice in decided.items())
    assert Counter((one["chosen_text"], one["rejected_text"]) for one in pairs(run, 1)) == better
    assert 0 < len(better) < 20


def test_what_a_model_wrote_is_shown_as_text_and_nothing_is_taken_from_elsewhere(served, page):
    queue, link = served
    messages = (("user", f"Ask {HOSTILE}"), ("assistant", "Well?"), ("user", "line one\n  line two"))
    queue.put([question(1, left=HOSTILE, right="", messages=messages)])
    page.enter(link)
    until(lambda: page.shows(queue.questions()[0]), "the question")
    assert page.text("left") == HOSTILE
    assert HOSTILE in page.text("prompt")
    assert page.browser.title == "Which answer is better?"
    for name in ("img", "b", "iframe"):
        assert page.browser.find_elements(By.TAG_NAME, name) == []
    assert "token" not in page.browser.current_url
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert all(name.startswith("http://127.0.0.1:") for name in loaded)
    problems = [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert problems == []


def test_undo_works_over_a_reload_and_not_once_the_run_has_it(served, page):
    queue, link = served
    queue.put([question(1), question(2)])
    page.enter(link)
    until(lambda: page.shows(question(1)), "the first")
    page.press(Keys.ARROW_LEFT)
    until(lambda: page.shows(question(2)), "the second")
    page.browser.refresh()
    until(lambda: page.shows(question(2)), "the second, after a reload")
    page.press("u")
    until(lambda: page.shows(question(1)), "the first again")
    assert queue.answers("q1") == []
    page.press("b")
    until(lambda: page.shows(question(2)), "the second")
    assert [answer.choice for answer in queue.answers("q1")] == ["both_bad"]
    queue.take(["q1"], older_than_s=0)
    page.press("u")
    until(lambda: "the run has it already" in page.text("notice") or not page.element("undo").is_enabled(), "no way back")
    assert [answer.choice for answer in queue.answers("q1")] == ["both_bad"]


def test_strength_by_number_and_by_mouse(served, page):
    queue, link = served
    queue.put([question(n, strength=True) for n in range(1, 4)])
    page.enter(link)
    until(lambda: page.shows(question(1)), "the first")
    page.press("1")
    until(lambda: page.shows(question(2)), "the second")
    page.press("4")
    until(lambda: page.shows(question(3)), "the third")
    page.browser.find_element(By.CSS_SELECTOR, '#graded [data-choice="both_bad"]').click()
    until(lambda: page.element("empty").is_displayed(), "the end")
    queue.look()
    given = [(answer.choice, answer.strength) for n in (1, 2, 3) for answer in queue.answers(f"q{n}")]
    assert given == [("left", "clear"), ("right", "slight"), ("both_bad", None)]


def test_new_questions_come_by_themselves_and_a_wrong_token_is_said(served, page):
    queue, link = served
    page.enter(link.replace(TOKEN, "a-wrong-token-for-tests"))
    page.reads("notice", "the token is missing or wrong")
    page.browser.get("about:blank")
    page.browser.get(link)
    until(lambda: page.element("empty").is_displayed(), "an empty queue")
    queue.put([question(1)])
    until(lambda: page.shows(question(1)), "the question")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_it_fits_the_screen_and_long_answers_scroll(served, page, scheme, width, height):
    queue, link = served
    messages = (("user", "Write a few words about why the sky is blue, for a child of eight."),)
    short = "Sunlight is made of all colours. Air scatters the blue part most, so blue reaches your eyes from everywhere in the sky."
    queue.put([question(1, left=LONG, right=short, messages=messages, strength=scheme == "dark"), question(2)])
    for who, choice in (("bob", "left"), ("cat", "left")):
        queue.put([question(7, needed=3), question(8, needed=3)])
        for n in (7, 8):
            queue.answer(said(question(n), choice, who))
    page.size(width, height)
    page.theme(scheme)
    page.enter(link)
    until(lambda: page.text("right") == short, "the question")
    page.picture(f"{scheme}-{width}")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.browser.execute_script("return document.documentElement.scrollHeight") <= height
    left = page.element("left")
    assert left.get_property("scrollHeight") > left.get_property("clientHeight") > 100
    assert page.element("left-more").is_displayed()
    for button in page.browser.find_elements(By.CSS_SELECTOR, "footer button"):
        if button.is_displayed():
            place = button.rect
            assert place["y"] + place["height"] <= height
    page.press(*[Keys.ARROW_DOWN] * 3)
    assert left.get_property("scrollTop") > 0
    background = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.browser.get("about:blank")
