"""docs/works.md says what tests have shown, and no more."""

import json

import pytest

from tests.works import RECORD, TABLE, cells_of, rendered


def test_the_document_says_what_the_record_says() -> None:
    assert rendered(json.loads(RECORD.read_text())) in TABLE.read_text()


def test_every_recorded_cell_has_its_test(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    if options.keyword or options.markexpr or len({item.path for item in request.session.items}) < 40:
        pytest.skip("not all tests were collected")
    cells = {cell for item in request.session.items for cell in cells_of(item)}
    recorded = {
        f"{cell['what']} | {cell['by']} | {cell['outcome']}" for cell in json.loads(RECORD.read_text())["cells"]
    }
    assert recorded <= cells
