"""What is left of a tenant's limits, in OpenAI's headers."""

from collections.abc import Iterable, Mapping

from ..tenants.limits import Allowance


def rate_headers(allowances: Iterable[Allowance]) -> Mapping[str, str]:
    """``x-ratelimit-limit-requests`` and the like, for each limit that there is."""
    headers: dict[str, str] = {}
    for each in allowances:
        headers[f"x-ratelimit-limit-{each.what}"] = str(each.limit)
        headers[f"x-ratelimit-remaining-{each.what}"] = str(each.remaining)
        headers[f"x-ratelimit-reset-{each.what}"] = duration(each.reset)
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes them: ``0s``, ``120ms``, ``1.5s``, ``6m0s``."""
    if 0 < seconds < 1:
        return f"{max(1, round(1000 * seconds))}ms"
    minutes, rest = divmod(round(seconds, 2), 60)
    text = f"{rest:.2f}".rstrip("0").rstrip(".")
    return f"{minutes:.0f}m{text}s" if minutes else f"{text}s"
