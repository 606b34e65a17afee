"""A whole task in one file: scikit-learn's digits, a small network, accuracy in validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Batch, Data, Progress, Run, field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


@plugin
class Digits:
    """Classify 8x8 images of handwritten digits with a network of one hidden layer."""

    produces = ("train/accuracy", "val/accuracy")

    batch_size: int = field(default=64, validator=ge(1))
    """Images in a micro-batch."""
    hidden: int = field(default=128, validator=ge(1))
    """Units in the hidden layer."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return Images(self.batch_size, run.device, run.seed_for("data"))

    @hookimpl
    def build_model(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(64, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10))

    @hookimpl
    def forward(self, run: Run, batch: Batch) -> Tensor:
        from torch.nn.functional import cross_entropy

        images, labels = batch.data
        logits = run.module(images)
        run.log(f"{run.phase}/accuracy", (logits.argmax(1) == labels).float().mean())
        return cross_entropy(logits, labels)


class Images:
    """The images as tensors: every fifth is held out, the others are shuffled in each epoch."""

    fingerprint = "sklearn-digits"

    def __init__(self, batch_size: int, device: str, seed: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        found = load_digits()
        self.images = torch.tensor(found.data / 16.0, dtype=torch.float32, device=device)
        self.labels = torch.tensor(found.target, device=device)
        indices = torch.arange(len(self.labels))
        self.held_out, self.trained = indices[::5], indices[indices % 5 > 0]
        self.batch_size, self.seed = batch_size, seed
        self.epoch_samples = len(self.trained)

    def batches(self, progress: Progress) -> Iterator[Batch]:
        """Yield micro-batches without end, an epoch after the other."""
        import torch

        epoch, first = divmod(progress.samples, self.epoch_samples)
        while True:
            # A pure function of seed and epoch: a resumed run finds its place by itself.
            order = torch.Generator().manual_seed(self.seed + epoch)
            shuffled = self.trained[torch.randperm(self.epoch_samples, generator=order)]
            while first < self.epoch_samples:
                yield self.batch(shuffled[first : first + self.batch_size])
                first += self.batch_size
            epoch, first = epoch + 1, 0

    def validation(self) -> Mapping[str, list[Batch]]:
        """Return every fifth image, in batches."""
        return {"val": [self.batch(part) for part in self.held_out.split(self.batch_size)]}

    def batch(self, indices: Tensor) -> Batch:
        """Return the images at some indices, of shape (n, 64), and their labels (n,)."""
        count = len(indices)
        return Batch((self.images[indices], self.labels[indices]), count, count, tokens=0)
