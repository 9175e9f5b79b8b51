"""An existing PyTorch model on linear-memory attention: same weights, same outputs, then a window for longer inputs.

python examples/existing_model.py
"""

from __future__ import annotations

import torch

import longattn


def main() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(1, 256, 64)
    with torch.no_grad():
        before = model(x)
        longattn.nn.replace_attention(model)
        print(f"largest difference after the swap: {(model(x) - before).abs().max():.1e}")

    windowed = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    longattn.nn.replace_attention(windowed, window=128)
    with torch.no_grad():
        print(f"a window of 128 over 8192 tokens: {tuple(windowed(torch.randn(1, 8192, 64)).shape)}")


if __name__ == "__main__":
    main()
