"""The live page in Chromium: figures move, nothing is loaded from elsewhere, and it fits a phone, in light and dark mode.

It needs the programs chromium and chromedriver, and the package selenium. See docs/contributing.md.
"""

import contextlib
import json
import shutil

import fakes
import gateways
import pytest
import repositories
from fakes import WAIT_S

from superserve_jax import gateway
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.simulation.paper_profile import paper_profile

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'superserve-jax[browser]'")
PROGRAMS = [shutil.which(name) for name in ("chromium", "chromedriver")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in PROGRAMS, reason="needs Chromium: apt-get install chromium chromium-driver"),
]
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9")
"""Nothing listens at port 9. Chromium asks a proxy for all addresses but the ones of this machine."""
CHARTS = 8
HOSTILE = "<img src=x onerror=document.title=1>"


class Browser:
    """A page in Chromium."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, door, *, width=1280, dark=False, status="Live"):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(door.url)
        fakes.wait_until(lambda: self.text("status") == status)

    def run(self, script):
        return self.driver.execute_script(f"return {script}")

    def text(self, name):
        return self.run(f"document.getElementById('{name}').textContent")

    def number(self, name):
        """A figure of the page. Below 0 if there is none."""
        text = self.text(name).replace(",", "")
        return float(text) if text[:1].isdigit() else -1.0

    def requests(self):
        """The addresses of all requests since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        """Errors and warnings in the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS[1])) as driver:
        driver.set_page_load_timeout(WAIT_S)
        yield Browser(driver)


@pytest.fixture(scope="module")
def door():
    """A gateway with a demo in front of two sleeping engines."""
    profile = paper_profile()
    engines = [FakeEngine(profile, name=name) for name in ("gpu:0", HOSTILE)]
    with (
        fakes.serve(*engines, profile=profile, policy="slackfit", slo_ms=36) as server,
        gateway.Gateway(server, port=0, name="resnet", demo=True) as opened,
    ):
        yield opened


def test_the_figures_move_without_an_error_and_without_a_request_to_elsewhere(browser, door):
    browser.open(door)
    seen = set()
    fakes.wait_until(lambda: seen.add(browser.text("rate")) or len(seen) > 3)
    assert browser.number("accuracy") > 73
    assert browser.run("document.querySelectorAll('#charts canvas').length") == CHARTS
    assert browser.run("[...document.querySelectorAll('canvas')].every(c => c.width > 100 && c.height > 50)")
    assert "36 ms" in browser.text("attainment-note")
    assert browser.driver.title == "SuperServe: resnet"
    assert not browser.complaints()
    requests = browser.requests()
    assert f"{door.url}/events" in requests
    assert not [url for url in requests if not url.startswith((f"{door.url}/", "data:"))]


def test_text_from_the_server_is_not_html(browser, door):
    browser.open(door)
    fakes.wait_until(lambda: HOSTILE in browser.text("workers"))
    assert browser.run("document.querySelectorAll('#workers img').length") == 0


def test_accuracy_falls_in_a_burst_and_recovers(browser, door):
    browser.open(door)
    fakes.wait_until(lambda: browser.number("accuracy") > 79.5)
    browser.run("(s => { s.value = 0.6 * s.max; s.dispatchEvent(new Event('input')) })(document.getElementById('burst'))")
    browser.run("document.getElementById('send').click()")
    fakes.wait_until(lambda: browser.text("send").startswith("Burst"))
    fakes.wait_until(lambda: 0 < browser.number("accuracy") < 79)
    fakes.wait_until(lambda: browser.number("accuracy") > 79.5)
    assert browser.text("send") == "Send a burst"


def test_a_slider_changes_the_steady_traffic_for_all_pages(browser, door):
    browser.open(door)
    fakes.wait_until(lambda: browser.run("!document.getElementById('demo').hidden"))
    move = "(s => { s.value = s.max / 10; s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')) })"
    browser.run(f"{move}(document.getElementById('steady'))")
    chosen = browser.text("steady-qps")
    browser.open(door)
    fakes.wait_until(lambda: browser.text("steady-qps") == chosen)


def test_a_slider_follows_the_highest_rate_of_its_model(browser, door):
    browser.open(door)
    fakes.wait_until(lambda: browser.run("!document.getElementById('demo').hidden"))
    most = browser.run("document.getElementById('steady').max")
    browser.run("(document.getElementById('steady').max = '1')")  # as of another export that was there before
    fakes.wait_until(lambda: browser.run("document.getElementById('steady').max") == most)


@pytest.mark.parametrize("width", [320, 390, 760, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_the_screen(browser, door, width, dark):
    browser.open(door, width=width, dark=dark)
    fakes.wait_until(lambda: browser.run("document.querySelectorAll('#charts canvas').length") == CHARTS)
    assert browser.run("document.documentElement.scrollWidth") <= width
    columns = browser.run("getComputedStyle(document.getElementById('charts')).gridTemplateColumns.split(' ').length")
    assert columns == (1 if width <= 760 else 2)
    red = browser.run("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 60) == dark
    assert not browser.complaints()


CONTRAST = """
(() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && [...e.childNodes].some(
    (n) => n.nodeType === 3 && n.data.trim())).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [e.textContent, (a + 0.05) / (b + 0.05)]; }).filter(([, ratio]) => ratio < 4.5);
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(browser, door, dark):
    browser.open(door, dark=dark)
    assert browser.run(CONTRAST.strip()) == []


