"""What all routes share: the models, the rates, who watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from hanlin.serve.call import Call
from hanlin.serve.conversations import Conversations
from hanlin.serve.keys import Rates
from hanlin.serve.models import Models
from hanlin.serve.observe import Observer
from hanlin.serve.responses import Responses
from hanlin.serve.settings import ServeConfig

__all__ = ["Service", "service_of"]

log = logging.getLogger("hanlin.serve")

_LOOK_SECONDS = 0.25
_COMPILERS = 2


class Service:
    """Attributes:
    failure: why an engine has died; the server ends then, for its state is unknown.
    draining: whether it is shutting down.
    stopped: set when an engine has died.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.models = Models(config)
        self.rates = Rates()
        self.observer = Observer(config, self.models, self.rates)
        self.started = time.time()
        self.conversations = Conversations()
        self.responses = Responses()
        self.draining = False
        self.stopped = asyncio.Event()
        self.compilers = ThreadPoolExecutor(_COMPILERS, "hanlin-compile")
        self._keeper: asyncio.Task[None] | None = None

    @property
    def failure(self) -> BaseException | None:
        return self.models.failure

    async def open(self, request: Request, model: str | None, *, keep_alive: float | None = None) -> Call:
        """Begin a request: find its model and have it loaded.

        Raises:
            ApiError: 404, or 503 while shutting down. CapacityError.
        """
        began = time.perf_counter()
        lease = await self.models.lease(model, keep_alive=keep_alive)
        state = request.scope["state"]
        return Call(
            id=state["request_id"],
            request=request,
            key=state["key"],
            lease=lease,
            limits=self.config.limits,
            observer=self.observer,
            compilers=self.compilers,
            began=began,
            load_seconds=time.perf_counter() - began,
        )

    async def start(self) -> None:
        """Load the first model, if it is not there yet, and begin to watch."""
        await self.models.preload()
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop watching, unload all."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self.responses.close()
        self.observer.close()
        await self.models.close()
        self.compilers.shutdown(wait=False, cancel_futures=True)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self.failure is not None and not self.stopped.is_set():
                log.critical("an engine has died: %r", self.failure, exc_info=self.failure)
                self.stopped.set()
            self.conversations.sweep()
            await self.models.unload_idle()


def service_of(request: Request) -> Service:
    """The service of the app that got this request."""
    service: Service = request.app.state.service
    return service
