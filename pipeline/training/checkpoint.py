"""The files of a checkpoint, written and read.

- ``model.safetensors``: the weights that a bundle takes over: averaged ones where there are any
- ``state.pt``: raw weights and optimiser, the averaged weights too; read with ``weights_only``
- ``progress.json``: how far the run has come
- ``ledger-<rank>.npy``, ``rng-<rank>.pt``: the rows that a rank has used, and its random state

All ranks write into the same checkpoint; a restart unites the ledgers, whatever the number of ranks then.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline import storage
from pipeline.stream.run_stream import Ledger
from pipeline.training.optimizer import Ema

MODEL, STATE, PROGRESS = "model.safetensors", "state.pt", "progress.json"


def save(
    folder: Path,
    rank: int,
    ledger: Ledger,
    *,
    model: nn.Module,
    average: Ema | None,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write this rank's part; rank 0 writes the shared files too.

    Args:
        folder: Where.
        rank: Of this worker.
        ledger: The rows that it has used.
        model: The bare module with the raw weights.
        average: The averaged weights, if there are any.
        optimizer: Its state is saved.
        progress: Content of progress.json.
    """
    (folder / f"ledger-{rank}.npy").write_bytes(ledger.to_bytes())
    torch.save(_random_state(), folder / f"rng-{rank}.pt")
    # The weights are the same on every rank, so one of them writes the rest.
    if rank:
        return
    bundled = model if average is None else average.module
    save_file({name: tensor.contiguous() for name, tensor in bundled.state_dict().items()}, folder / MODEL)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if average is not None:
        state["average"] = {"weights": average.module.state_dict(), "updates": average.updates}
    torch.save(state, folder / STATE)
    (folder / PROGRESS).write_text(json.dumps(progress))


def load(
    folder: Path, rank: int, *, model: nn.Module, average: Ema | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, average, optimiser and random state in place; returns the progress that was saved."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.module.load_state_dict(state["average"]["weights"])
        average.updates = state["average"]["updates"]
    # A group with more workers than before has ranks without a random state of their own: they keep their seed's.
    rng = folder / f"rng-{rank}.pt"
    if rng.exists():
        _set_random_state(torch.load(rng, weights_only=True))
    return json.loads((folder / PROGRESS).read_text())


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, rank: int) -> None:
    """Seed what draws at random outside the augmentation (initial weights, dropout)."""
    rank_seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(rank_seed)
    torch.manual_seed(rank_seed)


def latest(run_uri: str) -> str | None:
    """The checkpoint that Ray will hand to the workers of the run at ``run_uri``; None before the first.

    Its controller's snapshot decides, not the newest folder: with asynchronous upload they may differ.
    """
    snapshot = storage.join(run_uri, "checkpoint_manager_snapshot.json")
    if not storage.exists(snapshot):
        return None
    state = json.loads(storage.read_bytes(snapshot))
    newest = state.get("latest_checkpoint_result") or {}
    name = newest.get("checkpoint_dir_name")
    return storage.join(run_uri, name) if name else None


def read_ledger(checkpoint_uri: str) -> Ledger:
    """The union of all ranks' ledgers of a checkpoint."""
    ledger = Ledger()
    files = storage.list_files(checkpoint_uri, (".npy",))
    for name in [file.path for file in files if file.path.startswith("ledger-")]:
        ledger = ledger.union(Ledger.from_bytes(storage.read_bytes(storage.join(checkpoint_uri, name))))
    return ledger
