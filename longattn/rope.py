"""Rotary position embedding as a value: which frequencies turn which pairs of a head.

Pair i of a head vector is turned by the angle position * inv_freq[i] (Su et al., RoFormer, arXiv 2104.09864). The
angle is the float32 product of the float32 position and the float32 frequency in every dtype, on every backend.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.scaling import (
    AtLength,
    DynamicNTK,
    Frequencies,
    Linear,
    Llama3,
    LongRoPE,
    Proportional,
    Scaling,
    YaRN,
    finite_number,
    from_dict,
    inverse_frequencies,
)

__all__ = ["Rope"]

_WIDEST = 2**20  # far wider than any head


@dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys. Immutable and hashable; equal if its four arguments are.

    Args:
        dim: rotated width, even, at least 2; the first `dim` entries of a head turn, the rest pass through.
        base: b in theta_i = b^(-2i/dim), above 1.
        scaling: how the frequencies change to reach past the trained length; one of `longattn.scaling`.
        interleaved: pairs are entries (2i, 2i + 1) instead of (i, i + dim/2).

    Raises:
        InvalidInput: an argument out of range, or a scaling that does not exist at this width.
    """

    dim: int
    base: float = 10000.0
    scaling: Scaling | None = None
    interleaved: bool = False
    _prepared: dict[tuple[int, str], Frequencies] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = isinstance(self.dim, Integral) and not isinstance(self.dim, bool)
        if not whole or not 2 <= self.dim <= _WIDEST or self.dim % 2:
            raise InvalidInput("dim", f"an even int from 2 to {_WIDEST}", self.dim)
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise InvalidInput("scaling", "None or a scaling of longattn.scaling", self.scaling)
        if not isinstance(self.interleaved, bool):
            raise InvalidInput("interleaved", "a bool", self.interleaved)
        object.__setattr__(self, "dim", int(self.dim))
        object.__setattr__(self, "base", finite_number("base", self.base, above=1.0))
        object.__setattr__(self, "_prepared", self._prepare())

    def __reduce__(self) -> tuple[type[Rope], tuple[int, float, Scaling | None, bool]]:
        return type(self), (self.dim, self.base, self.scaling, self.interleaved)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """Return the node that makes an equal rope in a graph of torch.fx."""
        arguments = tracer.create_arg(self.__reduce__()[1])
        return tracer.create_node("call_function", type(self), arguments, {})

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change while the context grows, so that keys must be cached unrotated."""
        return self.scaling is not None and self.scaling.depends_on_length

    def at_length(self, length: int) -> Rope:
        """Return the rotation whose frequencies are those of `length` tokens, however long the context is."""
        if self.scaling is None or not self.depends_on_length:
            return self
        return Rope(self.dim, self.base, AtLength(self.scaling, length), self.interleaved)

    def frequencies(self, length: int, device: torch.device | str = "cpu") -> Frequencies:
        """The frequencies of a context of `length` tokens, the cached ones included.

        Args:
            length: one more than the largest position. Only DynamicNTK and LongRoPE look at it.
            device: where inv_freq shall be. It is made on the CPU and copied: all devices hold the same bits.

        Returns:
            inv_freq, float32 [dim / 2] (shared: do not write to it), and the attention_factor.
        """
        regime = 1 if self.scaling is None else self.scaling.regime(length)
        if regime is None:
            inv_freq, attention_factor = self._compute(length)
            return inv_freq.to(device), attention_factor
        key = regime, str(device)
        if key not in self._prepared:
            inv_freq, attention_factor = self._prepared[regime, "cpu"]
            with torch.inference_mode(False):  # what is kept must serve a later backward, too
                self._prepared[key] = inv_freq.to(device), attention_factor
        return self._prepared[key]

    def tables(
        self, positions: Tensor, length: int | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle; the attention_factor is not in them.

        Args:
            positions: integers or floats, any shape [...].
            length: tokens in the context, by default the largest position + 1 (read from the device if it is needed).
            dtype: of the tables. Evaluated in float64 for float64, else in float32 and rounded.

        Returns:
            cos and sin, each [..., dim / 2] on the device of `positions`.
        """
        inv_freq, _ = self.frequencies(self._length(positions, length), positions.device)
        angle = positions.to(torch.float32)[..., None] * inv_freq
        angle = angle.to(torch.promote_types(dtype, torch.float32))
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(self, x: Tensor, positions: Tensor, length: int | None = None) -> Tensor:
        """Turn the first `dim` entries of the last dimension and scale them by the attention_factor; eager PyTorch.

        Computes in float32 (float64 for float64) and rounds once. Differentiable in x.

        Args:
            x: [..., N, D] with D >= dim, floating.
            positions: [N], or [B, N] beside x [B, H, N, D].
            length: tokens in the context, by default the largest position + 1.

        Returns:
            A new tensor like x.

        Raises:
            InvalidInput: a shape or dtype that does not fit.
        """
        self._check_rotation(x, positions)
        compute = torch.promote_types(x.dtype, torch.float32)
        length = self._length(positions, length)
        cos, sin = self.tables(positions, length, compute)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # the same for all heads
        _, attention_factor = self.frequencies(length)

        turning, passing = x[..., : self.dim].to(compute), x[..., self.dim :]
        turned = turn_pairs(turning, cos, sin, self.interleaved) * attention_factor
        return torch.cat((turned.to(x.dtype), passing), dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """The arguments in plain Python values, ready for JSON."""
        scaling = None if self.scaling is None else self.scaling.to_dict()
        return {"dim": self.dim, "base": self.base, "scaling": scaling, "interleaved": self.interleaved}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rope:
        """The Rope that `to_dict` described.

        Raises:
            InvalidInput: a missing, unknown or bad argument.
        """
        names = {"dim", "base", "scaling", "interleaved"}
        if not isinstance(values, Mapping) or not {"dim"} <= values.keys() <= names:
            raise InvalidInput("rope", f"a mapping with 'dim' and any of {sorted(names - {'dim'})}", values)
        arguments = dict(values)
        if arguments.get("scaling") is not None:
            arguments["scaling"] = from_dict(arguments["scaling"])
        return cls(**arguments)

    @classmethod
    def from_hf(cls, config: Any, layer_type: str | None = None) -> Rope:
        """The rotation of a Hugging Face model, with transformers' own inv_freq and attention_factor.

        Reads `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and `partial_rotary_factor` (before).
        Multi-axis positions (mrope_section) agree where all axes hold the same position, as they do for text.

        Args:
            config: the text configuration of a model; any object with the same attributes will do.
            layer_type: such as "full_attention", where layer types have parameters of their own; else not looked at.

        Raises:
            InvalidInput: no rotary positions, an unknown rope type, a missing value, or a layer type without rotation.
        """
        return _from_hf(cls, config, layer_type)

    def _prepare(self) -> dict[tuple[int, str], Frequencies]:
        """The frequencies of each regime of lengths.

        Made with the instance, thus in eager mode, so that a compiled call reads the very same numbers.
        """
        lengths = (1, sys.maxsize)
        regimes = [1] if self.scaling is None else [self.scaling.regime(length) for length in lengths]
        with torch.inference_mode(False):  # what is kept must serve a later backward, too
            found = {(regime, "cpu"): self._compute(regime) for regime in regimes if regime is not None}
        if self.scaling is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return found  # a rotation that is made while a graph is traced has no values to read
        for inv_freq, factor in found.values():
            if type(inv_freq) is not Tensor or torch.compiler.is_compiling():  # no numbers while tracing
                continue
            if not (bool(inv_freq.isfinite().all()) and 0 <= factor <= torch.finfo(torch.float32).max):
                raise InvalidInput("scaling", "frequencies and a factor that float32 holds", self.scaling)
        return found

    def _compute(self, length: int) -> Frequencies:
        if self.scaling is None:
            return inverse_frequencies(self.dim, self.base), 1.0
        try:
            return self.scaling.frequencies(self.dim, self.base, length)
        except OverflowError:
            raise InvalidInput("scaling", f"numbers whose powers are finite at length {length}", self.scaling) from None

    def _length(self, positions: Tensor, length: int | None) -> int:
        if length is not None:
            return length
        if not self.depends_on_length or positions.numel() == 0 or positions.is_meta:
            return 1
        largest = positions.max().item()
        if not largest < 2**53:  # NaN, too
            raise InvalidInput("positions", f"numbers below 2^53 with a {type(self.scaling).__name__}", largest)
        return int(largest) + 1

    def _check_rotation(self, x: Tensor, positions: Tensor) -> None:
        if not x.is_floating_point():
            raise InvalidInput("x", "a floating dtype", x.dtype)
        if x.dim() < 2 or x.shape[-1] < self.dim:
            raise InvalidInput("x", f"shape [..., N, D] with D >= {self.dim}", list(x.shape))
        if positions.dtype == torch.bool or positions.is_complex():
            raise InvalidInput("positions", "an integer or floating dtype", positions.dtype)
        if positions.dim() == 2 and x.dim() != 4:
            raise InvalidInput("x", "shape [B, H, N, D] beside positions [B, N]", list(x.shape))
        expected = [x.shape[-2]] if positions.dim() != 2 else [x.shape[0], x.shape[-2]]
        if list(positions.shape) != expected:
            raise InvalidInput("positions", f"shape {expected}", list(positions.shape))


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., dim] with pair i turned by the angle of entry i of cos and sin, broadcastable to [..., dim / 2]."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


