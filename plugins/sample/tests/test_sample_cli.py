"""``fundamentallm sample`` on a real run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tomli
import tomli_w
import torch
from click.testing import CliRunner, Result

from fundamentallm import SettingsError, train
from fundamentallm_sample.cli import sample

LOCAL = '''
import torch
from torch import nn
from fundamentallm import Batch, hookimpl, plugin

TEXT = "\\nabcdefg\\u00e9"


class Letters:
    """Bytes, so that a letter may be two tokens."""

    vocab_size = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", "replace")


class Source:
    epoch_samples = None
    fingerprint = "letters"
    tokenizer = Letters()

    def batches(self, progress):
        text = torch.tensor(self.tokenizer.encode(TEXT * 2))
        while True:
            yield Batch((text[None, :-1], text[None, 1:]), 17, 1, 17)

    def validation(self):
        return {}


class NextByte(nn.Module):
    context_length = 4

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def logits(self, tokens):
        return self.table(tokens)

    def forward(self, inputs, targets):
        return nn.functional.cross_entropy(self.table(inputs)[0], targets[0])


@plugin
class Everything:
    """Data, model, optimizer and checkpoints in one file."""

    @hookimpl
    def build_data(self):
        return Source()

    @hookimpl
    def build_model(self):
        return NextByte()

    @hookimpl
    def build_optimizer(self, run):
        return torch.optim.AdamW(run.model.parameters(), lr=0.1)

    @hookimpl
    def on_safe_point(self, run):
        torch.save(run.snapshot(), run.folder / "latest.pt")

    @hookimpl
    def read_checkpoint(self, run):
        path = run.folder / "latest.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None
'''


ONLY_X = '''
from contextlib import contextmanager
from fundamentallm import hookimpl, plugin


@plugin
class OnlyX:
    """Evaluates with weights that make x the next letter."""

    @hookimpl
    @contextmanager
    def evaluation_weights(self, run):
        table = run.model.table.weight.data
        kept = table.clone()
        table.zero_()[:, ord("x")] = 1
        yield
        table.copy_(kept)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has memorized TEXT; its [sample] table chooses greedily."""
    return trained(tmp_path_factory.mktemp("letters"))


def trained(place: Path, *more: str) -> Path:
    (place / "everything.py").write_text(LOCAL, encoding="utf-8")
    train(
        {
            "plugins": [str(place / "everything.py"), *more, "sample"],
            "run": {"length": 60, "device": "cpu"},
            "sample": {"prompt": "ab", "temperature": 0, "max_tokens": 7},
        },
        run_dir=place / "run",
    )
    return place / "run"


