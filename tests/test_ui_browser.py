"""The page in a real browser: genes in, label out; a file in, table, plots and downloads out; readable on a phone and by a screen reader.

SCIMLORA_SCREENSHOTS names a folder for screenshots. SCIMLORA_NO_BROWSER=1 skips these tests where there is no Chromium.
"""
import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

pytestmark = pytest.mark.browser
APP = Path(__file__).resolve().parent.parent / "ui" / "src" / "streamlit_app.py"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
WIDTHS = (1280, 390)


def absent(what):
    "Skip only where it was said that there is no browser; a test that is skipped by itself is soon forgotten."
    text = f"{what} is not installed"
    if os.environ.get("SCIMLORA_NO_BROWSER"): pytest.skip(f"{text}, and SCIMLORA_NO_BROWSER is set")
    pytest.fail(f"{text}; install it, or set SCIMLORA_NO_BROWSER=1 to skip the browser tests")


@pytest.fixture(scope="module")
def chromium():
    try: from playwright.sync_api import sync_playwright
    except ImportError: absent("the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None: absent("chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(command, folder, ready, **settings):
    "A process that answers at an address; yields the process."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("API_", "SCIMLORA_BUNDLE"))} | settings
    with (folder / "log").open("a") as log: process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(ready, process)
        yield process
    finally:
        process.terminate()
        process.wait(20)
    assert "Traceback" not in (folder / "log").read_text()


@contextlib.contextmanager
def the_page(folder, **settings):
    "The page, started as a user would, taking files up to 2 MB; yields its address."
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", APP, "--server.address=127.0.0.1", f"--server.port={port}", "--server.maxUploadSize=2"]
    with started(command, folder, f"http://127.0.0.1:{port}/_stcore/health", **settings): yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    "The page with nothing configured."
    with the_page(tmp_path_factory.mktemp("page")) as url: yield url


@pytest.fixture
def served(chromium, command, tmp_path):
    "The page asking a service, and the service's process."
    port = free_port()
    (tmp_path / "page").mkdir()
    with started([command, "serve", "blood", "--port", str(port)], tmp_path, f"http://127.0.0.1:{port}/readyz") as process:
        with the_page(tmp_path / "page", API_URL=f"http://127.0.0.1:{port}") as url: yield url, process


@pytest.fixture(scope="module")
def blood_file(tmp_path_factory):
    "Real blood cells with labels where the shared cells are at hand, else pancreas cells, which blood leaves unassigned."
    from scimlora.core import InputError
    from scimlora.examples import baron, shared

    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    try: cells = shared("pbmc_3k_10x")[::9]
    except InputError: cells = baron()[::60]
    cells.copy().write_h5ad(path, compression="gzip")
    return path


def wait_for(url, process, seconds=60):
    "Wait until an address answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try: return urllib.request.urlopen(url, timeout=5).close()
        except OSError: time.sleep(.3)
    pytest.fail(f"it did not start within {seconds} s")


