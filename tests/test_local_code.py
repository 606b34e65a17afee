"""The local code of a run: which files are recorded, and that a change of them is reported."""

from __future__ import annotations

import hashlib
import json

import pytest

from fundamentallm import code_changes, hookimpl, load_run, plugin, train

PARTS = '''
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import Memory, TinyParts

@plugin
class Parts(TinyParts):
    """All that a tiny run needs; resumes from files of its own."""

    @hookimpl
    def on_safe_point(self, run):
        import torch
        torch.save(run.snapshot(), run.folder / "all.pt")

    @hookimpl
    def read_checkpoint(self, run):
        import torch
        path = run.folder / "all.pt"
        return torch.load(path, weights_only=False) if path.exists() else None

    @hookimpl
    def on_train_end(self):
        if False:
            import near, package.inner, json, missing
'''
SETTINGS = 'plugins = ["./parts.py"]\n[run]\nlength = 2\ndevice = "cpu"\n'


@pytest.fixture
def place(tmp_path):
    """A folder with a local plugin and modules that it imports, and one that it does not."""
    home = tmp_path / "mine"
    (home / "package").mkdir(parents=True)
    for name, text in {
        "parts.py": PARTS,
        "near.py": "from further import *\n",
        "further.py": "import near  # a circle\n",
        "unused.py": "",
        "package/__init__.py": "",
        "package/inner.py": "from . import other\nfrom .. import outside\n",
        "package/other.py": "this is not Python\n",
        "outside.py": "",
        "my.toml": SETTINGS,
    }.items():
        (home / name).write_text(text)
    return home


USED = {
    "parts.py",
    "near.py",
    "further.py",
    "package/__init__.py",
    "package/inner.py",
    "package/other.py",
    "outside.py",
}


def code(run):
    found = json.loads((run.folder / "environment.json").read_text())["code"]
    assert isinstance(found, dict)
    return found


def test_a_run_records_and_copies_its_local_plugin_and_what_that_imports(place, tmp_path):
    run = train(place / "my.toml", run_dir=tmp_path / "run")
    found = code(run)
    assert set(found) == {str(place / name) for name in USED}
    for name in USED:
        facts = found[str(place / name)]
        assert facts["sha256"] == hashlib.sha256((place / name).read_bytes()).hexdigest()
        assert facts["copy"] == f"code/mine/{name}"
        assert (run.folder / facts["copy"]).read_bytes() == (place / name).read_bytes()
    assert code_changes(run.folder) == []


def test_a_change_between_start_and_resume_is_reported_and_both_texts_are_kept(
    place, tmp_path, caplog
):
    run = train(place / "my.toml", run_dir=tmp_path / "run")
    (place / "near.py").write_text("x = 1\n")
    (place / "outside.py").unlink()
    since, copies = "since the run was started; its copy is", f"{run.folder}/code/mine"
    expected = [
        f"{place}/near.py has changed {since} {copies}/near.py",
        f"{place}/outside.py cannot be read any more {since} {copies}/outside.py",
    ]
    assert sorted(code_changes(run.folder)) == expected
    again = train(run.folder / "settings.toml", overrides=["run.length=4"], run_dir=run.folder)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "since the run was started" in line] == expected
    kept = run.folder / "code"
    assert (kept / "mine" / "near.py").read_text() == "x = 1\n"
    assert (kept / "until-step-00000002" / "mine" / "near.py").read_text() == (
        "from further import *\n"
    )
    assert (kept / "until-step-00000002" / "mine" / "outside.py").is_file()
    assert not (kept / "mine" / "outside.py").exists()
    assert not (kept / "mine" / "further.py").exists(), "near.py imports it no longer"
    assert code_changes(again.folder) == []


def test_a_module_that_is_imported_by_a_computed_name_is_recorded_with_what_it_imports(
    place, tmp_path
):
    computed = 'import importlib\nimportlib.import_module("computed.inner")\n'
    (place / "parts.py").write_text(computed + PARTS)
    (place / "computed").mkdir()  # a namespace package
    (place / "computed" / "inner.py").write_text("if False:\n    import unused\n")
    run = train(place / "my.toml", run_dir=tmp_path / "run")
    expected = {*USED, "computed/inner.py", "unused.py"}
    assert set(code(run)) == {str(place / name) for name in expected}
    assert (run.folder / "code" / "mine" / "computed" / "inner.py").is_file()


def test_plugins_of_distributions_are_not_copied(tiny_run):
    run = tiny_run("jsonl", length=1)
    assert code(run) == {}
    assert not (run.folder / "code").exists()


@plugin
class Given:
    """Is given as an object."""

    @hookimpl
    def on_step_end(self): ...


def test_the_file_of_a_plugin_that_is_given_as_an_object_is_recorded(tiny_run):
    assert __file__ in code(tiny_run(Given(), length=1))


def test_files_of_the_same_name_in_two_folders_have_copies_of_their_own(tmp_path):
    texts = {"a/mine/parts.py": PARTS, "a/mine/near.py": "first = 1\n"}
    texts |= {"b/mine/other.py": OTHER, "b/mine/near.py": "second = 2\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    settings = SETTINGS.replace('"./parts.py"', '"a/mine/parts.py", "b/mine/other.py"')
    (tmp_path / "my.toml").write_text(settings)
    run = train(tmp_path / "my.toml", run_dir=tmp_path / "run")
    copies = {path: (run.folder / facts["copy"]).read_text() for path, facts in code(run).items()}
    assert copies[str(tmp_path / "a/mine/near.py")] == "first = 1\n"
    assert copies[str(tmp_path / "b/mine/near.py")] == "second = 2\n"


OTHER = '''
from fundamentallm import hookimpl, plugin

@plugin
class Other:
    """Imports another module of the same name."""

    @hookimpl
    def on_step_end(self):
        if False:
            import near
'''


def test_a_damaged_record_of_code_reports_nothing_and_moves_nothing_outside(place, tmp_path):
    run = train(place / "my.toml", run_dir=tmp_path / "run")
    path = run.folder / "environment.json"
    facts = json.loads(path.read_text())
    outside = tmp_path / "precious.txt"
    outside.write_text("stays")
    for bad in (
        [],
        {"x": 1},
        {"x": {"sha256": 1, "copy": "code/x"}},
        {"x": {"sha256": "1", "copy": "code/../../precious.txt"}},
        {"x": {"sha256": "1", "copy": str(outside)}},
    ):
        path.write_text(json.dumps(facts | {"code": bad}))
        assert code_changes(run.folder) == []
        train(run.folder / "settings.toml", run_dir=run.folder)
        assert outside.read_text() == "stays"


def test_loading_a_run_copies_nothing(place, tmp_path):
    run = train(place / "my.toml", run_dir=tmp_path / "run")
    (place / "near.py").write_text("x = 1\n")
    before = set(run.folder.rglob("*"))
    load_run(run.folder)
    assert set(run.folder.rglob("*")) == before