def call(folder: Path, *options: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(sample, [str(folder), *options], input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_options_that_are_not_given_are_those_of_the_runs_settings(folder: Path) -> None:
    # Seven tokens: c d e f g and the two bytes of é.
    assert call(folder, "--seed", "1").stdout == "abcdefgé\n"


def test_options_replace_the_runs_settings(folder: Path) -> None:
    found = call(folder, "--prompt", "e", "--max-tokens", "2", "--num-samples", "2", "--seed", "1")
    assert found.stdout == "efg\n---------------\nefg\n"


def test_the_same_seed_gives_the_same_text_and_every_call_without_a_seed_another(
    folder: Path,
) -> None:
    hot = ("--temperature", "50", "--max-tokens", "30")
    texts = [call(folder, *hot, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    unseeded = call(folder, *hot)
    seed = unseeded.stderr.removeprefix("seed ").strip()
    assert call(folder, *hot, "--seed", seed).stdout == unseeded.stdout


def test_the_command_samples_with_the_weights_of_validation(tmp_path: Path) -> None:
    (tmp_path / "only_x.py").write_text(ONLY_X, encoding="utf-8")
    run = trained(tmp_path, str(tmp_path / "only_x.py"))
    assert call(run, "--seed", "1").stdout == "abxxxxxxx\n"
    typed = call(run, "--interactive", "--seed", "1", typed="e\n").stdout
    assert "exxxxxxx\n" in typed


@pytest.mark.parametrize("narrow", [("--top-k", "1"), ("--top-p", "0.0001")])
def test_top_k_and_top_p_limit_the_choice(folder: Path, narrow: tuple[str, str]) -> None:
    assert call(folder, "--temperature", "50", *narrow, "--seed", "3").stdout == "abcdefgé\n"


def test_interactive_continues_one_prompt_after_the_other(folder: Path) -> None:
    found = call(folder, "--interactive", "--seed", "1", "--max-tokens", "3", typed="f\n\nde\n")
    assert found.exit_code == 0
    # "f" is continued by g and both bytes of é; the empty line is the prompt of the settings.
    assert found.stdout == "> fgé\n> abcde\n> defg\ufffd\n> \n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-k", "0"), "top_k"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--prompt", ""), "prompt: is empty"),
    ],
)
def test_wrong_options_are_reported_before_a_model_is_loaded(
    options: tuple[str, str], problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        call(Path("no-such-run"), *options)


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a run folder"):
        call(tmp_path)


def test_the_help_comes_from_the_settings() -> None:
    text = " ".join(CliRunner().invoke(sample, ["--help"]).stdout.split())
    assert "0 always takes the likeliest token" in text


FINISH = '''
from fundamentallm import hookimpl, plugin


@plugin
class Finish:
    """Makes x the next letter of the finished model."""

    @hookimpl
    def finish_model(self, run):
        run.model.table.weight.data.zero_()[:, ord("x")] = 1
'''


def test_plugins_and_settings_can_be_changed_for_the_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "finish.py").write_text(FINISH, encoding="utf-8")
    changed = call(folder, "--plugin", str(tmp_path / "finish.py"), "--seed", "1")
    assert changed.stdout == "abxxxxxxx\n"
    assert call(folder, "--set", "sample.max_tokens=2", "--seed", "1").stdout == "abcd\n"
    assert call(folder, "--no-plugin", "sample", "--max-tokens", "2", "--seed", "1").stdout


def test_a_plugin_can_be_left_out_for_the_command(tmp_path: Path) -> None:
    (tmp_path / "only_x.py").write_text(ONLY_X, encoding="utf-8")
    run = trained(tmp_path, str(tmp_path / "only_x.py"))
    assert call(run, "--no-plugin", "only_x", "--seed", "1").stdout == "abcdefgé\n"


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_copied_run_is_sampled_without_its_corpus_its_device_and_its_logger(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tokenizer: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    corpus = tmp_path / "home" / "corpus.txt"
    corpus.parent.mkdir()
    corpus.write_text("the cat and the hat\n" * 40, encoding="utf-8")
    run = tmp_path / "home" / "run"
    text = {"path": str(corpus), "tokenizer": tokenizer, "vocab_size": 270, "context_length": 8}
    train(
        {
            "plugins": ["text", "gpt", "adamw", "ema", "checkpoint", "sample"],
            "run": {"length": 3, "device": "cpu"},
            "text": text,
            "gpt": {"num_layers": 1, "num_heads": 1, "d_model": 8},
            "sample": {"prompt": "the ", "max_tokens": 9},
        },
        run_dir=run,
    )
    before = call(run, "--seed", "1").stdout
    settings = tomli.loads((run / "settings.toml").read_text(encoding="utf-8"))
    settings["plugins"].append("absent_logger")
    settings["absent_logger"] = {"uri": "http://127.0.0.1:1"}
    settings["run"]["device"] = "cuda"
    (run / "settings.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    environment["roles"]["absent_logger"] = "observer"
    (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    shutil.rmtree(tmp_path / "home")
    assert call(copied, "--seed", "1").stdout == before
    warnings = " ".join(record.message for record in caplog.records)
    assert "'cuda'" in warnings
    assert "'absent_logger'" in warnings
    assert not (tmp_path / "home").exists(), "nothing was read or cached again"
