"""The page in a real browser: typed into, steered, stopped and read, with the demo's model; needs Debian's chromium."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.browser
OFFLINE = (
    "import pytest_socket; pytest_socket.socket_allow_hosts(['127.0.0.1', 'localhost'], allow_unix_socket=True)\n"
    "from hf_recontrol.cli import main; main()"
)
WAIT = 90_000  # milliseconds


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """`hf-recontrol demo --page`, in a process that can reach no other machine and would fail if it tried."""
    log = tmp_path_factory.mktemp("page") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", OFFLINE, "demo", "--page", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "2"})
    for _ in range(1200):
        if "The page is at" in log.read_text() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)
    assert "Traceback" not in log.read_text(), log.read_text()
    assert "SocketConnectBlocked" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "There is no chromium. Install it: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, url):
    """opened(**of the window): the page, in a window that asks nothing of another machine and reports no error."""
    contexts, wrong = [], []

    def open_page(**window):
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 1000}} | window)))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: wrong.append(request.url) if not ours(request.url) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#steered .answer")  # the last part to come
        return page

    def ours(address):
        return address.startswith((url, url.replace("http", "ws"), "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def tokens(page, side):
    return page.locator(f"#{side} [data-numbers]").all_inner_texts()


def colours(page, side):
    spans = page.locator(f"#{side} [data-numbers]")
    return set(spans.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)"))


def numbers_of(page, place):
    """What is shown of the token that was pointed at."""
    token = f"document.querySelectorAll('#steered [data-numbers]')[{place}]"
    return page.evaluate(f"getComputedStyle({token}, '::after').content")


def fill(page, name, value):
    page.locator(f"#{name} input, #{name} textarea").first.fill(value)


def ask(page, act=lambda page: page.click("#go")):
    """Both answers, whole, after this act."""
    page.evaluate("document.querySelector('#steered .answer').dataset.old = ''")
    act(page)
    page.wait_for_function(
        "document.querySelector('#steered .answer:not(.growing):not([data-old]) [data-numbers]') "
        "&& !document.querySelector('.growing')"
    )
    return ["".join(tokens(page, side)) for side in ("base", "steered")]


def slide(page, share):
    """The slider, pulled by the mouse to this share of its way."""
    track = page.locator("#strength input[type=range]").bounding_box()
    middle = track["y"] + track["height"] / 2
    page.mouse.move(track["x"] + track["width"] / 4, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * share, middle, steps=5)
    page.mouse.up()


def test_a_person_types_and_reads_two_answers_in_colour_then_pulls_the_slider(opened):
    page = opened()
    fill(page, "prompt", "the film is a slow and")
    base, steered = ask(page)
    assert base != steered
    assert len(colours(page, "base")) > 5
    assert len(colours(page, "steered")) > 5
    page.locator("#steered [data-numbers]").nth(3).hover()
    numbers = numbers_of(page, 3)
    assert re.search(r"value .* → .*‖u‖ .*KL .* nats.*likeliest without control: \w", numbers, re.DOTALL), numbers
    page.get_by_label("KL", exact=True).check()
    page.get_by_text("KL from the unsteered model, in nats").wait_for()
    assert colours(page, "base") == {"rgb(255, 255, 255)"}

    assert ask(page, lambda page: slide(page, -0.1)) == [base, base]  # off
    strong = ask(page, lambda page: slide(page, 1.1))
    assert strong[0] == base
    assert strong[1] not in (base, steered)
    page.locator("#plot .marks").wait_for()


def test_bad_input_is_answered_in_the_page(opened):
    page = opened()
    page.click("#advanced button")
    fill(page, "max_kl", "-1")
    page.click("#go")
    page.get_by_text("max_kl is -1; it must be a number > 0, in nats").wait_for()
    fill(page, "max_kl", "")
    fill(page, "length", "1000")
    page.click("#go")
    page.get_by_text("the model reads 256 in all").wait_for()
    fill(page, "length", "5")
    fill(page, "prompt", "  ")
    page.click("#go")
    page.get_by_text("The prompt is empty").wait_for()
    assert "Traceback" not in page.content()
    assert not tokens(page, "base")
    fill(page, "prompt", "the film is")
    assert all(ask(page))
    assert not page.locator("#refusal").is_visible()


def test_another_head_brings_its_own_controls(opened):
    page = opened()
    page.click("#advanced button")
    page.locator("#multiplier").get_by_text("scale", exact=True).wait_for()
    assert not page.locator("#num_steps").is_visible()
    page.locator("#head input").click()
    ask(page, lambda page: page.get_by_role("option", name="MLP value head").click())
    assert page.locator("#num_steps").is_visible()
    fill(page, "multiplier", "0.2")
    fill(page, "num_steps", "3")
    assert all(ask(page))


def test_an_answer_can_be_stopped_and_the_next_one_comes(opened):
    page = opened()
    page.click("#advanced button")
    fill(page, "length", "240")
    fill(page, "temperature", "2")
    fill(page, "seed", "7")  # whose base answer does not end by itself
    page.click("#go")
    page.wait_for_selector("#base [data-numbers]")
    page.click("#stop")
    page.wait_for_function("!document.querySelector('.growing')")
    stopped = tokens(page, "base"), tokens(page, "steered")
    assert len(stopped[0]) + len(stopped[1]) < 480
    page.wait_for_timeout(2000)
    assert (tokens(page, "base"), tokens(page, "steered")) == stopped
    fill(page, "length", "4")
    assert all(ask(page))


def test_it_fits_a_phone_where_a_tap_shows_a_tokens_numbers(opened):
    page = opened(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert all(ask(page))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#steered [data-numbers]").nth(3).tap()
    assert "likeliest without control" in numbers_of(page, 3)
