"""The report served: pages through DuckDB, new steps while a run trains, no write, no foreign name."""

import asyncio
import base64
import gzip
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hostile_caches import hostile_cache, write_run

import lightopd
from lightopd.errors import ConfigError
from lightopd.inspection.live.pages import ORDERS, Asked, Pages, parse_asked
from lightopd.inspection.live.server import application


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    cache = hostile_cache(root)
    write_run(root / "train", steps=5, is_finished=False, cache=cache.path)
    return root


@pytest.fixture(scope="module")
def pages(root):
    return Pages(lightopd.open_cache(root / "cache", runs=[root / "train"]), rollouts=5, every_s=1)


def ids(page):
    (text,) = re.findall(r'id="data">([A-Za-z0-9+/=]*)</script>', page)
    return [row["id"] for row in json.loads(gzip.decompress(base64.b64decode(text)))["rollouts"]]


def test_pages_hold_every_rollout_once_in_the_order_asked_for(pages):
    for order in ORDERS:
        found = [ids(pages.page(Asked(order=order, page=page))) for page in (1, 2, 3)]
        assert [len(page) for page in found] == [5, 5, 2]
        assert len({rollout_id for page in found for rollout_id in page}) == 12
    assert "Page 2 of 3" in pages.page(Asked(page=2))
    assert ids(pages.page(Asked(page=9))) == []


def test_search_goes_over_the_whole_cache_and_is_a_value(pages):
    assert len(ids(pages.page(Asked(search="OWNED")))) == 5
    assert ids(pages.page(Asked(search="' OR 1=1 --"))) == []


def test_what_an_address_asks_for_is_checked():
    assert parse_asked({"order": "longest", "page": "2", "search": "x"}) == Asked("longest", "x", 2)
    with pytest.raises(ConfigError, match="no order 'gap; DROP'"):
        parse_asked({"order": "gap; DROP"})
    for page in ("0", "-1", "many"):
        with pytest.raises(ConfigError, match="is no page number"):
            parse_asked({"page": page})


def asked(pages, host, *requests):
    """Answers of a server for `host`: (status, text, headers) of each (method, path, headers)."""

    async def ask():
        async with TestClient(TestServer(application(pages, host))) as client:
            found = []
            for method, path, headers in requests:
                async with client.request(method, path, headers=headers) as answer:
                    found.append((answer.status, await answer.text(), dict(answer.headers)))
            return found

    return asyncio.run(ask())


def test_only_reading_under_its_own_name_is_answered(pages):
    found = asked(
        pages,
        "127.0.0.1",
        ("GET", "/training", {}),
        ("GET", "/training", {"Host": "localhost:1"}),
        ("GET", "/training", {"Host": "evil.example"}),
        ("GET", "/training", {"Host": "evil.example:8765"}),
        ("GET", "/training", {"Host": "127.0.0.1.evil.example"}),
        ("POST", "/", {}),
        ("DELETE", "/training", {}),
        ("GET", "/../etc/passwd", {}),
        ("GET", "/?order=nothing", {}),
    )
    assert [status for status, _, _ in found] == [200, 200, 421, 421, 421, 405, 405, 404, 400]
    assert all(headers["X-Content-Type-Options"] == "nosniff" for _, _, headers in found)
    assert "owned" not in found[0][1]


def test_on_every_address_numbers_are_answered_and_names_are_not(pages):
    found = asked(
        pages,
        "0.0.0.0",
        ("GET", "/training", {"Host": "10.1.2.3:8765"}),
        ("GET", "/training", {"Host": "evil.example:8765"}),
    )
    assert [status for status, _, _ in found] == [200, 421]


def test_new_steps_are_drawn_and_nothing_is_drawn_twice(pages, root):
    before = pages.training()
    assert pages.training() == before
    with (root / "train" / "metrics.csv").open("a") as file:
        file.write("0.3,-0.2,1.0,0.9,0.1,0.01,0,1.0,1e-4,900.0,6\n")
    assert pages.training() != before


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(root):
    command = [str(Path(sys.executable).with_name("lightopd")), "view", str(root / "cache"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(address, timeout=120) as answer:
        text = answer.read().decode()
    assert "connect-src &#39;self&#39;" in text
    taken = subprocess.run(
        [*command[:-1], address.strip("/").rpartition(":")[2]], capture_output=True, text=True, check=False
    )
    assert taken.returncode == 7
    assert "cannot listen on 127.0.0.1 port" in taken.stderr
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)
