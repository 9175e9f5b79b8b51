"""Train a decoder on sequences that several processes share: weights by FSDP2, activations by context parallelism.

torchrun --nproc-per-node 2 examples/train_context_parallel.py [folder] [steps] [tokens]

It learns bytes of Python's own standard library. Interrupted and started again, on as many processes or others, it goes
on from the folder's checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longattn.models import Decoder, TransformerConfig
from longattn.training import ByteCorpus, ContextParallel, RandomWindows, TrainingConfig, stdlib_files, train


def main(folder: str = "checkpoint", steps: int = 20, tokens: int = 2048) -> list[float]:
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)  # the same weights everywhere, before each rank keeps its part
    config = TransformerConfig(
        dim=64, layers=4, heads=4, kv_heads=2, max_length=tokens, pattern="SSSL", window=256, sinks=4
    )
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("context",))
    model = ContextParallel(Decoder(config).to(device), mesh, layout="zigzag")

    first = dist.get_rank() == 0
    batches = RandomWindows(ByteCorpus(stdlib_files()), batch_size=1, length=tokens)
    training = TrainingConfig(steps=steps, warmup=5, save_every=10, precision="float32")
    checkpoint = Path(folder)
    resume = (checkpoint / ".metadata").exists()
    losses = train(model, batches, training, checkpoint=checkpoint, resume=resume, show_progress=first).losses
    if first and losses:
        print(f"{dist.get_world_size()} ranks, {tokens} tokens: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    dist.barrier()  # gloo's threads let go of their last tensors: they must not want the interpreter when it has ended
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
