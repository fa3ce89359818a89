"""The rows file: whole rows only, and no row of another schema."""

import json
from dataclasses import asdict

import pytest

from bench import rows
from bench.rows import Row, RowsError, read, write


def row(**changes) -> Row:
    """A row of a benchmark that never ran."""
    facts = {
        "run": "2026-01-01T00:00:00Z-abcd",
        "timestamp": "2026-01-01T00:00:01Z",
        "group": "step",
        "op": "anderson",
        "variant": "triton-deq",
        "backend": "reference",
        "mode": "forward",
        "device": "A processor",
        "kind": "cpu",
        "threads": 2,
        "dtype": "float32",
        "shape": (32, 1024),
        "commit": None,
        "dirty": True,
        "source": "0123456789ab",
        "p50_ms": 2.0,
        "steps": 20,
    }
    return Row(**{**facts, **changes})


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    written = [
        row(),
        row(variant="peer", p50_ms=None, error="ValueError: no"),
        row(versions={"torch": "2.13"}),
    ]
    for each in written:
        write(path, each)
    assert read([path]) == written


def test_another_schema_is_refused_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**asdict(row()), "schema": 0}) + "\n")
    with pytest.raises(
        RowsError, match=r"rows.jsonl, line 1: rows of schema 0, and this bench reads schema 1"
    ):
        read([path])
    with pytest.raises(RowsError, match="schema 0"):
        write(path, row())
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("line", ["[]", '"x"', "3", "{}"])
def test_what_is_no_row_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RowsError, match="rows of schema None"):
        read([path])


def test_a_field_too_many_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**asdict(row()), "mood": "good"}) + "\n")
    with pytest.raises(RowsError, match="not those of schema 1: mood"):
        read([path])


def test_half_a_row_is_refused_and_cut_off_by_the_next_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, row())
    whole = path.read_text()
    path.write_text(whole + whole[:50])  # a machine that died in the middle
    with pytest.raises(RowsError, match="line 2: not JSON"):
        read([path])
    write(path, row(variant="peer"))
    assert [each.variant for each in read([path])] == ["triton-deq", "peer"]


def test_a_file_of_half_a_row_is_begun_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"schema": 1, "ru')
    write(path, row())
    assert len(read([path])) == 1


def test_a_row_is_written_in_one_piece(tmp_path, monkeypatch):
    pieces = []
    monkeypatch.setattr(rows.os, "write", lambda handle, data: pieces.append(data))
    write(tmp_path / "rows.jsonl", row())
    assert len(pieces) == 1
    assert pieces[0].endswith(b"\n")
