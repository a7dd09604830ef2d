"""Block formats: equal bit for bit to the `gguf` package's decoders."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from hanlin.checkpoints.blocks import BLOCKS, dequantize
from hanlin.errors import CheckpointError

OWN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
PACKAGE = tuple(kind for kind in BLOCKS if kind not in OWN and hasattr(gguf.quants, kind) and kind != "BF16")


def expected(kind: str, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(all="ignore"):
        rows = data.reshape(shape[0], -1)
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(shape)


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    elements, nbytes = BLOCKS[kind]
    count = int(np.prod(shape)) // elements
    return np.random.default_rng(seed).integers(0, 256, count * nbytes, dtype=np.uint8)


def test_sizes_are_those_of_the_format() -> None:
    theirs = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in BLOCKS if kind in theirs} == {k: v for k, v in BLOCKS.items() if k in theirs}
    assert set(theirs) <= set(BLOCKS)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (1030, 1024)])
def test_own_decoders_equal_the_package_bit_for_bit(kind: str, shape: tuple[int, ...]) -> None:
    """Any bytes at all: every scale that fits 16 bits, NaN and infinity among them; and more than one chunk."""
    data = random_blocks(kind, shape)
    mine = dequantize(kind, data, shape).numpy()
    theirs = expected(kind, data, shape)
    assert mine.dtype == np.float32 and mine.shape == shape
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(mine), nan)
    np.testing.assert_array_equal(mine.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("kind", PACKAGE)
@pytest.mark.parametrize("rows", [1, 16, 19])
def test_other_kinds_go_through_the_package(kind: str, rows: int) -> None:
    elements, _ = BLOCKS[kind]
    data = random_blocks(kind, (rows, elements))
    np.testing.assert_array_equal(
        dequantize(kind, data, (rows, elements)).numpy(), expected(kind, data, (rows, elements))
    )


def test_read_only_bytes_are_fine() -> None:
    data = random_blocks("Q4_1", (4, 32))
    frozen = data.copy()
    frozen.flags.writeable = False
    assert torch.equal(dequantize("Q4_1", frozen, (4, 32)).nan_to_num(), dequantize("Q4_1", data, (4, 32)).nan_to_num())


def test_no_elements() -> None:
    assert dequantize("Q8_0", np.empty(0, np.uint8), (0, 32)).shape == (0, 32)


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1"])
def test_kinds_without_a_decoder_are_named(kind: str) -> None:
    elements, _ = BLOCKS[kind]
    with pytest.raises(CheckpointError, match=f"{kind} can't be decoded"):
        dequantize(kind, random_blocks(kind, (1, elements)), (1, elements))
