"""The finders of settings on a GPU; plugins/tuning/tests has them on the CPU, and a limit to memory
that a test makes there: a process that is killed."""

from __future__ import annotations

import re
from pathlib import Path

import gpu
import pytest
import tomli
import tomli_w
from click.testing import CliRunner, Result

# Takes most of the GPU's memory away from the processes that try a size, so that few are tried.
LIMIT = '''
import torch
from fundamentallm import hookimpl, plugin


@plugin
class Limit:
    """Limits the memory of the process to some MiB."""

    mib: int

    @hookimpl
    def on_run_start(self):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(self.mib * 2**20 / total)
'''


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "limit.py").write_text(LIMIT)
    tables = {
        "plugins": ["text", "gpt", "adamw", "amp", "grad_clip", "./limit.py"],
        "run": {"length": 100, "device": "cuda"},
        "text": gpu.corpus(tmp_path) | {"context_length": 512, "batch_size": 4},
        "gpt": {"num_layers": 4, "num_heads": 4, "d_model": 256},
        "amp": {"dtype": "bf16"},
        "limit": {"mib": 600},
    }
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def said(result: Result) -> str:
    assert result.exit_code == 0, result.exception or result.output
    return result.output


@pytest.mark.cuda(seconds=100)
def test_the_largest_batch_size_that_fits_into_the_memory_of_a_gpu_is_found(settings: Path) -> None:
    from fundamentallm_tuning.cli import batch_size_finder

    words = [str(settings), "--min", "2", "--max", "64", "--steps", "3"]
    text = said(CliRunner().invoke(batch_size_finder, words))
    fitting = re.search(r"the largest found to fit: (\d+)", text)
    assert fitting is not None, text
    assert 2 <= int(fitting[1]) < 64
    assert "does not fit: " in text
    assert 2 <= tomli.loads(text[text.index("[text]") :])["text"]["batch_size"] <= int(fitting[1])


@pytest.mark.cuda(seconds=10)
def test_a_learning_rate_is_found_on_a_gpu(settings: Path) -> None:
    from fundamentallm_tuning.cli import lr_finder

    text = said(CliRunner().invoke(lr_finder, [str(settings), "--no-plugin", "limit"]))
    assert 1e-6 < tomli.loads(text[text.index("[adamw]") :])["adamw"]["lr"] < 1
