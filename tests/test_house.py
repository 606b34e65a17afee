"""The rules of the house: sizes, imports, words, documents that match the code."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import grimp
import pytest
import tomli

import fundamentallm
from fundamentallm import HOOKS, find_plugins, role_of, setting_fields

ROOT = Path(__file__).parent.parent
OUR_HOST = sorted((ROOT / "fundamentallm" / "host").glob("*.py"))
CORE = sorted((ROOT / "fundamentallm").glob("*.py"))
TESTING = sorted((ROOT / "fundamentallm" / "testing").glob("*.py"))
FOLDERS = sorted(p.parent for p in ROOT.glob("plugins/*/pyproject.toml"))
MODULES = sorted(
    path for path in ROOT.glob("plugins/*/fundamentallm_*/**/*.py") if "templates" not in path.parts
)

PACKAGES = {path.name for path in ROOT.glob("plugins/*/fundamentallm_*")}


def imports(of: Path | ast.Module) -> list[str]:
    found = []
    for node in ast.walk(of if isinstance(of, ast.Module) else ast.parse(of.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_core_and_the_host_have_at_most_6200_lines_together():
    assert sum(lines(path) for path in [*CORE, *OUR_HOST]) <= 6200


def test_no_module_is_over_400_lines_and_the_loop_is_at_most_200():
    sizes = {str(p.relative_to(ROOT)): lines(p) for p in [*CORE, *OUR_HOST, *TESTING, *MODULES]}
    assert {name: size for name, size in sizes.items() if size > 400} == {}
    assert sizes["fundamentallm/loop.py"] <= 200


FEATURES = re.compile(r"fundamentallm_|(mlflow|torch\.distributed|torch\.amp)(\.|$)")


def feature_uses(text: str) -> list[str]:
    """Return the features and plugins that a module imports, or reads as an attribute of torch."""
    tree = ast.parse(text)
    read = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = imports(tree) + [name for name in read if re.fullmatch(r"torch\.\w+", name)]
    return [name for name in names if FEATURES.match(name)]


def test_the_core_imports_no_plugin_and_no_feature():
    for path in [*CORE, *TESTING]:
        assert feature_uses(path.read_text()) == [], path.name


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("import mlflow, torch.distributed", ["mlflow", "torch.distributed"]),
        ("def f():\n    from torch import amp, nn", ["torch.amp"]),
        ("import torch\ntorch.distributed.is_initialized()", ["torch.distributed"]),
        ("import fundamentallm_text", ["fundamentallm_text"]),
        ("import torch\nfrom torch.distributions import Normal\ntorch.amplify", []),
    ],
)
def test_a_feature_is_found_in_imports_and_attributes(text, uses):
    assert feature_uses(text) == uses


def test_the_host_knows_neither_training_nor_torch():
    for path in OUR_HOST:
        found = [
            name for name in imports(path) if re.match(r"fundamentallm\.(?!host\b)|torch", name)
        ]
        assert found == [], path.name


def foreign_imports(text: str, own: str) -> list[str]:
    """Return what a module of the distribution ``own`` imports from another one of this project,
    except names of the core's face."""
    return [
        name
        for name in imports(ast.parse(text))
        if re.match(r"fundamentallm(_|\.|$)", name)
        and name.split(".")[0] != own
        and name not in {f"fundamentallm.{face}" for face in fundamentallm.__all__}
    ]


def test_plugins_import_from_the_core_its_face_alone_and_never_each_other():
    for path in MODULES:
        own = path.relative_to(ROOT / "plugins").parts[1]
        assert foreign_imports(path.read_text(), own) == [], path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from fundamentallm import Run, loop, rng", ["fundamentallm.loop", "fundamentallm.rng"]),
        ("import fundamentallm.run", ["fundamentallm.run"]),
        ("import fundamentallm", ["fundamentallm"]),
        ("from fundamentallm.periods import Period", ["fundamentallm.periods.Period"]),
        ("def f():\n    from fundamentallm_b import B", ["fundamentallm_b.B"]),
        ("from fundamentallm import Run, folder, train\nfrom fundamentallm_a.x import y", []),
        ("import fundamentallm_a.x", []),
    ],
)
def test_an_import_from_outside_of_the_face_is_found(text, found):
    assert foreign_imports(text, "fundamentallm_a") == found


