"""The page holds the verdict, every event and every picture, and needs nothing from outside."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from handmade_run import EVENTS, FAULTS, METRICS

from outlast.cluster.errors import Misuse
from outlast.launch.report.report import judge, load_run, read_lines, write_report
from outlast.launch.report.timeline import RunRecord, tell

SHA = "ab" * 32


def write_logs(directory: Path) -> None:
    directory.mkdir()
    digest = {**EVENTS[-1], "event": "digest", "step": 11, "sha256": SHA}
    events = [*EVENTS, digest]
    for agent in sorted({event["agent"] for event in events}):
        lines = [json.dumps(event) + "\n" for event in events if event["agent"] == agent]
        (directory / f"events-{agent}.jsonl").write_text("".join(lines))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))
    (directory / "faults.json").write_text(json.dumps([dataclasses.asdict(f) for f in FAULTS]))


def test_a_directory_becomes_a_record(tmp_path: Path) -> None:
    write_logs(tmp_path / "disturbed")
    assert load_run(tmp_path / "disturbed") == tell("disturbed", EVENTS, METRICS, FAULTS, SHA)


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"st')
    assert list(read_lines(log)) == [{"step": 0}]
    log.write_text('{"step": 0}\n{"st\n{"step": 1}\n')
    with pytest.raises(Misuse, match="line 2"):
        list(read_lines(log))
    with pytest.raises(Misuse, match="events"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("ours", "theirs", "identical"),
    [(SHA, SHA, True), (SHA, "cd" * 32, False), (SHA, None, None), (None, SHA, None)],
)
def test_the_verdict(ours: str | None, theirs: str | None, identical: bool | None) -> None:
    run, twin = RunRecord("run", digest=ours), RunRecord("twin", digest=theirs)
    assert judge(run, twin).identical is identical
    assert judge(run, None).identical is None


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    run = tell("disturbed", EVENTS, METRICS, FAULTS, SHA)
    write_report(tmp_path / "new" / "report.html", run, tell("twin", [], METRICS, digest=SHA))
    page = (tmp_path / "new" / "report.html").read_text()
    assert "Identical, bit for bit" in page
    assert page.count(SHA) == 2
    assert page.count("<svg") == 3
    assert all(fault.label in page for fault in FAULTS)
    assert "exactly 0 in all 11 steps" in page
    assert "#0101" not in page, "a stand-in colour was left"
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import', page)
    assert not [found for found in outside if "www.w3.org" not in found]
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def test_the_page_of_a_run_without_anything(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", RunRecord("empty <run>"))
    page = (tmp_path / "report.html").read_text()
    assert "No twin to compare with" in page
    assert "empty &lt;run&gt;" in page


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(Misuse, match=r"pip install outlast\[report\]"):
        write_report(tmp_path / "report.html", RunRecord("empty"))
