"""The models behind one port: loaded when asked for, unloaded when idle, within a budget of memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hanlin.aio import AsyncLLM
from hanlin.errors import CapacityError, HanlinError
from hanlin.llm import LLM, load
from hanlin.serve.admission import Admission
from hanlin.serve.errors import ApiError, model_not_found
from hanlin.serve.settings import ModelSpec, ServeConfig

__all__ = ["Lease", "Models", "Progress", "Served"]

log = logging.getLogger("hanlin.serve")

# Others wait for a step's end, and a newcomer's first token for half a step more.
_STEP_SECONDS = 0.05

Progress = Callable[[int, int], None]


@dataclass(eq=False, kw_only=True)
class Served:
    """A model of the list, loaded or not.

    Attributes:
        users: leases that are out. expires: when it may be unloaded, on the monotonic clock; None is never.
        created: seconds since 1970, when it was listed; OpenAI's model objects carry it.
    """

    name: str
    spec: ModelSpec
    llm: AsyncLLM | None = None
    admission: Admission | None = None
    users: int = 0
    used: float = 0.0
    expires: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def bytes(self) -> int:
        """Memory of the weights and of the whole cache."""
        if self.llm is None:
            return 0
        engine = self.llm.llm.engine
        return engine.runner.weight_bytes + engine.limits.blocks * engine.runner.block_bytes


@dataclass(eq=False)
class Lease:
    """A model that stays loaded until `release`."""

    models: Models
    served: Served
    name: str
    adapter: str | None
    keep_alive: float | None = None
    released: bool = False

    @property
    def llm(self) -> LLM:
        return self.engine.llm

    @property
    def engine(self) -> AsyncLLM:
        assert self.served.llm is not None
        return self.served.llm

    @property
    def admission(self) -> Admission:
        assert self.served.admission is not None
        return self.served.admission

    def release(self) -> None:
        """May be called twice."""
        if not self.released:
            self.released = True
            self.models.give_back(self.served, self.keep_alive)


class Models:
    """Names to models. All in one event loop; loading and closing happen in threads."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._names: dict[str, tuple[Served, str | None]] = {}
        self.list: list[Served] = []
        self._room = asyncio.Lock()
        for spec in config.models:
            served = Served(name=spec.name or _own_name(spec), spec=spec)
            self.list.append(served)
            for name in (served.name, *spec.aliases):
                self._names[name] = served, None
            for adapter in spec.adapters:
                self._names[adapter] = served, adapter

    @property
    def names(self) -> list[str]:
        return list(self._names)

    @property
    def failure(self) -> BaseException | None:
        """Why an engine has died, if one has."""
        return next((s.llm.llm.thread.failure for s in self.list if s.llm and s.llm.llm.thread.failure), None)

    def find(self, name: str | None) -> tuple[Served, str | None]:
        """The model of this name and, if it is an adapter's, the adapter. No name means the first model.

        Raises:
            ApiError: 404.
        """
        if not name:
            return self.list[0], None
        found = self._names.get(name) or self._names.get(name.removesuffix(":latest"))
        if found is None and self.config.any_model_name:
            return self.list[0], None
        if found is None:
            raise model_not_found(name, self.names)
        return found

    def add_adapter(self, name: str, served: Served) -> None:
        """Let a loaded adapter be asked for by name.

        Raises:
            ApiError: 409 when the name is taken.
        """
        if name in self._names:
            raise ApiError(409, f"the name {name!r} is taken", code="name_taken", param="lora_name")
        self._names[name] = served, name

    def remove_adapter(self, name: str) -> Served:
        """Raises:
        ApiError: 404 when there is no such adapter.
        """
        served, adapter = self._names.get(name, (None, None))
        if served is None or adapter is None:
            raise ApiError(404, f"no adapter {name!r}", code="adapter_not_found", param="lora_name")
        del self._names[name]
        return served

    async def lease(self, name: str | None, *, keep_alive: float | None = None) -> Lease:
        """Have a model loaded, and kept.

        Args:
            keep_alive: seconds that it then stays loaded without being asked for; None is as configured.

        Raises:
            ApiError: 404. CapacityError, and whatever `hanlin.load` raises.
        """
        served, adapter = self.find(name)
        served.users += 1
        try:
            async with served.loading:
                if served.llm is None:
                    await self._load(served)
        except BaseException:
            served.users -= 1
            raise
        return Lease(self, served, name or served.name, adapter, keep_alive)

    def give_back(self, served: Served, keep_alive: float | None) -> None:
        """A lease has ended."""
        served.users -= 1
        served.used = time.monotonic()
        seconds = self.config.keep_alive if keep_alive is None else keep_alive
        served.expires = None if seconds is None or seconds < 0 else served.used + seconds

    async def preload(self, progress: Progress | None = None) -> None:
        """Load the first model."""
        async with self.list[0].loading:
            if self.list[0].llm is None:
                await self._load(self.list[0], progress)

    async def unload_idle(self) -> None:
        """Unload what has not been asked for long enough."""
        now = time.monotonic()
        for served in self.list:
            if served.llm and not served.users and served.expires is not None and served.expires <= now:
                await self.unload(served)

    async def unload(self, served: Served) -> None:
        """Give a model's memory back."""
        llm, served.llm, served.admission = served.llm, None, None
        if llm is not None:
            log.info("unloading %s", served.name)
            await llm.close()

    async def close(self) -> None:
        """Unload all; running requests end with an error."""
        for served in self.list:
            await self.unload(served)

    async def _load(self, served: Served, progress: Progress | None = None) -> None:
        async with self._room:
            options = {"step_seconds": _STEP_SECONDS, **served.spec.options}
            if served.spec.adapters:
                options["adapters"] = dict(served.spec.adapters)
            budget = self.config.memory_budget
            if budget is not None:
                options["cache_bytes"] = await self._make_room(served, budget)
            while True:
                try:
                    llm = await asyncio.to_thread(load, served.spec.source, progress=progress, **options)
                    break
                except CapacityError:
                    if not await self._unload_one():
                        raise
                except HanlinError as error:
                    log.error("%s cannot be loaded: %s", served.name, error)
                    raise
        limits = self.config.limits
        served.admission = Admission(
            places=limits.running or llm.engine.limits.max_sequences,
            queued_requests=limits.queued_requests,
            queued_tokens=limits.queued_tokens,
        )
        served.llm = AsyncLLM(llm)
        served.used = time.monotonic()
        served.expires = None if self.config.keep_alive is None else served.used + self.config.keep_alive
        log.info("loaded %s in %.1f s, %.2f GB", served.name, llm.load_seconds, served.bytes / 1e9)

    async def _make_room(self, served: Served, budget: int) -> int:
        """Unload idle models until this one fits; returns what its cache may take.

        Raises:
            CapacityError: with what is needed, before anything is loaded.
        """
        need = await asyncio.to_thread(_weight_bytes, served.spec)
        given: int | None = served.spec.options.get("cache_bytes")
        least = given or min(budget // 16, 256 << 20)
        while sum(other.bytes for other in self.list) + need + least > budget:
            if not await self._unload_one():
                raise CapacityError(
                    f"{served.name} needs {(need + least) / 2**30:.1f} GiB; of the memory budget of "
                    f"{budget / 2**30:.1f} GiB, {sum(o.bytes for o in self.list) / 2**30:.1f} GiB are in use"
                )
        return given or min(max(least, budget // 4), budget - need - sum(other.bytes for other in self.list))

    async def _unload_one(self) -> bool:
        """Unload the model that was not asked for longest; False when all are in use."""
        idle = [s for s in self.list if s.llm is not None and not s.users]
        if not idle:
            return False
        await self.unload(min(idle, key=lambda s: s.used))
        return True


def _own_name(spec: ModelSpec) -> str:
    if spec.source is None:
        from hanlin.hub.names import DEFAULT

        return DEFAULT
    path = Path(spec.source)
    return path.resolve().name if path.exists() else spec.source


def _weight_bytes(spec: ModelSpec) -> int:
    """Bytes of the model's files: what its weights take at most, unless they are to be widened."""
    from hanlin.hub import resolve

    path = resolve(spec.source).path
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")]
    return sum(file.stat().st_size for file in files)