def test_the_import_contracts_list_every_package_and_every_module_of_the_core():
    linter = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = {contract["name"]: contract for contract in linter["contracts"]}
    face = contracts["plugins import from the core its face alone"]
    no_plugin = contracts["the core imports no plugin and no mlflow"]["forbidden_modules"]
    no_training = contracts["the host knows nothing of training, and imports no torch"]
    assert set(linter["root_packages"]) == PACKAGES | {"fundamentallm"}
    assert set(contracts["plugins never import each other"]["modules"]) == PACKAGES
    assert set(face["source_modules"]) == PACKAGES
    assert set(no_plugin) == PACKAGES | {"mlflow"}
    core = {f"fundamentallm.{path.stem}" for path in CORE} - {"fundamentallm.__init__"}
    core |= {"fundamentallm.testing"}
    public = {f"fundamentallm.{name}" for name in fundamentallm.__all__}
    assert set(face["forbidden_modules"]) == (core | {"fundamentallm.host"}) - public
    assert set(no_training["forbidden_modules"]) == core | {"torch", "mlflow"}


def test_the_storage_of_checkpoints_knows_no_run_and_nothing_above_it():
    """The thread that writes a checkpoint may use what is in the folder while the run goes on."""
    package = "fundamentallm_checkpoint"
    for path in sorted((ROOT / "plugins" / "checkpoint" / package / "storage").glob("*.py")):
        found = imports(path)
        assert "fundamentallm.Run" not in found, path.name
        above = [n for n in found if n.startswith(package) and f"{package}.storage." not in f"{n}."]
        assert above == [], path.name
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Name
        }
        assert "Run" not in names, path.name


BOTH_PROCESSES = {"journal", "sync_state", "tracking_uri"}
"""Modules of mlflow that the training process and the upload worker use."""


def test_the_upload_worker_and_the_training_process_share_only_the_modules_for_both():
    package = "fundamentallm_mlflow"
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    worker = {f"{package}.worker", *graph.find_descendants(f"{package}.worker")}
    shared = {f"{package}.{name}" for name in BOTH_PROCESSES}
    used = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    training = graph.modules - worker - shared - {f"{package}.cli"}
    assert shared < graph.modules
    # The commands run in a process of their own, so they may use both rooms.
    assert {name: found for name in training | shared if (found := used[name] & worker)} == {}
    assert {name: found for name in worker if (found := used[name] - worker - shared)} == {}
    assert {name: found for name in shared if (found := used[name] - shared)} == {}
    for name in BOTH_PROCESSES:
        assert f"`{name}`" in (ROOT / "docs" / "architecture.md").read_text(), name


def test_no_modules_import_each_other_in_a_circle_at_run_time():
    packages = ["fundamentallm", *PACKAGES]
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    used = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    TopologicalSorter(used).prepare()  # raises CycleError, with the circle


