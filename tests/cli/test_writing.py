"""What commands leave on disk: refused ones nothing, others whole files; and the state that they use is their own."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from longattn.cli import main
from longattn.cli.card import card_path, read_card
from longattn.errors import InvalidInput
from longattn.files import locked
from longattn.models import SequenceClassifier, TransformerConfig
from longattn.training import Checkpoint, RandomWindows, load_checkpoint, load_model, save_checkpoint
from longattn.training.data import held_out_sides, split_files

SHAPE = ("--dim", 32, "--layers", 1, "--heads", 2, "--precision", "float32")
TINY = (*SHAPE, "--context", 16, "--batch-size", 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(message: str, *arguments: object) -> None:
    """The command ends with code 1 and one line that holds the message, and no file changes."""
    before = contents()
    result = run(*arguments)
    output = result.output.strip()
    assert result.exit_code == 1 and message in output and output.splitlines()[-1].startswith("Error: "), output
    assert contents() == before


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    for n in range(6):
        (tmp_path / "t" / f"{n}.txt").write_text(f"Document {n} says that it says nothing else. " * 8)
    return tmp_path


def write_examples(name: str, *labels: object) -> None:
    rows = [{"text": f"word {n}", "label": labels[n % len(labels)]} for n in range(40)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_refused_resume_changes_nothing() -> None:
    write_examples("a.jsonl", "bad", "good")
    write_examples("b.jsonl", "no", "yes")
    settings = (*SHAPE, "--steps", 2, "--held-out", 0, "--context", 16)
    done("fine-tune", "classify", "a.jsonl", "--out", "m", *settings)
    refused("--resume: labels", "fine-tune", "classify", "b.jsonl", "--out", "m", *settings, "--resume")
    refused("checkpoint's config", "fine-tune", "classify", "a.jsonl", "--out", "m", *settings[:6], "--resume")
    refused("--out", "fine-tune", "classify", "a.jsonl", "--out", "m", *settings)


def test_whole_numbers_are_labels() -> None:
    write_examples("a.jsonl", 0, 1)
    done("fine-tune", "classify", "a.jsonl", "--out", "m", *SHAPE, "--steps", 1, "--context", 16)
    card = read_card(Path("m"))
    assert card is not None and card.labels == ("0", "1")
    assert done("predict", "m", "word 1")[0] in "01"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_examples_may_hold_line_separators(separator: str) -> None:
    rows = [{"text": f"one{separator}two {n}", "label": "ab"[n % 2]} for n in range(40)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path("e.jsonl").write_text(text, encoding="utf-8", newline="")
    assert "held out" in done("fine-tune", "classify", "e.jsonl", "--out", "m", *SHAPE, "--steps", 1, "--context", 16)


def test_what_commands_write_is_not_text() -> None:
    command = ("train", ".", *TINY, "--steps", 2, "--held-out", 0)
    first, second = done(*command, "--out", "a"), done(*command, "--out", "b")
    size = first.partition("weights; ")[2].partition(" bytes")[0]
    assert f"{size} bytes in 6 files" in second
    assert "2 files are not text and left out: a, a.json" in second
    assert f"{size} bytes in 6 files" in done(*command, "--out", "a", "--resume")
    refused("a binary file", "train", "a", *TINY, "--out", "c")


def test_a_resume_over_other_texts_names_them() -> None:
    command = ("train", "t", *TINY, "--steps", 2, "--held-out", 0, "--out", "m")
    done(*command)
    Path("t/0.txt").rename("t/9.txt")
    refused("1 new: 9.txt; 1 gone: 0.txt", *command, "--resume")
    Path("t/9.txt").rename("t/0.txt")
    Path("t/1.txt").write_text(Path("t/1.txt").read_text().upper())
    refused("1 changed: 1.txt", *command, "--resume")


def test_tokens_belong_to_texts_tokenizer_and_settings() -> None:
    command = ("train", "t", *TINY, "--steps", 2, "--held-out", 0, "--out", "m")
    done(*command, "--objective", "masked")
    tokens = Path("m.tokens").read_bytes()
    refused("--resume: purpose", *command, "--objective", "spans", "--resume")
    refused("--resume: next_sentence", *command, "--objective", "masked", "--next-sentence", "--resume")
    done(*command, "--objective", "masked", "--resume")
    for path in (Path("m"), Path("m.json")):
        path.unlink()
    for file in Path("t").iterdir():  # a run that was killed left m.tokens; the texts are other ones now
        file.write_text(file.read_text().upper())
    done(*command, "--objective", "masked")
    assert Path("m.tokens").read_bytes() != tokens


def test_an_interrupt_before_the_first_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    before = contents()
    for where in ("longattn.training.loop._optimizer", "longattn.cli.train.write_token_file"):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupt)
            result = run("train", "t", *TINY, "--objective", "masked", "--steps", 2, "--held-out", 0, "--out", "m")
        assert result.exit_code == 130 and "interrupted; nothing was saved" in result.output, result.output
        assert contents() == before


def test_an_interrupted_save_leaves_the_older_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    save, saves = safetensors.torch.save_file, []

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        saves.append(arguments)
        if len(saves) == 2:
            raise KeyboardInterrupt
        save(*arguments, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    result = run("train", "t", *TINY, "--steps", 5, "--save-every", 2, "--held-out", 0, "--out", "m")
    assert result.exit_code == 130 and "interrupted; 2 steps are saved in m: " in result.output
    assert load_checkpoint(Path("m")).progress["step"] == 2
    assert sorted(path.name for path in Path().iterdir()) == ["m", "m.json", "t"]


def test_an_error_in_training_saves_the_steps_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = RandomWindows.batch

    def fail(self: RandomWindows, step: int) -> Tensor:
        if step == 3:
            raise InvalidInput("document", "at least 17 bytes", "a file that is gone")
        return batch(self, step)

    monkeypatch.setattr(RandomWindows, "batch", fail)
    result = run("train", "t", *TINY, "--steps", 5, "--held-out", 0, "--out", "m")
    assert result.exit_code == 1 and "ended by an error; 3 steps are saved in m: " in result.output
    assert result.output.splitlines()[-1].startswith("Error: document: ")
    monkeypatch.undo()


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize(
    "command",
    [
        ("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--out", "m"),
        ("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--objective", "masked", "--out", "m"),
        ("tokenizer", "t", "--vocab-size", 300, "--out", "m"),
    ],
)
def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(command: tuple[object, ...]) -> None:
    if command[0] == "tokenizer":
        pytest.importorskip("tokenizers")
    with small_disk(2000):
        refused("", *command)
    done(*command)


def test_two_runs_on_one_out_are_refused() -> None:
    command = ("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--out", "m")
    with locked(Path("m")):
        refused("no other running command writes", *command)
    Path(".m.7.tmp").touch()
    done(*command)
    assert sorted(path.name for path in Path().iterdir()) == ["m", "m.json", "t"]


@pytest.mark.parametrize("other", ["m.json", "m.tokens"])
def test_other_files_beside_out_are_not_overwritten(other: str) -> None:
    Path(other).write_text('{"mine": 1}')
    refused(f"no other file at {other}", "train", "t", *TINY, "--steps", 1, "--objective", "masked", "--out", "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out", 0.9999), "at least 1 of the files on both sides, got 0.9999 of 6 files: 0 for training"),
        (("--held-out", 0.5, "--context", 3000), "a document of at least 3001 bytes"),
        (("--objective", "masked", "--context", 4, "--held-out", 0), "length: expected an int >= 5"),
        (("--steps", 1, "--learning-rate", -1), "learning_rate"),
        (("--tokenizer", "t/0.txt"), "a complete tokenizer.json"),
    ],
)
def test_what_is_refused_leaves_nothing(options: tuple[object, ...], message: str) -> None:
    refused(message, "train", "t", *TINY, "--out", "m", *options)


def test_held_out_texts_must_be_large_enough_before_training() -> None:
    command = ("train", "t", *TINY, "--steps", 1, "--held-out", 0.5, "--out", "m")
    for path in split_files(sorted(Path("t").iterdir()), 0.5)[1]:
        path.write_text("short")
    refused("a held-out file of at least 17 bytes for --context, or 0, got", *command)
    for path in Path("t").iterdir():
        path.unlink()
    documents = [f"Document {n} says nothing." for n in range(20)]
    ids = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16).tobytes() for text in documents]
    sides = held_out_sides((hashlib.sha256(one).digest() for one in ids), 0.5, "documents")
    for n in (*np.flatnonzero(sides)[:1], *np.flatnonzero(~sides)[:3]):
        Path(f"t/{n}").write_text(documents[n])
    pairs = (*command, "--objective", "masked", "--next-sentence")
    refused("--held-out: documents: expected at least two of two tokens, for pairs, got 1", *pairs)


@pytest.mark.parametrize("task", ["classify", "translate"])
def test_extras_are_asked_for_before_training(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    gone = {"classify": "sklearn", "translate": "sacrebleu"}[task]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == gone else find(name, *rest))
    rows = {"classify": {"text": "a", "label": "b"}, "translate": {"source": "a", "target": "b"}}
    Path("e.jsonl").write_text(json.dumps(rows[task]))
    refused("longattn[metrics]", "fine-tune", task, "e.jsonl", "--out", "m")


@pytest.mark.parametrize("command", [("train", "--tokenizer", "bytes", "--clean"), ("tokenizer",)])
def test_texts_that_are_not_utf8_are_named(command: tuple[str, ...]) -> None:
    if command[0] == "tokenizer":
        pytest.importorskip("tokenizers")
    Path("t/3.txt").write_bytes(b"caf\xe9 " * 20)
    message = "t/3.txt: expected a text in UTF-8, got byte 0xe9 at offset 3"
    refused(message, command[0], "t", "--out", "m", *command[1:], *(TINY if command[0] == "train" else ()))
    if command[0] == "train":
        done("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--out", "bytes")  # any encoding


CARD: dict[str, Any] = {"purpose": "classify", "tokenizer": "bytes", "labels": ["a", "b"], "next_sentence": False}


@pytest.mark.parametrize(
    "card",
    [
        "[" * 100_000,
        "[]",
        *(json.dumps({key: value for key, value in CARD.items() if key != name}) for name in CARD),
        *(json.dumps({**CARD, name: value}) for name in CARD for value in (7, [[]], {"a": []}, "x")),
        json.dumps({**CARD, "labels": ["a", "a"]}),
        json.dumps({**CARD, "labels": ["a", "b", "c"]}),
        json.dumps({**CARD, "purpose": "causal", "labels": []}),
        json.dumps({**CARD, "texts": ["a"]}),
        b'{"purpose": "\xff"}',
    ],
)
def test_damaged_cards_are_refused(card: str | bytes) -> None:
    config = TransformerConfig.style("bert", dim=16, layers=1, heads=2, max_length=16, vocab_size=261)
    save_checkpoint(Path("m"), Checkpoint(config, SequenceClassifier(config, 2).state_dict()))
    card_path(Path("m")).write_text(json.dumps(CARD))
    done("predict", "m", "text", "--context", 8)
    card_path(Path("m")).write_bytes(card if isinstance(card, bytes) else card.encode())
    refused("", "predict", "m", "text", "--context", 8)


def test_a_tokenizer_with_ids_past_the_vocabulary_is_refused() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    config = TransformerConfig.style("bert", dim=16, layers=1, heads=2, max_length=16, vocab_size=8)
    save_checkpoint(Path("m"), Checkpoint(config, SequenceClassifier(config, 2).state_dict()))
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "word": 8}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    card_path(Path("m")).write_text(json.dumps({**CARD, "tokenizer": json.loads(made.to_str())}))
    refused("ids below 8", "predict", "m", "word")


@pytest.fixture
def base(folder: Path) -> Path:
    done("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--out", "base")
    return Path("base")


def test_a_refused_fine_tune_leaves_no_tokens(base: Path) -> None:
    Path("A.txt").write_text("AAAA " * 300)
    Path("B.txt").write_text("the quick brown fox " * 100)
    command = ("extend", base, "--method", "yarn", "--factor", 2, "--steps", 3, "--precision", "float32")
    refused("tokens", *command, "--text", "A.txt", "--tokens", 1, "--out", "o")  # found when the text is encoded
    refused("learning_rate", *command, "--text", "A.txt", "--learning-rate", -1, "--out", "o")
    refused("o.training", *command, "--text", "A.txt", "--resume", "--out", "o")
    weights = []
    for text, out in (("B.txt", "o"), ("B.txt", "b"), ("A.txt", "a")):
        done(*command, "--text", text, "--learning-rate", 0.05, "--warmup", 0, "--out", out)
        weights.append(load_model(Path(out)).embedding.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_fine_tune_resumes_with_its_own_text_and_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longattn.training import loop

    Path("A.txt").write_text("AAAA " * 300)
    command = ["extend", "--method", "yarn", "--factor", 2, "--steps", 4, "--save-every", 2, "--out", "o"]

    def stop(path: Path, checkpoint: Checkpoint) -> None:
        save_checkpoint(path, checkpoint)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        interrupted = run(*command, base, "--text", "A.txt")
    assert interrupted.exit_code == 130 and "2 steps are saved in o.training" in interrupted.output
    Path("A.txt").rename("B.txt")
    Path("B.txt").write_text("BBBB " * 300)
    refused("1 new: B.txt; 1 gone: A.txt", *command, base, "--text", "B.txt", "--resume")
    Path("A.txt").write_text("AAAA " * 300)
    done("train", "t", *TINY, "--steps", 1, "--held-out", 0, "--seed", 7, "--out", "other")
    refused("the weights that it was started with", *command, "other", "--text", "A.txt", "--resume")
    refused("a new file", *command, base, "--text", "A.txt")
    done(*command, base, "--text", "A.txt", "--resume")
    assert not list(Path().glob("o.t*")) and not list(Path().glob("o.training*"))
