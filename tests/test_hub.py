"""Bundles and the page to and from a false Hub: what goes up, what is refused, what the Hub's refusals mean."""
import shutil
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="push, pull and space need it: pip install 'scimlora[hub]'")
from fake_hub import FakeHub

from scimlora.base import BASES
from scimlora.bundle import load_bundle

UI = Path(__file__).resolve().parent.parent / "ui"
TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = FakeHub()
    for k in ("API_KEY", "SCIMLORA_API_KEY"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


def test_a_bundle_goes_up_and_comes_down(hub, cli, tmp_path):
    ended = cli("push", "blood", "me/blood")
    assert ended.code == 0 and "manifest.json" in ended.out and hub.made["me/blood"]["visibility"] == "private" and f"Bearer {TOKEN}" in {a for _, _, a, _ in hub.asked}
    assert hub.files["me/blood"] == {p.name: p.read_bytes() for p in (BASES / "blood").iterdir()}
    assert cli("push", "blood", "me/blood").code == 0  # once more, into the same repository
    ended = cli("pull", "me/blood", "--out", tmp_path / "mine")
    assert ended.code == 0 and load_bundle(tmp_path / "mine").classes == load_bundle("blood").classes
    assert {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()} == hub.files["me/blood"]


def test_what_comes_down_is_no_bundle(hub, cli, tmp_path):
    hub.files["me/other"] = {"README.md": b"# A model", "model.bin": b"\x80\x04."}
    hub.files["me/cut"] = {p.name: p.read_bytes() for p in (BASES / "blood").iterdir()} | {"head.safetensors": b"short"}
    for repo, word in (("me/other", "lacks manifest.json"), ("me/cut", "damaged or cut short"), ("me/none", "there is no me/none"), ("none", "OWNER/NAME")):
        ended = cli("pull", repo, "--out", tmp_path / "mine")
        assert ended.code == 2 and word in ended.err and ended.err.count("\n") == 1 and not (tmp_path / "mine").exists(), ended.err


def test_a_dry_run_lists_and_asks_nobody(hub, cli):
    ended = cli("space", "deploy", "me/page", "--folder", UI, "--bundle", "blood", "--dry-run")
    assert ended.code == 0 and not hub.asked
    for name in ("Dockerfile", "README.md", "requirements.txt", "src/streamlit_app.py", ".streamlit/config.toml", "bundle/manifest.json"): assert name in ended.out
    assert "__pycache__" not in ended.out and "SCIMLORA_BUNDLE" in ended.out
    assert cli("push", "blood", "me/blood", "--dry-run").code == 0 and not hub.asked


def test_a_space_is_made_and_waited_for(hub, cli, monkeypatch):
    monkeypatch.setenv("API_KEY", "a-key-that-nobody-guesses")
    ended = cli("space", "deploy", "me/page", "--folder", UI, "--api-url", "https://example.org")
    assert ended.code == 0, ended.err
    made, files = hub.made["me/page"], hub.files["me/page"]
    assert made["type"] == "space" and made["sdk"] == "docker" and hub.variables == {"API_URL": "https://example.org"} and hub.secrets == {"API_KEY": "a-key-that-nobody-guesses"}
    assert files["Dockerfile"] == (UI / "Dockerfile").read_bytes() and "bundle/manifest.json" not in files
    assert [p for _, p, _, _ in hub.asked].index("/api/spaces/me/page/restart") > [p for _, p, _, _ in hub.asked].index("/api/spaces/me/page/commit/main")
    assert "RUNNING" in ended.out and "a-key-that-nobody-guesses" not in ended.out + ended.err


def test_a_space_that_does_not_start(hub, cli):
    hub.stages = ["BUILD_ERROR"]
    ended = cli("space", "deploy", "me/page", "--folder", UI)
    assert ended.code == 1 and "BUILD_ERROR" in ended.err and "log" in ended.err
    hub.stages = ["BUILDING"]
    ended = cli("space", "deploy", "me/page", "--folder", UI, "--wait", "0.01")
    assert ended.code == 1 and "still at BUILDING" in ended.err
    assert cli("space", "deploy", "me/page", "--folder", UI, "--wait", "0").code == 0


@pytest.mark.parametrize("status, word", [(401, "does not know your token"), (402, "paid plan"), (403, "may not do this with me/page"), (429, "too often")])
def test_refusals_are_explained(hub, cli, status, word):
    hub.refuse["/create"] = status
    ended = cli("space", "deploy", "me/page", "--folder", UI)
    assert ended.code == 2 and word in ended.err and f"error {status}" in ended.err and TOKEN not in ended.err and ended.err.count("\n") == 1


def test_no_token_no_network_no_folder(hub, cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ended = cli("push", "blood", "me/blood")
    assert ended.code == 1 and "cannot be reached" in ended.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ended = cli("push", "blood", "me/blood")
    assert ended.code == 2 and "HF_TOKEN" in ended.err
    assert cli("space", "deploy", "me/page").code == 2


@pytest.mark.parametrize("name, text", [(".streamlit/secrets.toml", "API_KEY = 'x'"), (".env", "A=1"), ("src/notes.py", f"token = '{TOKEN}'"), ("src/key.txt", "-----BEGIN PRIVATE KEY-----"),
                                        ("src/own.py", "KEY = 'my-own-service-key'"), ("src/cells.h5ad", "x" * (11 << 20))])
def test_secrets_and_large_files_stay_here(hub, cli, monkeypatch, tmp_path, name, text):
    monkeypatch.setenv("API_KEY", "my-own-service-key")
    shutil.copytree(UI, tmp_path / "ui", symlinks=True)
    (tmp_path / "ui" / name).write_text(text)
    ended = cli("space", "deploy", "me/page", "--folder", tmp_path / "ui", "--api-url", "https://example.org")
    assert ended.code == 2 and Path(name).name in ended.err and not hub.asked and "my-own" not in ended.err