def foreign_names(tree: ast.Module) -> set[str]:
    """Return the names in a module that imports of dependencies bind."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound = {a.asname or a.name.partition(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound = {a.asname or a.name: str(node.module) for a in node.names}
        else:
            continue
        found |= {name for name, module in bound.items() if is_dependency(module)}
    return found


def is_dependency(module: str) -> bool:
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and not top.startswith("fundamentallm")


def underscore_uses(text: str) -> list[str]:
    """Return the underscore names of dependencies that a module imports or reads an attribute of.

    Dunder names are public, and so are torch's documented ``_foreach_`` operations.
    """
    tree = ast.parse(text)
    private, foreign, found = re.compile(r"_(?!_|foreach_)"), foreign_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            words = [(a.name, a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = str(node.module)
            words = [(f"{module}.{a.name}", [*module.split("."), a.name]) for a in node.names]
        elif isinstance(node, ast.Attribute):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            known = isinstance(root, ast.Name) and root.id in foreign
            found += [ast.unparse(node)] if known and private.match(node.attr) else []
            continue
        else:
            continue
        found += [
            name for name, parts in words if is_dependency(name) and any(map(private.match, parts))
        ]
    return found


# torch documents this class and has no public path to it. Only the test kit may use it: a change of
# torch would break the tests of its users, never a run. See docs/decisions/0012.
UNDERSCORES_OF_TESTS = ["torch.utils._python_dispatch.TorchDispatchMode"]


def test_no_module_uses_an_underscore_name_of_a_dependency():
    for path in [*CORE, *OUR_HOST, *TESTING, *MODULES]:
        allowed = UNDERSCORES_OF_TESTS if path in TESTING else []
        assert [use for use in underscore_uses(path.read_text()) if use not in allowed] == [], path


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("import torch\ntorch._amp_update_scale_(a)", ["torch._amp_update_scale_"]),
        ("import torch as t\nx = t.nn.Linear(1, 2)._buffers", ["t.nn.Linear(1, 2)._buffers"]),
        ("from torch import nn\nnn.Module()._modules", ["nn.Module()._modules"]),
        ("def f():\n    from pluggy._hooks import X", ["pluggy._hooks.X"]),
        ("import torch\ntorch._foreach_norm(x)\ntorch.nn.__name__\nself._x\nsys._getframe()", []),
    ],
)
def test_an_underscore_name_is_found_in_imports_and_attributes(text, uses):
    assert underscore_uses(text) == uses


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestEveryDistribution:
    def test_is_named_after_its_folder(self, folder):
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["name"] == f"fundamentallm-{folder.name.replace('_', '-')}"
        assert (folder / f"fundamentallm_{folder.name}" / "py.typed").is_file()

    def test_ships_the_license_of_the_repository(self, folder):
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["license-files"] == ["LICENSE"]
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()

    def test_takes_the_core_as_a_range(self, folder):
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        assert "fundamentallm>=0.1,<0.2" in project["dependencies"]
        assert not [d for d in project["dependencies"] if "==" in d]

    def test_has_a_readme_of_one_sentence_and_what_is_generated(self, folder):
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        text = (folder / "README.md").read_text()
        assert text.startswith("# ")
        assert text.split("\n\n")[1].strip()
        if project.get("entry-points", {}).get("fundamentallm"):
            assert "<!-- settings" in text
            assert "<!-- hooks" in text

    def test_every_plugin_of_it_passes_the_contract(self, folder):
        project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
        tests = "\n".join(path.read_text() for path in folder.glob("tests/test_*.py"))
        for entry in project.get("entry-points", {}).get("fundamentallm", {}).values():
            name = entry.partition(":")[2]
            assert re.search(rf"plugin(: [^=]+)? = {name}\b", tests), f"no PluginContract of {name}"


def test_every_first_party_plugin_is_known_by_its_distribution_and_role():
    ours = tomli.loads((ROOT / "fundamentallm" / "first_party.toml").read_text())
    found = {
        name: {"distribution": offers[0].distribution, "role": role_of(offers[0].load())}
        for name, offers in find_plugins().items()
        if offers[0].distribution.startswith("fundamentallm-")
    }
    assert ours["plugins"] == found


def test_every_first_party_command_is_known_by_the_distribution_that_brings_it():
    ours = tomli.loads((ROOT / "fundamentallm" / "first_party.toml").read_text())
    found = {
        entry.name: entry.dist.name
        for entry in metadata.entry_points(group="fundamentallm.commands")
        if entry.dist.name.startswith("fundamentallm-")
    }
    assert ours["commands"] == found


def test_every_hook_is_documented_and_tested():
    page = (ROOT / "docs" / "hooks.md").read_text()
    tests = (ROOT / "tests" / "test_hooks.py").read_text()
    for hook in HOOKS:
        assert f"`{hook}`" in page or f" {hook}(" in page, hook
        assert hook in tests, hook


def test_the_generated_documents_match_the_code():
    words = ["--settings", "docs/settings.md", "--hooks", "docs/hooks.md"]
    for folder in FOLDERS:
        if folder.name == "authoring":  # no plugin, but what describes them
            continue
        words += ["--readme", str(folder / "README.md")]
    done = subprocess.run(
        [sys.executable, "-m", "fundamentallm", "reference", "--check", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_that_the_comparison_names_is_one_of_its_plugin():
    """A row's third cell names a plugin first, and then settings of it."""
    found = find_plugins()
    rows = [
        line.split("|")[3]
        for line in (ROOT / "docs" / "compare.md").read_text().splitlines()
        if line.startswith("| ") and "| here |" not in line
    ]
    named = {}
    for cell in rows:
        words = re.findall(r"`([^`]+)`", cell)
        plugins = [word for word in words if word in found]
        settings = [word.split(" = ")[0] for word in words if re.match(r"[a-z_]+( = |$)", word)]
        for plugin in plugins:
            named.setdefault(plugin, set()).update(s for s in settings if s not in found)
    for plugin, settings in named.items():
        fields = setting_fields(found[plugin][0].load())
        assert settings <= fields.keys(), (plugin, settings - fields.keys())
    assert len(named) >= 25


