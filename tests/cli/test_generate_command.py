"""`longattn generate`: what a saved model writes, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from longattn.cli import main
from longattn.models import Decoder, GenerationConfig, TransformerConfig, decode_bytes
from longattn.models import generate as generate_with
from longattn.training.checkpoint import Checkpoint, load_model, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Decoder(TransformerConfig(dim=32, layers=2, heads=2, max_length=32))
    model.embedding.weight.data[128:] -= 1.0
    save_checkpoint(tmp_path / "model", Checkpoint(model.config, model.state_dict()))
    return tmp_path / "model"


def expected(checkpoint: Path, prompt: str, count: int) -> str:
    [found] = generate_with(
        load_model(checkpoint), [list(prompt.encode())], GenerationConfig(max_new_tokens=count), decode=decode_bytes
    )
    return found.text or ""


def test_goes_on_from_prompts_and_files(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("from a file")
    result = run(checkpoint, "Hello", "--file", tmp_path / "prompt", "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n---\n") == [
        expected(checkpoint, "Hello", 9),
        expected(checkpoint, "from a file", 9) + "\n",
    ]
    assert "18 tokens; " in result.stderr and "tokens/s" in result.stderr and "16 tokens of prompts" in result.stderr


def test_reads_a_prompt_from_standard_input(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(checkpoint), "--max-new-tokens", "9"]
    for prompts, text in ((["-"], b"Hello"), ([], b"Hello"), ([], b"two\r\nlines\n")):
        result = CliRunner().invoke(main, [*arguments, *prompts], input=text)
        assert result.stdout == expected(checkpoint, text.decode().replace("\r\n", "\n"), 9) + "\n", result.output
    both = CliRunner().invoke(main, [*arguments, "Bye", "-"], input="Hello")
    assert both.stdout.split("\n---\n") == [expected(checkpoint, "Bye", 9), expected(checkpoint, "Hello", 9) + "\n"]
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for words, text, told in (
        ([], b"", "at least one text, --file, or a text on standard input"),
        (["-", "-"], b"x", "standard input (-) once, got 2 times"),
        (["-"], b"caf\xe9", "standard input: expected a text in UTF-8, got byte 0xe9 at offset 3"),
        (["--file", str(tmp_path / "latin")], b"", "latin: expected a text in UTF-8, got byte 0xe9 at offset 3"),
        (["caf\udce9"], b"", "PROMPTS: expected a text in UTF-8"),
        (["x", "--stop", "caf\udce9"], b"", "--stop: expected a text in UTF-8"),
    ):
        wrong = CliRunner().invoke(main, [*arguments, *words], input=text)
        assert wrong.exit_code == 1 and told in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_options(checkpoint: Path) -> None:
    greedy = run(checkpoint, "Hello", "--max-new-tokens", 9)
    drafted = run(checkpoint, "Hello", "--max-new-tokens", 9, "--draft", checkpoint)
    assert drafted.stdout == greedy.stdout and "guessed by the draft model" in drafted.stderr
    beams = run(checkpoint, "Hello", "--max-new-tokens", 5, "--beams", 2, "--window", 4, "--sinks", 1)
    assert beams.exit_code == 0 and "5 tokens; " in beams.stderr
    sampled = [
        run(checkpoint, "Hello", "--temperature", 1, "--top-k", 90, "--seed", seed, "--cache-dtype", "int8").stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    stopped = run(checkpoint, "Hello", "--max-new-tokens", 9, "--stop", greedy.stdout[2])
    assert stopped.stdout.rstrip("\n") == greedy.stdout[: greedy.stdout.index(greedy.stdout[2])]


def test_folders_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, 30)}
    model = tokenizers.models.WordLevel(words, unk_token="<s>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    hf = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    result = run(tmp_path, "w5 w6 w7", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    ended = next((place for place, token in enumerate(hf) if token == 1), 8)
    assert result.stdout.split() == [next(w for w, i in words.items() if i == token) for token in hf[:ended]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "at least one text"),
        (("",), "an empty prompt"),
        (("a", "--temperature", -1), "temperature"),
        (("a", "--top-p", 0), "top_p"),
        (("a", "--stop", ""), "stop"),
        (("a", "--sinks", 2), "sinks"),
        (("a", "--max-new-tokens", 0), "max_new_tokens"),
        (("a", "--beams", 0), "beams"),
    ],
)
def test_bad_input_is_told(checkpoint: Path, arguments: tuple[object, ...], message: str) -> None:
    result = run(checkpoint, *arguments)
    assert result.exit_code == 1 and result.stderr.lstrip().startswith("Error: ") and message in result.stderr
    assert "Traceback" not in result.output
