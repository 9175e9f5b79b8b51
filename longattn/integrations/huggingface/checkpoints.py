"""Llama-style, GPT-2 and BERT checkpoints of Hugging Face in our reference models, and back.

The two name the same weights differently and compute the same. What our models cannot compute is an error, never left
out. llama.py, gpt2.py and bert.py say, each for its family, which config and which weights are whose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput
from longattn.integrations.huggingface import bert, gpt2, llama
from longattn.integrations.huggingface.methods import listed_methods
from longattn.integrations.huggingface.options import readable
from longattn.integrations.huggingface.weights import to_ours, to_theirs, without_derived
from longattn.models import (
    Decoder,
    Encoder,
    MaskedLM,
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
    extended_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "load_into",
    "load_pretrained",
    "read_config",
    "to_hf",
    "weight_files",
]

_INDEX = "model.safetensors.index.json"


class _Kind(NamedTuple):
    """A class of transformers and what it is here."""

    family: ModuleType
    make: Callable[[TransformerConfig, int], nn.Module]  # of a config and the number of classes
    auto: str  # the class of transformers that makes one of a config


def _decoder(config: TransformerConfig, classes: int) -> nn.Module:
    return Decoder(config)


_KINDS = {
    "LlamaForCausalLM": _Kind(llama, _decoder, "AutoModelForCausalLM"),
    "MistralForCausalLM": _Kind(llama, _decoder, "AutoModelForCausalLM"),
    "GPT2LMHeadModel": _Kind(gpt2, _decoder, "AutoModelForCausalLM"),
    "BertModel": _Kind(bert, lambda config, classes: Encoder(config), "AutoModel"),
    "BertForMaskedLM": _Kind(bert, lambda config, classes: MaskedLM(config), "AutoModelForMaskedLM"),
    "BertForPreTraining": _Kind(
        bert, lambda config, classes: MaskedLM(config, next_sentence=True), "AutoModelForPreTraining"
    ),
    "BertForSequenceClassification": _Kind(bert, SequenceClassifier, "AutoModelForSequenceClassification"),
    "BertForTokenClassification": _Kind(bert, TokenClassifier, "AutoModelForTokenClassification"),
}
# What a config of each model_type without `architectures` means.
_DEFAULTS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
}
_FAMILIES = {model_type: _KINDS[architecture].family for model_type, architecture in _DEFAULTS.items()}


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None, architecture: str | None = None) -> Any:
    """The model of a folder with config.json and safetensors, in one file or in shards; on the CPU, in eval mode.

    Args:
        folder: as `save_pretrained` of transformers writes it, and as model hubs hold it.
        dtype: of the weights; the checkpoint's by default.
        architecture: the class of transformers whose weights these are, such as "BertForPreTraining"; what the config
            says by default.

    Returns:
        As `from_hf`.

    No code of the folder runs: one whose config asks for code of its own is refused.

    Raises:
        InvalidInput: no such checkpoint, a damaged, truncated or missing file, missing, unexpected, misshapen or
            non-finite weights, or a model that ours cannot compute.
    """
    folder = Path(folder)
    config = read_config(folder)
    if architecture is None:
        named = getattr(config, "architectures", None) or [_DEFAULTS.get(config.model_type, config.model_type)]
        architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str):
        raise InvalidInput("architecture", "the name of a class of transformers", repr(architecture))
    config_from_hf(config)  # before any weight is read
    return _model(architecture, config, _read_weights(folder), dtype)


def read_config(folder: Path, argument: str = "folder") -> PreTrainedConfig:
    """Return the config of a folder, without running code of the folder.

    Args:
        argument: the name of the caller's argument, for the error.

    Raises:
        InvalidInput: none, or one that transformers does not read.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InvalidInput(argument, "a folder with a config.json", folder)
    with readable(argument, "a folder with a config.json that transformers reads without running code", folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def from_hf(model: PreTrainedModel) -> Any:
    """A copy of a transformers model as ours, in eval mode.

    Args:
        model: a LlamaForCausalLM, MistralForCausalLM or GPT2LMHeadModel, which become a `Decoder`; a BertModel (its
            output, without the pooler), an `Encoder`; a BertForMaskedLM or BertForPreTraining, a `MaskedLM`; a
            BertForSequenceClassification or BertForTokenClassification, a `SequenceClassifier` or `TokenClassifier`.

    Raises:
        InvalidInput: as `load_pretrained`.
    """
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    return _model(type(model).__name__, model.config, state, None)


def to_hf(model: nn.Module) -> PreTrainedModel:
    """A copy of our model as a transformers model, in eval mode; its save_pretrained writes a checkpoint for others.

    Args:
        model: one of those that `from_hf` makes.

    Returns:
        The counterpart; a MistralForCausalLM if all layers of a rotary decoder are sliding.

    Raises:
        InvalidInput: what Hugging Face's models cannot compute, such as mixed layers or sinks.
    """
    import transformers

    architecture = _architecture(model)
    kind = _KINDS[architecture]
    ours: Any = model
    config = config_to_hf(ours.config)
    config.dtype = next(model.parameters()).dtype
    options: dict[str, Any] = {}
    if isinstance(model, (SequenceClassifier, TokenClassifier)):
        config.num_labels = model.head.out_features
    elif isinstance(model, Encoder):
        options = {"add_pooling_layer": False}
    theirs = getattr(transformers, kind.auto).from_config(config, **options)
    state = to_theirs(kind.family.names(model), model.state_dict())
    derived = kind.family.derived(model)
    state |= {name: state[original] for name, original in derived.items() if original in state}
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def load_into(theirs: PreTrainedModel, model: nn.Module) -> None:
    """Copy our model's weights into a transformers model that is its counterpart.

    Raises:
        InvalidInput: weights of other names or shapes.
    """
    kind = _KINDS[_architecture(model)]
    state = to_theirs(kind.family.names(model), model.state_dict())
    derived = kind.family.derived(model)
    state |= {name: state[original] for name, original in derived.items() if original in state}
    try:
        theirs.load_state_dict({name: weight.detach().clone() for name, weight in state.items()})
    except RuntimeError as error:
        raise InvalidInput("model", f"the weights of a {type(theirs).__name__}", str(error)) from error
    theirs.tie_weights()


def config_from_hf(config: PreTrainedConfig) -> TransformerConfig:
    """Our config of a Llama, Mistral, GPT-2 or BERT config.

    Raises:
        InvalidInput: another model, or options that ours does not have.
    """
    if config.model_type not in _FAMILIES:
        raise InvalidInput("config", f"model_type {' or '.join(_FAMILIES)}", config.model_type)
    with readable("config", f"a config of a {config.model_type} model", "config.json"):
        ours = _FAMILIES[config.model_type].config_from_hf(config)
    return reduce(extended_config, listed_methods(config), ours)


def config_to_hf(config: TransformerConfig) -> PreTrainedConfig:
    """The config of transformers that says the same: of Llama, Mistral (if all layers are sliding), GPT-2 or BERT.

    Raises:
        InvalidInput: as `to_hf`.
    """
    if config.architecture == "encoder":
        return bert.config_to_hf(config)
    return (gpt2 if config.positions == "learned" else llama).config_to_hf(config)


def _architecture(model: nn.Module) -> str:
    """The class of transformers that one of our models is."""
    if isinstance(model, Decoder):
        # Llama's and Mistral's weights have the same names.
        return "GPT2LMHeadModel" if model.config.positions == "learned" else "LlamaForCausalLM"
    if isinstance(model, MaskedLM):
        return "BertForMaskedLM" if model.pooler is None else "BertForPreTraining"
    for cls, name in (
        (Encoder, "BertModel"),
        (SequenceClassifier, "BertForSequenceClassification"),
        (TokenClassifier, "BertForTokenClassification"),
    ):
        if isinstance(model, cls):
            return name
    raise InvalidInput("model", "a Decoder, an Encoder or one with a head", type(model).__name__)


def _model(
    architecture: str, config: PreTrainedConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> nn.Module:
    """Our model with these weights, by Hugging Face's names."""
    ours = config_from_hf(config)
    if architecture not in _KINDS or _KINDS[architecture].family is not _FAMILIES[config.model_type]:
        names = [name for name, kind in _KINDS.items() if kind.family is _FAMILIES[config.model_type]]
        raise InvalidInput("architecture", " or ".join(names), architecture)
    kind = _KINDS[architecture]
    if ours.layers > len(state):  # before so many layers are made
        raise InvalidInput("checkpoint", f"the weights of {ours.layers:,} layers", f"{len(state):,} tensors")
    with torch.device("meta"), readable("config", "sizes that a model can have", "config.json"):
        model = kind.make(ours, config.num_labels or 2)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    state = without_derived(kind.family.normalised(state, model), kind.family.derived(model))
    model.load_state_dict(to_ours(kind.family.names(model), state, shapes), assign=True)
    return model.to(dtype).eval()


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Return the safetensors files of a folder, each with the tensors that the index says it holds; None: all.

    Raises:
        InvalidInput: a damaged index, a file that is not there, or one outside of the folder.
    """
    index = folder / _INDEX
    found: dict[str, set[str] | None] = {"model.safetensors": None}
    if index.is_file():
        found = _indexed(index)
    for name in found:
        if not (folder / name).is_file():
            raise InvalidInput("folder", f"a folder with {name}", folder)
    return found


def _indexed(index: Path) -> dict[str, set[str] | None]:
    """Return the files that an index names. Each is in its folder, not above or below it."""
    with readable("folder", f"a folder with a complete {index.name}", index):
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    found: dict[str, set[str] | None] = {}
    for tensor, name in places:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise InvalidInput("folder", f"an {index.name} that names safetensors files in its folder", repr(name))
        tensors = found.setdefault(name, set())
        assert tensors is not None
        tensors.add(tensor)
    return dict(sorted(found.items()))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for name, tensors in weight_files(folder).items():
        with readable("checkpoint", "complete safetensors files", name):
            read = load_file(folder / name)
        wrong = sorted((weights.keys() & read.keys()) | (set() if tensors is None else tensors ^ read.keys()))
        if wrong:
            raise InvalidInput("checkpoint", f"the tensors that {_INDEX} says are in {name}", ", ".join(wrong[:8]))
        weights |= read
    return weights
