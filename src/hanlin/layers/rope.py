"""Rotary position embedding, with every scaling kind, in one place.

Shapes: T packed tokens, P position rows (two for ChatGLM-6B, else one), H heads, K head size, R rotary dimensions.
Sources: Su et al. 2021 (RoPE); dynamic NTK as in the InternLM2 and TurboMind code; llama3 and yarn as in the Llama 3.1
release and Peng et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hanlin.errors import ConfigError, problems

__all__ = ["Positions", "Rope", "RopeConfig", "Rotation", "rotate"]

_NUMBERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "none": ("factor",),
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": (),
    "yarn": (
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """What fixes the angles: `dims` rotary dimensions, base, scaling kind and its numbers, trained length.

    `half` rounds the frequencies to float16, as ChatGLM-6B was trained with them.
    """

    dims: int
    base: float
    max_positions: int
    kind: str = "none"
    numbers: Mapping[str, float] = field(default_factory=dict)
    interleaved: bool = False
    half: bool = False

    @property
    def factor(self) -> float:
        return self.numbers.get("factor", 1.0)

    @property
    def trained_length(self) -> int:
        """Positions that need no scaling."""
        return int(self.numbers.get("original_max_position_embeddings", self.max_positions))

    def dynamic_length(self, length: int) -> int:
        """The length that fixes the angles of a sequence with a prompt of `length` tokens; 0 where none does."""
        return length if self.kind == "dynamic" and length > self.trained_length else 0

    @classmethod
    def parse(
        cls, value: object, *, dims: int, base: float, max_positions: int, interleaved: bool = False
    ) -> RopeConfig:
        """Read a `rope_scaling` value (`type` or `rope_type`; None is no scaling).

        Raises:
            ConfigError: naming an unknown kind and every key that is missing, unknown or not a positive number.
        """
        plain = cls(dims=dims, base=base, max_positions=max_positions, interleaved=interleaved)
        if value is None:
            return plain
        if not isinstance(value, Mapping):
            raise ConfigError(f"rope_scaling must be a mapping or null, not {value!r}")
        kind = value.get("rope_type", value.get("type", "default"))
        kind = "none" if kind in (None, "default", "none") else kind
        if not isinstance(kind, str) or kind not in _NUMBERS:
            raise ConfigError(f"rope_scaling: unknown type {kind!r}. Known: {', '.join(_NUMBERS)}.")
        other = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
        given = {k: v for k, v in value.items() if k not in other}
        found = [f"{kind} needs {key!r}" for key in _NUMBERS[kind] if given.get(key) is None]
        for key, number in given.items():
            if key not in (*_NUMBERS[kind], *_OPTIONAL[kind]):
                found.append(f"unknown key {key!r} could change numbers")
            elif number is not None and (not isinstance(number, (int, float)) or not 0 <= number < 1e300):
                found.append(f"{key} must be a finite number >= 0, not {number!r}")
        if not found and kind != "none" and float(given["factor"]) < 1:
            found.append(f"factor must be >= 1, not {given['factor']!r}")
        if found:
            raise ConfigError(problems("rope_scaling", found))
        numbers = {k: float(v) for k, v in given.items() if v is not None}
        return cls(
            dims=dims, base=base, max_positions=max_positions, kind=kind, numbers=numbers, interleaved=interleaved
        )


@dataclass(frozen=True)
class Positions:
    """Where the tokens stand.

    Attributes:
        rows: (P, T) int64.
        lengths: (T,) int64, `RopeConfig.dynamic_length` of each token's sequence; None when all are 0.
    """

    rows: Tensor
    lengths: Tensor | None = None


class Rotation(NamedTuple):
    """Cosines and sines, each (T, R / 2) float32; `interleaved` pairs (0,1),(2,3)... instead of the two halves."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class Rope:
    """Angles of positions. The frequencies are float32, as the released models were trained."""

    def __init__(self, config: RopeConfig) -> None:
        self.config = config

    def __call__(self, positions: Positions) -> Rotation:
        """(P, T) positions -> cosines and sines (T, R / 2); P rows share the rotary dimensions evenly."""
        config = self.config
        parts = []
        for row in positions.rows:
            frequency = self.frequencies(config.dims // len(positions.rows), positions.lengths, row.device)
            parts.append(row.float()[:, None] * frequency)
        angles = torch.cat(parts, -1)
        scale = self.attention_factor
        return Rotation(angles.cos() * scale, angles.sin() * scale, config.interleaved)

    def frequencies(self, dims: int, lengths: Tensor | None, device: torch.device) -> Tensor:
        """(1, dims / 2), or (T, dims / 2) where the lengths of the sequences matter."""
        config = self.config
        if config.kind != "dynamic" or lengths is None:
            return self._scaled(config.base, dims, device)[None]
        known, index = torch.unique(lengths, return_inverse=True)
        return torch.stack([self._scaled(self.base(int(n), dims), dims, device) for n in known])[index]

    def base(self, length: int, dims: int) -> float:
        """Dynamic NTK: the base that stretches the slowest wave to `length`; it stays fixed for a whole sequence."""
        config = self.config
        if length <= config.trained_length:
            return config.base
        stretch = config.factor * length / config.trained_length - (config.factor - 1)
        return float(config.base * stretch ** (dims / (dims - 2)))

    def _scaled(self, base: float, dims: int, device: torch.device) -> Tensor:
        exponent = torch.arange(0, dims, 2, dtype=torch.int64, device=device).float() / dims
        plain = 1.0 / (base**exponent)
        if self.config.half:
            plain = plain.half().float()
        kind, n = self.config.kind, self.config.numbers
        if kind == "linear":
            return plain / n["factor"]
        if kind == "llama3":
            return _llama3(plain, n)
        if kind == "yarn":
            return _yarn(plain, base, dims, self.config)
        return plain

    @property
    def attention_factor(self) -> float:
        """What yarn multiplies the cosines and sines by, to keep the entropy of attention; 1 otherwise."""
        n = self.config.numbers
        if self.config.kind != "yarn":
            return 1.0
        if "attention_factor" in n:
            return n["attention_factor"]
        factor = n["factor"]
        if n.get("mscale") and n.get("mscale_all_dim"):
            return _mscale(factor, n["mscale"]) / _mscale(factor, n["mscale_all_dim"])
        return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(plain: Tensor, n: Mapping[str, float]) -> Tensor:
    """Slow waves are divided by the factor, fast ones kept, those between blended."""
    trained = n["original_max_position_embeddings"]
    low, high = n["low_freq_factor"], n["high_freq_factor"]
    wave = 2 * math.pi / plain
    smooth = (trained / wave - low) / (high - low)
    blended = (1 - smooth) * (plain / n["factor"]) + smooth * plain
    scaled = torch.where(wave > trained / low, plain / n["factor"], plain)
    middle = (wave <= trained / low) & (wave >= trained / high)
    return torch.where(middle, blended, scaled)


def _yarn(plain: Tensor, base: float, dims: int, config: RopeConfig) -> Tensor:
    """Ramp to the scaled wave between the dimensions that turn `beta_fast` and `beta_slow` times when trained."""
    n, trained = config.numbers, config.trained_length

    def dimension(turns: float) -> float:
        return dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(n.get("beta_fast", 32.0)), dimension(n.get("beta_slow", 1.0))
    if n.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32, device=plain.device) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return plain / n["factor"] * (1 - keep) + plain * keep


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R dimensions of x (T, H, K), in float32; the rest passes through."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    dims = 2 * cos.shape[-1]
    turned, rest = x[..., :dims].float(), x[..., dims:]
    if rotation.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = out.to(x.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out
