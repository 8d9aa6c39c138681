"""The report in a real browser: it opens, it can be used by hand and by keys, and hostile text stays text."""

import time

import pytest
from browsers import chromium, console, requests
from cache_cases import make_cache
from hostile_caches import SCRIPT, hostile_cache, write_run

import lightopd

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    cache = hostile_cache(root)
    write_run(root / "train", cache=cache.path)
    lightopd.open_cache(cache.path, runs=[root / "train"]).report(root / "report.html")
    return root


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(driver, root):
    requests(driver)
    console(driver)
    return opened(driver, root / "report.html")


def opened(driver, path):
    driver.get(path.as_uri())
    wait(driver, "return document.body.dataset.ready || document.body.dataset.failed")
    assert driver.execute_script("return document.body.dataset.ready") == "true"
    return driver


def wait(driver, script, seconds=20.0):
    deadline_s = time.monotonic() + seconds
    while not (found := driver.execute_script(script)):
        assert time.monotonic() < deadline_s, script
        time.sleep(0.02)
    return found


def texts(driver, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return driver.execute_script(script, selector)


def type_into(driver, name, text):
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input'))",
        *(name, text),
    )


def press(driver, key):
    driver.execute_script(
        "document.getElementById('detail').dispatchEvent("
        "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
        key,
    )


def test_it_opens_without_a_complaint_and_without_a_request(page, root):
    asked = [url for url in requests(page) if not url.startswith(("data:", "blob:"))]
    assert asked == [(root / "report.html").as_uri()]
    assert console(page) == []


def test_the_charts_are_drawn(page):
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => "
        "[e.getBoundingClientRect().height, e.querySelectorAll('[aria-roledescription]').length])"
    )
    assert len(sizes) >= 15
    assert all(height > 30 and marks > 0 for height, marks in sizes)


def test_the_pointer_shows_the_topk_beside_the_students(page, root):
    from selenium.webdriver.common.action_chains import ActionChains

    spans = page.find_elements("css selector", "#response span")
    ActionChains(page).scroll_to_element(spans[0]).move_to_element(spans[1]).perform()
    wait(page, "return document.querySelector('#topk')")
    assert texts(page, "#topk th") == ["token", "teacher", "student"]
    rollout_id = page.execute_script(
        "return document.querySelector('#detail .facts').textContent.split(/[ ,]/)[1]"
    )
    view = lightopd.open_cache(root / "cache").rollout(rollout_id)
    shown = texts(page, "#topk tbody tr td:nth-child(2)")
    assert "position 1," in texts(page, "#inspector p")[0]
    assert float(shown[0]) == pytest.approx(view.topk["teacher"][1][0][1], abs=2e-3)
    students = [text for text in texts(page, "#topk tbody tr td:nth-child(3)") if text != "-"]
    assert len(students) >= 1
    assert "log T" in texts(page, "#inspector p")[1]


def test_keys_walk_over_tokens_and_rollouts(page):
    press(page, "ArrowRight")
    press(page, "ArrowRight")
    assert page.execute_script("return document.querySelector('[aria-current]').dataset.at") == "1"
    press(page, "ArrowLeft")
    assert page.execute_script("return document.querySelector('[aria-current]').dataset.at") == "0"
    before = texts(page, "#detail .facts")
    press(page, "j")
    assert texts(page, "#detail .facts") != before
    press(page, "k")
    assert texts(page, "#detail .facts") == before


def test_search_sort_and_filters_choose_rollouts(page):
    count = "return document.getElementById('count').textContent"
    assert page.execute_script(count) == "12 of 12"
    type_into(page, "search", "needle")
    wait(page, f"{count} === '11 of 12'")
    type_into(page, "search", "")
    type_into(page, "reward-from", "1")
    wait(page, f"{count} === '4 of 12'")
    type_into(page, "reward-from", "")
    type_into(page, "sort", "largest mean gap")
    wait(page, f"{count} === '12 of 12'")
    gaps = [float(text.split()[1].replace("\u2212", "-")) for text in texts(page, ".row .facts")]
    assert gaps == sorted(gaps, reverse=True)
    assert page.execute_script("return document.getElementById('clip').value") == "3.0"


def test_hostile_text_stays_text(page):
    assert page.execute_script("return window.owned") is None
    assert page.title.startswith("lightopd report")
    assert SCRIPT in "".join(texts(page, "#response span"))
    shown = "".join(texts(page, "#response"))
    for invisible in ("\u202e", "\x1b", "\u2028"):
        assert invisible not in shown
    assert "\\u202e" in shown


def test_a_million_characters_are_shown_without_harm(page):
    started_s = time.monotonic()
    press(page, "j")
    assert "500 tokens" in texts(page, "#detail .facts")[0]
    assert len(texts(page, "#response")[0]) == pytest.approx(1_000_000, rel=0.01)
    assert time.monotonic() - started_s < 100
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert console(page) == []


def test_a_thousand_rollouts_scroll_and_filter_without_lag(driver, tmp_path):
    make_cache(tmp_path / "cache", lengths=[[40] * 500, [40] * 500])
    lightopd.open_cache(tmp_path / "cache").report(tmp_path / "r.html", check=False)
    opened(driver, tmp_path / "r.html")
    assert driver.execute_script("return document.querySelectorAll('.row').length") < 60
    milliseconds = driver.execute_script(
        """const list = document.getElementById('list'), began = performance.now();
        for (let i = 0; i < 100; i++) { list.scrollTop = i * 700; list.dispatchEvent(new Event('scroll')); }
        return (performance.now() - began) / 100"""
    )
    assert milliseconds < 500
    assert driver.execute_script("return document.querySelectorAll('.row').length") < 60
    assert (
        driver.execute_script(
            """const began = performance.now(); document.getElementById('clip').value = 2;
        document.getElementById('clip').dispatchEvent(new Event('input')); return performance.now() - began"""
        )
        < 15_000
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page, theme):
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    contrast = page.execute_script(
        """const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(x => { x /= 255;
            return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 });
            return .2126 * r + .7152 * g + .0722 * b };
        return ['body', '.muted', '.good', '.bad', 'a'].map(s => { const e = document.querySelector(s);
            const a = light(getComputedStyle(e).color);
            const b = light(getComputedStyle(document.body).backgroundColor);
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) })"""
    )
    assert min(contrast) > 4.5