def test_the_words_that_mean_two_things_are_not_used():
    wrong = re.compile(r"\b(global_step|batch_idx|n_iter|iter_num|trainer|self\.cfg|config_path)\b")
    for path in [*CORE, *OUR_HOST, *MODULES]:
        found = wrong.findall(path.read_text())
        assert found == [], path


PLAIN_WORDS = {
    "told, tells, tell of": "report, print, log, state, name, return; an error is raised",
    "hear, hears, heard": "receive, implement (a hook)",
    "whoever, whomever, somebody, nobody": "the plugin, the caller, the user, no plugin, none",
    "anew": "again, from the start, new",
    "beside, besides": "next to, in addition to, except, parallel to, without",
    "make way": "move, rename, delete",
}
"""Words of a dialect that this code once used, and plain ones for them.

"hold" and "keep" are not listed: a file holds rows, and retention keeps checkpoints.

A listed word usually hides who does what: name the thing that acts and what it does. docs/style.md
has the rules of the language, docs/glossary.md the term for each thing.
"""


def listed_words(text: str) -> list[str]:
    words = ", ".join(PLAIN_WORDS).split(", ")
    return re.findall(rf"\b({'|'.join(words)})\b", text.replace("_", " "), re.IGNORECASE)


def prose_files() -> list[Path]:
    kinds = ["*.py", "*.md", "*.toml", "*.tmpl", "*.yml", "Makefile"]
    done = subprocess.run(
        ["git", "ls-files", "-z", *kinds], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = done.stdout.split("\0")[:-1]
    return [ROOT / name for name in names if name != "tests/test_house.py"]


def test_code_and_documents_use_plain_words():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {', '.join(words)}: {line.strip()}"
        for path in prose_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (words := listed_words(line))
    ]
    assert found == [], f"for plain words see PLAIN_WORDS: {PLAIN_WORDS}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def test_a_mistake_is_told_at_once():", ["told"]),
        ("# Besides, nobody hears it.", ["Besides", "nobody", "hears"]),
        ("the plugins make way", ["make way"]),
        ("shear the untold bookshelf; it retells", []),
    ],
)
def test_listed_words_are_found_in_names_and_sentences_and_not_in_other_words(text, words):
    assert listed_words(text) == words


PHRASES = {
    "a word in a reason": (
        r"""["'] (not )?in \S*(why|reason|rejection)\b|(why|reason)\.(starts|ends)with\(""",
        "",
        """theirs = [why for why in run.rejected if "gradient" not in why]""",
    ),
    "how a plugin's origin is printed": (
        r"given as an object",
        "fundamentallm/host/sources.py",
        """if "given as an object" in facts["plugins"][name]:""",
    ),
    "the prefix of a hook's name": (
        r"""startswith\(\(?["'](on|build|edit)_""",
        "",
        """events = [hook for hook in HOOKS if hook.startswith("on_")]""",
    ),
    "an attribute that a saver may have": (
        r"""(get|has)attr\([^()]+, ["'](every|folder|contents)["']""",
        "",
        """if getattr(one, "every", None) is not None:""",
    ),
    "a hook's name looked up on a plugin": (
        r"""(get|has)attr\([^()]+, ["'](build_|on_|evaluation_weights|validate|forward|backward)""",
        "",
        """if hasattr(one, "build_optimizer"):""",
    ),
    "the project's own words in a message": (
        r"""["'](did you mean|matches no|is not installed)["'] (not )?in\b""",
        "",
        """if "did you mean" in close:""",
    ),
    "the quoted name at the start of a validator's message": (
        r"""re\.(sub|match)\(.*error""",
        "",
        """text = re.sub(r"^'\\w+' ", "", str((*error.args, error)[0]))""",
    ),
    "the end of a printed fact or the last printed line": (
        r"""(fact|line|text)s?(\[-1\])?\.endswith\(["'][ a-z/]+["']\)|splitlines\(\)\[-1\]""",
        "",
        """if fact.endswith("left"):""",
    ),
    "a method's name in place of an event": (
        r"take_histogram",
        "",
        """if hasattr(one, "take_histogram"):""",
    ),
    "the last logged step, computed again": (
        r"- \(?not (\w+\.)*closed\b",
        "fundamentallm/data.py",
        """known = progress.step - (not progress.closed)""",
    ),
    "a flag that one hook sets for the next": (
        r"self\._(is_)?(validating|after_validation|in_validation)\b",
        "",
        """self._validating = self._off = False""",
    ),
    "a counter whose parity means something": (
        r"\bmoment\s*(\+=|%|&|= 0$|= 0\s)",
        "",
        """moment = 0  # twice the step; odd while one is attempted""",
    ),
    "a plural that is corrected afterwards": (
        r"batchs",
        "",
        """return f"{name}s".replace("batchs", "batches")""",
    ),
    "rounding up, written out again": (
        r"\b1e-12\b",
        "fundamentallm/periods.py",
        """return -(-a * b * (1 - 1e-12) // 1)""",
    ),
    "a private operation of mixed precision": (
        r"_amp_foreach",
        "",
        """torch._amp_foreach_non_finite_check_and_unscale_(grads, found, scale)""",
    ),
}
"""What code must not decide by: a pattern, the one file that may have it, and code that was wrong."""


