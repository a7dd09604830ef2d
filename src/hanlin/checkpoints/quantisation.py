"""What `quantization_config` of a `config.json` says: how the weights beside it are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hanlin.checkpoints.base import shown
from hanlin.errors import ConfigError, problems

__all__ = ["Method", "Quantisation", "read_quantisation"]

Method = Literal["awq", "gptq", "compressed-tensors", "bitsandbytes", "hanlin"]
_METHODS: tuple[Method, ...] = ("awq", "gptq", "compressed-tensors", "bitsandbytes", "hanlin")
_WHOLE_ROW = -1


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """
    Attributes:
        bits: of a code, those that may occur.
        group: columns that share a scale; -1: all of a row; 0: as the shapes of the files say.
        zero_added: what has to be added to a stored zero point (1 in GPTQ's first version).
        symmetric: no zero points are needed: the middle of the codes stands for zero.
    """

    method: Method
    bits: tuple[int, ...]
    group: int = 0
    zero_added: int = 0
    symmetric: bool = False


def read_quantisation(values: Any, path: Path) -> Quantisation:
    """Read it.

    Raises:
        ConfigError: a method, version or width that is not read here, or keys that contradict; all at once.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: 'quantization_config' must be an object, not {shown(values)}")
    found: list[str] = []
    method = _method(values)
    if method is None:
        found.append(f"'quant_method' = {shown(values.get('quant_method'))} is not read here")
        made = None
    elif method == "hanlin":  # the packed weights say the rest themselves
        made = Quantisation(method=method, bits=())
    else:
        made = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "bitsandbytes": _bitsandbytes}[method](
            values, found
        )
    if found or made is None:
        remedy = f"Read are {', '.join(_METHODS)}; else use the original weights, and quantise them: hanlin quantize."
        raise ConfigError(problems(f"{path}: quantization_config", found, remedy))
    return made


def _method(values: Mapping[str, Any]) -> Method | None:
    name = values.get("quant_method")
    if name is None:  # GPTQ's own quantize_config.json, and old bitsandbytes files, do not name themselves
        if "load_in_4bit" in values or "load_in_8bit" in values:
            return "bitsandbytes"
        name = "gptq" if "desc_act" in values else None
    return next((method for method in _METHODS if isinstance(name, str) and name.lower() == method), None)


def _awq(values: Mapping[str, Any], found: list[str]) -> Quantisation:
    version = values.get("version", values.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        found.append(f"'version' = {shown(version)} of AWQ is not read here, only 'gemm'")
    if values.get("zero_point", True) is not True:
        found.append(f"'zero_point' = {shown(values['zero_point'])}: AWQ's gemm files have zero points")
    bits = _bits(values, ("bits", "w_bit"), (4,), found)
    return Quantisation(method="awq", bits=bits, group=_group(values, ("group_size", "q_group_size"), found))


def _gptq(values: Mapping[str, Any], found: list[str]) -> Quantisation:
    version = values.get("checkpoint_format") or values.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        found.append(f"'checkpoint_format' = {shown(version)} is not read here, only 'gptq' and 'gptq_v2'")
    if values.get("is_marlin_format"):
        found.append("'is_marlin_format': weights packed for Marlin's kernels are not read here")
    dynamic = values.get("dynamic")
    if dynamic is not None and not isinstance(dynamic, Mapping):
        found.append(f"'dynamic' must be an object, not {shown(dynamic)}")
    widths = (2, 3, 4, 8)
    bits = _bits(values, ("bits",), widths, found)
    group = _group(values, ("group_size",), found)
    return Quantisation(
        method="gptq",
        bits=widths if dynamic else bits,  # parts of the model may have others
        group=0 if dynamic else group,
        zero_added=int(version == "gptq"),
        symmetric=values.get("sym") is True,
    )


def _compressed(values: Mapping[str, Any], found: list[str]) -> Quantisation:
    known = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
    groups = values.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    if not schemes or not all(isinstance(scheme, Mapping) for scheme in schemes):
        found.append("'config_groups' must name at least one scheme")
        schemes = []
    for form in (values.get("format"), *(scheme.get("format") for scheme in schemes)):
        if form is not None and form not in known:
            found.append(f"'format' = {shown(form)} is not read here, only {', '.join(known[:2])}")
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        found.append(f"'sparsity_config' = {shown(sparsity.get('format'))}: sparse weights are not read here")
    if values.get("kv_cache_scheme"):
        found.append("'kv_cache_scheme': a quantised cache with stored scales is not read here")
    if values.get("transform_config"):
        found.append("'transform_config': weights that were rotated are not read here")
    bits: set[int] = set()
    for number, scheme in enumerate(schemes):
        weights = scheme.get("weights")
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
            found.append(f"scheme {number} has weights {shown(weights)}; only whole numbers ('type': 'int') are read")
            continue
        bits.update(_bits(weights, ("num_bits",), (2, 3, 4, 8), found))
    return Quantisation(method="compressed-tensors", bits=tuple(sorted(bits)))


def _bitsandbytes(values: Mapping[str, Any], found: list[str]) -> Quantisation:
    four, eight = values.get("load_in_4bit") is True, values.get("load_in_8bit") is True
    if four == eight:
        found.append("one of 'load_in_4bit' and 'load_in_8bit' must be true")
    return Quantisation(method="bitsandbytes", bits=(4,) if four else (8,))


def _bits(values: Mapping[str, Any], keys: tuple[str, ...], known: tuple[int, ...], found: list[str]) -> tuple[int]:
    value = next((values[key] for key in keys if key in values), None)
    if type(value) is not int or value not in known:
        found.append(f"'{keys[0]}' = {shown(value)} is not read here, only {', '.join(map(str, known))}")
        return (known[0],)
    return (value,)


def _group(values: Mapping[str, Any], keys: tuple[str, ...], found: list[str]) -> int:
    value = next((values[key] for key in keys if key in values), None)
    if type(value) is not int or not (value == _WHOLE_ROW or 0 < value < 1 << 20):
        found.append(f"'{keys[0]}' must be the number of columns with one scale, or -1, not {shown(value)}")
        return _WHOLE_ROW
    return value
