"""`clipjax data bench`: figures of the training stream and of the bare loop, and whether chips would wait."""

import json
import tarfile

import numpy as np
import pytest

from clipjax.cli import data_bench
from clipjax.cli.data import main
from clipjax.config import Config, DataConfig, ModelConfig, ViTConfig
from clipjax.data import loading_speed
from clipjax.data.loading_speed import LoadingRate, measure_loading
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from tests.cli.test_data_show import png
from tests.commands import exit_code
from tests.data.test_filters import add

pytestmark = pytest.mark.newest


@pytest.fixture
def shard(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(40):
            add(tar, f"{i}.png", png(20 + i) if i else b"no picture")
            add(tar, f"{i}.txt", b"text")
    return str(tmp_path / "a.tar")


class Clock:
    """Time that passes by a second at each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_counts_are_those_of_the_clock(monkeypatch):
    monkeypatch.setattr(loading_speed.time, "process_time", Clock())
    data, model = DataConfig(train="x", max_bad_fraction=1), ModelConfig(image=ViTConfig(image_size=8))
    config = Config(global_batch_size=4, model=model, data=data)
    pixels = np.zeros((10, 9, 9, 3), np.uint8)
    source = ArraySource([b"bad", *pixels], ["a"] * 11)
    tokenizer = BytesTokenizer()
    bare, plain, tokens = measure_loading(source, tokenizer, config, is_remote=[False], seconds=5, clock=Clock())
    # The clock is looked at once an image, and twice before the fifth second of a stream's batch.
    assert (bare.images, bare.seconds, bare.cpu_seconds) == (5, 5, 1)
    assert [each.images for each in (plain, tokens)] == [16, 16] and plain.seconds == 5
    assert (plain.with_tokens, tokens.with_tokens, plain.num_workers) == (False, True, 0)
    assert plain.images_per_second == 16 / 5 and plain.images_per_core_second == 16
    assert plain.unusable in (1, 2)  # one of eleven, in 24 draws of which 8 warm up


def test_a_source_without_a_picture_is_refused():
    source = ArraySource([b"bad"] * 3, ["a"] * 3)
    with pytest.raises(ValueError, match="none of 3 samples has an image that can be decoded"):
        list(measure_loading(source, BytesTokenizer(), Config(), is_remote=[False], seconds=1))


def test_an_order_of_blocks_fits_the_smaller_batch():
    pixels = np.zeros((200, 9, 9, 3), np.uint8)
    config = Config(
        global_batch_size=1000, model=ModelConfig(image=ViTConfig(image_size=8)), data=DataConfig(train="x")
    )
    source, tokenizer = ArraySource(pixels, ["a"] * 200), BytesTokenizer()
    rates = list(measure_loading(source, tokenizer, config, is_remote=[True], seconds=0.01))
    assert [rate.images % 64 for rate in rates[1:]] == [0, 0]


ARGUMENTS = ["--seconds=0.01", "--config.global_batch_size=8", "--config.model.image.image_size=32"]


def test_the_command(shard, tmp_path, capsys):
    output = tmp_path / "bench.json"
    assert main(["bench", shard, *ARGUMENTS, f"--output={output}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data.train={shard!r}: 40 samples, image_size=32"
    assert lines[1].split() == [
        "num_workers",
        "tokens",
        "images/s",
        "images/s",
        "per",
        "core",
        "of",
        "bare",
        "unusable",
    ]
    assert [line.split()[:6] for line in lines[3:6]] == [
        ["bare", "decode", "+", "resize", "-", "no"],
        ["training", "stream", "0", "no", *lines[4].split()[4:6]],
        ["training", "stream", "0", "yes", *lines[5].split()[4:6]],
    ]
    found = json.loads(output.read_text())
    assert found["samples"] == 40 and len(found["rates"]) == 3
    for rate in found["rates"]:
        assert rate["images_per_second"] == pytest.approx(rate["images"] / rate["seconds"])
        assert rate["images"] > 0 and rate["cpu_seconds"] > 0


@pytest.mark.slow
def test_workers_count_with_their_cpu_time(shard, tmp_path):
    output = tmp_path / "bench.json"
    assert (
        main(["bench", shard, *ARGUMENTS, "--seconds=1"[:0] or "--config.data.num_workers=1", f"--output={output}"])
        == 0
    )
    rates = json.loads(output.read_text())["rates"]
    assert [rate["num_workers"] for rate in rates] == [None, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("needed", "cores", "verdict"),
    [(900.0, "2.2", "the chips would wait for data"), (700.0, "1.8", "the chips would not wait for data")],
)
def test_chips_that_would_wait(needed, cores, verdict):
    rates = [LoadingRate("bare", None, False, 10, 1.0, 1.0), LoadingRate("stream", 2, True, 800, 1.0, 2.0)]
    assert data_bench.describe_need(rates, needed, "v5e:2x2", 4) == (
        f"v5e:2x2: each of 4 hosts needs {needed:.0f} images/s, the work of {cores} cores like these; with "
        f"num_workers=2 this machine gives 800: {verdict}"
    )
    assert data_bench.describe_need(rates, None, "v5e:2x2", 1).startswith("v5e:2x2: the step does not fit")


def test_the_need_of_a_topology_is_that_of_its_plan(shard, tmp_path, monkeypatch, capsys):
    class Target:
        name, num_slices, num_hosts = "v5e:2x2", 1, 2

    monkeypatch.setattr(data_bench.targets, "prepare_environment", lambda topology: None)
    monkeypatch.setattr(data_bench.targets, "find_target", lambda topology, slices: Target())
    monkeypatch.setattr(data_bench.targets, "check_devices", lambda config, target, teacher: None)
    monkeypatch.setattr(data_bench, "_images_per_host", lambda config, target, num_samples: 1e9)
    config = tmp_path / "c.py"
    config.write_text("from clipjax.config import Config\ndef get_config():\n    return Config()\n")
    output = tmp_path / "bench.json"
    arguments = ["bench", shard, *ARGUMENTS, f"--config={config}", "--topology=v5e:2x2", f"--output={output}"]
    assert main(arguments) == 0
    assert "v5e:2x2: each of 2 hosts needs 1,000,000,000 images/s" in capsys.readouterr().out
    assert json.loads(output.read_text())["images_per_second_per_host"] == 1e9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--source is missing: the first argument, or the data.train of --config"),
        (["{shard}", "--seconds=0"], "--seconds=0 must be a number of seconds above 0"),
        (["{shard}", "--seconds=nan"], "--seconds=nan must be a number"),
        (["{shard}", "--slices=2"], "--slices=2 would be ignored without --topology"),
        (["{shard}", "--topology=v5e:2x2"], "--topology=v5e:2x2 needs --config"),
        (["{shard}", "--output=/no/such/folder/x"], "there is no folder"),
        (["{shard}", "--config.data.num_workers=-1"], "data.num_workers=-1"),
        (["{shard}", "--source={shard}"], "--source is given twice"),
        (["{shard}", "--config.data.filters=('w>1',)"], "filters keep none of 40 samples"),
    ],
)
def test_what_is_refused(shard, argv, message, capsys):
    assert exit_code(main, ["bench", *(each.format(shard=shard) for each in argv)]) == 2
    assert message in capsys.readouterr().err
