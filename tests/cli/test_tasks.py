"""Every objective and task from the command line: a tokenizer, pretraining, fine-tuning, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from longattn.cli import main
from longattn.cli.card import read_card
from longattn.training import load_checkpoint

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")

SHAPE = ("--dim", 32, "--layers", 1, "--heads", 2, "--batch-size", 4, "--precision", "float32")
TINY = (*SHAPE, "--context", 24, "--steps", 2)
TASKS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"{word} {n}", "label": word} for n in range(12) for word in ("odd", "even")],
    "tag": [{"tokens": ["one", str(n)], "labels": ["word", "number"]} for n in range(20)],
    "translate": [{"source": str(n), "target": f"number {n}"} for n in range(20)],
    "embed": [{"text": str(n), "other": f"number {n}"} for n in range(20)],
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for n in range(30):
        (folder / f"{n}.txt").write_text(f"Document number {n} says that it says nothing else. " * 4)
    return folder


@pytest.fixture(scope="module")
def wordpiece(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert "token ids" in done("tokenizer", texts, "--out", out, "--kind", "wordpiece", "--vocab-size", 90, "--clean")
    return out


@pytest.fixture
def examples(tmp_path: Path) -> Any:
    def write(task: str) -> Path:
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(example) + "\n" for example in TASKS[task]))
        return path

    return write


def test_a_gpt_of_trained_tokens_writes_and_teaches(texts: Path, tmp_path: Path) -> None:
    tokenizer, gpt = tmp_path / "bpe.json", tmp_path / "gpt"
    done("tokenizer", texts, "--out", tokenizer, "--vocab-size", 280)
    command = ("train", texts, "--tokenizer", tokenizer, *TINY)
    assert "perplexity" in done(*command, "--out", gpt, "--recompute")
    assert load_checkpoint(gpt).settings["training"]["recompute"] is True
    assert done("generate", gpt, "Document", "--max-new-tokens", 3)
    output = done(*command, "--out", tmp_path / "student", "--teacher", gpt)
    assert "held-out loss" in output
    assert load_checkpoint(tmp_path / "student").settings["loss"]["share"] == 0.5


@pytest.mark.parametrize("options", [("masked", "--next-sentence"), ("infilling",), ("spans",)])
def test_other_objectives(texts: Path, wordpiece: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "model"
    assert "held-out loss" in done(
        "train", texts, "--out", out, "--objective", *options, "--tokenizer", wordpiece, *TINY
    )
    card = read_card(out)
    assert card is not None and card.purpose == options[0]
    assert type(card.load(out)).__name__ == ("MaskedLM" if options[0] == "masked" else "EncoderDecoder")


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str, texts: Path, wordpiece: Path, examples: Any, tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "model"
    objective = "infilling" if task == "translate" else "masked"
    done("train", texts, "--out", start, "--objective", objective, "--tokenizer", wordpiece, *TINY)
    settings = ("--batch-size", 4, "--precision", "float32", "--held-out", 0.3, "--context", 16)
    command = ("fine-tune", task, examples(task), "--start", start, *settings)
    figure = {"translate": "BLEU", "embed": "find their other"}.get(task, "macro F1")
    assert figure in done(*command, "--out", out, "--steps", 4)
    done(*command, "--out", tmp_path / "half", "--steps", 4, "--save-every", 2)
    assert "4 steps" in done(*command, "--out", tmp_path / "half", "--steps", 4, "--save-every", 2, "--resume")
    answer = done("predict", out, "one 7", "even 8", "--context", 16).splitlines()
    if task == "translate":
        return
    assert len(answer) == 2
    assert (answer[0][0] == "1") if task == "embed" else answer[0].split("\t")[0].count("/") == (2 * (task == "tag"))


def test_filled_masks(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "bert"
    done("train", texts, "--out", out, "--objective", "masked", *TINY)
    assert len(done("predict", out, "Document [MASK]umber [MASK]").splitlines()) == 2
    assert "a [MASK] in each" in run("predict", out, "no mask").output
    assert "an empty one at place 1" in run("predict", out, "a [MASK]", " ").output
    (tmp_path / "bert.json").write_text("{")
    assert "complete bert.json" in run("predict", out, "text").output


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], (), "at least one example"),
        (["{"], (), "line 1: expected a JSON object"),
        (['{"text": "", "label": "a"}'], (), "not empty"),
        (['{"text": "a", "label": "a"}'] * 2, ("--held-out", 0), "at least two labels"),
        (['{"text": "a", "label": "a"}'], (), "both sides"),
        (['{"text": "a", "label": "a"}'], ("--held-out", 1), "in [0, 1)"),
        (['{"text": "a", "label": "a"}'], ("--resume",), "resume from"),
    ],
)
def test_bad_examples_are_told(lines: list[str], options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "examples").write_text("\n".join(lines))
    result = run("fine-tune", "classify", tmp_path / "examples", "--out", tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.output and result.output.startswith("Error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--next-sentence",), "--objective masked"),
        (("--objective", "masked", "--teacher", "x"), "--objective causal"),
        (("--objective", "masked", "--style", "llama"), "architecture"),
        (("--tokenizer", "nowhere.json"), "a file that exists"),
    ],
)
def test_options_that_do_not_fit_are_told(
    options: tuple[object, ...], message: str, texts: Path, tmp_path: Path
) -> None:
    result = run("train", texts, "--out", tmp_path / "out", *TINY, *options)
    assert result.exit_code == 1 and message in result.output and result.output.startswith("Error: ")


def test_only_tasks_are_predicted(texts: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    done("train", texts, "--out", pair, "--objective", "infilling", *TINY)
    assert "a model for classify, tag, translate, embed, masked" in run("predict", pair, "7").output


def test_a_start_of_another_kind_is_told(texts: Path, examples: Any, tmp_path: Path) -> None:
    start = tmp_path / "pair"
    done("train", texts, "--out", start, "--objective", "infilling", *TINY)
    command = ("fine-tune", "classify", examples("classify"), "--out", tmp_path / "out", "--start")
    assert "an encoder (masked)" in run(*command, start).output
    (tmp_path / "pair.json").unlink()
    assert "with the .json beside it" in run(*command, start).output
