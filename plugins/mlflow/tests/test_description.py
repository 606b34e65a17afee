"""The description of a run: its text, and that no other text is overwritten."""

from __future__ import annotations

import json
import shlex
import string
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import Run, hookimpl, plugin
from fundamentallm.testing import TinyRun
from fundamentallm_mlflow import Mlflow, description
from fundamentallm_mlflow.description import LINE, program, wrapped
from fundamentallm_mlflow.worker.client import Client

START: dict[str, Any] = {
    "name": "r",
    "time": 1,
    "parameters": {},
    "records": [],
    "dataset": {"name": "d", "digest": "1", "source": {}, "profile": {}},
}

# Not of all characters: a command's words hold no line ends, and the page is not a shell.
WORDS = st.lists(st.text(string.ascii_letters + "-='\" \\$./", max_size=30), min_size=1)


@given(WORDS)
def test_a_wrapped_command_is_the_same_to_a_shell(words: list[str]) -> None:
    assert shlex.split(wrapped(words).replace("\\\n", "")) == words


def test_lines_end_before_an_option_and_are_short() -> None:
    words = ["train", "a.toml", *(w for i in range(20) for w in ("--set", f"adamw.lr=1e-{i}"))]
    first, *lines = wrapped(words).split("\n")
    assert first.startswith("train a.toml --set adamw.lr=1e-0")
    assert len(lines) == 5
    assert all(line.startswith("    --set ") for line in lines)
    assert max(map(len, [first, *lines])) <= LINE + len("     \\")


def test_a_program_has_the_name_that_a_user_types() -> None:
    assert program(["/opt/bin/fundamentallm", "train"]) == "fundamentallm"
    assert program(["/lib/fundamentallm/__main__.py", "train"]) == "fundamentallm"


def test_a_description_has_model_code_command_and_how_to_resume(tiny_run: TinyRun) -> None:
    part = Mlflow(tracking_uri="nonsense://x", on_start_failure="journal", end_seconds=0.01)
    run = tiny_run(part, length=2)
    with (run.folder / "mlflow" / "journal.jsonl").open(encoding="utf-8") as rows:
        tags = json.loads(next(rows))["tags"]
    weights = sum(parameter.numel() for parameter in run.parameters)
    first, *rest = tags["mlflow.note.content"].split("\n\n")
    assert first.startswith(f"**{run.name}**: {weights:,} weights, 2 steps, with `")
    assert "`tiny_model`" in first
    assert "`mlflow`" not in first
    assert rest[-1] == f"```sh\nfundamentallm resume {shlex.quote(str(run.folder.resolve()))}\n```"
    record = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    assert rest[0].split()[1] == program(record["command"]) == tags["mlflow.source.name"]
    assert shlex.split(tags["command"])[1:] == record["command"][1:]


@plugin
class Keeper:
    """Saves the run in a way of its own, which nothing reads back."""

    role = "saver"

    place: str = "here"

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        (run.folder / "environment.json").write_text("[damaged", encoding="utf-8")


def test_the_settings_of_what_declares_itself_a_saver_are_no_parameters(tiny_run: TinyRun) -> None:
    part = Mlflow(tracking_uri="nonsense://x", on_start_failure="journal", end_seconds=0.01)
    run = tiny_run(part, Keeper(), length=1)
    with (run.folder / "mlflow" / "journal.jsonl").open(encoding="utf-8") as rows:
        found = json.loads(next(rows))["parameters"]
    assert "tiny_optimizer.lr" in found
    assert "keeper.place" not in found
    assert description.tags(run, {}, found)["run_folder"] == str(run.folder), "despite the damage"


def test_an_edited_description_stays_when_the_run_is_resumed(look: Any) -> None:
    store = Client(look.uri, "edited")
    run_id = store.run_for(START | {"id": "1" * 32})
    said = {"mlflow.note.content": "made", "host": "a"}
    store.describe(run_id, START | {"tags": said}, {})
    assert look.client.get_run(run_id).data.tags["mlflow.note.content"] == "made"
    store.api.set_tag(run_id, "mlflow.note.content", "written by hand")
    store.describe(run_id, START | {"tags": said | {"host": "b"}}, {})
    tags = look.client.get_run(run_id).data.tags
    assert (tags["mlflow.note.content"], tags["host"]) == ("written by hand", "b")
