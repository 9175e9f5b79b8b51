"""The contenders of the training step: the same model, the same loss, and honest estimates of memory."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "training_step.py"
SHAPE: dict[str, Any] = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 32}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_contenders_have_one_loss(recompute: bool) -> None:
    pytest.importorskip("transformers")
    from longattn.integrations.huggingface import to_hf

    contender = runpy.run_path(str(_FILE))["contender"]
    windows = torch.randint(0, 50, (1, 25))
    ours, loss = contender("longattn", {**SHAPE, "tie_embeddings": True}, recompute=recompute)
    wanted = loss(windows)
    wanted.backward()
    state = to_hf(ours).state_dict()
    for name in ("sdpa", "eager"):
        theirs, their_loss = contender(name, {**SHAPE, "tie_embeddings": True}, recompute=recompute)
        theirs.load_state_dict(state)
        theirs.train()
        found = their_loss(windows)
        found.backward()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(theirs.model.embed_tokens.weight.grad, ours.embedding.weight.grad)
        assert theirs.config._attn_implementation == name


def test_what_grows_with_the_square_is_foreseen() -> None:
    estimated = runpy.run_path(str(_FILE))["estimated_bytes"]
    assert estimated("longattn", 32768, 30) < 20e9 < 100e9 < estimated("eager", 32768, 30)
