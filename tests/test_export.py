"""torch.export: a module that attends becomes a program of any batch and length, that can be saved and loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longattn
from longattn import Rope

ROOT = Path(__file__).resolve().parent.parent


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 3 * 16)
        self.sinks = torch.nn.Parameter(torch.randn(2))
        self.rope = Rope(8, scaling=longattn.scaling.YaRN(4.0, 32))

    def forward(self, x: Tensor, key_lens: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        keywords = {"causal": True, "window": 5, "sinks": 1, "align": "start", "key_lens": key_lens}
        return (
            longattn.attention(q, k, v, rope=self.rope, sink_logits=self.sinks, **keywords).transpose(1, 2).flatten(2)
        )


def inputs(batch: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, n, 16), torch.randint(1, n + 1, (batch,), dtype=torch.int32)


def exported(block: Block, strict: bool) -> torch.export.ExportedProgram:
    batch, n = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("n", min=1, max=1 << 20)
    shapes = {"x": {0: batch, 1: n}, "key_lens": {0: batch}}
    return torch.export.export(block, inputs(3, 11), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_any_length(strict: bool) -> None:
    block = Block()
    program = exported(block, strict)
    if not strict:
        program = program.run_decompositions()  # the operator is no composition, and stays whole
    attention = [node for node in program.graph.nodes if node.target is torch.ops.longattn.attention.default]
    assert len(attention) == 1
    for batch, n in ((3, 11), (1, 1), (5, 300)):
        x, key_lens = inputs(batch, n)
        torch.testing.assert_close(program.module()(x, key_lens), block(x, key_lens))


def test_save_and_load(tmp_path: Path) -> None:
    """In a process that imports longattn, which registers the operator, and knows no module of ours; to train, too."""
    block = Block()
    x, key_lens = inputs(2, 40)
    torch.export.save(exported(block, False), tmp_path / "block.pt2")
    out = block(x, key_lens)
    out.square().sum().backward()
    torch.save((x, key_lens, out.detach(), block.sinks.grad), tmp_path / "case.pt")
    program = (
        "import sys, torch, longattn\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "x, key_lens, expected, dsinks = torch.load(sys.argv[2])\n"
        "out = program(x, key_lens)\n"
        "torch.testing.assert_close(out, expected)\n"
        "out.square().sum().backward()\n"
        "torch.testing.assert_close(program.sinks.grad, dsinks)\n"
    )
    paths = [str(tmp_path / name) for name in ("block.pt2", "case.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, check=True)
