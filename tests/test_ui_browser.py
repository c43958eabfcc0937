"""The page in a real browser: genes in, label out; a file in, table and downloads out; readable on a phone.

SCIMLORA_SCREENSHOTS names a folder for screenshots. SCIMLORA_NO_BROWSER=1 skips these tests where there is no Chromium.
"""
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


@pytest.fixture(scope="module")
def address(chromium, bundle_dir, tmp_path_factory):
    "The page, started as a user would, taking files up to 2 MB."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = {k: v for k, v in os.environ.items() if not k.startswith("API_")} | {"SCIMLORA_BUNDLE": str(bundle_dir)}
    folder = tmp_path_factory.mktemp("page")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "streamlit", "run", APP, "--server.address=127.0.0.1", f"--server.port={port}",
                                    "--server.maxUploadSize=2"], cwd=folder, env=settings, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield wait_for(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.wait(20)
    assert "Traceback" not in (folder / "log").read_text()


def wait_for(url, process, seconds=60):
    "Return the address once the page is healthy."
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try: return urllib.request.urlopen(f"{url}/_stcore/health", timeout=5) and url
        except OSError: time.sleep(.3)
    pytest.fail(f"the page did not start within {seconds} s")


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
    page.wait_for_timeout(1500)  # charts and tables fade in
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": width, "height": height + 20})
    page.wait_for_timeout(500)
    page.screenshot(path=Path(folder) / f"{name}_{width}.png")
    page.set_viewport_size({"width": width, "height": 900})


def alert(page): return page.get_by_test_id("stAlert").filter(visible=True)


def test_genes_become_a_label(page, other_cells):
    from playwright.sync_api import expect

    cell = other_cells[(other_cells.obs.cell_type == "beta").to_numpy()][0]
    counts = pd.Series(cell.X.toarray()[0], cell.var_names).nlargest(500)  # Chromium types, and thousands of lines take long
    text = "\n".join(f"{g} {v:g}" for g, v in counts.items())
    page.get_by_role("textbox", name="Genes and values").fill(text)
    page.get_by_role("button", name="What cell is this?").click()
    expect(alert(page)).to_contain_text("beta", timeout=60_000)
    expect(page.get_by_test_id("stVegaLiteChart").filter(visible=True)).to_be_visible()
    keep(page, "genes")


def test_an_example_is_one_click(page):
    from playwright.sync_api import expect

    page.get_by_role("radio", name="alpha").click()
    expect(page.get_by_role("textbox", name="Genes and values")).to_have_value(re.compile("^GCG 6"), timeout=30_000)
    page.get_by_role("button", name="What cell is this?").click()
    expect(alert(page)).to_contain_text("alpha", timeout=60_000)
    keep(page, "example")


def test_a_file_becomes_a_table_and_downloads(page, other_cells, tmp_path):
    other_cells[::3].copy().write_h5ad(tmp_path / "forty.h5ad", compression="gzip")
    page.get_by_role("tab", name="Annotate a file").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "forty.h5ad")
    page.get_by_role("button", name="Annotate the cells").click(timeout=60_000)
    page.get_by_role("heading", name="Every cell").wait_for(timeout=60_000)
    page.get_by_test_id("stDataFrame").filter(visible=True).wait_for()
    table = pd.read_csv(io.BytesIO(downloaded(page, "Table (csv)")), keep_default_na=False)
    assert list(table) == ["cell_id", "cell_type", "confidence", "unassigned", "top3", "reason"] and len(table) == 40
    (tmp_path / "back.h5ad").write_bytes(downloaded(page, "Annotated file (h5ad)"))
    back = ad.read_h5ad(tmp_path / "back.h5ad")
    assert back.obs.scimlora_label.astype(str).tolist() == table.cell_type.tolist() and "X_scimlora" in back.obsm
    assert (back.obs.cell_type.astype(str).to_numpy() == table.cell_type.to_numpy()).mean() > .8
    keep(page, "file")


def downloaded(page, button):
    with page.expect_download(timeout=60_000) as download: page.get_by_role("button", name=button).click()
    return Path(download.value.path()).read_bytes()


def test_a_broken_or_oversize_file_gets_a_sentence(page, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "broken.h5ad").write_bytes(b"gene,value\nINS,3\n")
    (tmp_path / "large.h5ad").write_bytes(b"\0" * (3 << 20))
    page.get_by_role("tab", name="Annotate a file").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.h5ad")
    expect(alert(page)).to_contain_text("broken.h5ad: is no h5ad", timeout=60_000)
    page.locator("input[type=file]").set_input_files(tmp_path / "large.h5ad")
    expect(page.get_by_text("2.0MB or smaller")).to_be_visible(timeout=30_000)
    keep(page, "refused")


def test_about_the_model(page):
    page.get_by_role("tab", name="About the model").click()
    page.get_by_role("heading", name="What it cannot do").wait_for()
    keep(page, "about")