# Model types of transformers that turn the pairs (2i, 2i + 1) without a word about it in their configuration.
_INTERLEAVED_MODELS = frozenset(
    "axk2 bailing_hybrid blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher codegen cohere cohere2 "
    "cohere2_moe deepseek_v2 deepseek_v32 dots3_note_text ernie4_5 ernie4_5_moe glm glm4 glm4v_text glm_moe_dsa "
    "glm_ocr_text gptj helium llama4_text longcat_flash mistral_large4_text moonshine moonshine_streaming "
    "openai_privacy_filter".split()
)

# Model types whose rotation a Rope cannot say.
_FOREIGN_MODELS = {
    "deepseek_v4": "it turns the last entries of a head",
    "ernie4_5_vl_moe_text": "it orders the frequencies by axis",
    "nanochat": "it turns the other way round",
}


def _from_hf(cls: type[Rope], config: Any, layer_type: str | None) -> Rope:
    model_type = getattr(config, "model_type", None)
    if model_type in _FOREIGN_MODELS:
        raise InvalidInput("config", "a rotation that Rope can say", f"{model_type}: {_FOREIGN_MODELS[model_type]}")
    parameters = _hf_parameters(config, layer_type)
    interleaved = getattr(config, "rope_interleave", None)
    return cls(
        dim=_hf_dim(config, layer_type, parameters),
        base=parameters["rope_theta"],
        scaling=_hf_scaling(config, parameters),
        interleaved=model_type in _INTERLEAVED_MODELS if interleaved is None else bool(interleaved),
    )


