"""Putting a loaded model, its tokenizer, its chat format and an engine together, as the machine allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hanlin.adapters import Adapters
from hanlin.chat.visualglm import VisualGLMFormat
from hanlin.checkpoints.load import Loaded, load_model
from hanlin.checkpoints.packed import PackedSource
from hanlin.checkpoints.source import TensorInfo, TensorSource
from hanlin.engine.engine import Engine, EngineLimits
from hanlin.engine.lowering import Lowering
from hanlin.engine.native import NativeRunner, native_block_bytes
from hanlin.engine.runner import Runner, TorchRunner, kv_bytes
from hanlin.engine.speculative import Drafter, ModelDrafter, PromptLookup
from hanlin.errors import CapacityError, ChatFormatError, ConfigError, RequestError
from hanlin.guide import Grammars
from hanlin.kernels.native import Context, unavailable_reason
from hanlin.kernels.packed_cache import PackedCache, PackedImage
from hanlin.layers.rope import Rope, RopeConfig
from hanlin.models.parts import HasParts
from hanlin.models.registry import layout_of
from hanlin.models.visualglm import VisualGLMConfig
from hanlin.options import EngineConfig, free_memory
from hanlin.requests import RequestBuilder, stop_ids_of
from hanlin.types import ChatFormat, SamplingParams, Tokenizer
from hanlin.vision import Vision

__all__ = ["Placement", "check_memory", "engine", "load", "peak_memory", "place", "requests"]

# Without a word from the caller, a reply ends here rather than at the end of a context of 32K tokens.
_DEFAULT_MAX_TOKENS = 1024
# What the cache holds at least, if memory allows; memory is only taken as it is used.
_AUTO_CACHE_TOKENS = 65536
# Packed weights of fewer bytes are packed as fast as they are checked and mapped.
_LEAST_PACKED = 64 << 20


@dataclass(kw_only=True)
class Placement:
    """Where and in which form a model is held and run.

    Attributes:
        dtype: of the torch module; with native weights only the norms stay there.
        weights, kv_cache: kinds of the native runner; "auto" weights are as the files have them.
        context: of the native runner; None for torch.
        cache: of packed weights on disk.
        image: packed weights that the model's own files have.
        lowering: the packed weights, once loaded.
        path: of the model.
        prefix: a P-Tuning v2 checkpoint to lay over it.
        adapter: a LoRA adapter to merge into it.
        free: bytes of memory that could be taken before loading.
    """

    device: torch.device
    dtype: torch.dtype
    weights: str = "auto"
    kv_cache: str = "auto"
    context: Context | None = None
    cache: PackedCache | None = None
    image: PackedImage | None = None
    lowering: Lowering | None = None
    path: Path = Path()
    prefix: Path | None = None
    adapter: Path | None = None
    free: int = 0

    @property
    def encoder(self) -> torch.dtype | None:
        """Of an image encoder's large weights, where the native library multiplies by them; None is as all others."""
        return None if self.context is None else torch.float32 if self.weights == "float32" else torch.bfloat16

    def taker(self, model: nn.Module) -> Lowering:
        """Who takes the weights while the files are read."""
        assert self.context is not None
        self.lowering = Lowering(
            cast(HasParts, model), weights=self.weights, context=self.context, cache=self.cache, image=self.image
        )
        return self.lowering

    def admit(self, source: TensorSource) -> None:
        """See the files before anything is made of them; called again when something is laid over them."""
        check_memory(source, self)
        self.image = PackedImage(**source.image._asdict()) if isinstance(source, PackedSource) else None


