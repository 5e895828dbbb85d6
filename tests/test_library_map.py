"""The map in a real browser: headless Chromium, driven by chromedriver over its own HTTP protocol.

Needs chromium and chromedriver (Debian: chromium, chromium-driver); .ci/run installs them.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch

from library import page
from library.store import Song

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element's id
EVIL = (
    '<img src=x onerror="window.owned=1"></script><script>window.owned=2</script>\u2028${alert(1)}'
)


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--window-size=1300,850",
            "--mute-audio",
        ]
        wanted = {
            "capabilities": {
                "alwaysMatch": {
                    "goog:chromeOptions": {"args": args},
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            }
        }
        self.session = ""
        deadline = time.monotonic() + 60
        while not self.session:
            try:
                self.session = f"/session/{self.call('POST', '/session', wanted)['sessionId']}"
            except OSError:
                assert (
                    time.monotonic() < deadline and self.driver.poll() is None
                ), "chromedriver does not start"
                time.sleep(0.2)

    def call(self, method, path, body=None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, path):
        self.call("POST", f"{self.session}/url", {"url": f"file://{path}"})

    def run(self, script, *args):
        """The value that a script returns."""
        return self.call(
            "POST", f"{self.session}/execute/sync", {"script": script, "args": list(args)}
        )

    def type(self, selector, text):
        found = self.call(
            "POST", f"{self.session}/element", {"using": "css selector", "value": selector}
        )
        self.call("POST", f"{self.session}/element/{found[ELEMENT]}/clear")
        if text:
            self.call("POST", f"{self.session}/element/{found[ELEMENT]}/value", {"text": text})

    def click(self, x, y):
        pointer = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        self.call(
            "POST",
            f"{self.session}/actions",
            {"actions": [{"type": "pointer", "id": "mouse", "actions": pointer}]},
        )

    def errors(self):
        """What the console has against the page; that a made-up file cannot be played is no fault
        of it."""
        log = self.call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [
            entry["message"]
            for entry in log
            if entry["level"] == "SEVERE" and "ERR_FILE_NOT_FOUND" not in entry["message"]
        ]

    def screenshot(self):
        return base64.b64decode(self.call("GET", f"{self.session}/screenshot"))

    def close(self):
        with contextlib.suppress(OSError):
            self.call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in ("chromedriver", "chromium"):
        assert shutil.which(
            program
        ), f"{program} is missing: apt-get install chromium chromium-driver"
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def collection(n, rng):
    """n made-up songs, their unit vectors in 12 clouds; song 7 has hostile tags."""
    centres = rng.standard_normal((12, 24))
    x = centres[np.arange(n) % 12] + 0.5 * rng.standard_normal((n, 24))
    unit = torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1).half()
    songs = [
        Song(
            f"/music/{i}.mp3".encode(),
            1,
            1,
            seconds=200,
            artist=f"Artist {i % 12}",
            title=f"Title {i}",
            album=f"Album {i % 40}",
            year=str(1960 + i % 60),
            genre=("Rock", "Jazz")[i % 2],
            row=i,
        )
        for i in range(n)
    ]
    songs[7] = Song(
        b'/music/caf\xe9 "<b>.mp3',
        1,
        1,
        artist=EVIL,
        title=EVIL,
        album=EVIL,
        year=EVIL,
        genre=EVIL,
        row=7,
    )
    return songs, unit


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A page of 300 songs."""
    songs, unit = collection(300, np.random.default_rng(0))
    path = tmp_path_factory.mktemp("map") / "library.html"
    path.write_text(
        page.page(songs, page.layout(unit), page.neighbours(unit, 10), {}), encoding="utf-8"
    )
    return path


def settled(browser, path):
    browser.open(path)
    browser.run("recolour(); paint();")


def test_the_page_renders_its_songs(browser, small):
    settled(browser, small)
    assert (
        browser.run("return n") == 300
        and browser.run("return at('count').textContent") == "300 songs"
    )
    drawn = browser.run(
        "const d = pen.getImageData(0, 0, canvas.width, canvas.height).data; let k = 0;"
        "for (let i = 3; i < d.length; i += 4) k += d[i] > 0; return k"
    )
    assert drawn > 3000 and len(browser.screenshot()) > 10_000
    assert browser.errors() == []


def test_search_finds_and_a_click_on_it_shows_the_song(browser, small):
    settled(browser, small)
    browser.type("#search", "title 123")
    assert browser.run("return at('count').textContent") == "1 of 300 songs"
    browser.run("document.querySelector('#near li').click()")
    assert browser.run("return at('title').textContent") == "Title 123"
    browser.type("#search", "no such song")
    assert browser.run("return at('about').textContent") == "nothing found"
    assert browser.errors() == []


