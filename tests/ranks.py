"""What the workers of a group return to say who they are."""

from __future__ import annotations

from typing import Any

from dist_ft.process.place import Place


def report(place: Place, given: Any) -> dict[str, Any]:
    return {"rank": place.rank, "world": place.world_size, "given": given}