def test_the_page_connects_again_by_itself_and_says_so(browser):
    with gateways.opened() as (server, door):
        browser.open(door)
        port = int(door.url.rsplit(":", 1)[1])
        door.close()
        fakes.wait_until(lambda: browser.text("status") == "Reconnecting")
        with gateway.Gateway(server, port=port):
            fakes.wait_until(lambda: browser.text("status") == "Live")
    browser.complaints()  # of the refused connections


def test_an_open_page_asks_for_the_token_if_the_gateway_comes_back_with_one(browser):
    token = "a-secret-of-many-letters"
    with gateways.opened() as (server, door):
        browser.open(door)
        port = int(door.url.rsplit(":", 1)[1])
        door.close()
        with gateway.Gateway(server, port=port, token=token, demo=True):
            fakes.wait_until(lambda: browser.text("status") == "Token needed")
            for given, status in (("wrong", "Token needed"), (token, "Live")):
                browser.run(f"(document.getElementById('token').value = '{given}')")
                browser.run("document.querySelector('#login button').click()")
                fakes.wait_until(lambda status=status: browser.text("status") == status)
            fakes.wait_until(lambda: browser.run("!document.getElementById('demo').hidden"))
            browser.run("document.getElementById('send').click()")
            fakes.wait_until(lambda: browser.text("send").startswith("Burst"))
            browser.run("sessionStorage.clear()")
    browser.complaints()  # of the refused connections, and of the requests without the token


def test_a_page_opens_without_the_token_and_asks_for_it(browser):
    token = "a-secret-of-many-letters"
    with gateways.opened(gateway_options={"token": token}) as (_, door):
        browser.open(door, status="Token needed")
        assert browser.run("sessionStorage.getItem('token')") is None
        browser.run(f"(document.getElementById('token').value = '{token}')")
        browser.run("document.querySelector('#login button').click()")
        fakes.wait_until(lambda: browser.text("status") == "Live")
        browser.open(door)  # it has kept the token
        assert browser.run("document.getElementById('login').hidden")
        browser.run("sessionStorage.clear()")
    browser.complaints()  # of the request without the token


def test_models_come_and_go(browser, tmp_path):
    folder = repositories.write(tmp_path)
    with repositories.opened(folder, demo=True) as door:
        browser.open(door)
        fakes.wait_until(lambda: browser.run("!document.getElementById('none').hidden"))
        assert browser.run("document.querySelector('main').hidden")
        assert repositories.change(door, "second").status == 200
        fakes.wait_until(lambda: browser.driver.title == "SuperServe: second")
        fakes.wait_until(lambda: browser.run("!document.getElementById('demo').hidden"))
        assert browser.run("document.querySelectorAll('#charts canvas').length") == CHARTS
        assert browser.run("[...document.querySelectorAll('canvas')].every(c => c.width > 100 && c.height > 50)")
        assert repositories.change(door, "first").status == 200
        fakes.wait_until(lambda: browser.run("!document.getElementById('choose').hidden"))
        assert browser.driver.title == "SuperServe: second"
        assert repositories.change(door, "second", "unload").status == 200
        fakes.wait_until(lambda: browser.driver.title == "SuperServe: first")
        assert browser.run("document.getElementById('choose').hidden")
        assert repositories.change(door, "first", "unload").status == 200
        fakes.wait_until(lambda: browser.run("!document.getElementById('none').hidden"))
        assert browser.driver.title == "SuperServe"
        assert not browser.complaints()


def test_a_visitor_chooses_one_of_several_models(browser):
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(fakes.serve(slo_ms=slo)) for name, slo in (("one", 20), ("other", 50))}
        browser.open(stack.enter_context(gateway.Gateway(servers, port=0)))
        assert "20 ms" in browser.text("attainment-note")
        assert browser.run("!document.getElementById('choose').hidden")
        browser.run("(s => { s.value = 'other'; s.dispatchEvent(new Event('change')) })(document.getElementById('model'))")
        assert "50 ms" in browser.text("attainment-note")
        assert browser.driver.title == "SuperServe: other"
        assert not browser.complaints()