def _hf_parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    """The rope_parameters of one layer type; those that are absent are left out, never None."""
    everything = getattr(config, "rope_parameters", None) or _hf_parameters_before_v5(config)
    by_layer_type = {name: value for name, value in everything.items() if isinstance(value, Mapping)}
    if by_layer_type and layer_type not in by_layer_type:
        raise InvalidInput("layer_type", f"one of {sorted(by_layer_type)}", layer_type)
    parameters = by_layer_type[layer_type] if by_layer_type else everything
    parameters = {name: value for name, value in parameters.items() if value is not None}

    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters["truncate"] = bool(everything.get("truncate", True))  # transformers reads it at the top level only
    if not by_layer_type and hasattr(config, "original_max_position_embeddings"):
        parameters["original_max_position_embeddings"] = config.original_max_position_embeddings  # Phi-3 keeps it there
    for name in ("rope_theta", "partial_rotary_factor"):
        if getattr(config, name, None) is not None:
            parameters.setdefault(name, getattr(config, name))
    if "rope_theta" not in parameters:
        raise InvalidInput(
            "config", "a model with rotary positions (rope_parameters or rope_theta)", type(config).__name__
        )
    return parameters


def _hf_parameters_before_v5(config: Any) -> dict[str, Any]:
    parameters = dict(getattr(config, "rope_scaling", None) or {})
    if hasattr(config, "rotary_pct"):  # GPT-NeoX
        parameters |= {"rope_theta": config.rotary_emb_base, "partial_rotary_factor": config.rotary_pct}
    elif hasattr(config, "rotary_dim") and not hasattr(config, "rope_theta"):  # GPT-J and CodeGen fix the base
        parameters["rope_theta"] = 10000.0
    elif hasattr(config, "rope_local_base_freq"):  # Gemma 3
        full = {"rope_theta": config.rope_theta, **parameters}
        return {"full_attention": full, "sliding_attention": {"rope_theta": config.rope_local_base_freq}}
    return parameters


