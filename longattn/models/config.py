"""The shape of a Transformer as one immutable value, saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from longattn import scaling
from longattn.errors import InvalidInput
from longattn.extension import Method, Remapping, check_layer_methods
from longattn.rope import Rope
from longattn.scaling import Scaling, finite_number

__all__ = ["STYLES", "TransformerConfig"]

FULL, SLIDING, UNROTATED = "L", "S", "N"
DECODER, ENCODER, ENCODER_DECODER = "decoder", "encoder", "encoder-decoder"

_CHOICES = {
    "architecture": (DECODER, ENCODER, ENCODER_DECODER),
    "positions": ("rope", "learned", "sinusoidal"),
    "norm": ("rms", "layer"),
    "feed_forward": ("swiglu", "gelu", "gelu_tanh", "relu"),
    "window_positions": ("original", "cache"),
}
_FLAGS = ("norm_first", "embedding_norm", "bias", "scale_embeddings", "tie_embeddings")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that a model is, but its weights.

    The defaults are those of Llama; `style` names the others.

    Args:
        vocab_size: V, the number of token ids; 256 for bytes.
        dim: C, the width of the residual stream.
        layers: how many blocks; of an encoder-decoder, those of the decoder.
        heads: Hq, query heads.
        kv_heads: Hkv, a divisor of heads; heads by default.
        head_dim: D, even for rotary positions; dim / heads by default.
        hidden: inner width of the feed-forward layers; 4 dim by default, of SwiGLU 8/3 dim, rounded up to a multiple
            of 64, where its three matrices weigh what two of width 4 dim do (Shazeer, GLU Variants, arXiv 2002.05202).
        max_length: the trained length, in tokens. Longer inputs run, where a rope_scaling or sliding layers make them
            work; with learned positions they are an error.
        architecture: "decoder" (causal), "encoder" (every token sees every other), or "encoder-decoder", whose decoder
            attends to the encoder's output as well.
        encoder_layers: of an encoder-decoder; layers by default.
        positions: "rope" rotates queries and keys, "learned" and "sinusoidal" are added to the embeddings.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm).
        norm_first: norms stand before attention and feed-forward layers and after the last block (pre-norm), or after
            each sum (post-norm, as the first Transformer has it).
        embedding_norm: a norm of the embeddings, before the first block.
        feed_forward: "swiglu", or two matrices with "gelu", "gelu_tanh" (its approximation) or "relu" between them.
        bias: of the linear layers and LayerNorms.
        dropout: of embeddings and of what attention and feed-forward layers add, while training.
        attention_dropout: of the attention weights, while training.
        token_types: how many token types (segments) an encoder's input has; 0: none.
        scale_embeddings: token embeddings are multiplied by sqrt(dim), before positions are added.
        pattern: one letter a layer, repeated over the layers: "L" full attention, "S" a sliding window, "N" full
            attention without rotation (NoPE). "SSSL" is three sliding layers, then a full one. Attention to an
            encoder's output is always full.
        window: how many of the newest keys a sliding layer sees, the query's own included; an encoder's sees as many on
            the other side too.
        sinks: how many of the first keys a sliding layer sees from everywhere.
        window_positions: where the sinks of sliding layers stand in the rotation: "original", or "cache" as in
            StreamingLLM, with and without a cache.
        rope_base, rope_scaling: of `longattn.Rope`.
        methods: of a decoder's layers, as in `longattn.nn.Attention`: LogN, ShiftedGroups, SelfExtend or DualChunk.
        norm_eps: of the norms.
        tie_embeddings: the output projection is the embedding; of an encoder-decoder, source and target share it too.

    Raises:
        InvalidInput: a value out of range, or two that contradict each other.
    """

    vocab_size: int = 256
    dim: int
    layers: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # an int once constructed, as are the next two
    head_dim: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    max_length: int
    architecture: str = DECODER
    encoder_layers: int | None = None
    positions: str = "rope"
    norm: str = "rms"
    norm_first: bool = True
    embedding_norm: bool = False
    feed_forward: str = "swiglu"
    bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    token_types: int = 0
    scale_embeddings: bool = False
    pattern: str = FULL
    window: int | None = None
    sinks: int = 0
    window_positions: str = "original"
    rope_base: float = 10000.0
    rope_scaling: Scaling | None = None
    methods: tuple[Method, ...] = ()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "max_length"):
            _check_int(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidInput(name, " or ".join(map(repr, choices)), repr(getattr(self, name)))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(name, "a bool", repr(getattr(self, name)))
        if self.head_dim is None and self.dim % self.heads:
            raise InvalidInput("dim", f"a multiple of heads {self.heads} (or head_dim beside it)", self.dim)
        self._default("kv_heads", self.heads)
        self._default("head_dim", self.dim // self.heads)
        self._default("hidden", -(-8 * self.dim // (3 * 64)) * 64 if self.feed_forward == "swiglu" else 4 * self.dim)
        if self.heads % self.kv_heads:
            raise InvalidInput("kv_heads", f"a divisor of heads {self.heads}", self.kv_heads)
        self._check_architecture()
        self._check_pattern()
        self._check_positions()
        self._check_methods()
        finite_number("norm_eps", self.norm_eps, above=0.0)
        for name in ("dropout", "attention_dropout"):
            finite_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
            if getattr(self, name) == 1:
                raise InvalidInput(name, "a number in [0, 1)", getattr(self, name))

    @classmethod
    def style(cls, name: str, **sizes: Any) -> TransformerConfig:
        """The config of a well-known family in other sizes.

        Args:
            name: one of `STYLES`.
            sizes: the arguments of this class; they win over those of the style.

        Raises:
            InvalidInput: an unknown style, or bad arguments.
        """
        if name not in STYLES:
            raise InvalidInput("name", f"one of {', '.join(STYLES)}", repr(name))
        return cls(**{**STYLES[name], **sizes})

    @property
    def rope(self) -> Rope | None:
        """How positions rotate queries and keys; None where they are added to the embeddings."""
        return Rope(self.head_dim, self.rope_base, self.rope_scaling) if self.positions == "rope" else None

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees a window (and the sinks) only."""
        return self.pattern[layer % len(self.pattern)] == SLIDING

    def rope_of(self, layer: int) -> Rope | None:
        """How positions rotate the queries and keys of a layer."""
        return None if self.pattern[layer % len(self.pattern)] == UNROTATED else self.rope

    def methods_of(self, layer: int) -> tuple[Method, ...]:
        """Those of a layer: one that rotates nothing has no positions to give."""
        rotates = self.rope_of(layer) is not None
        return tuple(method for method in self.methods if rotates or not isinstance(method, Remapping))

    def to_dict(self) -> dict[str, Any]:
        """The arguments in plain Python values, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["rope_scaling"] = None if self.rope_scaling is None else self.rope_scaling.to_dict()
        return values | {"methods": [method.to_dict() for method in self.methods]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The config that `to_dict` described.

        Raises:
            InvalidInput: a missing, unknown or bad argument.
        """
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, Mapping) or not required <= values.keys() <= names:
            expected = f"a mapping with {sorted(required)} and any of {sorted(names - required)}"
            raise InvalidInput("config", expected, list(values) if isinstance(values, Mapping) else values)
        rope_scaling = values.get("rope_scaling")
        read = {"rope_scaling": None if rope_scaling is None else scaling.from_dict(rope_scaling)}
        return cls(**{**values, **read, "methods": tuple(map(Method.read, values.get("methods", ())))})

    def _default(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        _check_int(name, getattr(self, name))

    def _check_architecture(self) -> None:
        if self.architecture == ENCODER_DECODER:
            if self.encoder_layers is None:
                object.__setattr__(self, "encoder_layers", self.layers)
            _check_int("encoder_layers", self.encoder_layers)
        elif self.encoder_layers is not None:
            raise InvalidInput(
                "encoder_layers", f"None for the architecture {self.architecture!r}", self.encoder_layers
            )
        if isinstance(self.token_types, bool) or not isinstance(self.token_types, int) or self.token_types < 0:
            raise InvalidInput("token_types", "an int >= 0", repr(self.token_types))
        if self.token_types and self.architecture != ENCODER:
            raise InvalidInput("token_types", f"0 for the architecture {self.architecture!r}", self.token_types)

    def _check_positions(self) -> None:
        if self.positions == "rope":
            _check_int("head_dim", self.head_dim, even=True)
            Rope(self.head_dim, self.rope_base, self.rope_scaling).frequencies(self.max_length)
            return
        if self.positions == "sinusoidal" and self.dim % 2:
            raise InvalidInput("dim", "an even int with sinusoidal positions", self.dim)
        for name in ("rope_scaling", "rope_base"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InvalidInput(name, f"the default beside positions {self.positions!r}", getattr(self, name))

    def _check_methods(self) -> None:
        if not isinstance(self.methods, tuple):
            raise InvalidInput("methods", "a tuple of longattn.extension's methods", self.methods)
        placed = bool(self.methods) or self.window_positions == "cache"
        if placed and self.architecture != DECODER:
            name = "methods" if self.methods else "window_positions"
            raise InvalidInput(name, f"the default for the architecture {self.architecture!r}", getattr(self, name))
        if self.window_positions == "cache" and (self.positions != "rope" or SLIDING not in self.pattern):
            got = f"positions {self.positions!r} and pattern {self.pattern!r}"
            raise InvalidInput("window_positions", "'original' without rotation or a sliding layer", got)
        check_layer_methods(self.methods, self.rope)

    def _check_pattern(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - {FULL, SLIDING, UNROTATED}:
            expected = "letters S (sliding), L (full) and N (full, no rotation), at least one"
            raise InvalidInput("pattern", expected, repr(self.pattern))
        if UNROTATED in self.pattern and self.positions != "rope":
            raise InvalidInput("pattern", "no layer N in a model that rotates nothing", repr(self.pattern))
        deepest = max(self.layers, self.encoder_layers or 0)
        if len(self.pattern) > deepest:
            raise InvalidInput("pattern", f"at most {deepest} letters, one a layer", repr(self.pattern))
        if SLIDING in self.pattern:
            _check_int("window", self.window)
        elif self.window is not None:
            raise InvalidInput("window", "None without a sliding layer (S in pattern)", self.window)
        elif self.sinks:
            raise InvalidInput("sinks", "0 without a sliding layer (S in pattern)", self.sinks)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise InvalidInput("sinks", "an int >= 0", repr(self.sinks))


def _check_int(name: str, value: object, *, even: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (even and value % 2):
        raise InvalidInput(name, "an even int >= 2" if even else "an int >= 1", repr(value))


# What the families are but their sizes.
STYLES: Mapping[str, Mapping[str, Any]] = {
    # Touvron et al., arXiv 2302.13971
    "llama": {},
    # Radford et al., Language Models are Unsupervised Multitask Learners, 2019
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-5,
        "feed_forward": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    # Devlin et al., arXiv 1810.04805
    "bert": {
        "architecture": ENCODER,
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-12,
        "norm_first": False,
        "embedding_norm": True,
        "feed_forward": "gelu",
        "bias": True,
        "token_types": 2,
        "tie_embeddings": True,
    },
    # An encoder with what decoders have since learned
    "modern-encoder": {"architecture": ENCODER, "tie_embeddings": True},
    # Vaswani et al., Attention Is All You Need, arXiv 1706.03762
    "transformer": {
        "architecture": ENCODER_DECODER,
        "positions": "sinusoidal",
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_first": False,
        "feed_forward": "relu",
        "bias": True,
        "scale_embeddings": True,
        "tie_embeddings": True,
    },
    "modern-transformer": {"architecture": ENCODER_DECODER, "tie_embeddings": True},
}