@pytest.fixture(params=WIDTHS)
def page(request, chromium, address):
    "The page opened at one width, ready to be used."
    page = chromium.new_page(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    page.goto(address)
    page.get_by_role("tab", name="Type genes").wait_for(timeout=90_000)
    yield page
    page.close()


def keep(page, name):
    "Check that nothing sticks out to the side, and save the whole page where a folder for it is named."
    width = page.viewport_size["width"]
    assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= width
    if not (folder := os.environ.get("SCIMLORA_SCREENSHOTS")): return
    page.wait_for_timeout(500)  # charts and tables fade in
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": width, "height": height + 20})
    page.wait_for_timeout(1500)  # charts further down are drawn now
    page.screenshot(path=Path(folder) / f"{name}_{width}.png")
    page.set_viewport_size({"width": width, "height": 900})


def alert(page): return page.get_by_test_id("stAlert").filter(visible=True)


def settled(page):
    "Wait until nothing is redrawn or fades in any more: text that is half there has no contrast."
    idle(page)
    page.wait_for_function("""() => !document.querySelector('[data-stale=true]')
        && document.getAnimations().every(a => a.playState !== 'running' || a.effect.getComputedTiming().endTime === Infinity)""", timeout=30_000)


def accessible(page):
    "axe-core finds nothing serious on the page as it is shown."
    from axe_playwright_python.sync_playwright import Axe

    settled(page)
    found = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert not found, "\n".join(f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}" for v in found)


def idle(page):
    "Wait until the page's script has ended; a click before that may come between."
    page.wait_for_timeout(300)
    page.locator("[data-test-script-state=notRunning]").wait_for(timeout=60_000)


def ask(page):
    page.get_by_role("button", name="What cell is this?").click()
    return alert(page)


def send(page, path):
    idle(page)
    page.get_by_role("tab", name="Annotate a file").click()
    page.locator("input[type=file]").set_input_files(path)


def annotate(page, path):
    send(page, path)
    page.get_by_role("button", name="Annotate the cells").click(timeout=90_000)
    page.get_by_role("heading", name="Every cell").wait_for(timeout=120_000)


def test_genes_become_a_label(page):
    from playwright.sync_api import expect

    page.get_by_role("textbox", name="Genes and values").fill("CD19 1.2\nMS4A1 2.6\nCD79A 3.4\nCD79B 2.9\nCD37 2.8\nBANK1 1.5")
    expect(ask(page)).to_contain_text("B cell", timeout=60_000)
    expect(page.get_by_test_id("stVegaLiteChart").filter(visible=True)).to_be_visible()
    accessible(page)
    keep(page, "genes")


def test_an_example_is_one_click(page):
    from playwright.sync_api import expect

    page.get_by_role("radio", name="NK cell").click()
    expect(page.get_by_role("textbox", name="Genes and values")).to_have_value(re.compile("GNLY 4"), timeout=30_000)
    expect(ask(page)).to_contain_text("NK cell", timeout=60_000)
    expect(page).to_have_url(re.compile("genes=GNLY"))


def test_a_link_opens_its_answer(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/?genes=CD19:2.4,MS4A1:3,CD79A")
    expect(alert(page)).to_contain_text("B cell", timeout=60_000)
    page.goto(f"{address}/?page=About+the+model")
    page.get_by_role("heading", name="What it cannot do").wait_for(timeout=60_000)


def test_a_file_becomes_a_table_plots_and_downloads(page, blood_file, tmp_path):
    annotate(page, blood_file)
    table = pd.read_csv(io.BytesIO(downloaded(page, "Table (csv)")), keep_default_na=False)
    was = ad.read_h5ad(blood_file)
    assert list(table) == ["cell_id", "cell_type", "confidence", "unassigned", "top3", "reason", "cluster", "majority"] and len(table) == len(was)
    (tmp_path / "back.h5ad").write_bytes(downloaded(page, "Annotated file (h5ad)"))
    back = ad.read_h5ad(tmp_path / "back.h5ad")
    assert back.obs.scimlora_label.astype(str).tolist() == table.cell_type.tolist() and {"X_scimlora"} <= set(back.obsm)
    assert {"scimlora_label", "scimlora_confidence", "scimlora_unassigned", "scimlora_reason", "scimlora_top3", "scimlora_cluster", "scimlora_majority"} <= set(back.obs)
    if "B" in set(was.obs.cell_type): assert (table.cell_type[(was.obs.cell_type == "B").to_numpy()] == "B cell").mean() > .9
    for _ in range(100):  # charts come into being as they are scrolled to
        if (n := page.get_by_test_id("stVegaLiteChart").filter(visible=True).count()) >= 3: break
        page.wait_for_timeout(200)
    assert n >= 3 and page.get_by_test_id("stDataFrame").filter(visible=True).count() == 2
    accessible(page)
    keep(page, "file")


def downloaded(page, button):
    with page.expect_download(timeout=60_000) as download: page.get_by_role("button", name=button).click()
    return Path(download.value.path()).read_bytes()


def test_a_broken_or_oversize_file_gets_a_sentence(page, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "broken.h5ad").write_bytes(b"gene,value\nCD19,3\n")
    (tmp_path / "large.h5ad").write_bytes(b"\0" * (3 << 20))
    send(page, tmp_path / "broken.h5ad")
    expect(alert(page)).to_contain_text("broken.h5ad: is no h5ad", timeout=60_000)
    page.locator("input[type=file]").set_input_files(tmp_path / "large.h5ad")
    expect(page.get_by_text("2.0MB or smaller")).to_be_visible(timeout=30_000)
    keep(page, "refused")


def test_how_good_it_is(page):
    page.get_by_role("tab", name="How good is it").click()
    page.get_by_role("heading", name="What it forgot of other tissues").wait_for(timeout=60_000)
    accessible(page)
    keep(page, "good")


def test_about_the_model(page):
    page.get_by_role("tab", name="About the model").click()
    page.get_by_role("heading", name="What it cannot do").wait_for(timeout=60_000)
    accessible(page)
    keep(page, "about")


def test_a_service_that_is_killed_in_the_middle(served, chromium, blood_file):
    from playwright.sync_api import expect

    url, process = served
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{url}/?example=B+cell&layout=PCA")
    expect(alert(page)).to_contain_text("B cell", timeout=90_000)
    annotate(page, blood_file)
    process.kill()
    process.wait(20)
    page.get_by_role("button", name="Annotate the cells").click()
    expect(alert(page).filter(has_text="cannot be reached")).to_be_visible(timeout=60_000)
    idle(page)
    page.get_by_role("tab", name="Type genes").click()
    expect(alert(page)).to_contain_text("B cell")
    idle(page)
    expect(ask(page).filter(has_text="cannot be reached")).to_be_visible(timeout=60_000)
    keep(page, "killed")
    page.close()
