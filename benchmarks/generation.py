"""Generation and its caches: the time of a decode step, endless streams, and Hugging Face's own loop.

python -m benchmarks.generation decode                    a step's time against the context's length
python -m benchmarks.generation stream MODEL TEXT         perplexity and memory over up to a million tokens
python -m benchmarks.generation huggingface FOLDER TEXT   SmolLM2's generate loop, ours and theirs
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from longattn import KVCache, PagedKVCache, Rope, SlidingKVCache, attention_with_cache
from longattn.bench.clock import in_turn, make_clock
from longattn.cache import Cache
from longattn.evaluation import loss_in_short_windows
from longattn.integrations.huggingface import from_hf
from longattn.models import Decoder, GenerationConfig, make_caches
from longattn.models import stream as stream_with
from longattn.training.checkpoint import load_model

_PAGE_SIZE = 64
_CHUNK = 256  # tokens of a stream that are read at once


@click.group()
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU; torch's number by default.")
def main(threads: int | None) -> None:
    """Generation and its caches."""
    if threads is not None:
        torch.set_num_threads(threads)


@main.command()
@click.option("--longest", default=65536, show_default=True, help="Context, in tokens; from 1024 on, by fours.")
@click.option("--window", default=1024, show_default=True, help="Of the ring.")
@click.option("--heads", default=32, show_default=True)
@click.option("--kv-heads", default=8, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--rounds", default=50, show_default=True)
def decode(longest: int, window: int, heads: int, kv_heads: int, head_dim: int, dtype: str, rounds: int) -> None:
    """One token of one layer: append, rotate and attend. Ratios are medians over rounds of calls in turn."""
    shape = (1, kv_heads, head_dim)
    where: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    click.echo(f"{heads} heads on {kv_heads}, D {head_dim}, {dtype}, {torch.get_num_threads()} threads")
    click.echo(f"{'context':>8} {'contiguous':>12} {'paged':>12} {'by contiguous':>14} {f'ring {window}':>12}")
    lengths = itertools.takewhile(lambda n: n <= longest, (1024 * 4**power for power in itertools.count()))
    for length in lengths:
        room = length + 4 * rounds  # the clock may call more than once a round
        caches = [
            KVCache(*shape, capacity=room, **where),
            PagedKVCache(*shape, num_pages=-(-room // _PAGE_SIZE), page_size=_PAGE_SIZE, **where),
            SlidingKVCache(*shape, window=window, **where),
        ]
        calls = [_step(cache, length, heads, where) for cache in caches]
        contiguous, paged, ring = in_turn(calls, make_clock("cpu"), rounds, math.inf)
        ratio = statistics.median(p / c for p, c in zip(paged, contiguous, strict=True))
        times = [f"{statistics.median(seconds) * 1e6:>9.1f} us" for seconds in (contiguous, paged, ring)]
        click.echo(f"{length:>8} {times[0]} {times[1]} {ratio:>14.3f} {times[2]}")


def _step(cache: Cache, length: int, heads: int, where: dict[str, Any]) -> Callable[[], object]:
    """A decode step of a cache that holds `length` tokens."""
    rope = Rope(cache.head_dim)
    drawn = torch.Generator().manual_seed(0)
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        k, v = (torch.randn(1, cache.kv_heads, count, cache.head_dim, generator=drawn, **where) for _ in range(2))
        cache.append(k, v, rope=rope)
    q = torch.randn(1, heads, 1, cache.head_dim, generator=drawn, **where)
    k, v = k[:, :, :1], v[:, :, :1]
    step = partial(attention_with_cache, q, k, v, cache, rope=rope)
    step()
    return step


@main.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=1_000_000, show_default=True, help="How much to read; the text is repeated if short.")
@click.option("--window", type=int, help="The trained length by default, less the sinks.")
@click.option("--sinks", default=4, show_default=True)
@click.option("--compared", default=20_000, show_default=True, help="Tokens whose window is also read anew.")
def stream(model: Path, text: Path, tokens: int, window: int | None, sinks: int, compared: int) -> None:
    """Read a byte stream of any length with rings, at positions in the cache and in the stream.

    Compared with the dense window: the model reads the newest tokens anew, as many as it was trained on.
    """
    decoder = load_model(model)
    trained = decoder.config.max_length
    window = trained - sinks if window is None else window
    content = text.read_bytes()
    ids = torch.frombuffer(bytearray((content * (1 + (tokens + 1) // len(content)))[: tokens + 1]), dtype=torch.uint8)
    ids = ids.long()

    stride = max(1, trained // 4)
    count = trained + (min(compared, tokens) - trained) // stride * stride
    dense = loss_in_short_windows(decoder, ids[None, : count + 1], trained, stride).losses.mean().item()
    click.echo(f"first {count:,} tokens, dense window of {trained}: perplexity {math.exp(dense):.4f}")
    for positions in ("cache", "original"):
        click.echo(f"ring of {window} and {sinks} sinks, positions in the {positions.replace('original', 'stream')}")
        _read_stream(decoder.extended(window=window, sinks=sinks), ids, positions, count)


@torch.no_grad()
def _read_stream(model: Decoder, ids: Tensor, positions: str, compared: int) -> None:
    """Print perplexity, speed and memory at the tokens compared, and ten times on the way."""
    caches = make_caches(model, 1, 1, positions=positions)
    tokens = len(ids) - 1
    marks = sorted({compared, *(tokens * tenth // 10 for tenth in range(1, 11))})
    total, start = 0.0, time.perf_counter()
    for first, last in itertools.pairwise((0, *marks)):
        for at in range(first, last, _CHUNK):
            stop = min(at + _CHUNK, last)
            logits = model(ids[None, at:stop], caches=caches)
            total += F.cross_entropy(logits[0], ids[at + 1 : stop + 1], reduction="sum").item()
        rate = last / (time.perf_counter() - start)
        held = sum(cache.nbytes for cache in caches)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        click.echo(
            f"{last:>12,} tokens: perplexity {math.exp(total / last):.4f}, {rate:,.0f} tokens/s, "
            f"caches {held / 1e6:.2f} MB, process at most {resident / 1024:.1f} MiB"
        )


class _Run(NamedTuple):
    """One run of a generate loop, in seconds."""

    tokens: list[int]
    first: float  # until the first token
    whole: float


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gguf", help="The file in the folder, where the weights are one.")
@click.option("--context", default=8192, show_default=True, help="Tokens, the new ones included.")
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--rounds", default=3, show_default=True)
def huggingface(
    folder: Path, text: Path, gguf: str | None, context: int, new_tokens: int, dtype: str, rounds: int
) -> None:
    """The likeliest tokens after a long prompt: Hugging Face's generate with SDPA, and ours; in turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    where: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    ours = from_hf(theirs).to(getattr(torch, dtype))
    theirs = theirs.to(getattr(torch, dtype))
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"][: context - new_tokens]
    prompt = torch.tensor([ids])

    class Times(BaseStreamer):
        """When tokens came; the prompt comes before them."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: Tensor) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    def by_theirs(count: int) -> _Run:
        times, start = Times(), time.perf_counter()
        found = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=times,
        )
        return _Run(found[0, len(ids) :].tolist(), times.at[1] - start, time.perf_counter() - start)

    def by_ours(count: int) -> _Run:
        start = time.perf_counter()
        pieces = stream_with(ours, [ids], GenerationConfig(max_new_tokens=count))
        tokens, first = [next(pieces).token], time.perf_counter() - start
        tokens += [piece.token for piece in pieces]
        return _Run(tokens, first, time.perf_counter() - start)

    runs: list[tuple[_Run, _Run]] = []
    for number in range(rounds):
        calls = (by_theirs, by_ours) if number % 2 == 0 else (by_ours, by_theirs)
        found = {call: call(new_tokens) for call in calls}
        runs.append((found[by_theirs], found[by_ours]))
    them, us = runs[0]
    equal = next((n for n, (t, u) in enumerate(zip(them.tokens, us.tokens, strict=True)) if t != u), new_tokens)
    threads = torch.get_num_threads()
    click.echo(f"{len(ids):,} tokens of prompt, {new_tokens} new, {dtype}, {threads} threads; medians of {rounds}")
    click.echo(f"the same tokens: {equal} of {new_tokens}")
    for name, of in (
        ("whole loop", lambda run: run.whole),
        ("first token", lambda run: run.first),
        ("each more", lambda run: (run.whole - run.first) / max(1, new_tokens - 1)),
    ):
        seconds = [statistics.median(of(run) for run in side) for side in zip(*runs, strict=True)]
        ratio = statistics.median(of(t) / of(u) for t, u in runs)
        click.echo(
            f"{name:>12}: Hugging Face {seconds[0]:.3f} s, longattn {seconds[1]:.3f} s, {ratio:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