@pytest.mark.parametrize(("pattern", "home", "wrong"), PHRASES.values(), ids=PHRASES)
def test_data_decides_in_place_of_phrases(pattern, home, wrong):
    assert re.search(pattern, wrong), "the pattern has to find the code that was wrong"
    found = [
        f"{name}:{number}: {line.strip()}"
        for path in [*CORE, *OUR_HOST, *TESTING, *MODULES]
        if (name := str(path.relative_to(ROOT))) != home
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == []


def test_no_furniture_words_name_a_class_or_a_file():
    furniture = re.compile(r"(Manager|Handler|Helper|Base|Mixin|Connector|Wrapper)$")
    for path in [*CORE, *OUR_HOST, *MODULES]:
        assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
        tree = ast.parse(path.read_text())
        classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        assert [name for name in classes if furniture.search(name)] == [], path


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_in_plain_python_runs_and_has_fewer_than_25_lines(tmp_path):
    (example,) = blocks(ROOT / "docs" / "python.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) < 25
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outcome, loss = done.stdout.split()[-2:]
    assert outcome == "finished"
    assert float(loss) < 0.05


def test_the_plugin_of_the_guide_passes_the_tests_of_the_guide(tmp_path):
    plugin, *tests = blocks(ROOT / "docs" / "write-a-plugin.md", "python")
    (tmp_path / "patience.py").write_text(plugin)
    for name, text in zip(("patience", "reads", "logger"), tests, strict=True):
        (tmp_path / f"test_{name}.py").write_text(text)
    # The suite of jsonl kills a run; here it would only start Python once more.
    words = ["-q", "-p", "no:cacheprovider", "-rA", "-k", "not killed", "."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stdout
    passed = {name: done.stdout.count(f"PASSED test_{name}.py") for name in ("patience", "reads")}
    assert passed == {"patience": 16, "reads": 1}
    assert done.stdout.count("PASSED test_logger.py") >= 24


def test_the_readme_s_settings_and_plugin_compose(tmp_path):
    from fundamentallm import compose

    (settings, *_) = blocks(ROOT / "README.md", "toml")
    (plugin, *_) = blocks(ROOT / "README.md", "python")
    assert len(plugin.strip().splitlines()) <= 17
    (tmp_path / "loss_stop.py").write_text(plugin)
    (tmp_path / "my.toml").write_text(settings)
    composed = compose(
        tmp_path / "my.toml",
        overrides=["loss_stop.enough=1.5"],
        add=[str(tmp_path / "loss_stop.py")],
    )
    assert list(composed.plugins)[-1] == "loss_stop"


def test_every_settings_file_says_what_it_is_and_composes():
    from fundamentallm import compose

    for path in sorted((ROOT / "settings").glob("*.toml")):
        assert path.read_text().startswith("# "), path
        composed = compose(path)
        assert json.dumps(composed.tables)


def test_every_file_that_the_makefile_runs_is_tracked():
    """An ignored file works here and is missing in every clone."""
    named = re.findall(r"\b(?:tests|settings|docs)/[\w./-]+\.\w+", (ROOT / "Makefile").read_text())
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert named
    assert set(named) - set(done.stdout.split()) == set()
