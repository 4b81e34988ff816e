"""``/health``, ``/ready``, ``/version`` and ``/metrics``: for those who operate the server."""

from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import Response

from ..engine.errors import EngineUnavailable
from ..store.residency import Residency
from .security import admin_only
from .state import State

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: State) -> dict[str, str]:
    """Requests are served; 503 before that and while the engine is down."""
    state.require_info()
    if not state.started.is_set():
        raise EngineUnavailable("The server is loading its adapters; try again shortly.")
    return {"status": "ready"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The installed version."""
    return {"version": version("deltamux")}


@router.get("/metrics", dependencies=[admin_only])
async def metrics(state: State) -> Response:
    """Prometheus' text format, which tells of all tenants."""
    stats = state.engine.stats
    residency = Residency(state.registry, () if stats is None else stats.device_adapters)
    content, content_type = state.metrics.render(state.engine.info, stats, residency)
    return Response(content, media_type=content_type)
