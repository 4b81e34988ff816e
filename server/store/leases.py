"""What requests run on: names resolved to versions, which stay while a request uses them."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time

from ..composition import CompositionRefused, check_composition
from ..generation import AdapterWeight
from ..tenants.tenant import Caller
from .catalog import Catalog, Chosen
from .entries import Adapter, Usage, Version
from .errors import AdapterUnavailable, UnknownModel
from .residents import Residents


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What a request runs on.

    Attributes:
        model: Its ``model`` field.
        caller: Who asks, which decides what names mean.
        adapters: Names and weights of its ``adapters`` field, empty without one.
        sticky: Requests of equal ones get the same target of a weighted alias.
    """

    model: str
    caller: Caller
    adapters: tuple[tuple[str, float], ...] = ()
    sticky: str = ""


@dataclass(frozen=True, slots=True)
class Selected:
    """An adapter of a request."""

    adapter: Adapter
    version: Version
    weight: float


@dataclass(frozen=True, slots=True)
class Leased:
    """An adapter that a request runs on.

    Attributes:
        adapter_id: What the engine calls it.
        weight: What its corrections are multiplied by.
        name: What it is registered as.
        digest: Of the version that it is.
    """

    adapter_id: int
    weight: float
    name: str
    digest: str

    @property
    def use(self) -> AdapterWeight:
        """As the engine is told of it."""
        return AdapterWeight(self.adapter_id, self.weight)


class Leases:
    """Who uses which content; belongs to the event loop's thread.

    Args:
        catalog: What names mean.
        residents: What the engine knows.
        on_idle: Told of a content when the last request that used it has ended.
    """

    def __init__(
        self,
        catalog: Catalog,
        residents: Residents,
        on_idle: Callable[[str], None],
    ) -> None:
        """Start with no request."""
        self._catalog = catalog
        self._residents = residents
        self._on_idle = on_idle
        self._held: Counter[str] = Counter()
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self.used: set[str] = set()
        """Names whose usage has changed since it was last written."""

    def is_held(self, digest: str) -> bool:
        """Whether a request uses the content."""
        return digest in self._held

    def select(self, choice: ModelChoice) -> list[Selected]:
        """The adapters a request means, with their weights; none for the bare base.

        Raises:
            UnknownModel: As ``Catalog.resolve``; or the base where an adapter belongs.
            AdapterUnavailable: An adapter has no version yet.
            CompositionRefused: The adapters cannot be combined.
        """
        if not choice.adapters:
            return [_selected(chosen, weight) for chosen, weight in self.chosen(choice)]
        if not self._catalog.is_base(choice.model, choice.caller):
            self._resolve(choice.model, choice)
            raise CompositionRefused(
                f"with 'adapters', 'model' names the base, {self._catalog.base_name!r}, and not an "
                "adapter"
            )
        selected = [_selected(chosen, weight) for chosen, weight in self.chosen(choice)]
        if len({each.version.digest for each in selected}) < len(selected):
            raise CompositionRefused("'adapters' names one adapter twice: add up its weights")
        check_composition(
            [
                (repr(each.adapter.plain_name), each.weight, each.version.info.composable)
                for each in selected
            ]
        )
        return selected

    def chosen(self, choice: ModelChoice) -> list[tuple[Chosen, float]]:
        """The adapters a request names, whether or not they have a version or go together.

        Raises:
            UnknownModel: As ``Catalog.resolve``; or the base where an adapter belongs.
        """
        if choice.adapters:
            return [(self._adapter(name, choice), weight) for name, weight in choice.adapters]
        alone = self._resolve(choice.model, choice)
        return [] if alone is None else [(alone, 1.0)]

    @asynccontextmanager
    async def lease(self, choice: ModelChoice) -> AsyncIterator[list[Leased]]:
        """The adapters a request means, known to the engine and kept while the block runs.

        Waits for those that the engine has to be told of, and for nothing else.

        Raises:
            UnknownModel: As ``select``.
            CompositionRefused: As ``select``.
            AdapterUnavailable: An adapter cannot be loaded now.
            EngineError: The engine is not there to load it.
        """
        selected = self.select(choice)
        digests = [each.version.digest for each in selected]
        self._held.update(digests)
        try:
            leased = [
                Leased(
                    await self._residents.ensure(each.version, each.adapter.name),
                    each.weight,
                    each.adapter.name,
                    each.version.digest,
                )
                for each in selected
            ]
            self._count(selected)
            yield leased
        finally:
            for digest in digests:
                self._release(digest)

    def _count(self, selected: list[Selected]) -> None:
        for each in selected:
            usage = self.usage[each.adapter.name]
            usage.hits += 1
            usage.last_used = time()
            self.used.add(each.adapter.name)

    def _release(self, digest: str) -> None:
        self._held[digest] -= 1
        if not self._held[digest]:
            del self._held[digest]
            self._on_idle(digest)

    def _resolve(self, model: str, choice: ModelChoice) -> Chosen | None:
        return self._catalog.resolve(model, choice.caller, choice.sticky)

    def _adapter(self, model: str, choice: ModelChoice) -> Chosen:
        chosen = self._resolve(model, choice)
        if chosen is None:
            raise UnknownModel(f"{model!r} is the base model; 'adapters' names adapters.")
        return chosen


def _selected(chosen: Chosen, weight: float) -> Selected:
    if chosen.version is None:
        raise AdapterUnavailable(
            f"The adapter {chosen.adapter.plain_name!r} is being fetched; try again shortly.", 1.0
        )
    return Selected(chosen.adapter, chosen.version, weight)
