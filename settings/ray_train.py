"""Train with the processes of Ray Train.

``python settings/ray_train.py SETTINGS FOLDER [PROCESSES]``: SETTINGS has to list ``ddp`` or
``fsdp``, and FOLDER has to be one that all machines share. Ray starts the processes, and starts
them again when one is lost: the run then continues from its newest checkpoint. Needs
``pip install "ray[train]"``.
"""

import sys
from pathlib import Path
from typing import Any


def train_in_worker(chosen: dict[str, Any]) -> None:
    """Train as one of the processes; Ray has joined them already."""
    import fundamentallm

    fundamentallm.train(chosen["settings"], run_dir=chosen["folder"])


def main(settings: str, folder: str, processes: int = 2) -> None:
    """Start the processes and wait until the run is over."""
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    places = {"settings": str(Path(settings).resolve()), "folder": str(Path(folder).resolve())}
    trainer = TorchTrainer(
        train_in_worker,
        train_loop_config=places,
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
