"""The page in a real browser, as a new user sees it; screenshots go to artifacts/demo."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deqzoo import DEQModel
from deqzoo.data.pictures import read_picture
from deqzoo.demo import examples
from deqzoo.evaluation.classify import classify
from deqzoo.evaluation.perplexity import perplexity
from deqzoo.models.readers import load_tokenizer

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install -e '.[test]'"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser can be found: apt-get install chromium"
)

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "artifacts" / "demo"
PICTURES = ROOT / "examples" / "pictures"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


class Page:
    """A tab of the browser that records what goes wrong."""

    def __init__(self, browser: Any, url: str, size: dict[str, int], theme: str) -> None:
        self.page = browser.new_page(viewport=size)
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(f"{url}/?__theme={theme}")
        # The first example is solved when the page opens.
        self.page.wait_for_selector("#image-details .dz-verdict")

    def picture(self, path: Path | None) -> None:
        """Take the picture away, and choose another."""
        self.page.locator("#image-picture").get_by_label("Remove Image").click()
        self.page.wait_for_selector("#image-details .dz-waiting")
        if path is not None:
            self.page.set_input_files("#image-picture input[type=file]", path)

    def tab(self, name: str) -> None:
        found = self.page.get_by_role("tab", name=name, exact=True)
        if not found.count():  # a narrow page keeps the last ones in a menu
            self.page.get_by_label("More tabs").click()
            found = self.page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        found.click()

    def message(self, words: str) -> str:
        """The message that stands in the place of the answer."""
        shown = self.page.locator(".dz-error:visible", has_text=words)
        shown.wait_for()
        assert shown.count() == 1 and not self.page.locator(".toast-body").count()
        return shown.inner_text()

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(400)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    opened = Page(browser, served.url, DESKTOP, "light")
    yield opened
    assert opened.errors == []
    assert {host.split(":")[0] for host in opened.hosts if host} == {"127.0.0.1"}
    opened.page.close()


def test_image_tab(page, served) -> None:
    model = DEQModel.from_pretrained(served.zoo / served.image)
    model.use_inference_kernels(False)  # the page gives the solver's settings, which are float32's
    (expected,) = classify(model, [read_picture(PICTURES / "chelsea.png")])
    opened = page.page.inner_text("#image-answer")
    page.picture(PICTURES / "chelsea.png")
    verdict = page.page.wait_for_selector(".dz-verdict").inner_text()
    page.shot("image")
    assert page.page.inner_text("#image-answer") == opened  # which was the first example's
    answer = page.page.inner_text("#image-answer")
    label, probability = expected.labels[0]
    assert label in answer and f"{probability * 100:.0f}%" in answer
    assert all(name in answer for name, _ in expected.labels)
    assert ("Equilibrium found" in verdict) == expected.converged
    assert page.page.locator(".dz-chart").first.locator("circle").count() == expected.n_steps
    assert page.page.locator(".dz-tolerance").count() == 1

    budget = page.page.locator("#image-budget input[type=number]")
    budget.fill("2")
    page.page.click("#image-run")
    page.page.wait_for_function(
        "document.querySelectorAll('.dz-chart')[0].querySelectorAll('circle').length === 2"
    )
    page.page.wait_for_function(
        "document.querySelector('.dz-verdict').innerText.includes('Stopped early')"
    )


def test_image_mistakes(page, tmp_path) -> None:
    page.picture(None)
    page.page.click("#image-run")
    page.message("There is no picture yet")
    file = tmp_path / "words.png"
    file.write_text("not a picture")
    page.page.set_input_files("#image-picture input[type=file]", file)
    assert "Traceback" not in page.message("no picture that can be read")
    assert not page.page.locator("#image-picture img").count()  # no broken picture stays


def test_batch_tab(page, served) -> None:
    model = DEQModel.from_pretrained(served.zoo / served.image)
    model.use_inference_kernels(False)
    everything = [PICTURES / "chelsea.png", *sorted(PICTURES.glob("*.jpg"))]
    labels = model.config.label2id
    pictures = examples.known_pictures(everything, labels) or everything
    expected = classify(model, [read_picture(p) for p in pictures])
    page.tab("Several images")
    page.page.click("#batch-examples")
    page.page.wait_for_selector(".dz-card")
    page.shot("batch")
    cards = page.page.locator(".dz-card")
    assert cards.count() == len(pictures)
    for i, result in enumerate(expected):
        assert f"{result.n_steps} steps" in cards.nth(i).inner_text()
    truths = [examples.shown_class(path, labels) for path in pictures]
    right = sum(r.labels[0][0] == t for r, t in zip(expected, truths, strict=True))
    if any(truths):
        said = page.page.inner_text("#batch-answers")
        assert f"{right} of these {len(pictures)} right" in said


def test_why_tab_measures(page, served) -> None:
    page.tab("Why a DEQ")
    page.page.wait_for_selector(".dz-minis")
    page.shot("why")
    effort = page.page.inner_text("#why-effort")
    # The cards and the key of the chart: classes may be the same, or wrong.
    assert [effort.count(kind) for kind in ("the easiest", "the hardest")] == [2, 2]
    memory = page.page.inner_text("#why-memory")
    unrolled, flat = (float(x) for x in re.findall(r"([\d.]+) MiB", memory)[:2])
    assert unrolled > flat > 0
    before = page.page.inner_text("#why-dial")
    page.page.locator("#why-step input[type=number]").fill("1")
    page.page.keyboard.press("Tab")
    page.page.wait_for_function(
        "document.querySelector('#why-dial').innerText.includes('after 1 step:')"
    )
    assert page.page.inner_text("#why-dial") != before


def test_examples_have_names(page) -> None:
    names = page.page.locator("#image-examples button").evaluate_all(
        "buttons => buttons.map(button => button.ariaLabel)"
    )
    assert names[0] == "Example: chelsea" and "Example: ship" in names


def test_text_tab(page, served) -> None:
    text = "The river and the sea of the zyxwv ."
    model = DEQModel.from_pretrained(served.zoo / served.text)
    report = perplexity(model, [text], load_tokenizer(model), keep_surprisal=True)
    page.tab("Text")
    page.page.fill("#text-input textarea", text)
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Enter")  # the button comes next: no mouse is needed
    page.page.wait_for_selector(".dz-token")
    figures = page.page.inner_text("#text-figures")
    assert f"{report.perplexity:,.1f}" in figures
    assert f"{report.bits_per_character:.2f}" in figures
    tokens = page.page.locator(".dz-token")
    assert tokens.count() == report.tokens
    tip = tokens.nth(2).get_attribute("data-tip")
    assert re.fullmatch(r"and: [\d.]+ bits.* · \d+ solver steps?(, not converged)?", tip)
    assert page.page.locator(".dz-token.dz-unknown").count() == report.unknown > 0
    assert page.page.locator(".dz-next tr").count() == 8

    page.page.locator("#write-length input[type=number]").fill("5")
    page.page.click("#write-run")
    page.page.wait_for_function(
        "document.querySelector('#write-effort')?.innerText.startsWith('5 words')"
    )
    tokens.nth(4).hover()
    page.shot("text")


def test_text_mistakes(page, tmp_path) -> None:
    page.tab("Text")
    page.page.click("#text-run")
    page.message("The text is empty")
    large = tmp_path / "large.txt"
    large.write_bytes(b"word " * 2_000_000)
    with page.page.expect_file_chooser() as chooser:
        page.page.click("#text-upload")
    chooser.value.set_files(large)
    page.message("10.0 MB")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\x00\x01\x02" * 10)
    with page.page.expect_file_chooser() as chooser:
        page.page.click("#text-upload")
    chooser.value.set_files(binary)
    page.message("binary file")
    page.page.fill("#text-input textarea", "<img src=x onerror=alert(1)> the river")
    page.page.click("#text-run")
    page.page.wait_for_selector(".dz-token")
    assert page.page.locator("#text-tokens img").count() == 0


def test_graph_tab(page) -> None:
    page.tab("Graph")
    page.page.click("#graph-run")
    page.page.wait_for_selector(".dz-graph circle")
    page.shot("graph")
    nodes = page.page.locator(".dz-graph circle")
    assert nodes.count() >= 2
    assert "norm" in nodes.first.locator("title").inner_html()
    assert page.page.locator("#graph-residuals circle").count() > 1
    page.page.locator("#graph-number input").fill("9999")
    page.page.click("#graph-run")
    page.message("graph number")


def test_models_of_nodes(page) -> None:
    page.tab("Graph")
    page.page.click("#node-run")
    page.page.wait_for_selector("#node-drawing circle")
    page.shot("nodes")
    assert page.page.locator("#node-drawing circle").count() == 40
    assert "of the 39 other nodes" in page.page.inner_text("#node-verdict")
    assert page.page.locator("#node-distance circle").count() == 20
    page.page.locator("#node-number input").fill("99")
    page.page.click("#node-run")
    page.message("the node must be a whole number from 0 to 39".capitalize())


def test_phone_in_the_dark(browser, served) -> None:
    opened = Page(browser, served.url, PHONE, "dark")
    page = opened.page
    assert "dark" in page.evaluate("document.body.className")
    opened.picture(PICTURES / "ship.jpg")
    page.wait_for_selector("#image-details .dz-verdict")
    opened.shot("phone-image")
    assert opened.fits()
    assert page.locator("footer .show-api").is_visible()
    opened.tab("Why a DEQ")
    page.wait_for_selector(".dz-minis")
    opened.shot("phone-why")
    assert opened.fits()
    opened.tab("Text")
    page.fill("#text-input textarea", "The river and the sea of the north .")
    page.click("#text-run")
    page.wait_for_selector(".dz-token")
    opened.shot("phone-text")
    assert opened.fits()
    opened.tab("Graph")
    page.click("#graph-run")
    page.wait_for_selector(".dz-graph circle")
    opened.shot("phone-graph")
    assert opened.fits()
    opened.tab("About")
    page.wait_for_selector("pre:visible")  # a program, wider than a phone
    opened.shot("phone-about")
    assert opened.fits() and opened.errors == []
    page.close()
