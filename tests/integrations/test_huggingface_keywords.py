"""Every keyword that reaches attention in a transformers model is honoured, known to change nothing, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

import longattn
from integrations.attention_calls import Modules, files
from integrations.tiny_models import ALL, ENCODERS, SEQ2SEQ, VOCABULARY, inputs, tiny
from longattn.integrations.huggingface import register
from longattn.integrations.huggingface.attention import attention_forward
from longattn.integrations.huggingface.keywords import HONOURED, WITHOUT_EFFECT
from longattn.integrations.huggingface.packing import MASKS_WITHOUT_POSITIONS
from longattn.integrations.huggingface.visibility import visibility

hf.logging.set_verbosity_error()
KNOWN = HONOURED | WITHOUT_EFFECT
REFUSED = {"block_indices", "indices", "sinks"}  # sparse choices of keys, and sinks of each query


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def test_the_keywords_that_transformers_writes() -> None:
    """Read from the installed sources; families that make causal masks without position_ids are found as well."""
    written: set[str] = set()
    passed: set[str] = set()
    without_positions = set()
    for family, tree in files():
        modules = Modules(tree)
        here, through = set(modules.written()), set(modules.passed())
        written, passed = written | here, passed | through
        if "position_ids" in here | through and modules.makes_causal_masks_without_positions():
            without_positions.add(family)
    assert len(written) > 15 and {"use_cache", "position_ids", "return_dict"} <= passed
    assert written - KNOWN == REFUSED
    assert passed <= KNOWN
    assert without_positions == MASKS_WITHOUT_POSITIONS
    assert set(TransformersKwargs.__annotations__) <= KNOWN
    assert not HONOURED & WITHOUT_EFFECT


def test_a_keyword_that_nobody_knows() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(longattn.Unsupported, match="Linear with the keyword indices\n.*indices is not implemented"):
        attention_forward(nn.Linear(1, 1), q, q, q, None, indices=torch.zeros(1, 3, 2))
    model = tiny("llama")
    model.set_attn_implementation("longattn")
    with pytest.raises(longattn.Unsupported, match="keyword head_mask"):
        model(torch.tensor([[3, 4, 5]]), head_mask=torch.ones(2, 4))
    assert attention_forward(nn.Linear(1, 1), q, q, q, None, indices=None)[0].shape == (1, 3, 2, 8)


def test_the_choice_of_a_sparse_indexer_is_not_dropped() -> None:
    """With a 4-D mask, these models hand the keys that they chose to the attention call alone."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    index = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    config = hf.DeepseekV32Config(**shape, **heads, **experts, **index, vocab_size=VOCABULARY, first_k_dense_replace=1)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="longattn").eval()
    ids, mask = torch.randint(3, VOCABULARY, (1, 9)), torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(longattn.Unsupported, match="keyword indices"):
        model(ids, attention_mask=mask)


def test_is_causal() -> None:
    """transformers makes the mask by the keyword; a module on its own cannot change the mask that it got."""
    model, ids = tiny("llama"), torch.tensor([[3, 4, 5, 6]])
    logits = []
    for implementation in ("eager", "longattn"):
        model.set_attn_implementation(implementation)
        logits.append(model(ids, is_causal=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    layer, q = nn.Module(), torch.randn(1, 2, 3, 8)
    layer.is_causal = True  # type: ignore[assignment]
    with pytest.raises(longattn.Unsupported, match=r"is_causal=False\n.*config\.is_causal"):
        attention_forward(layer, q, q, q, visibility(1, 3, 3), is_causal=False)


FLAGS = {"output_attentions": True, "output_hidden_states": True, "return_dict": True}


@pytest.mark.parametrize("name", ALL)
def test_every_family_with_every_flag(name: str) -> None:
    model, (keywords, _) = tiny(name), inputs(name, None)
    options = dict(FLAGS)
    if name not in ENCODERS:
        options["use_cache"] = True
    if name == "bert":
        options["token_type_ids"] = torch.zeros_like(keywords["input_ids"])
    if name not in ("bert", "distilbert", "t5", "bart", "whisper", "vit"):
        options["num_items_in_batch"] = torch.tensor(26)
        options["token_type_ids"] = torch.zeros_like(keywords["input_ids"])
    results = []
    for implementation in ("eager", "longattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**keywords, **options)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5 * max(1.0, float(results[0].abs().max())))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ENCODERS])
def test_every_family_generates_with_beams(name: str) -> None:
    model, (keywords, _) = tiny(name), inputs(name, "left")
    keywords = {key: value for key, value in keywords.items() if not key.startswith("decoder")}
    text = []
    for implementation in ("eager", "longattn"):
        model.set_attn_implementation(implementation)
        text.append(model.generate(**keywords, num_beams=2, max_new_tokens=4, do_sample=False, disable_compile=True))
    assert torch.equal(text[0], text[1])


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of one family's inputs and labels."""

    def __init__(self, name: str) -> None:
        keywords, _ = inputs(name, None if name in ("vit", "whisper") else "right")
        if name in SEQ2SEQ:
            labels = keywords.pop("decoder_input_ids")
            keywords.pop("decoder_attention_mask", None)
        elif name == "vit":
            labels = torch.tensor([0, 1])
        else:
            labels = torch.where(keywords["input_ids"] == 0, -100, keywords["input_ids"])
        if name in ("bert", "llama", "gpt_oss"):
            keywords["token_type_ids"] = torch.zeros_like(keywords["input_ids"])
        self.columns = {**keywords, "labels": labels}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


HEADS = {
    "bert": "BertForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "vit": "ViTForImageClassification",
}


@pytest.mark.parametrize("name", ALL)
def test_every_family_takes_a_step_of_the_trainer(name: str, tmp_path: Path) -> None:
    losses = []
    for implementation in ("eager", "longattn"):
        config = tiny(name).config
        for option in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
            setattr(config, option, 0.0)
        torch.manual_seed(0)
        model = getattr(hf, HEADS.get(name) or type(tiny(name)).__name__)(config)
        model.set_attn_implementation(implementation)
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
        )
        trainer = hf.Trainer(model=model, args=arguments, train_dataset=Rows(name))
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
