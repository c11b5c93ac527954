"""No search for garbage while something large is imported, and afterwards as before, whatever happened."""

import gc

import pytest

from d2surgery.importing import uncollected


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, KeyError])
def test_collection_is_off_inside_and_afterwards_as_it_was(enabled: bool, error: type[Exception] | None) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        try:
            with uncollected():
                assert not gc.isenabled()
                if error:
                    raise error
        except KeyError:
            pass
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()
