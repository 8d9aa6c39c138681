"""A headless Chromium that opens pages, hears its console, and knows every address that was asked for."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SETTINGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-dev-shm-usage",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


@contextmanager
def chromium(width: int = 1500, height: int = 1000) -> Iterator[Any]:
    """A browser with a profile of its own; ends with the block."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _found("chromium", "google-chrome", "chrome")
    for setting in SETTINGS:
        options.add_argument(setting)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_found("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def requests(driver: Any) -> list[str]:
    """Every address that the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def console(driver: Any) -> list[str]:
    """Every complaint on the console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def _found(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"none of {', '.join(names)} is installed: apt-get install chromium chromium-driver"
    )