def place(settings: EngineConfig) -> Placement:
    """Choose device, dtype and runner.

    Raises:
        ConfigError: for a device that is not here, or kinds that only the native runner has where it cannot be used.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}") from error
    quantised = settings.kv_cache if not settings.quant_policy else f"int{settings.quant_policy}"
    why_not = _why_not_native(settings, device)
    if why_not is None:
        weights = settings.weights if settings.weights != "auto" else settings.dtype
        kv_cache = quantised if quantised != "auto" else "float32" if weights == "float32" else "bfloat16"
        return Placement(
            device=device,
            dtype=torch.float32,
            weights=weights,
            kv_cache=kv_cache,
            context=Context(settings.threads),
            cache=_packed_cache() if settings.packed_cache else None,
        )
    only_native = [
        f"{key} = {value!r}"
        for key, value in (("runner", settings.runner), ("weights", settings.weights), ("kv_cache", quantised))
        if value not in ("auto", "torch")
    ]
    if only_native:
        raise ConfigError(f"{', '.join(only_native)} needs the native runner, which cannot be used: {why_not}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.dtype != "auto":
        return Placement(device=device, dtype=getattr(torch, settings.dtype))
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Placement(device=device, dtype=torch.bfloat16 if fast else torch.float32)


def _why_not_native(settings: EngineConfig, device: torch.device) -> str | None:
    if settings.runner == "torch":
        return "runner = 'torch' was asked for"
    if device.type != "cpu":
        return f"the device is {device}"
    if settings.dtype == "float16":
        return "dtype = 'float16' was asked for"
    return unavailable_reason()


def load(path: Path, placement: Placement, progress: Callable[[int, int], None] | None = None) -> Loaded:
    """Read a model's files into the placement.

    Raises:
        CheckpointError, ConfigError: files that are broken or do not fit.
        CapacityError: too little memory, before any of it is taken.
    """
    placement.path = path
    return load_model(
        path,
        dtype=placement.dtype,
        device=placement.device,
        progress=progress,
        taker=placement.taker if placement.context else None,
        admit=placement.admit,
        prefix=placement.prefix,
        adapter=placement.adapter,
        encoder=placement.encoder,
    )


def _packed_cache() -> PackedCache:
    from hanlin.hub.places import Places

    return PackedCache(Places.default().home / "packed", least=_LEAST_PACKED)


def check_memory(source: TensorSource, placement: Placement) -> None:
    """Raises:
    CapacityError: when the weights will not fit, with what they need, before any of it is taken.
    """
    if placement.device.type != "cpu":
        return
    need = sum(_bytes(name, info, placement) for name, info in source.infos.items())
    placement.free = free_memory()
    if need > placement.free:
        kind = placement.weights if placement.context else str(placement.dtype).removeprefix("torch.")
        raise CapacityError(
            f"{source.path}: the weights need {need / 2**30:.1f} GiB as {kind}, "
            f"{placement.free / 2**30:.1f} GiB are free"
        )


def _bytes(name: str, info: TensorInfo, placement: Placement) -> float:
    """What a stored tensor will take; the integer kinds have a float16 scale (and minimum) for each 32 values."""
    count = torch.Size(info.shape).numel()
    if placement.context is None:
        return count * placement.dtype.itemsize
    if name.startswith("image_encoder.") and placement.encoder is not None:
        return count * placement.encoder.itemsize
    if placement.weights == "auto":
        return min(info.nbytes, count * 2.0)
    return count * {"float32": 4, "bfloat16": 2, "int8": 1.0625, "int4": 0.625}[placement.weights]


def requests(loaded: Loaded, settings: EngineConfig, path: Path, context: Context | None) -> RequestBuilder:
    """What turns this model's requests into sequences. `context` multiplies for an image encoder, if not torch."""
    from hanlin.tokenizers import from_gguf, load_tokenizer

    tokenizer: Tokenizer = load_tokenizer(path) if path.is_dir() else from_gguf(loaded.metadata, name=str(path))
    chat_format, no_chat = _chat_format(tokenizer, loaded, settings.chat_template, path)
    vision = None
    if isinstance(loaded.config, VisualGLMConfig):
        vision = Vision(cast(nn.Module, loaded.model.image_encoder), loaded.config.vision.image_size, context)
        if isinstance(chat_format, VisualGLMFormat):
            chat_format.image_length = loaded.config.image_length
    system = settings.system_prompt
    if system is None:
        system = (chat_format.default_system if chat_format else None) or ""
    return RequestBuilder(
        tokenizer=tokenizer,
        config=loaded.config,
        rope=_rope(loaded, settings),
        chat_format=chat_format,
        no_chat=no_chat,
        system_prompt=system,
        stop_ids=frozenset(stop_ids_of(loaded.config, chat_format, loaded.description.generation)),
        defaults=_defaults(chat_format, loaded, path),
        adapters=Adapters(loaded.model),
        grammars=_grammars(tokenizer, loaded.config.vocab_size),
        layout=layout_of(loaded.config),
        vision=vision,
    )


def _grammars(tokenizer: Tokenizer, size: int) -> Grammars | None:
    from hanlin.tokenizers.base import BaseTokenizer

    return Grammars(tokenizer.table, tokenizer.encode, size) if isinstance(tokenizer, BaseTokenizer) else None


def engine(loaded: Loaded, settings: EngineConfig, placement: Placement, rope: RopeConfig) -> Engine:
    """A runner with a pool as large as the settings say, and an engine over it."""
    size = settings.cache_block_seq_len
    context = settings.session_len or _context(rope)
    lowering = placement.lowering
    per_block = (
        native_block_bytes(loaded.config, placement.kv_cache, size)
        if lowering
        else kv_bytes(loaded.config, placement.dtype.itemsize) * size
    )
    free = free_memory()
    if lowering and lowering.cached:  # a mapped file counts as free memory
        free = min(free, max(0, placement.free - lowering.nbytes))
    blocks = _blocks(settings, context, per_block, free)
    runner = _runner(loaded, settings, placement, rope, blocks)
    limits = EngineLimits(
        blocks=blocks,
        block_size=size,
        max_context=context,
        max_sequences=settings.places,
        max_step_tokens=settings.step_tokens(loaded.config.hidden_size),
        prefix_caching=settings.enable_prefix_caching,
        step_seconds=settings.step_seconds,
    )
    return Engine(runner, limits, _drafter(loaded, settings, limits))


