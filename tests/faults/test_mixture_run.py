"""One run on a mixture of prepared TFDS data, tars in a bucket and a Parquet file, killed and gone on with, exactly.

With `../shared` the tars are emoji; without it, colours.
"""

import os
import pathlib
import signal

import pyarrow
import pyarrow.parquet
import pytest

from clipjax.runtime import objects
from tests.conftest import SHARED
from tests.data.test_exact_resume import caption, picture
from tests.faults.crash import UNDISTURBED
from tests.faults.tiny_run import TinyRun, differences, ended, read_lines, wait_until, write_pairs
from tests.runtime.stores import BUCKET

pytestmark = [pytest.mark.process, pytest.mark.slow]

TARS = f"gs://{BUCKET}/mixture"
KILLED_AT = (30, 95, 150)


class MixtureRun(TinyRun):
    """The tiny run on three sources."""

    def write(self) -> None:
        from clipjax.data.scenes.builder import build_scenes

        super().write()
        build_scenes(str(self.folder / "tfds"), "tiny")
        rows = {"jpg": [picture(i) for i in range(50)], "alt": [caption(i) for i in range(50)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), self.folder / "data" / "pairs.parquet", row_group_size=10)
        shards = sorted((SHARED / "data" / "emoji").glob("*blob-train*.tar"))[:2] if SHARED.is_dir() else []
        for number in () if shards else range(2):
            shards.append(self.folder / "data" / f"{number}.tar")
            write_pairs(shards[-1], first=100 * number)
        for number, shard in enumerate(shards):
            objects.write_bytes(f"{TARS}/{number:05d}.tar", shard.read_bytes())
        mixture = f"""dict(
            scenes=MixtureSource(source="tfds:scenes/tiny/train", weight=2.0),
            emoji=MixtureSource(source="{TARS}/*.tar", weight=1.0),
            table=MixtureSource(source="{self.folder}/data/pairs.parquet", weight=0.5, caption_field="alt"),
        )"""
        config = self.folder / "config.py"
        text = config.read_text().replace(
            f"train={str(self.shard)!r}", f"tfds_dir={str(self.folder / 'tfds')!r}, mixture={mixture}"
        )
        config.write_text(
            text.replace("global_batch_size=8,", "global_batch_size=8, loss=LossConfig(same_pair=SamePair.INDEX),")
        )


def test_a_mixture_is_killed_and_goes_on_exactly(tmp_path, gcs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = MixtureRun(tmp_path)
    run.write()
    run.finish(UNDISTURBED)
    options: tuple[tuple[str, ...], ...] = (
        (),
        ("--config.data.num_workers=2",),
        (f"--config.data.cache_dir={tmp_path}/c",),
    )
    for step, more in zip(KILLED_AT, options, strict=True):
        process = run.start("killed", *more)
        with ended(process):
            assert wait_until(lambda step=step: run.logged_step("killed") >= step, seconds=120, process=process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    run.finish("killed")
    assert not differences(run, "killed", UNDISTURBED)
    starts = run.first_steps("killed")
    assert len(starts) == len(KILLED_AT) + 1 and starts == sorted(starts) and starts[-1] > 100
    last = [line for line in read_lines(run.workdir("killed") / "metrics.jsonl") if "samples_due" in line][-1]
    due, total = last["samples_due"], 1600
    for name, weight in (("scenes", 2.0), ("emoji", 1.0), ("table", 0.5)):
        assert abs(due[name] - total * weight / 3.5) <= 8 * 3  # of each of up to eight lanes, three sources
    assert sum(due.values()) == total and last["samples_skipped_by_source"] == {"scenes": {}, "emoji": {}, "table": {}}
    assert pathlib.Path(tmp_path / "c").is_dir()
