"""What a training run leaves in a checkpoint folder, and how it comes back.

``model.safetensors`` (what a bundle takes over: averaged weights where there are any), ``state.pt`` (the
rest: raw weights, optimiser, RNG; read with ``weights_only``), ``progress.json``, and one
``ledger-<rank>.npy`` a rank. All ranks write into the same checkpoint; whoever restarts unites the ledgers.
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
    """Write this rank's part; rank 0 writes the shared files too."""
    (folder / f"ledger-{rank}.npy").write_bytes(ledger.to_bytes())
    torch.save(_rng(), folder / f"rng-{rank}.pt")
    if rank:
        return
    best = model if average is None else average.module
    save_file({k: v.contiguous() for k, v in best.state_dict().items()}, folder / MODEL)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if average is not None:
        state["average"] = {"weights": average.module.state_dict(), "updates": average.updates}
    torch.save(state, folder / STATE)
    (folder / PROGRESS).write_text(json.dumps(progress))


def load(
    folder: Path, rank: int, *, model: nn.Module, average: Ema | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore in place; returns the progress that was saved."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.module.load_state_dict(state["average"]["weights"])
        average.updates = state["average"]["updates"]
    rng = folder / f"rng-{rank}.pt"
    if rng.exists():
        _set_rng(torch.load(rng, weights_only=True))
    return json.loads((folder / PROGRESS).read_text())


def _rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, rank: int) -> None:
    """Seed what draws at random outside the augmentation (initial weights, dropout)."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    torch.manual_seed(mixed)


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
    """All ranks' ledgers of a checkpoint in one."""
    ledger = Ledger()
    found = [f.path for f in storage.list_files(checkpoint_uri, (".npy",)) if f.path.startswith("ledger-")]
    for name in found:
        ledger = ledger.union(Ledger.from_bytes(storage.read_bytes(storage.join(checkpoint_uri, name))))
    return ledger