def _runner(loaded: Loaded, settings: EngineConfig, placement: Placement, rope: RopeConfig, blocks: int) -> Runner:
    size, context = settings.cache_block_seq_len, settings.session_len or _context(rope)
    if placement.lowering and not placement.lowering.sound():
        placement.lowering = None
        loaded = load(placement.path, placement)
    if placement.lowering is None or placement.context is None:
        return TorchRunner(loaded.model, blocks=blocks, block_size=size, invariant=settings.deterministic)
    return NativeRunner(
        placement.lowering,
        loaded.config,
        context=placement.context,
        rope=rope,
        blocks=blocks,
        block_size=size,
        kv_cache=placement.kv_cache,
        max_tokens=max(settings.step_tokens(loaded.config.hidden_size), context if layout_of(loaded.config) else 0),
    )


def _drafter(loaded: Loaded, settings: EngineConfig, limits: EngineLimits) -> Drafter | None:
    """Who guesses tokens: a small model, the text itself, or nobody."""
    if settings.draft_model is None:
        return PromptLookup() if settings.speculation == "auto" else None
    from hanlin.hub import resolve

    path = resolve(settings.draft_model).path
    placement = place(settings)
    small = load(path, placement)
    if small.config.vocab_size != loaded.config.vocab_size:
        raise ConfigError(
            f"draft_model {settings.draft_model!r} has a vocabulary of {small.config.vocab_size}, "
            f"the model one of {loaded.config.vocab_size}; they must be the same"
        )
    runner = _runner(small, settings, placement, small.config.rope, limits.blocks)
    return ModelDrafter(
        runner,
        blocks=limits.blocks,
        block_size=limits.block_size,
        max_tokens=settings.step_tokens(small.config.hidden_size),
    )


def peak_memory() -> int:
    """Peak resident bytes of this process, 0 where the platform does not say."""
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # getrusage would count what ran before exec
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _chat_format(
    tokenizer: Tokenizer, loaded: Loaded, name: str | None, path: Path
) -> tuple[ChatFormat | None, ChatFormatError | None]:
    """The model's format, or why it has none; a name that was asked for must be had."""
    from hanlin.chat import chat_format_for

    template, kind = loaded.description.template, loaded.config.model_type
    # Only its name tells that checkpoint, which has turns of its own, from the others.
    early = kind == "internlm" and not template and any("chat-7b-v1_1" in part for part in path.parts)
    wanted = "internlm-v1_1" if early and name is None else name
    try:
        return chat_format_for(tokenizer, model_type=kind, template=template, name=wanted), None
    except ChatFormatError as error:
        if name is not None:
            raise ConfigError(str(error)) from error
        return None, error


def _defaults(chat_format: ChatFormat | None, loaded: Loaded, path: Path) -> SamplingParams:
    """The family's sampling, with what the model's own `generation_config.json` says."""
    base, given = chat_format.defaults if chat_format else SamplingParams(), loaded.description.generation
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values: dict[str, Any] = {name: given[name] for name in names if type(given.get(name)) in (int, float)}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return base.override(max_tokens=base.max_tokens or _DEFAULT_MAX_TOKENS, **values)
    except RequestError as error:
        raise ConfigError(f"{path / 'generation_config.json'}: {error}") from error


def _rope(loaded: Loaded, settings: EngineConfig) -> RopeConfig:
    """The model's RoPE, with LMDeploy's `rope_scaling_factor` in place of its own scaling."""
    rope = loaded.config.rope
    if settings.rope_scaling_factor:
        rope = replace(rope, kind="dynamic", numbers={"factor": settings.rope_scaling_factor})
        for module in loaded.model.modules():
            table = getattr(module, "rope", None)
            if isinstance(table, Rope):
                table.config = rope
    return rope


def _context(rope: RopeConfig) -> int:
    """The length that a model is made for; dynamic scaling stretches it by its factor."""
    return int(rope.max_positions * (rope.factor if rope.kind == "dynamic" else 1.0))


def _blocks(settings: EngineConfig, context: int, per_block: int, free: int) -> int:
    """Blocks of the KV cache, each of `per_block` bytes."""
    entry, size = settings.cache_max_entry_count, settings.cache_block_seq_len
    if settings.cache_bytes is not None:
        blocks = settings.cache_bytes // per_block
    elif entry is None:
        blocks = min(max(_AUTO_CACHE_TOKENS, 2 * context) // size + 1, free // 2 // per_block)
    elif entry < 1:
        blocks = int(free * entry) // per_block
    else:
        blocks = int(entry)
    if blocks < 1:
        raise CapacityError(
            f"the KV cache needs at least one block of {per_block / 2**20:.1f} MiB; {free / 2**30:.1f} GiB are free. "
            "Give it more, or lower cache_block_seq_len."
        )
    return blocks
