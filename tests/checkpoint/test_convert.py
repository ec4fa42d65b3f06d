"""Every format into every other, without a loss; conversions that are cut short, or go wrong."""

import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed_runs
import numpy as np
import pytest
from held import Held, conversion, digests, held, into, random, silent

from outlast.checkpoint import convert as engine
from outlast.checkpoint import proof
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.convert import convert
from outlast.checkpoint.formats.registry import FORMATS, Opened, open_checkpoint
from outlast.checkpoint.items import Wanted
from outlast.cluster.errors import Corrupt, Misuse

FULL = [name for name in FORMATS if name != "safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """The same contents in every format."""
    directory = tmp_path_factory.mktemp("formats")
    return {name: into(held(), name, directory) for name in FORMATS}


@pytest.mark.parametrize("first", FULL)
@pytest.mark.parametrize("second", FULL)
def test_there_and_back_again(
    made: dict[str, Opened], first: str, second: str, tmp_path: Path
) -> None:
    there = into(made[first], second, tmp_path / "there")
    assert there.format.name == second
    back = into(there, first, tmp_path / "back")
    assert digests(back.source) == digests(made[first].source) == digests(held())
    for source in (there.source, back.source):
        assert_same(source.contents, held().contents)


def assert_same(found: Contents, truth: Contents) -> None:
    """All that every format but safetensors has to keep."""
    assert (found.step, found.dtype, found.aliases) == (truth.step, truth.dtype, truth.aliases)
    assert set(found.arrays) == set(truth.arrays)
    assert [g.names for g in found.groups] == [g.names for g in truth.groups]
    for mine, theirs in zip(found.groups, truth.groups, strict=True):
        assert mine.hyper.items() >= theirs.hyper.items()
        assert mine.scalars == theirs.scalars
    for fact in proof.KEPT_FACTS:
        assert found.facts[fact] == truth.facts[fact]


@pytest.mark.parametrize("name", FULL)
def test_weights_alone_leave_the_optimizer_behind(
    made: dict[str, Opened], name: str, tmp_path: Path
) -> None:
    told = list(proof.left_behind(made[name].source.contents, FORMATS["safetensors"], Wanted()))
    assert any("exp_avg, exp_avg_sq stay behind" in text for text in told)
    found = into(made[name], "safetensors", tmp_path)
    assert digests(found.source) == digests(made["safetensors"].source)
    assert digests(found.source).items() <= digests(held()).items()


@pytest.mark.parametrize("name", FULL)
def test_half_precision_keeps_its_masters(name: str, tmp_path: Path) -> None:
    source = held("bfloat16")
    found = into(source, name, tmp_path)
    assert digests(found.source) == digests(source)
    assert found.source.contents.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["native", "dcp", "safetensors"])
def test_weights_of_several_dtypes_stay_what_they_are(name: str, tmp_path: Path) -> None:
    dtypes = ["float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn", "bfloat16", "float32"]
    arrays = tuple(Array("param", f"w{i}", (9,), dtype) for i, dtype in enumerate(dtypes))
    source = Held(Contents(7, arrays, dtype=dtypes[0]), {a.key: random(a) for a in arrays})
    assert digests(into(source, name, tmp_path).source) == digests(source)
    assert list(proof.left_behind(source.contents, FORMATS[name], Wanted())) == []


@pytest.mark.parametrize(("was", "to", "wanted"), [
    ("float32", "safetensors", Wanted(dtype="float16")), ("float64", "deepspeed", Wanted()),
    ("float64", "universal", Wanted()), ("complex64", "deepspeed", Wanted()),
])  # fmt: skip
def test_what_is_rounded_is_told(was: str, to: str, wanted: Wanted, tmp_path: Path) -> None:
    contents = held().contents
    arrays = tuple(replace(a, dtype=was) if a.role == "param" else a for a in contents.arrays)
    contents = replace(contents, arrays=arrays)
    now = wanted.dtype or "float32"
    told = list(proof.left_behind(contents, FORMATS[to], wanted))
    assert f"param: 6 of {was} are rounded to {now}" in told
    if was == "complex64":
        with pytest.raises(Misuse, match="complex64, which ZeRO does not train"):
            into(Held(contents, {}), to, tmp_path)


# ---- a result that is not what it should be


class Spoilt(Held):
    """Gives one element of one array differently every time but the first."""

    def __init__(self, key: str) -> None:
        good = held()
        super().__init__(good.contents, good.values)
        self.key, self.times = key, 0

    def read(self, array: Array, start: int, stop: int) -> np.ndarray:
        values = super().read(array, start, stop)
        if array.key == self.key:
            self.times += 1
            values.view("u1")[0] ^= self.times > 1
        return values


@pytest.mark.parametrize("name", ["native", "safetensors"])
@pytest.mark.parametrize("key", ["param/scale", "param/wte.weight", "buffer/mask"])
def test_one_wrong_bit_is_found_and_nothing_stays(tmp_path: Path, name: str, key: str) -> None:
    with pytest.raises(Corrupt, match=f"{key}: 1 bytes are not the source's"):
        into(Spoilt(key), name, tmp_path)
    assert not (tmp_path / name).exists() or not list((tmp_path / name).iterdir())
    opened = Opened(FORMATS["native"], tmp_path / "origin", Spoilt(key))
    job = replace(conversion(opened, name, tmp_path / name), proof=False)
    convert(job, silent)  # nobody else notices


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: {"step": 8}, "step 7 became 8"),
        (lambda c: {"arrays": c.arrays[1:]}, "param/wte.weight is missing"),
        (lambda c: {"arrays": (*c.arrays, Array("buffer", "b", (), "bool"))}, "b is too much"),
        (lambda c: {"arrays": tuple(replace(a, dtype="float64") for a in c.arrays)}, "became"),
        (lambda c: {"groups": c.groups[::-1]}, "hold other parameters"),
        (lambda c: {"groups": (replace(c.groups[0], hyper={}), c.groups[1])}, "group 0: lr 0.0003"),
        (lambda c: {"groups": (replace(c.groups[0], scalars={}), c.groups[1])}, "group 0: step"),
        (lambda c: {"aliases": {}}, "tied names"),
        (lambda c: {"facts": {}}, "facts: lr_scheduler"),
        (lambda c: {}, None),
    ],
)
def test_what_is_not_carried_is_told(change: object, why: str | None) -> None:
    contents = held().contents
    other = replace(contents, **change(contents))
    found = list(proof.differences(contents, other, FORMATS["dcp"], Wanted()))
    assert (not found) if why is None else any(why in text for text in found)


# ---- cut short


PROGRAM = """
import sys, time
from pathlib import Path
from outlast.checkpoint.convert import convert
from held import *
class Slow(Held):
    def read(self, array, start, stop):
        print(array.key, flush=True)
        time.sleep(0.1)
        return super().read(array, start, stop)
directory = Path(sys.argv[1])
source = held()
slow = Slow(source.contents, source.values)
opened = Opened(FORMATS["native"], directory / "origin", slow)
convert(conversion(opened, sys.argv[2], directory / "out"), silent)
"""


@pytest.mark.parametrize("name", FORMATS)
def test_killed_and_gone_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "origin").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), name]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert process.stdout is not None
    for _ in range(9):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    out = tmp_path / "out"
    parts = [*out.glob(".*.part"), *tmp_path.glob(".*.part")]
    assert len(parts) == 1
    shown = [path.name for place in (tmp_path, out) for path in place.glob("[!.]*")]
    assert {*shown} <= {"origin", "out"}, "only the parts are there"

    class Counted(Held):
        read_keys: list[str] = []  # noqa: RUF012

        def read(self, array: Array, start: int, stop: int) -> np.ndarray:
            self.read_keys.append(array.key)
            return super().read(array, start, stop)

    source = Counted(held().contents, held().values)
    opened = Opened(FORMATS["native"], tmp_path / "origin", source)
    job = conversion(opened, name, out)
    done = len((job.part / "journal").read_text().splitlines()) - 1
    convert(job, silent)
    if name in ("native", "safetensors"):  # an item for every array, and one for its header
        assert done >= 2
        total = len(FORMATS[name].stored(source.contents, Wanted()))
        reads = len(source.read_keys) - total  # without those of the proof
        assert reads <= total - done + (name == "safetensors")
    assert digests(open_checkpoint(out).source).items() <= digests(held()).items()
    assert not job.part.exists()


def test_what_changed_meanwhile_starts_over(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    source = held()

    class Failing(Held):
        def read(self, array: Array, start: int, stop: int) -> np.ndarray:
            if array.key == "buffer/cos":
                raise Corrupt("planted")
            return super().read(array, start, stop)

    opened = Opened(FORMATS["native"], tmp_path / "origin", source)
    broken = replace(opened, source=Failing(source.contents, source.values))
    with pytest.raises(Corrupt, match="planted"):
        convert(conversion(broken, "safetensors", tmp_path / "out"), silent)
    journal = next(tmp_path.glob(".out.part")) / "journal"
    before = journal.read_text().splitlines()
    assert len(before) > 3
    (tmp_path / "origin" / "file").write_text("new")
    with pytest.raises(Corrupt, match="planted"):
        convert(replace(conversion(broken, "safetensors", tmp_path / "out"), workers=1), silent)
    assert journal.read_text().splitlines()[0] != before[0]
    journal.write_text("garbage")
    convert(conversion(opened, "safetensors", tmp_path / "out"), silent)
    assert digests(open_checkpoint(tmp_path / "out").source).items() <= digests(source).items()


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()

    def meddle(what: str, at: int, total: int) -> None:
        (tmp_path / "origin" / "file").write_text("new")

    opened = Opened(FORMATS["native"], tmp_path / "origin", held())
    with pytest.raises(Misuse, match="changed while it was read"):
        convert(conversion(opened, "native", tmp_path / "out"), meddle)
    assert not list((tmp_path / "out").glob("step*"))


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = into(held(), "safetensors", tmp_path)
    out = tmp_path / "out"
    for make, why in [
        (lambda: (out.mkdir(), (out / "file").touch()), "exists"),
        (lambda: ((out / "file").unlink(), out.rmdir(), out.symlink_to(tmp_path)), "exists"),
        (lambda: (out.unlink(), (tmp_path / ".out.part").mkdir(),
                  (tmp_path / ".out.part" / "mine").touch()), "not of a conversion"),
    ]:  # fmt: skip
        make()
        with pytest.raises(Misuse, match=why):
            convert(conversion(source, "safetensors", out), silent)
    assert (tmp_path / ".out.part" / "mine").exists()
    stored = into(held(), "native", tmp_path / "second")
    (tmp_path / "link").symlink_to(stored.path)
    for place in (stored.path, tmp_path / "link"):
        with pytest.raises(Misuse, match="lies in the source"):
            convert(conversion(stored, "safetensors", place / "out"), silent)
    with pytest.raises(Misuse, match="a disk of its own"):
        convert(conversion(stored, "safetensors", Path("/proc")), silent)
    (tmp_path / "latest").write_text("global_step5000")
    with pytest.raises(Misuse, match="latest names 'global_step5000'"):
        convert(conversion(stored, "deepspeed", tmp_path), silent)
    assert (tmp_path / "latest").read_text() == "global_step5000"
    (tmp_path / "latest").write_text("global_step7\n")
    convert(conversion(stored, "deepspeed", tmp_path), silent)


@pytest.mark.parametrize("name", FORMATS)
def test_who_opens_and_forgets_leaves_no_file_open(tmp_path: Path, name: str) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    opened = into(held(), name, tmp_path)
    for array in opened.source.contents.arrays:
        opened.source.read(array, 0, array.numel)
    assert len(os.listdir("/proc/self/fd")) > before
    del opened, array
    assert len(os.listdir("/proc/self/fd")) <= before


def test_ended_right_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = into(held(), "native", tmp_path / "first")
    job = conversion(opened, "deepspeed", tmp_path / "out")

    def end(paths: list[Path], forget: bool = False) -> None:
        if job.place.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "synchronise", end)
        with pytest.raises(KeyboardInterrupt):
            convert(job, silent)
    assert job.part.exists()
    with pytest.raises(Misuse, match="exists"):
        convert(replace(job, proof=False), silent)
    convert(job, silent)
    assert (tmp_path / "out" / "latest").read_text() == job.place.name
    assert not job.part.exists()
    with pytest.raises(Misuse, match="exists"):
        convert(job, silent)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    arrays = (Array("param", "a", (2,), "float32"), Array("buffer", "a", (2,), "float32"))
    source = Held(Contents(0, arrays), {})
    with pytest.raises(Misuse, match="same name"):
        into(source, "safetensors", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_two_at_once(tmp_path: Path) -> None:
    opened = Opened(FORMATS["native"], tmp_path / "origin", held())
    (tmp_path / "origin").mkdir()
    job = conversion(opened, "native", tmp_path / "out")

    def again(what: str, at: int, total: int) -> None:
        with pytest.raises(Misuse, match="another conversion is writing"):
            convert(job, silent)

    convert(job, again)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = engine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(Misuse, match="100 bytes free"):
        into(held(), "native", tmp_path)


# ---- which format it is


def test_what_is_nothing_and_what_is_two(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(Misuse, match="is not one of native, "):
        open_checkpoint(tmp_path)
    with pytest.raises(Misuse, match="is not a checkpoint of dcp"):
        open_checkpoint(tmp_path, "dcp")
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(Misuse, match="latest names 'global_step9'"):
        open_checkpoint(tmp_path)
    into(held(), "native", tmp_path)
    into(held(), "safetensors", tmp_path / "s")
    (tmp_path / "s" / "safetensors" / "model.safetensors").rename(
        tmp_path / "native" / "model.safetensors"
    )
    with pytest.raises(Misuse, match="has native and safetensors"):
        open_checkpoint(tmp_path / "native")
    assert open_checkpoint(tmp_path / "native", "native").format is FORMATS["native"]
    assert open_checkpoint(tmp_path / "native", "safetensors").source.contents.groups == ()


# ---- larger than memory


MEMORY = """
import resource, sys
from pathlib import Path
from held import *
class Endless(Held):
    def read(self, array, start, stop):
        return np.arange(start, stop, dtype=np.float32)
arrays = tuple(Array(role, name, (4096, 4096), "float32")
               for role in ("param", "exp_avg", "exp_avg_sq") for name in "abcd")
group = Group(tuple("abcd"), HYPER, {"step": 7.0})
directory = Path(sys.argv[1])
(directory / "origin").mkdir()
opened = Opened(FORMATS["native"], directory / "origin", Endless(Contents(7, arrays, (group,)), {}))
into(held(), sys.argv[2], directory / "small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
into(opened, sys.argv[2], directory)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, name: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), name], text=True,
                          check=True, stdout=subprocess.PIPE, timeout=300,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert int(done.stdout) < 2 * 64e6, "two workers, of 805 MB"


# ---- checkpoints of others


SHORT = ["z1_bf16_optimizer", "z2_round_robin", "z3_sub_groups"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in SHORT else pytest.mark.long)
        for name in deepspeed_runs.CASES
        if name != "z0"  # stage 0 is refused
    ],
)
def test_a_real_run_goes_through_every_format(
    deepspeed_saves: Path, tmp_path: Path, case: str
) -> None:
    first = open_checkpoint(deepspeed_saves / case)
    assert list(proof.problems(first, 2, lambda size: None)) == []
    truth, contents = digests(first.source), first.source.contents
    at = first
    for number, to in enumerate(("universal", "dcp", "native", "megatron", "deepspeed")):
        at = into(at, to, tmp_path / str(number))
        assert digests(at.source) == truth
        assert_same(at.source.contents, contents)
    assert list(proof.problems(at, 2, lambda size: None)) == []
