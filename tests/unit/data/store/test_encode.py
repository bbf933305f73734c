"""Garbage is collected between portions of rows, and as before when their encoding ends."""

from __future__ import annotations

import gc

import pytest

from dist_ft.data.store.encode import RowEncoder


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_goes_on_as_it_was(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(self: RowEncoder, rows: object) -> None:
        seen.append(gc.isenabled())
        raise ValueError

    monkeypatch.setattr(RowEncoder, "_encode_all", fail)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError):
            RowEncoder(None, "train", None, None)([])  # type: ignore[arg-type]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert seen == [False]
