"""What is measured: GPT-2 of 124 million parameters, or a tiny model to execute every line."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import handwritten
import numpy as np
from nanogpt import Model as NanoGPT
from roofline import Model

from fundamentallm_gpt import Gpt
from fundamentallm_gpt.model import GPT
from fundamentallm_text.tokenizers import learn_bpe

if TYPE_CHECKING:
    from device import Device

PAD = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of the model, of the data and of the measurements."""

    layers: int
    heads: int
    width: int
    vocab: int
    context: int
    batch: int
    """Windows in a micro-batch of the run and of the handwritten loop."""
    nano_batch: int
    """The same for the loop in nanoGPT's way."""
    window: int
    """Windows in a step where a run is compared with nanoGPT's way."""
    rounds: int
    turn: int
    long: int
    """Consecutive steps whose times are measured one by one."""
    half: int
    """Steps between an asynchronous save and a plain one."""
    saves: int
    small: int
    """Steps of a run with micro-batches of one window."""
    product: int
    """The size of the square matrices whose product is timed."""
    copied: int
    """The bytes whose copy is timed."""
    characters: int
    """The text that tokens are made from."""

    @property
    def gpt(self) -> dict[str, Any]:
        """The table of the plugin gpt."""
        return {
            "num_layers": self.layers,
            "num_heads": self.heads,
            "d_model": self.width,
            "bias": False,
            "activation": "gelu_tanh",
            "pad_vocab_to_multiple_of": PAD,
        }

    @property
    def rows(self) -> int:
        """The rows of the embedding, with padding."""
        return -(-self.vocab // PAD) * PAD

    @property
    def model(self) -> Model:
        """The sizes that the roofline depends on."""
        return Model(self.layers, self.width, self.rows, self.context)

    def by_hand(self, device: Device) -> GPT:
        """Return the model of the run, for the handwritten loop."""
        table = dict(self.gpt)
        pad = table.pop("pad_vocab_to_multiple_of")
        shape = Gpt(**table).shape()
        made = GPT(shape, vocab_size=self.vocab, context_length=self.context, pad_vocab_to=pad)
        return made.to(device.kind)

    def nanogpt(self, device: Device) -> NanoGPT:
        """Return the model as nanoGPT publishes it."""
        return NanoGPT(self.layers, self.heads, self.width, self.rows, self.context).to(device.kind)


GPT2 = Size(
    layers=12,
    heads=12,
    width=768,
    vocab=50257,
    context=1024,
    batch=32,
    nano_batch=12,
    window=480,
    rounds=24,
    turn=10,
    long=500,
    half=40,
    saves=6,
    small=200,
    product=8192,
    copied=1 << 32,
    characters=20_000_000,
)
TINY = Size(
    layers=2,
    heads=2,
    width=32,
    vocab=300,
    context=16,
    batch=4,
    nano_batch=2,
    window=8,
    rounds=2,
    turn=2,
    long=10,
    half=4,
    saves=2,
    small=6,
    product=64,
    copied=1 << 16,
    characters=50_000,
)


def settings(size: Size, device: Device, tokens: Path, length: int) -> dict[str, Any]:
    """Return the settings of the run: the dozen plugins of a careful user, and the model."""
    return {
        "plugins": [
            *("text", "gpt", "adamw", "grad_clip", "lr_schedule", "accumulate", "amp", "compile"),
            *("checkpoint", "jsonl", "console", "progress", "throughput", "gc", "crash_report"),
            "early_stopping",
        ],
        "run": {"length": length, "log_every": handwritten.LOG_EVERY, "device": device.kind},
        "text": {
            "path": str(tokens),
            "vocab_size": size.vocab,
            "context_length": size.context,
            "batch_size": size.batch,
            "validation_fraction": 0.0,
            "cache_dir": str(tokens.parent / "cache"),
        },
        "gpt": size.gpt,
        "adamw": {
            "lr": handwritten.LR,
            "beta1": handwritten.BETAS[0],
            "beta2": handwritten.BETAS[1],
            "weight_decay": handwritten.WEIGHT_DECAY,
        },
        "grad_clip": {"max_norm": handwritten.MAX_NORM},
        "lr_schedule": {"warmup": f"{max(min(handwritten.WARMUP, length // 10), 1)} steps"},
        "accumulate": {"microbatches": 1},
        "amp": {"dtype": "bf16"},
        "compile": dict(device.compiler),
        "checkpoint": {"every": handwritten.NEVER, "save_final": False},
        "throughput": {"table": False},
        "gc": {"every": handwritten.COLLECT_EVERY},
        "early_stopping": {"monitor": "train/loss", "patience": handwritten.NEVER},
    }


def token_file(kind: str, size: Size, work: Path) -> Path:
    """Return a file of uint16 tokens: of the standard library by BPE, or random; make it once."""
    path = work / f"{kind}-{size.vocab}.bin"
    if not path.exists():
        tokens = library_tokens(size) if kind == "stdlib" else random_tokens(size)
        partial = path.with_suffix(".partial")
        tokens.astype(np.uint16).tofile(partial)
        partial.rename(path)
    return path


def library_tokens(size: Size) -> np.ndarray:
    """Return the tokens of the sources of Python's standard library, by a BPE learned from them."""
    chunks: list[str] = []
    left = size.characters
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if left > 0 and "site-packages" not in path.parts:
            chunks.append(path.read_text(encoding="utf-8", errors="ignore")[:left])
            left -= len(chunks[-1])
    tokenizer = learn_bpe(chunks, size.characters, size.vocab, "")
    return tokenizer.encode_chunks(chunks)


def random_tokens(size: Size) -> np.ndarray:
    """Return random tokens, as many as the text has characters divided by four."""
    return np.random.default_rng(0).integers(size.vocab, size=size.characters // 4)
