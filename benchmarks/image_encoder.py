"""The image encoder of VisualGLM-6B at its true shape, with random weights: seconds for an image, and peak memory.

python benchmarks/image_encoder.py [--threads N] [--torch]
"""

from __future__ import annotations

import argparse
import io
import time

import torch

from hanlin.assembly import peak_memory
from hanlin.kernels.native import Context, available
from hanlin.models.eva import BLIP2, EncoderConfig
from hanlin.vision import Vision

VISION = EncoderConfig(layers=39, width=1408, heads=16, inner=6144, eps=1e-6, rows=1, image_size=224, patch=14)
QUERIES = EncoderConfig(layers=12, width=768, heads=12, inner=3072, eps=1e-12, rows=32, crossed=(True, False) * 6)


def picture(number: int) -> bytes:
    """A photo's worth of random colours."""
    from PIL import Image

    colours = torch.randint(0, 256, (480, 640, 3), generator=torch.Generator().manual_seed(number))
    out = io.BytesIO()
    Image.fromarray(colours.to(torch.uint8).numpy()).save(out, "PNG")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--torch", action="store_true", help="without the native library, in bfloat16")
    options = parser.parse_args()
    with torch.device("meta"):
        encoder = BLIP2(VISION, QUERIES, 4096).eval().requires_grad_(False)
    native = available() and not options.torch
    if native:
        encoder.keep(torch.bfloat16)
    else:
        encoder.bfloat16()
    encoder.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        center = float(name.endswith(("norm.weight", "ln_vision.weight")))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02 + center)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"{count:,} parameters; built with {peak_memory() / 2**30:.2f} GiB")
    began = time.perf_counter()
    vision = Vision(encoder, VISION.image_size, Context(options.threads) if native else None)
    print(f"packed in {time.perf_counter() - began:.1f} s" if native else "not packed: torch multiplies")
    for number in (1, 2, 1):
        began = time.perf_counter()
        rows = vision.given(0, picture(number)).rows
        print(f"image {number}: {time.perf_counter() - began:.2f} s, {rows.shape}, deviation {rows.std():.3f}")
    print(f"peak memory {peak_memory() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
