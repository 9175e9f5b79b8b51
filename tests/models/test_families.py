"""Encoder, decoder and encoder-decoder of every style: what sees what, padding, packing, weights, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longattn import InvalidInput
from longattn.models import (
    STYLES,
    Decoder,
    Encoder,
    EncoderDecoder,
    GenerationConfig,
    TransformerConfig,
    build,
    generate,
    sinusoids,
)

SIZES: dict[str, Any] = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "max_length": 24}
ENCODERS, PAIRS = ("bert", "modern-encoder"), ("transformer", "modern-transformer")


def model(style: str, **changes: Any) -> Any:
    return build(TransformerConfig.style(style, **SIZES | changes)).double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("style", list(STYLES))
def test_every_weight_learns(style: str) -> None:
    net = model(style).train()
    if isinstance(net, EncoderDecoder):
        net.loss(ids(2, 7), ids(2, 5), ids(2, 5)).backward()
    elif isinstance(net, Encoder):
        net(ids(2, 7), token_types=ids(2, 7) % 2 if net.config.token_types else None).pow(3).sum().backward()
    else:
        net.loss(ids(2, 7), ids(2, 7)).backward()
    unused = {name for name, weight in net.named_parameters() if weight.grad is None}
    assert unused == set()


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_is_that_of_torch(norm_first: bool) -> None:
    net = model("bert", layers=1, norm_first=norm_first, norm_eps=1e-5, embedding_norm=False, token_types=0)
    block = net.blocks[0]
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    ).eval()
    attention = block.attention
    packed = [torch.cat([getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv"]) for kind in ("weight", "bias")]
    state = {"self_attn.in_proj_weight": packed[0], "self_attn.in_proj_bias": packed[1]}
    for name, module in (
        ("self_attn.out_proj", attention.o_proj),
        ("linear1", block.feed_forward.up_proj),
        ("linear2", block.feed_forward.down_proj),
        ("norm1", block.attention_norm),
        ("norm2", block.feed_forward_norm),
    ):
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    out, wanted = block(x, key_mask=mask), theirs(x, src_key_padding_mask=~mask)
    same(out[mask], wanted[mask])


def test_a_decoder_layer_with_memory_is_that_of_torch() -> None:
    net = model("transformer", layers=1)
    block = net.decoder.blocks[0]
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    theirs = nn.TransformerDecoderLayer(32, 4, 128, 0.0, "relu", batch_first=True, dtype=torch.float64).eval()
    state: dict[str, Tensor] = {}
    for ours_name, name in (("attention", "self_attn"), ("cross_attention", "multihead_attn")):
        ours = getattr(block, ours_name)
        for kind in ("weight", "bias"):
            state[f"{name}.in_proj_{kind}"] = torch.cat([getattr(getattr(ours, f"{x}_proj"), kind) for x in "qkv"])
            state[f"{name}.out_proj.{kind}"] = getattr(ours.o_proj, kind)
    for name, module in (
        ("linear1", block.feed_forward.up_proj),
        ("linear2", block.feed_forward.down_proj),
        ("norm1", block.attention_norm),
        ("norm2", block.cross_attention_norm),
        ("norm3", block.feed_forward_norm),
    ):
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    theirs.load_state_dict(state)
    x, memory = torch.randn(2, 5, 32).double(), torch.randn(2, 11, 32).double()
    lens = torch.tensor([11, 4], dtype=torch.int32)
    hidden = torch.arange(11) >= lens[:, None]
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=hidden)
    same(block(x, memory=memory, memory_lens=lens), wanted)


@pytest.mark.parametrize("style", ENCODERS)
def test_padding_and_packing_change_no_sequence(style: str) -> None:
    net = model(style)
    first, second = ids(1, 9), ids(1, 5)
    alone = [net(first)[0], net(second)[0]]
    padded = torch.zeros(2, 9, dtype=torch.int64)
    padded[0], padded[1, :5] = first[0], second[0]
    lens = torch.tensor([9, 5], dtype=torch.int32)
    for out in (net(padded, key_lens=lens), net(padded, key_mask=torch.arange(9) < lens[:, None])):
        same(out[0], alone[0])
        same(out[1, :5], alone[1])
    out = net(torch.cat((first[0], second[0])), cu_seqlens=torch.tensor([0, 9, 14], dtype=torch.int32))
    same(out, torch.cat(alone))


@pytest.mark.parametrize(
    ("style", "changes"), [("gpt2", {}), ("llama", {"pattern": "SL", "window": 3, "sinks": 1}), ("llama", {})]
)
def test_packed_documents_do_not_see_each_other(style: str, changes: dict[str, Any]) -> None:
    net = model(style, **changes)
    documents = [ids(n) for n in (7, 1, 12)]
    cu_seqlens = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = torch.cat(documents)
    same(net(packed, cu_seqlens=cu_seqlens), torch.cat([net(document[None])[0] for document in documents]))
    loss = net.loss(packed, packed, cu_seqlens=cu_seqlens, reduction="none")
    same(loss, torch.cat([net.loss(d[None], d[None], reduction="none")[0] for d in documents]))
    longer = torch.cat((packed, packed[:4]))  # what no document holds disturbs none
    same(net(longer, cu_seqlens=cu_seqlens)[:20], net(packed, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("style", PAIRS)
def test_a_pair_sees_its_source_and_its_own_past(style: str) -> None:
    net = model(style, pattern="SL", window=3, encoder_layers=3)
    assert (len(net.encoder.blocks), len(net.decoder.blocks)) == (3, 2)
    source, tokens = ids(2, 11), ids(2, 6)
    lens = torch.tensor([11, 4], dtype=torch.int32)
    logits = net(source, tokens, source_lens=lens)
    same(net(source, tokens, source_mask=torch.arange(11) < lens[:, None]), logits)
    same(net(source[1:, :4], tokens[1:]), logits[1:])
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50
    same(net(source, changed, source_lens=lens)[:, :4], logits[:, :4])
    changed = source.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    assert (net(changed, tokens, source_lens=lens)[0] - logits[0]).abs().amax(-1).min() > 1e-9
    targets = ids(2, 6)
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    same(net.loss(source, tokens, targets, source_lens=lens, chunk=5), wanted)


def test_tying_shares_one_matrix() -> None:
    tied, untied = model("transformer"), model("transformer", tie_embeddings=False)
    assert {"source_embedding.weight", "head.weight"} == untied.state_dict().keys() - tied.state_dict().keys()
    assert tied.output_weight is tied.embedding.weight
    assert tied.embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_returned_weights_are_those_of_the_attention() -> None:
    tokens, source = ids(2, 8), ids(2, 10)
    for net in (model("gpt2"), model("llama", pattern="SL", window=3)):
        weights = net.attention_weights(tokens, 1, range(8))
        assert weights.shape == (2, 4, 8, 8) and weights.triu(1).abs().max() == 0
        same(weights.sum(-1), torch.ones(2, 4, 8).double())
        block = net.blocks[1]
        x = block.attention_norm(net.blocks[0](net._enter(net.embedding(tokens), None, {})[0]))
        values = block.attention.v_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
        same(block.attention.o_proj((weights @ values).transpose(1, 2).flatten(-2)), block.attention(x))
    pair = model("transformer")
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    cross = pair.cross_attention_weights(source, tokens, 0, [0, -1], source_mask=mask)
    assert cross.shape == (2, 4, 2, 10) and cross[1, ..., 6:].abs().max() == 0
    same(cross.sum(-1), torch.ones(2, 4, 2).double())
    for bad in (-1, 2, True):
        with pytest.raises(InvalidInput, match="layer"):
            model("bert").attention_weights(tokens, bad, [0])


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoids(torch.tensor([0, 3, 100_000]), 6)
    assert table.shape == (3, 6) and table.dtype == torch.float32
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    angle = torch.tensor(100_000 / 10000 ** (2 / 6), dtype=torch.float64)
    torch.testing.assert_close(table[2, 2:4], torch.stack((angle.sin(), angle.cos())).float())


def test_dropout_acts_in_training_only() -> None:
    net = model("bert", dropout=0.2, attention_dropout=0.2)
    tokens = ids(1, 8)
    same(net(tokens), net(tokens))
    assert not torch.allclose(net.train()(tokens), net(tokens))


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("tokens", lambda: model("bert")(torch.tensor([[50]]))),
        ("tokens", lambda: model("bert")(ids(4))),
        ("tokens", lambda: model("llama")(ids(1, 4), cu_seqlens=torch.tensor([0, 4]))),
        ("at most max_length 24", lambda: model("bert")(ids(1, 25))),
        ("at most max_length 24", lambda: model("gpt2")(ids(30), cu_seqlens=torch.tensor([0, 30]).int())),
        ("token_types", lambda: model("bert")(ids(1, 3), token_types=torch.tensor([[0, 1, 2]]))),
        ("token_types", lambda: model("modern-encoder")(ids(1, 3), token_types=ids(1, 3))),
        ("source", lambda: model("transformer")(torch.tensor([[-1]]), ids(1, 3))),
        ("memory", lambda: model("transformer").decode(ids(2, 3), torch.zeros(1, 4, 32).double())),
        ("architecture", lambda: Decoder(TransformerConfig.style("bert", **SIZES))),
        ("architecture", lambda: Encoder(TransformerConfig.style("llama", **SIZES))),
        ("architecture", lambda: EncoderDecoder(TransformerConfig.style("gpt2", **SIZES))),
        ("learned positions", lambda: generate(model("gpt2"), [[1]], GenerationConfig(max_new_tokens=25))),
        ("caches", lambda: model("gpt2")(ids(1, 3), caches=[None])),
        ("memory_caches", lambda: model("transformer").decode(ids(2, 3), caches=[])),
        ("without cross-attention", lambda: model("gpt2").remember(torch.zeros(1, 4, 32), [None, None])),
        ("caches", lambda: model("llama")(ids(1, 3), caches=[None])),
        ("name", lambda: TransformerConfig.style("lstm", **SIZES)),
    ],
)
def test_bad_input_is_named(says: str, call: Any) -> None:
    with pytest.raises(InvalidInput, match=says):
        call()