def test_a_click_on_a_song_shows_its_neighbours_and_plays_its_file(browser, small):
    settled(browser, small)
    x, y = browser.run("return toScreen(42)")
    browser.click(x, y)
    chosen = browser.run("return chosen")
    assert (
        chosen >= 0
        and browser.run(
            "return Math.hypot(toScreen(chosen)[0] - arguments[0], "
            "toScreen(chosen)[1] - arguments[1])",
            x,
            y,
        )
        < 12
    )
    near = browser.run(
        "return [...document.querySelectorAll('#near li')].map(e => +e.dataset.song)"
    )
    assert (
        len(near) == 10 and near == browser.run("return songs.near[chosen]") and chosen not in near
    )
    assert browser.run("return at('player').src") == browser.run("return songs.url[chosen]")
    assert browser.errors() == []


def test_the_wheel_zooms_about_the_pointer(browser, small):
    settled(browser, small)
    before = browser.run("return toMap(300, 300)")
    browser.run(
        "canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: -400, clientX: 300, clientY: 300}))"
    )
    assert browser.run("return view.scale") > 2
    assert np.allclose(browser.run("return toMap(300, 300)"), before)


def test_the_pointer_over_a_song_says_its_name(browser, small):
    settled(browser, small)
    browser.run(
        "const [x, y] = toScreen(42);"
        "canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y}))"
    )
    assert "Title" in browser.run("return at('tip').textContent")
    assert browser.run("return at('tip').style.display") == "block"


@pytest.mark.parametrize("key", ["artist", "year", "tag", "album"])
def test_colours_by(browser, small, key):
    settled(browser, small)
    browser.run(f"at('colour').value = '{key}'; recolour();")
    assert (
        len(set(browser.run("return colours"))) > 1
        and browser.run("return at('legend').children.length") > 1
    )


def test_tags_with_html_are_text(browser, small):
    settled(browser, small)
    browser.run("choose(7, true); at('colour').value = 'tag'; recolour();")
    browser.type("#search", "onerror")
    browser.run("return new Promise(done => setTimeout(done, 200))")
    assert browser.run("return window.owned === undefined") is True
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return at('count').textContent") == "1 of 300 songs"
    assert browser.run("return songs.title[7]").startswith("<img src=x")
    assert browser.run("return songs.url[7]") == "file:///music/caf%E9%20%22%3Cb%3E.mp3"
    assert browser.errors() == []


def test_twenty_thousand_songs(browser, tmp_path):
    songs, unit = collection(20_000, np.random.default_rng(1))
    places = np.random.default_rng(2).random((20_000, 2))
    path = tmp_path / "large.html"
    path.write_text(page.page(songs, places, page.neighbours(unit, 10), {}), encoding="utf-8")
    assert path.stat().st_size < 12e6
    settled(browser, path)
    assert browser.run("return n") == 20_000
    paint = browser.run(
        "const start = performance.now(); for (let i = 0; i < 5; i++) paint();"
        "return (performance.now() - start) / 5"
    )
    assert paint < 1000  # ms, drawn by the processor of a busy machine
    browser.type("#search", "title 19999")
    assert (
        browser.run("return at('count').textContent") == "1 of 20000 songs"
        and browser.errors() == []
    )


# --- without a browser


def test_no_text_of_a_song_can_end_the_script_element():
    text = page.as_script([EVIL, "</SCRIPT>", "<!--", "&lt;"])
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text)[0] == EVIL


def test_the_page_asks_nothing_of_the_network(small):
    text = small.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text


def test_a_large_collection_is_laid_out_by_a_sample(monkeypatch):
    monkeypatch.setattr(page, "SAMPLE", 100)
    _, unit = collection(600, np.random.default_rng(0))
    places = page.layout(unit)
    assert places.shape == (600, 2) and (places >= 0).all() and (places <= 1).all()
    cloud = np.arange(600) % 12
    centres = np.stack([places[cloud == k].mean(0) for k in range(12)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
    assert (nearest == cloud).mean() > 0.8


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_songs_have_places(n):
    songs, unit = collection(12, np.random.default_rng(0))
    places = page.layout(unit[:n])
    index, score = page.neighbours(unit[:n], 10)
    assert (
        places.shape == (n, 2) and np.isfinite(places).all() and index.shape == (n, min(10, n - 1))
    )


def test_neighbours_are_exact():
    _, unit = collection(50, np.random.default_rng(0))
    index, score = page.neighbours(unit, 3)
    full = (unit.float() @ unit.float().T).fill_diagonal_(-2).numpy()
    assert (np.take_along_axis(full, index, 1) == np.sort(full, 1)[:, :-4:-1]).all()


def test_addresses_of_names_in_any_encoding():
    assert page.url(os.fsencode("/a/\udce9#?.mp3")) == "file:///a/%E9%23%3F.mp3"
