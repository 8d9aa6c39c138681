"""The served report in a real browser: it opens, turns its pages, and follows a run that trains."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from browsers import chromium, console, requests
from hostile_caches import hostile_cache, write_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    cache = hostile_cache(root)
    write_run(root / "train", steps=5, is_finished=False, cache=cache.path)
    return root


@pytest.fixture(scope="module")
def address(root):
    command = [
        str(Path(sys.executable).with_name("lightopd")),
        "view",
        str(root / "cache"),
        str(root / "train"),
    ]
    options = ["--port", "0", "--rollouts", "5", "--every", "1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(timeout=30)


def wait(driver, script, *arguments, seconds=60.0):
    deadline_s = time.monotonic() + seconds
    while not (found := driver.execute_script(script, *arguments)):
        assert time.monotonic() < deadline_s, script
        time.sleep(0.05)
    return found


def test_pages_turn_and_charts_follow_the_run(root, address):
    with chromium() as driver:
        driver.get(address)
        wait(driver, "return document.body.dataset.ready")
        assert "Page 1 of 3" in driver.find_element("id", "rollouts").text
        first = driver.find_element("css selector", "#detail .facts").text
        driver.find_element("id", "after").click()
        wait(driver, "return document.body.dataset.ready && location.search.includes('page=2')")
        wait(driver, "return document.querySelector('#detail .facts')")
        assert driver.find_element("css selector", "#detail .facts").text != first
        before = driver.execute_script("return document.querySelector('#training').innerHTML")
        with (root / "train" / "metrics.csv").open("a") as file:
            file.write("0.3,-0.2,1.0,0.9,0.1,0.01,0,1.0,1e-4,900.0,6\n")
        wait(driver, "return document.querySelector('#training').innerHTML !== arguments[0]", before)
        assert driver.execute_script("return window.owned") is None
        assert console(driver) == []
        assert {
            url for url in requests(driver) if url.startswith("http") and not url.startswith(address)
        } == set()
