"""What can be set when a model is loaded; LMDeploy's names and meanings where it has one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hanlin.errors import ConfigError, problems

__all__ = ["EngineConfig"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("hf", "gguf", "awq", "gptq", "compressed-tensors")
WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")
RUNNERS = ("auto", "native", "torch")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is held and run. Also known as LMDeploy's TurbomindEngineConfig and PytorchEngineConfig.

    Attributes:
        dtype: of weights and cache: auto, float32, bfloat16 or float16. Auto is bfloat16 where the CPU multiplies it
            natively or the device is an accelerator, else float32.
        device: auto, cpu, cuda, mps, or cuda:1.
        session_len: tokens of one conversation at most; None is what the model was made for.
        max_batch_size: sequences computed together at most.
        max_prefill_token_num: tokens of one step at most; longer prompts are cut into chunks. None is 2,048, and fewer
            for wide models, whose rows would take too much memory.
        weights: how a CPU keeps them: auto (blocks of a GGUF file as they are, else `dtype`), float32, bfloat16, int8,
            int4. The integer kinds have groups of 32; the head and the embedding keep 8 bits.
        kv_cache: auto (as `dtype`), float32, bfloat16, int8 or int4; on a CPU.
        quant_policy: LMDeploy's word for it: 8 and 4 are int8 and int4.
        runner: auto, native (the CPU library) or torch (any device, the reference).
        speculation: auto guesses tokens from the text so far where that pays, off does not; the reply is the same.
        draft_model: a small model of the same vocabulary to guess with, instead.
        step_seconds: how long prompts may make a step last while others are answered, and eight times as long while
            nobody is; every other step three times that, for prompts that end with it. 0 does not care.
        cache_max_entry_count: of the KV cache: a fraction of the free memory, or a number of blocks; None takes what
            `max_batch_size` short or a few long conversations need, and half of the free memory at most.
        cache_bytes: of the KV cache: its size in bytes, instead.
        cache_block_seq_len: tokens of one block of the cache.
        enable_prefix_caching: keep computed text for later requests that start alike.
        deterministic: one request, one answer, whatever else runs; on CPU.
        rope_scaling_factor: stretch the context by dynamic NTK; 0 keeps what the model says.
        chat_template: name of a chat format; None chooses by the model.
        system_prompt: for conversations without one; None is the model's own default, "" none at all.
        adapter: a directory with a LoRA adapter, as PEFT saves them, to be merged into the weights while loading.
        adapters: such directories by name, to be asked for by each request.
        packed_cache: keep packed weights of the native runner on disk, where later loads map them.
        threads: CPU threads; None leaves it to torch.
        ptuning_checkpoint: a directory that P-Tuning v2 wrote (`pytorch_model.bin`), whose soft prefix the model gets.
        tp, use_logn_attn: must be 1 and False for now.
        model_format: as LMDeploy names it (hf, gguf, awq, gptq, compressed-tensors); the files tell.

    Raises:
        ConfigError: naming every impossible value at once.
    """

    dtype: str = "auto"
    device: str = "auto"
    session_len: int | None = None
    max_batch_size: int | None = None
    max_prefill_token_num: int | None = None
    cache_max_entry_count: float | None = None
    cache_bytes: int | None = None
    cache_block_seq_len: int = 32
    enable_prefix_caching: bool = True
    deterministic: bool = True
    rope_scaling_factor: float = 0.0
    chat_template: str | None = None
    system_prompt: str | None = None
    threads: int | None = None
    adapter: str | os.PathLike[str] | None = None
    adapters: Mapping[str, str | os.PathLike[str]] | None = None
    packed_cache: bool = True
    weights: str = "auto"
    kv_cache: str = "auto"
    quant_policy: int = 0
    runner: str = "auto"
    speculation: str = "auto"
    draft_model: str | None = None
    step_seconds: float = 0.25
    ptuning_checkpoint: str | os.PathLike[str] | None = None
    tp: int = 1
    use_logn_attn: bool = False
    model_format: str | None = None

    def __post_init__(self) -> None:
        found = []
        for name, allowed in (
            ("dtype", DTYPES),
            ("weights", WEIGHTS),
            ("kv_cache", WEIGHTS),
            ("runner", RUNNERS),
            ("speculation", ("auto", "off")),
        ):
            if getattr(self, name) not in allowed:
                found.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.quant_policy not in (0, 4, 8):
            found.append(f"quant_policy must be 0, 4 or 8, not {self.quant_policy!r}")
        elif self.quant_policy and self.kv_cache not in ("auto", f"int{self.quant_policy}"):
            found.append(f"quant_policy {self.quant_policy} and kv_cache {self.kv_cache!r} contradict each other")
        for name, low in (
            ("session_len", 2),
            ("max_batch_size", 1),
            ("max_prefill_token_num", 1),
            ("cache_bytes", 1),
            ("cache_block_seq_len", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                found.append(f"{name} must be a whole number >= {low}, not {value!r}")
        entry = self.cache_max_entry_count
        numeric = type(entry) in (int, float) and math.isfinite(entry or 0)
        if entry is not None and not (numeric and (0 < entry < 1 or (entry >= 1 and entry == int(entry)))):
            found.append(f"cache_max_entry_count must be a fraction in (0, 1) or a number of blocks, not {entry!r}")
        if entry is not None and self.cache_bytes is not None:
            found.append("give cache_max_entry_count or cache_bytes, not both")
        if type(self.step_seconds) not in (int, float) or not 0 <= self.step_seconds < math.inf:
            found.append(f"step_seconds must be a number >= 0, not {self.step_seconds!r}")
        adapters: object = self.adapters
        if adapters is not None and not isinstance(adapters, Mapping):
            found.append(f"adapters must map names to directories, not {adapters!r}")
        factor = self.rope_scaling_factor
        if type(factor) not in (int, float) or not (factor == 0 or 1 <= factor < math.inf):
            found.append(f"rope_scaling_factor must be 0 or >= 1, not {factor!r}")
        for name, only in (("tp", 1), ("use_logn_attn", False)):
            if getattr(self, name) != only:
                found.append(f"{name} = {getattr(self, name)!r} is not supported, only {only!r}")
        if self.model_format not in (None, *FORMATS):
            found.append(f"model_format {self.model_format!r} cannot be read, only {', '.join(FORMATS)}")
        if found:
            raise ConfigError(problems("engine options", found))

    @property
    def places(self) -> int:
        """Sequences in one step at most."""
        return self.max_batch_size or 64

    def step_tokens(self, hidden_size: int) -> int:
        """Tokens in one step at most, of a model of this width: their rows take a thirtieth of what its weights do."""
        return self.max_prefill_token_num or max(256, min(2048, (3 << 20) // hidden_size))

    def override(self, **options: Any) -> EngineConfig:
        """A copy with other values.

        Raises:
            ConfigError: naming every unknown option and every impossible value.
        """
        known = {f.name for f in fields(self)}
        unknown = [f"unknown option {name!r}" for name in options if name not in known]
        if unknown:
            raise ConfigError(problems("engine options", unknown, f"Known: {', '.join(sorted(known))}."))
        return replace(self, **options)


def free_memory() -> int:
    """Bytes that can be taken without swapping, the limit of a container included."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 << 30
    values = _read("/proc/meminfo")
    for line in values.splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123 (a kernel interface, not a file)
            return file.read()
    except OSError:
        return ""
