"""`longattn extend` and `longattn eval`: what they write, for each kind of model, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from longattn import scaling
from longattn.cli import main
from longattn.cli.eval import token_counts
from longattn.cli.language_model import load_language_model
from longattn.errors import InvalidInput
from longattn.evaluation import Evaluation, Plan, Results
from longattn.extension import DualChunk, LogN, SelfExtend
from longattn.integrations.huggingface import load_pretrained, to_hf
from longattn.models import Decoder, TransformerConfig
from longattn.training import Checkpoint, load_model, save_checkpoint

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_length": 64, "norm_eps": 1e-5}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line number {n} says that it says nothing else.\n" for n in range(200)))
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    model = Decoder(TransformerConfig(**SIZES))
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(model.config, model.state_dict()))
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(n): n for n in range(128)}, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    path = tmp_path / "hf"
    to_hf(Decoder(TransformerConfig(**SIZES))).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(path)
    return path


def test_a_checkpoint_of_ours_is_extended_and_measured(ours: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer.safetensors"
    said = done("extend", ours, "--out", out, "--method", "yarn", "--method", "log-n", "--factor", 4)
    assert "YaRN" in said and "saved to" in said
    config = load_model(out).config
    assert config.rope_scaling == scaling.YaRN(4, 64) and config.methods == (LogN(64),)

    results = tmp_path / "results"
    command = ("eval", out, "--lengths", "256,512", "--text", text, "--out", results, "--bucket", 64, "--depths", 2)
    said = done(*command, "--tasks", "loss,short_windows,perplexity,passkey,fwe,speed", "--stride", 32)
    assert "Loss by position" in said and "passkey.png" in said
    page = (results / "report.md").read_text()
    assert "| position | 512 tokens | in windows of 64 |" in page
    for heading in ("Loss by position", "Perplexity by length", "Passkey", "RULER", "Time and memory"):
        assert f"## {heading}" in page
    assert {path.name for path in results.iterdir()} == {
        "results.json",
        "report.md",
        "loss_by_position.png",
        "passkey.png",
        "cost.png",
    }
    saved = json.loads((results / "results.json").read_text())
    assert saved["settings"]["trained"] == 64 and saved["settings"]["methods"] == []
    assert len(saved["cells"]) == 2 + 2 + 2 * 2 + 2 + 2

    saved["cells"] = saved["cells"][:3]
    (results / "results.json").write_text(json.dumps(saved))
    done(*command, "--tasks", "loss,short_windows,perplexity,passkey,fwe,speed", "--stride", 32, "--resume")
    again = json.loads((results / "results.json").read_text())
    assert len(again["cells"]) == 12 and again["cells"][:3] == saved["cells"]
    assert "--resume" in run(*command, "--tasks", "loss").output
    refused = run(*command, "--tasks", "loss", "--resume")
    assert refused.exit_code == 1 and "plan" in refused.output


def test_methods_of_an_evaluation_are_those_of_an_extension(ours: Path, text: Path, tmp_path: Path) -> None:
    method = ("--method", "self-extend", "--factor", 4)
    done("extend", ours, "--out", tmp_path / "longer.safetensors", *method)
    assert load_model(tmp_path / "longer.safetensors").config.methods == (SelfExtend(5, 16),)
    means = []
    for number, model in enumerate(((ours, *method), (tmp_path / "longer.safetensors",))):
        out = tmp_path / str(number)
        done("eval", *model, "--lengths", 256, "--tasks", "loss", "--text", text, "--out", out)
        means.append(json.loads((out / "results.json").read_text())["cells"][0]["losses"])
    assert means[0] == means[1]


@pytest.mark.parametrize("method", ["yarn", "dual-chunk"])
def test_a_folder_stays_a_folder(method: str, folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    options = (
        "--method",
        method,
        "--factor",
        4,
        "--steps",
        2,
        "--context",
        128,
        "--warmup",
        0,
        "--learning-rate",
        0.01,
    )
    done("extend", folder, "--out", out, "--text", text, *options, "--precision", "float32")
    model, before = load_pretrained(out), load_pretrained(folder)
    if method == "yarn":
        assert model.config.rope_scaling == scaling.YaRN(4, 64)
    else:
        assert model.config.methods == (DualChunk.of(64),)
    assert not torch.equal(model.output_weight, before.output_weight)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "longer"}  # no traces of the training
    results = tmp_path / "results"
    said = done("eval", out, "--lengths", 200, "--tasks", "loss,speed", "--text", text, "--out", results)
    assert "new tokens/s" in said


def test_fine_tuning_on_skipped_positions_and_resuming(ours: Path, text: Path, tmp_path: Path) -> None:
    command = ["extend", ours, "--method", "yarn", "--factor", 4, "--text", text, "--pose", "--batch-size", 2]
    command += ["--steps", 4, "--precision", "float32", "--warmup", 0, "--save-every", 2]
    done(*command, "--out", tmp_path / "whole.safetensors")
    whole = load_model(tmp_path / "whole.safetensors")

    from longattn.training import loop

    out = tmp_path / "parted.safetensors"
    saved: list[Path] = []

    def stop(path: Path, checkpoint: Checkpoint) -> None:
        save_checkpoint(path, checkpoint)
        saved.append(path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        interrupted = run(*command, "--out", out)
    assert interrupted.exit_code == 130 and "--resume" in interrupted.output and not out.exists()
    done(*command, "--out", out, "--resume")
    for name, weight in load_model(out).state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name])


def test_adapters_train_few_weights_and_end_up_in_the_others(ours: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out, before = tmp_path / "longer.safetensors", load_model(ours).state_dict()
    command = ("extend", ours, "--method", "yarn", "--factor", 2, "--text", text, "--steps", 3, "--lora", 2)
    said = done(*command, "--lora-embeddings", "--out", out, "--learning-rate", 0.05, "--warmup", 0)
    after = load_model(out)
    assert "weights train" in said
    changed = {name for name, weight in after.state_dict().items() if not torch.equal(weight, before[name])}
    assert {"blocks.0.attention.q_proj.weight", "embedding.weight", "norm.weight"} <= changed
    assert not {"blocks.0.feed_forward.up_proj.weight", "head.weight"} & changed


def test_a_search_for_longrope(ours: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer.safetensors"
    sizes = ("--search-population", 4, "--search-generations", 1)
    done("extend", ours, "--out", out, "--method", "longrope", "--factor", 4, "--search", text, *sizes)
    found = load_model(out).config.rope_scaling
    assert isinstance(found, scaling.LongRoPE) and found.factor == 4 and len(found.long_factor) == 8
    (tmp_path / "found.json").write_text(json.dumps(found.to_dict()))
    again = tmp_path / "again.safetensors"
    done("extend", ours, "--out", again, "--method", "longrope", "--longrope", tmp_path / "found.json")
    assert load_model(again).config.rope_scaling == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extend", "--method", "yarn", "--factor", 0.5), "--factor: expected a number of at least 1"),
        (("extend", "--method", "yarn"), "--factor"),
        (("extend",), "--method"),
        (("extend", "--method", "learned", "--factor", 2), "learned positions"),
        (("extend", "--method", "longrope", "--factor", 2), "--longrope"),
        (("extend", "--method", "yarn", "--factor", 2, "--resume"), "--resume"),
        (("eval", "--lengths", "9999999", "--tasks", "speed"), "GB of memory"),
        (("eval", "--lengths", "128", "--tasks", "loss"), "a text of at least 129 tokens"),
        (("eval", "--lengths", "8 thousand"), "--lengths"),
        (("eval", "--lengths", "8k", "--tasks", "reading"), "tasks"),
    ],
)
def test_what_is_refused(
    arguments: tuple[Any, ...], message: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longattn.evaluation.reading.free_bytes", lambda device="cpu": 10**8)
    command, *options = arguments
    result = run(command, ours, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    learned = Decoder(TransformerConfig.style("gpt2", **{**SIZES, "kv_heads": 2}))
    save_checkpoint(tmp_path / "gpt.safetensors", Checkpoint(learned.config, learned.state_dict()))
    for method in ("yarn", "self-extend", "streaming"):
        refused = run(
            "extend", tmp_path / "gpt.safetensors", "--out", tmp_path / "o", "--method", method, "--factor", 2
        )
        assert refused.exit_code == 1 and "rotary positions" in " ".join(refused.output.split())
    (tmp_path / "empty").mkdir()
    refused = run("eval", tmp_path / "empty", "--lengths", 64)
    assert refused.exit_code == 1 and "MODEL" in refused.output
    (tmp_path / "empty" / "config.json").write_text("no JSON")
    refused = run("eval", tmp_path / "empty", "--lengths", 64)
    assert refused.exit_code == 1 and "MODEL" in refused.output


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}<assistant>"


@pytest.fixture
def chatty(folder: Path) -> Path:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def test_questions_are_asked_as_messages(chatty: Path, tmp_path: Path) -> None:
    loaded = load_language_model(chatty)
    assert loaded.decode(loaded.chat("Hi!")) == "<user>Hi!</><assistant>"
    assert tuple(map(loaded.decode, loaded.chat_frame())) == ("<user>", "</><assistant>")

    asked: list[str] = []
    frame = loaded.chat_frame()

    class Reader:
        def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
            asked.append(loaded.decode(prompt))
            return list(prompt[:1])

        def bytes_for(self, tokens: int) -> int:
            return 0

    plan = Plan(tasks=("passkey",), lengths=(700,), depths=1)
    reader: Any = Reader()
    suite = Evaluation(reader, plan, encode=loaded.encode, decode=loaded.decode, prefix=frame[0], suffix=frame[1])
    suite.run(Results({}), lambda: None)
    [prompt] = asked
    assert prompt.startswith("<user>") and prompt.endswith("The pass key is</><assistant>") and len(prompt) <= 700

    out = tmp_path / "results"
    command = ("eval", chatty, "--lengths", 700, "--tasks", "passkey", "--depths", 1, "--out", out)
    done(*command, "--chat")
    refused = run(*command, "--resume")
    assert refused.exit_code == 1 and "--resume: chat" in refused.output
    said = run("generate", chatty, "Hi!", "--max-new-tokens", 2, "--chat")
    assert said.exit_code == 0 and f"{len('<user>Hi!</><assistant>')} tokens of prompts" in said.stderr


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% for", "nothing", "{{ 1 / 0 }}"])
def test_chat_templates_that_do_not_work(template: str | None, folder: Path, ours: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    refused = run("eval", folder, "--lengths", 700, "--tasks", "passkey", "--chat", "--out", tmp_path / "out")
    assert refused.exit_code == 1 and refused.output.startswith("Error: --chat") and refused.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
    refused = run("generate", ours, "Hi!", "--chat")
    assert refused.exit_code == 1 and refused.output.startswith("Error: --chat")


def test_all_ids_that_end_a_text(folder: Path) -> None:
    def write(name: str, **values: Any) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    write("generation_config.json", eos_token_id=[5, 7])
    write("config.json", eos_token_id=9)
    write("tokenizer_config.json", eos_token="a")
    for keep in (False, True):
        assert load_language_model(folder, keep=keep).stop_tokens == (5, 7, 9, ord("a"))
    write("generation_config.json", eos_token_id=[-1, 256, 3])  # the model has none of the first two
    write("config.json", eos_token_id=None)
    assert load_language_model(folder).stop_tokens == (3, ord("a"))
    write("generation_config.json", eos_token_id="three")
    with pytest.raises(InvalidInput, match="eos_token_id"):
        load_language_model(folder)


def test_drafts_have_the_same_tokens(folder: Path, ours: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    command = ("generate", folder, "Hi!", "--max-new-tokens", 3, "--draft")
    assert run(*command, other).exit_code == 0
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for draft, got in ((other, "one with 2 other tokens, such as 'a'"), (ours, "another kind of tokenizer")):
        refused = run(*command, draft)
        assert refused.exit_code == 1 and got in " ".join(refused.output.split()), refused.output


def test_what_a_method_takes_away_is_said(folder: Path, ours: Path, tmp_path: Path) -> None:
    for number, model in enumerate((ours, folder)):
        first, second = (tmp_path / f"{number}-{name}" for name in ("first", "second"))
        result = run("extend", model, "--out", first, "--method", "yarn", "--factor", 4)
        assert result.exit_code == 0 and "Note:" not in result.stderr
        result = run("extend", first, "--out", second, "--method", "linear", "--factor", 2)
        said = " ".join(result.stderr.split())
        assert result.exit_code == 0 and said.count("Note:") == 2
        assert "Linear(factor=2.0) replaces YaRN(" in said and "about 128 tokens" in said and "before 256" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "self-extend", "--factor", 2, "--window", 64), "window: expected less than the 64 tokens"),
        (("--method", "self-extend", "--factor", 1), "group: expected an int >= 2"),
        (("--method", "streaming", "--window", 64), "window: expected less than the 64 tokens"),
        (("--method", "streaming", "--window", 62), "sinks: expected with the window at most the 64 tokens"),
        (("--method", "pattern", "--pattern", "SL", "--window", 64), "window: expected less than the 64 tokens"),
        (("--method", "yarn", "--factor", 2, "--group", 4), "--group: expected none without --method self-extend"),
        (("--method", "dual-chunk", "--window", 4), "--window: expected none without"),
        (("--method", "log-n", "--base", 1e6), "--base: expected none without --method base"),
    ],
)
def test_nonsense_for_a_method(
    options: tuple[Any, ...], message: str, folder: Path, ours: Path, tmp_path: Path
) -> None:
    for model in (ours, folder):
        refused = run("extend", model, "--out", tmp_path / "out", *options)
        assert refused.exit_code == 1 and message in " ".join(refused.output.split()), refused.output
        assert not (tmp_path / "out").exists()


def test_folders_say_which_attention_they_need(folder: Path, tmp_path: Path) -> None:
    for method, wanted in (("log-n", "longattn"), ("yarn", None)):
        out = tmp_path / method
        done("extend", folder, "--out", out, "--method", method, "--factor", 4)
        assert json.loads((out / "config.json").read_text()).get("attn_implementation") == wanted
    done("extend", tmp_path / "log-n", "--out", tmp_path / "both", "--method", "yarn", "--factor", 4)
    assert json.loads((tmp_path / "both" / "config.json").read_text())["attn_implementation"] == "longattn"


def test_what_transformers_does_not_save_is_known_before_work_begins(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*arguments: object, **options: object) -> None:
        raise ValueError("some generation parameters are set in the model config")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", save)
    monkeypatch.setattr("longattn.cli.extend.run_training", None)  # not reached
    refused = run("extend", folder, "--out", tmp_path / "out", "--method", "yarn", "--factor", 4, "--text", text)
    assert refused.exit_code == 1 and "a model that transformers saves" in refused.output, refused.output
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nX = None\n")
    for auto_map in ({"AutoConfig": "code.X"}, {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "of its own", "auto_map": auto_map}))
        result = CliRunner().invoke(main, ["generate", str(tmp_path), "Hi!"], input="y\ny\n")
        assert result.exit_code == 1 and "without running code" in result.output
        with pytest.raises(InvalidInput, match="without running code"):
            load_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "truncated", "leaves", "vocabulary", "layers", "type"])
def test_damaged_folders(damage: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    match damage:
        case "missing":
            del weights[name]
        case "shape":
            weights[name] = weights[name][:-1].clone()
        case "nan":
            weights[name][0, 0] = float("nan")
        case "layers":
            config["num_hidden_layers"] = 10
        case "type":
            config["hidden_size"] = "wide"
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if damage == "truncated":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if damage == "leaves":
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": dict.fromkeys(weights, "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if damage == "vocabulary":
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": [], "merges": 3}}')
    for command in ("generate", "eval"):
        refused = run(command, folder, *(["Hi!"] if command == "generate" else ["--lengths", 64]))
        assert refused.exit_code == 1, refused.output
        last = refused.output.strip().splitlines()[-1]
        assert last.startswith(("Error: MODEL", "Error: folder")), refused.output


def test_defaults_are_never_refused(ours: Path, text: Path, tmp_path: Path) -> None:
    """Tasks, stride and context where the user names none of them: lengths below the usual stride, and no text."""
    done("eval", ours, "--lengths", "300", "--depths", 1, "--out", tmp_path / "without")
    results = json.loads((tmp_path / "without" / "results.json").read_text())
    assert results["settings"]["plan"]["tasks"] == ["passkey", "speed"]

    asked = ("--tasks", "perplexity,short_windows", "--text", text)
    done("eval", ours, "--lengths", "100,120", *asked, "--out", tmp_path / "short")
    plan = json.loads((tmp_path / "short" / "results.json").read_text())["settings"]["plan"]
    assert (plan["stride"], plan["context"]) == (64, 64)  # the trained length
    done("eval", ours, "--lengths", "40", "--tasks", "perplexity", "--text", text, "--out", tmp_path / "shorter")
    plan = json.loads((tmp_path / "shorter" / "results.json").read_text())["settings"]["plan"]
    assert plan["stride"] == 40


def test_what_no_task_can_do_is_refused_before_anything_is_read(
    ours: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longattn.evaluation.Evaluation.measure", None)
    learned = Decoder(TransformerConfig(**{**SIZES, "positions": "learned"}))
    table = tmp_path / "table.safetensors"
    save_checkpoint(table, Checkpoint(learned.config, learned.state_dict()))
    for model, options, message in (
        (
            ours,
            ("--lengths", "300", "--tasks", "speed,cwe"),
            "lengths: expected at least 5,307 tokens, for the question of",
        ),
        (ours, ("--lengths", "8k,100"), "for the question of passkey, got 100"),
        (
            ours,
            ("--lengths", "300", "--tasks", "loss,passkey"),
            "--text: expected a text of at least 301 tokens, for loss",
        ),
        (
            ours,
            ("--lengths", "40", "--tasks", "perplexity", "--text", text, "--stride", 41),
            "at least the stride 41, got 40",
        ),
        (ours, ("--lengths", "1e400"), "--lengths: expected numbers of tokens"),
        (table, ("--lengths", "60", "--tasks", "speed"), "64 positions, got tasks that take 76"),
    ):
        result = run("eval", model, *options, "--out", tmp_path / "out")
        assert result.exit_code == 1 and message in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_lengths() -> None:
    assert token_counts("--lengths", "8k,1m, 300 ,1.5k") == (8192, 1048576, 300, 1536)
    for bad in ("", "x", "-1", "0"):
        with pytest.raises(InvalidInput):
            token_counts("--lengths", bad)
