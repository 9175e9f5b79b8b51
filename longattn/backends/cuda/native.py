"""The shared library of csrc/cuda, through ctypes: it knows no Python, so that one build serves every version."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from longattn._build_info import build_info


class Rows(ctypes.Structure):
    """csrc/cuda/call.h: LongattnRows."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64))

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Of x [B, H, N, D], unit stride in D."""
        batch, head, token, _ = x.stride()
        return cls(x.data_ptr(), batch, head, token)


class Call(ctypes.Structure):
    """csrc/cuda/call.h: LongattnCall."""

    _fields_ = (
        *((name, c_int32) for name in ("batch", "q_heads", "kv_heads", "nq", "nk", "head_dim", "v_head_dim")),
        ("is_bfloat16", c_int32),
        *((name, Rows) for name in ("q", "k", "v", "out")),
        ("lse", c_void_p),
        *((name, c_int32) for name in ("left", "right", "sinks", "offset", "from_end")),
        *((name, c_void_p) for name in ("offsets", "key_lens", "key_mask", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, c_int32) for name in ("max_seqlen_q", "max_seqlen_k")),
        *((name, c_void_p) for name in ("lo", "hi")),
        ("bounds_batch", c_int32),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_void_p) for name in ("sink_logits", "counters")),
        *((name, Rows) for name in ("dout", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("dlse", "row_terms", "dq_sum")),
        ("deterministic", c_int32),
        ("table", c_void_p),
        *((name, c_int32) for name in ("table_width", "pages", "page_size")),
        ("query_lens", c_void_p),
        *((name, Rows) for name in ("new_k", "new_v")),
        *((name, c_void_p) for name in ("inv_freq", "positions")),
        *((name, c_int32) for name in ("rotated", "interleaved", "inv_freq_batch", "positions_batch")),
        ("rope_factor", c_float),
        *((name, c_void_p) for name in ("packed_q", "partial_out", "partial_lse", "stream")),
    )


class RopeCall(ctypes.Structure):
    """csrc/cuda/call.h: LongattnRope."""

    _fields_ = (
        *((name, c_int32) for name in ("batch", "heads", "tokens", "width", "rotated")),
        *((name, c_int32) for name in ("is_bfloat16", "interleaved", "inverse")),
        *((name, Rows) for name in ("x", "out")),
        *((name, c_void_p) for name in ("inv_freq", "positions")),
        ("positions_batch", c_int32),
        ("factor", c_float),
        ("stream", c_void_p),
    )


class Workspace(ctypes.Structure):
    """csrc/cuda/call.h: LongattnWorkspace."""

    _fields_ = tuple((name, c_int64) for name in ("counters", "row_terms", "dq_sum", "partial_out", "partial_lse"))


_CALLS = {"forward": Call, "backward": Call, "append": Call, "decode": Call, "rope": RopeCall}


class Library:
    """The functions of a built library; `emulated` says that it is the host emulator's, which reads CPU tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.emulated = hasattr(self._library, "emulator_configure")
        if self._library.longattn_cuda_call_bytes() != ctypes.sizeof(Call):
            raise OSError(f"{path.name} was built from other sources than these: build again")
        for name, kind in _CALLS.items():
            function = getattr(self._library, f"longattn_cuda_{name}")
            function.restype, function.argtypes = c_char_p, (ctypes.POINTER(kind),)
        self.widest = int(self._library.longattn_cuda_widest())  # heads
        workspace = self._library.longattn_cuda_workspace
        workspace.restype, workspace.argtypes = None, (ctypes.POINTER(Call), ctypes.POINTER(Workspace))

    def workspace(self, call: Call) -> Workspace:
        """How many entries the buffers of a call have."""
        sizes = Workspace()
        self._library.longattn_cuda_workspace(ctypes.byref(call), ctypes.byref(sizes))
        return sizes

    def run(self, name: str, call: Call | RopeCall) -> None:
        """Start a call's kernels on the current stream.

        Raises:
            RuntimeError: what the driver says.
        """
        call.stream = None if self.emulated else torch.cuda.current_stream().cuda_stream
        fault = getattr(self._library, f"longattn_cuda_{name}")(ctypes.byref(call))
        if fault is not None:
            raise RuntimeError(f"longattn's CUDA kernels ({name}): {fault.decode()}")


def load(path: Path) -> Library | str:
    """The library at a path, or why there is none."""
    if not path.exists():
        return build_info().cuda_reason or "the CUDA kernels were not built"
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return f"the CUDA kernels do not load: {error}"


found = load(Path(__file__).parents[2] / "_cuda.so")  # by this installation; now, as torch.compile could not trace it
