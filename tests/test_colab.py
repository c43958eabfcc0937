"""The Colab notebooks point at what exists, and colab/run.py stops where a notebook fails and says why."""
import importlib.util
import json
import re
import sys
import types
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("papermill", reason="the notebooks are run with papermill: pip install 'scimlora[dev]'")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
BADGE = re.compile(r"\[!\[[^]]*\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
                   r"\(https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/([^/]+)/([^)]+)\)")

spec = importlib.util.spec_from_file_location("colab_run", ROOT / "colab" / "run.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture
def notebook(tmp_path):
    "Write a notebook from cells: text becomes code, (text, tag) tagged code."
    def write(name, *cells):
        made = [new_code_cell(c) if isinstance(c, str) else new_code_cell(c[0], metadata={"tags": [c[1]]}) for c in cells]
        nb = new_notebook(cells=[new_markdown_cell("# Test"), *made])
        nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
        nbformat.write(nb, tmp_path / name)
        return tmp_path / name

    return write


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS] == ["finetune_demo.ipynb", "finetune_siletti.ipynb", "finetune_your_h5ad.ipynb", "serve_ngrok.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_badge_opens_this_very_file(path, settings):
    cells = nbformat.read(path, as_version=4).cells
    repo, branch, file = BADGE.search(next(c.source for c in cells if "colab-badge" in c.source)).groups()
    assert f"https://github.com/{repo}" == settings["git_url"] and branch == settings["branch"]
    assert ROOT / file == path


def test_badges_of_the_readme_name_files_that_exist(settings):
    found = BADGE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {file for _, _, file in found} == {f"colab/{p.name}" for p in NOTEBOOKS}
    assert {(f"https://github.com/{repo}", branch) for repo, branch, _ in found} == {(settings["git_url"], settings["branch"])}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_parameters_stand_at_the_top_and_are_plain_values(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", [])
    values = {}
    exec(code[0].source, values)  # nothing but assignments: needs no import
    assert values["folder"] and not Path(values["folder"]).is_absolute()
    assert not any(c.outputs or c.execution_count for c in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_installs_this_repository_only_where_it_is_missing(path, settings):
    install = next(c.source for c in nbformat.read(path, as_version=4).cells if "pip" in c.source)
    assert f"git+{settings['git_url']}@{settings['branch']}" in install and 'find_spec("scimlora") is None' in install


def test_numbered_notebooks_come_first_and_in_order():
    names = [f"{p.parent.name}/{p.name}" for p in runner.all_notebooks()]
    numbered = [n for n in names if n.startswith("nbs/")]
    assert numbered == sorted(numbered) and len(numbered) > 15 and names[len(numbered):] == [f"colab/{p.name}" for p in NOTEBOOKS]


def test_one_notebook_hands_its_outputs_to_the_next(notebook, tmp_path, capsys):
    parameters = ('folder = "elsewhere"', "parameters")
    first = notebook("00_first.ipynb", parameters, "from pathlib import Path\n(Path(folder)/'x.txt').write_text('beta')")
    second = notebook("01_second.ipynb", parameters, "from pathlib import Path\nprint((Path(folder)/'x.txt').read_text())")
    assert runner.run_all([first, second], tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert re.search(r"00_first\.ipynb: \d+ s\n.*01_second\.ipynb: \d+ s\n2 notebooks: \d+ s", said)
    kept = json.loads((tmp_path / "out" / "01_second.ipynb").read_text(encoding="utf-8"))
    assert any("beta" in "".join(o.get("text", "")) for c in kept["cells"] for o in c.get("outputs", []))


def test_small_is_given_where_it_is_asked_for(notebook, tmp_path, capsys):
    asks = notebook("00_asks.ipynb", ('folder = "elsewhere"\nsmall = False', "parameters"), "open('said.txt', 'w').write(str(small))")
    for full, args in ((False, {}), (True, {"small": False})):
        runner.run(asks, tmp_path / "out", tmp_path / "work", tmp_path, **args)
        assert (tmp_path / "said.txt").read_text() == str(not full)


def test_a_drive_is_used_only_where_it_is_wanted(tmp_path, monkeypatch):
    "With stand-ins of Colab's own modules."
    said = []
    colab, drive = types.ModuleType("google.colab"), types.ModuleType("google.colab.drive")
    drive.mount, colab.drive = said.append, drive
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda self, **kw: said.append(str(self)))
    for path in NOTEBOOKS:
        cell = next((c.source for c in nbformat.read(path, as_version=4).cells if "google_drive.mount" in c.source), None)
        if cell is None: continue
        for wanted in (False, True):
            said.clear()
            exec(cell, {"drive": wanted, "folder": "runs", "sys": sys, "Path": Path})
            assert said[0] == "/content/drive" if wanted else said[0].startswith("runs")
            assert said[-1].startswith("/content/drive/MyDrive/runs/" if wanted else "runs/")


def test_it_stops_at_the_first_failing_cell_and_says_which(notebook, tmp_path, capsys):
    bad = notebook("00_bad.ipynb", ('folder = "elsewhere"', "parameters"), "a = 1", "raise ValueError('no beta cells')", "print('never')")
    early = notebook("00_early.ipynb", "1/0", ('folder = "elsewhere"', "parameters"))
    with pytest.raises(runner.Stopped, match="cell 1: ZeroDivisionError"): runner.run(early, tmp_path / "out", tmp_path / "work", tmp_path)
    after = notebook("01_after.ipynb", "print('never')")
    assert runner.run_all([bad, after], tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "00_bad.ipynb, cell 3: ValueError: no beta cells" in said and "01_after" not in said and "\x1b[" not in said
    assert (tmp_path / "out" / "00_bad.ipynb").exists() and not (tmp_path / "out" / "01_after.ipynb").exists()
    with pytest.raises(SystemExit) as stopped: runner.main([str(tmp_path / "nothing.ipynb")])
    assert "no such notebook" in str(stopped.value)


def test_a_cell_keeps_its_number_without_parameters(notebook, tmp_path):
    bad = notebook("00_bad.ipynb", "#| eval: false\nraise SystemError", "#| notest\nraise SystemError", "1/0")
    with pytest.raises(runner.Stopped, match="00_bad.ipynb, cell 3: ZeroDivisionError"):
        runner.run(bad, tmp_path / "out", tmp_path / "work", tmp_path)


def test_a_kernel_that_dies_is_a_failure_too(notebook, tmp_path):
    bad = notebook("00_bad.ipynb", "import os\nos._exit(3)")
    with pytest.raises(runner.Stopped, match="00_bad.ipynb: DeadKernelError"):
        runner.run(bad, tmp_path / "out", tmp_path / "work", tmp_path)
