"""The promises of SECURITY.md: nothing of others is executed, extracted or sent raw to a terminal."""

import ast
import contextlib
import gc
import io
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest

import clipjax
from clipjax.checkpoints import manifest
from clipjax.cli.convert import main_convert
from clipjax.cli.eval import main as evaluate
from clipjax.config import Config
from clipjax.data.sample import BadSample
from clipjax.data.webdataset import TarSource
from clipjax.runtime.terminal import printable
from tests.commands import exit_code
from tests.faults.tiny_run import write_pairs

# A restore that Orbax refuses leaves reads behind, which complain of their closed event loop when they are collected:
# in any later test, hence the whole module, and `collected` so that none is left to others.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


PACKAGE = pathlib.Path(clipjax.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "extractall",
    "extract",
    "system",
    "popen",
    "getoutput",
    "unsafe_load",
    "loads_pickle",
}
RUNS_USERS_PYTHON = {"cli/overrides.py", "sweeps/plan.py"}
"""Files that execute a config or sweep file: the user's own Python."""


def calls(path: pathlib.Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ""), node


def imported(path: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def keyword(call: ast.Call, name: str) -> object:
    return next(
        (item.value.value for item in call.keywords if item.arg == name and isinstance(item.value, ast.Constant)), None
    )


def test_no_code_of_ours_unpickles_extracts_or_opens_a_shell():
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        assert not FORBIDDEN_MODULES & set(imported(path)), place
        for name, call in calls(path):
            where = f"{place}:{call.lineno} {name}"
            assert name not in FORBIDDEN_CALLS or (isinstance(call.func, ast.Attribute) and name == "eval"), where
            assert keyword(call, "shell") is not True, where
            assert keyword(call, "allow_pickle") in (None, False), where
            if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
                owner = call.func.value.id
                assert (owner, name) != ("np", "load") or keyword(call, "allow_pickle") is False, where
                assert (owner, name) != ("torch", "load") or keyword(call, "weights_only") is True, where


def trap_bytes(marker: pathlib.Path, protocol: int) -> bytes:
    """A pickle that makes a folder when it is opened."""

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    return pickle.dumps(Trap(), protocol=protocol)


def torch_archive(content: bytes) -> bytes:
    """The frame of a PyTorch file with a pickle in it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
    return archive.getvalue()


def object_array(content: bytes) -> bytes:
    """The head of an `.npy` file of objects, and the pickle that such a file holds."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return head.getvalue() + content


MEMBERS = (
    "pickle",
    "pkl",
    "pyd",
    "pth",
    "pt",
    "ckpt",
    "bin",
    "npy",
    "npz",
    "dill",
    "joblib",
    "jpg",
    "png",
    "txt",
    "json",
    "cls",
)
"""Kinds of members of a shard: those that other readers unpickle, and those that are read here."""


def test_planted_pickles_in_shards_are_never_opened(tmp_path):
    marker, path = tmp_path / "trapped", tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i, extension in enumerate(MEMBERS):
            trap = trap_bytes(marker, protocol=i % 6)
            content = {"npy": object_array, "pt": torch_archive, "npz": torch_archive}.get(extension, bytes)(trap)
            for name, data in ((f"{i}.{extension}", content), (f"{i}x.jpg", content), (f"{i}x.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = TarSource([str(path)], max_caption_bytes=65_536, max_image_pixels=10_000)
    reasons = set()
    for index in range(len(source)):
        try:
            source[index]
        except BadSample as bad:
            reasons.add(bad.reason)
    assert "missing_image" in reasons and not marker.exists()
    pickle.loads(trap_bytes(marker, 2))
    assert marker.exists(), "the trap works where it is opened"


WEIGHTS = {
    "npz": "Object arrays cannot be loaded",
    "pt": "a pickle can run any code",
    "pth": "a pickle can run any code",
    "bin": "a pickle can run any code",
    "ckpt": "a pickle can run any code",
    "pkl": "no safetensors file",
    "npy": "no safetensors file",
    "safetensors": "no safetensors file",
}
"""Kinds of files of weights that may hold a pickle, and why clipjax does not open it. PyTorch's restricted unpickler,
where it is installed, is tried in tests/convert/test_pytorch.py."""


@pytest.mark.parametrize("extension", WEIGHTS)
@pytest.mark.parametrize("kind", ["open_clip", "openai", "huggingface", "big_vision"])
def test_planted_pickles_in_weights_are_never_opened(tmp_path, monkeypatch, capsys, kind, extension):
    monkeypatch.setitem(sys.modules, "torch", None)
    marker, path = tmp_path / "trapped", tmp_path / f"weights.{extension}"
    trap = trap_bytes(marker, 2)
    if extension == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("params.npy", object_array(trap))
    else:
        plain = {"safetensors": bytes, "pkl": bytes, "npy": object_array}
        path.write_bytes(plain.get(extension, torch_archive)(trap))
    model = "ViT-B/32-gelu" if kind == "open_clip" else "ViT-B/32"
    arguments = [f"--from={kind}", f"--input={path}", f"--output={tmp_path / 'out'}", f"--model={model}"]
    assert exit_code(main_convert, arguments) == 2
    assert WEIGHTS[extension] in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_format_2" / "checkpoints" / "9"


@pytest.mark.parametrize(
    "planted",
    [
        "config/metadata",
        "data/metadata",
        "preprocessing/metadata",
        "tokenizer/metadata",
        "ema/_METADATA",
        "ema/_sharding",
        "ema/array_metadatas/process_0",
        "ema/manifest.ocdbt",
        "ema/metadata.pkl",
        "ema/checkpoint",
        "_CHECKPOINT_METADATA",
    ],
)
def test_pickles_in_a_checkpoint_whose_checksums_fit_are_never_opened(tmp_path, planted):
    """Whoever can write a checkpoint can write its manifest, too."""
    step, marker = tmp_path / "checkpoints" / "9", tmp_path / "trapped"
    shutil.copytree(GOLDEN, step)
    (step / planted).write_bytes(trap_bytes(marker, 2))
    files = [path for path in manifest.list_files(step) if path != manifest.FILE]
    manifest.write(step, manifest.Manifest(9, None, manifest.hash_files(step, files)))
    assert manifest.examine(step).state is manifest.State.VERIFIED
    with contextlib.suppress(ValueError):  # some of these files are not read
        clipjax.load(tmp_path)
    assert exit_code(evaluate, [f"--checkpoint={tmp_path}"]) in (0, 2, 3)
    assert not marker.exists()


HOSTILE = "\x1b]0;title\x07 \x1b[2J red\x00\x9b31m \u202eabc\r\n\ud800"


def test_printable_leaves_no_control_character():
    shown = printable(HOSTILE)
    assert all(character.isprintable() for character in shown), ascii(shown)
    assert "\\x1b[2J red" in shown and printable("Größe 大 🐙 a\tb") == "Größe 大 🐙 a\\tb"


def test_names_of_files_are_never_sent_raw_to_a_terminal(tmp_path):
    """Of data and of checkpoints; by every command that prints them."""
    folder = tmp_path / "\x1b[2Jfolder"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"no tar" * 500)
    commands = (
        ["data", "show", f"--source={folder}/a.tar"],
        ["data", "show", f"--source={folder}/\x1b[31mb.tar"],
        ["eval", f"--checkpoint={folder}"],
        ["train", f"--config={folder}/x.py", f"--workdir={tmp_path}/run"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "clipjax", *command], capture_output=True, check=False, timeout=120
        )
        assert done.returncode in (2, 3), done
        assert b"\x1b" not in done.stdout + done.stderr, done
        assert b"folder" in done.stderr
    write_pairs(folder / "b.tar")
    for option in ("write", "against"):
        command = ["data", "verify", f"--source={folder}/b.tar", f"--{option}={folder}/manifest.json"]
        done = subprocess.run([sys.executable, "-m", "clipjax", *command], capture_output=True, check=True, timeout=120)
        assert b"\x1b" not in done.stdout + done.stderr and b"\\x1b[2Jfolder" in done.stdout, done


def test_captions_are_never_sent_raw_to_a_terminal(tmp_path, capsys):
    from clipjax.cli.data import main as data

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("k.png", b"not decoded by show"), ("k.txt", HOSTILE.encode("utf-8", "replace"))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert data(["show", f"--source={tmp_path / 'a.tar'}"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J red" in shown and not any(c in shown for c in "\x1b\x07\x00\x9b\r\u202e")


def test_the_compile_cache_is_for_the_user_alone(tmp_path):
    from clipjax.runtime import compilation

    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="compile_cache"):
        compilation.enable(str(tmp_path / "open"))
    assert Config().compile_cache == "auto", "never a folder of data or checkpoints"


ESCAPES = "\x1b\x07\x00\x9b\r\u202e"


def test_tables_messages_and_logs_show_names_of_others_escaped(tmp_path, caplog):
    """Task names of a checkpoint's config, names of step directories, values that an override replaces, shards."""
    from clipjax.cli.checkpoint import main as checkpoint
    from clipjax.monitoring.progress import Progress
    from clipjax.monitoring.run_logger import results_table
    from clipjax.runtime import process_log

    stream = io.StringIO()
    text = HOSTILE.encode("utf-8", "replace").decode()  # pytest cannot report what is no text
    Progress(10, stream=stream).message(f"first\n{text}")
    table = results_table({HOSTILE: {HOSTILE: 0.5}})
    with process_log.session():
        process_log.open_log(tmp_path, rank=0, header={})
        process_log.info(text)
    log = process_log.path_of(tmp_path, 0).read_text()
    for shown in (stream.getvalue(), table, log):
        assert "\\x1b[2J red" in shown and not any(c in shown for c in ESCAPES), ascii(shown)
    assert stream.getvalue().startswith("first\n") and len(table.splitlines()) == 3

    caplog.clear()
    (tmp_path / "\x1b[2J.tar").write_bytes(tarfile.TarInfo("a.txt").tobuf() + b"cut")
    TarSource([str(tmp_path / "\x1b[2J.tar")], max_caption_bytes=100, max_image_pixels=100)
    assert "\\x1b[2J.tar: the archive ends" in caplog.text and "\x1b" not in caplog.text
    with contextlib.redirect_stdout(io.StringIO()) as out:
        (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "20.damaged.\x1b]0;title").mkdir()
        assert checkpoint(["verify", str(tmp_path / "run")]) == 3
    assert "20.damaged.\\x1b]0;title" in out.getvalue() and "\x1b" not in out.getvalue()


def test_what_an_override_replaces_is_shown_escaped(monkeypatch, capsys):
    from clipjax.cli import eval as evaluate

    opened = evaluate.Opened([], None, [f"--config.x=1 (was {HOSTILE})"])
    monkeypatch.setattr(evaluate, "_open", lambda argv: (opened, {}))
    monkeypatch.setattr(evaluate, "_evaluate", lambda opened: 0)
    assert evaluate.main(["--checkpoint=x"]) == 0
    shown = capsys.readouterr().out
    assert "(was \\x1b]0;title" in shown and not any(c in shown for c in ESCAPES)
