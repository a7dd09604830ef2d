"""Several models behind one port: names, loading on demand, a budget, unloading; and an engine that dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hanlin.errors import CapacityError, CheckpointError, EngineError
from hanlin.serve.errors import ApiError
from hanlin.serve.models import Models
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory

SMALL = {"cache_bytes": 1 << 20, "threads": 1, "packed_cache": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("serve") / "tiny", tokenizer="small")


def models(work: Callable[[Models], Coroutine[Any, Any, None]], *specs: ModelSpec, **config: Any) -> None:
    """Run `work` over a pool, and close it."""

    async def go() -> None:
        pool = Models(ServeConfig(models=specs, **config))
        try:
            await work(pool)
        finally:
            await pool.close()

    asyncio.run(go())


def spec(directory: Path, name: str, **options: Any) -> ModelSpec:
    return ModelSpec(source=str(directory), name=name, options={**SMALL, **options})


def test_models_are_loaded_when_asked_for_and_once(directory: Path) -> None:
    async def work(pool: Models) -> None:
        assert pool.names == ["a", "A", "b"] and not any(served.llm for served in pool.list)
        leases = await asyncio.gather(*(pool.lease(name) for name in ("b", "b:latest", "b")))
        assert len({id(lease.llm) for lease in leases}) == 1 and pool.list[0].llm is None
        for lease in leases:
            lease.release()
            lease.release()
        assert pool.list[1].users == 0
        first = await pool.lease(None)
        assert first.served is pool.list[0] and (await pool.lease("A")).llm is first.llm
        with pytest.raises(ApiError) as caught:
            await pool.lease("c")
        assert caught.value.status == 404 and caught.value.code == "model_not_found"

    models(work, ModelSpec(source=str(directory), name="a", aliases=("A",), options=SMALL), spec(directory, "b"))


def test_idle_models_are_unloaded_and_come_back(directory: Path) -> None:
    async def work(pool: Models) -> None:
        lease = await pool.lease("a")
        first = lease.llm
        await pool.unload_idle()
        assert pool.list[0].llm is not None, "a model in use was unloaded"
        lease.release()
        await asyncio.sleep(0.06)
        await pool.unload_idle()
        assert pool.list[0].llm is None
        again = await pool.lease("a", keep_alive=-1)
        assert again.llm is not first
        again.release()
        await asyncio.sleep(0.06)
        await pool.unload_idle()
        assert pool.list[0].llm is not None, "the last request asked for it to stay"
        now = await pool.lease("a", keep_alive=0)
        now.release()
        await pool.unload_idle()
        assert pool.list[0].llm is None

    models(work, spec(directory, "a"), keep_alive=0.05)


def test_a_budget_makes_room_and_says_when_it_cannot(directory: Path) -> None:
    async def work(pool: Models) -> None:
        a = await pool.lease("a")
        with pytest.raises(CapacityError, match="memory budget"):
            await pool.lease("b")
        assert pool.list[0].llm is not None and pool.list[1].users == 0
        a.release()
        b = await pool.lease("b")
        assert pool.list[0].llm is None and pool.list[1].llm is not None
        b.release()

    probe = Models(ServeConfig(models=(spec(directory, "a"),)))

    async def size() -> int:
        (await probe.lease("a")).release()
        taken = probe.list[0].bytes
        await probe.close()
        return taken

    models(work, spec(directory, "a"), spec(directory, "b"), memory_budget=int(1.5 * asyncio.run(size())))


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(directory: Path, tmp_path: Path) -> None:
    broken = make_directory(tmp_path / "broken", tokenizer="small")
    next(broken.glob("*.safetensors")).write_bytes(b"nothing")

    async def work(pool: Models) -> None:
        for _ in range(2):
            with pytest.raises(CheckpointError):
                await pool.lease("broken")
        assert pool.list[1].users == 0
        assert (await pool.lease("a")).llm.generate([1, 2, 3], max_tokens=2, temperature=0)

    models(work, spec(directory, "a"), spec(broken, "broken"))


def test_a_dead_engine_is_known(directory: Path) -> None:
    async def work(pool: Models) -> None:
        lease = await pool.lease("a")
        assert pool.failure is None

        def broken(batch: Any) -> Any:
            raise RuntimeError("the machine is on fire")

        lease.llm.engine.runner.run = broken  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="on fire"):
            await lease.engine.generate([1, 2, 3], max_tokens=2)
        assert "on fire" in str(pool.failure)

    models(work, spec(directory, "a"))


def test_names_are_the_sources_own_unless_given(directory: Path) -> None:
    pool = Models(ServeConfig(models=(ModelSpec(), ModelSpec(source=str(directory)), ModelSpec(source="org/name"))))
    assert pool.names == ["smollm2", "tiny", "org/name"]


def test_adapters_share_their_models_name_space(directory: Path) -> None:
    pool = Models(ServeConfig(models=(spec(directory, "a"),)))
    pool.add_adapter("style", pool.list[0])
    assert pool.find("style") == (pool.list[0], "style")
    with pytest.raises(ApiError) as caught:
        pool.add_adapter("a", pool.list[0])
    assert caught.value.status == 409
    assert pool.remove_adapter("style") is pool.list[0]
    for name in ("style", "a"):
        with pytest.raises(ApiError) as caught:
            pool.remove_adapter(name)
        assert caught.value.status == 404
