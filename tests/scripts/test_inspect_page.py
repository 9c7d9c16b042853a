"""The page: one file, one copy of plotly, the corpus escaped; and in a real browser, where there is one."""

import html
import json
import re

import pytest
from inspect_cases import NASTY, inspect, make_run, write_texts

from scripts.inspect_curvature.browser import CHROMIUM, Browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_texts(root / "texts", 40)
    make_run(root)
    make_run(root, "twin", seed=3, steps=(20,))
    make_run(root, "short", pattern="AE", steps=(5,))
    with pytest.MonkeyPatch.context() as monkeypatch:
        size = ("--documents", 24, "--tokens", 64)
        assert not inspect(monkeypatch, root, "tiny", "--compare", "twin", "short", *size, "--out", root)
    return root / "report.html"


def test_it_is_one_small_file_with_one_copy_of_the_script(page):
    text = page.read_text()
    assert len(text.encode()) < 8e6
    assert text.count("plotly.js v") == 1
    outside = re.sub(r"<script>/\* plotly.*?</script>|<script type=.application.json.*?</script>", "", text, flags=re.S)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", outside) and "http" not in outside.replace("http-equiv", "")


def test_text_of_the_corpus_is_escaped(page):
    text = page.read_text()
    data = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, flags=re.S).group(1)
    figures = {figure["key"]: figure for figure in json.loads(data)["figures"]}
    shown = figures["trajectory"]["texts"]["tokens"][10]
    read = html.unescape(re.sub("<br>|</?b>", "", shown))
    assert "img" in read and "<img" not in shown and "<script" not in shown
    assert NASTY not in text and "<img" not in text.split("<script>/* plotly")[0]


def test_every_figure_explains_itself(page):
    text = page.read_text()
    figures = re.findall(r'<figure class="(\w+)" id="figure-([\w.-]+)">(.*?)</figure>', text, flags=re.S)
    keys = {key for _, key, _ in figures}
    wanted = {"curvature", "families", "blocks", "comparison", "foreign-comparison", "timeline", "correlation", "tubes"}
    assert wanted | {"stp", "forecast", "positions", "trajectory", "collapse-effective_rank"} <= keys
    for width, key, body in figures:
        read = re.search(r'<p class="read">(.*?)</p>', body, flags=re.S).group(1)
        assert len(read) > (20 if width == "third" else 80), key
        assert ("What it cannot show" in body) == (width != "third"), key


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_a_browser_draws_everything_and_asks_the_network_for_nothing(page, scheme):
    with Browser() as browser:
        browser.emulate(scheme)
        browser.open(page, wait_for="document.body.dataset.drawn")
        plots = browser.evaluate("document.querySelectorAll('.plot').length")
        drawn = """[...document.querySelectorAll('.plot')].filter(plot => plot.querySelector('svg.main-svg')
            && plot.querySelectorAll('.trace, .bars .point').length > 0).length"""
        assert browser.evaluate(drawn) == plots == int(browser.evaluate("document.body.dataset.drawn")) >= 21
        paint = browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"{scheme}: first contentful paint after {paint:.0f} ms")
        assert paint < 3000
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(map(int, re.findall(r"\d+", background)[:3])) > 384
        assert bright == (scheme == "light")

        # every view of every figure can be chosen
        browser.evaluate(
            """(async () => {
              for (const button of document.querySelectorAll('.choice button')) button.click();
              for (const list of document.querySelectorAll('.choice select'))
                for (const option of list.options) {
                  list.value = option.value;
                  list.dispatchEvent(new Event('change'));
                }
              await new Promise(done => setTimeout(done, 300));
            })()"""
        )
        assert browser.evaluate(drawn) == plots
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

        requests = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
        assert [url for url in requests if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
        assert sum(url.startswith("file:") for url in requests) == 1
        assert browser.said("Runtime.exceptionThrown") == []
        assert [said for said in browser.said("Runtime.consoleAPICalled") if said["type"] in ("error", "warning")] == []
        assert [said for said in browser.said("Log.entryAdded") if said["entry"]["level"] == "error"] == []


@needs_chromium
@pytest.mark.slow
def test_the_browser_test_can_fail(page, tmp_path):
    """A page whose figure is broken, or that asks for something, is noticed by what the test above looks at."""
    broken = tmp_path / "broken.html"
    code = "<script>fetch('http://localhost:9/x').catch(() => 0); console.error('no')</script></body>"
    broken.write_text(
        page.read_text().replace("</body>", code).replace("connect-src", "").replace("default-src 'none'; ", "")
    )
    with Browser() as browser:
        browser.open(broken, wait_for="document.body.dataset.drawn")
        requests = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
        assert any(url.startswith("http://localhost") for url in requests)
        assert any(said["type"] == "error" for said in browser.said("Runtime.consoleAPICalled"))
