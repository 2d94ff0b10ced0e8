"""The files of the live page: they load nothing from elsewhere, and the vendored ones are as published."""

import gzip
import hashlib
import re

import fakes
import gateways
import pytest
from gateways import call

from superserve_jax.gateway.app import App
from superserve_jax.gateway.live import FOLDER, LivePage
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.threads import LongWork

MODULES = ("live.js", "charts.js", "controls.js", "panels.js", "state.js", "stream.js")
OWN = ("index.html", "live.css", "icon.svg", *MODULES)
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""SHA-256 of the files of uPlot 1.6.32 in the npm registry."""


@pytest.fixture(scope="module")
def app():
    with fakes.serve(gateways.engine()) as server:
        models = {"supernet": ServedModel("supernet", server)}
        yield App(Repository(models), LongWork(), LivePage(models))


def get(app, path, **headers):
    return call(app, "GET", path, headers=[(name.replace("_", "-").encode(), value) for name, value in headers.items()])


def test_the_page_is_html_that_may_load_only_from_the_gateway(app):
    page = get(app, "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert page.content.startswith(b"<!doctype html>")


def test_every_file_that_the_page_names_is_there(app):
    named = re.findall(r'(?:src|href)="(static/[^"]*)"', get(app, "/").content.decode())
    scripts = [get(app, f"/static/{name}").content.decode() for name in MODULES]
    imported = {
        f"static/{name}" for script in scripts for name in re.findall(r'^import .* from "\./(\w+\.js)";$', script, re.M)
    }
    assert {name.rsplit("/", 1)[1] for name in {*named, *imported}} == {*OWN, *UPLOT} - {"index.html", "LICENSE"}
    for name in {*named, *imported}:
        file = get(app, f"/{name}")
        assert file.status == 200
        assert file.content == (FOLDER / name.removeprefix("static/")).read_bytes()
        assert ("immutable" in file.headers["cache-control"]) == ("uplot-1.6.32" in name)


def test_the_own_files_name_no_other_host_and_run_no_text():
    for name in OWN:
        text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", text, flags=re.MULTILINE), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|\sstyle=|<script>|<style", text
        )


def test_uplot_is_as_published():
    folder = FOLDER / "uplot-1.6.32"
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == UPLOT


def test_large_files_are_compressed_if_the_browser_likes(app):
    path = "/static/uplot-1.6.32/uPlot.iife.min.js"
    plain, small = get(app, path), get(app, path, accept_encoding=b"gzip, br")
    assert small.headers["content-encoding"] == "gzip"
    assert gzip.decompress(small.content) == plain.content


@pytest.mark.parametrize("path", ["/static/", "/static/../live.py", "/static/index.html", "/index.html", "/demo", "/static"])
def test_other_paths_are_not_found(app, path):
    answer = get(app, path)
    assert answer.status == 404
    assert answer.error


def test_other_methods_are_refused(app):
    answer = call(app, "POST", "/")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_browser_may_ask_for_the_head_only():
    with gateways.opened() as (_, door):
        answer = gateways.request(door, "HEAD", "/")
        assert (answer.status, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) == len((FOLDER / "index.html").read_bytes())