def _hf_dim(config: Any, layer_type: str | None, parameters: Mapping[str, Any]) -> int:
    rotary_dim = getattr(config, "rotary_dim", None)
    if rotary_dim is not None and "partial_rotary_factor" not in parameters:
        return int(rotary_dim)
    head_dim = _hf_head_dim(config, layer_type)
    if parameters["rope_type"] == "proportional":
        return head_dim
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _hf_head_dim(config: Any, layer_type: str | None) -> int:
    if layer_type is not None and getattr(config, "is_heterogeneous", False):
        with suppress(ValueError):  # layers of this type differ, but not in head_dim, or reading it says so
            config = config.per_layer_config[layer_type]
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or _hf_value(config, "hidden_size") // _hf_value(config, "num_attention_heads"))


def _hf_value(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if value is None:
        raise InvalidInput("config", f"a configuration with {name}", type(config).__name__)
    return value


def _hf_scaling(config: Any, parameters: Mapping[str, Any]) -> Scaling | None:
    def value(name: str) -> Any:
        if name not in parameters:
            raise InvalidInput("config", f"rope_parameters with {name}", dict(parameters))
        return parameters[name]

    def original() -> int:
        if "original_max_position_embeddings" in parameters:
            return parameters["original_max_position_embeddings"]
        return _hf_value(config, "max_position_embeddings")

    def factor() -> float:
        if "factor" in parameters:
            return parameters["factor"]
        return _hf_value(config, "max_position_embeddings") / original()

    match parameters["rope_type"]:
        case "default" | "mrope":
            return None
        case "linear":
            return Linear(value("factor"))
        case "dynamic":
            return DynamicNTK(value("factor"), _hf_value(config, "max_position_embeddings"))
        case "yarn":
            return YaRN(
                factor(),
                original(),
                beta_fast=parameters.get("beta_fast") or 32.0,
                beta_slow=parameters.get("beta_slow") or 1.0,
                mscale=parameters.get("mscale") or None,
                mscale_all_dim=parameters.get("mscale_all_dim") or None,
                truncate=parameters["truncate"],
                attention_factor=parameters.get("attention_factor"),
            )
        case "longrope":
            short, long = value("short_factor"), value("long_factor")
            return LongRoPE(factor(), original(), short, long, parameters.get("attention_factor"))
        case "llama3":
            return Llama3(value("factor"), original(), value("low_freq_factor"), value("high_freq_factor"))
        case "proportional":
            return Proportional(parameters.get("partial_rotary_factor", 1.0), parameters.get("factor", 1.0))
        case other:
            known = "default, linear, dynamic, yarn, longrope, llama3, proportional"
            raise InvalidInput("config", f"a rope type out of {known}", other)
