"""The log file of a process."""

import logging
import pathlib
import warnings

import pytest

from clipjax.runtime import process_log


def test_a_log_has_header_notes_warnings_and_the_traceback(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    process_log.info("before there is a log")
    with pytest.raises(KeyError), process_log.session():
        process_log.open_log(tmp_path, rank=3, header={"host": "node-3"})
        process_log.info("two\nlines")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("careful", UserWarning, stacklevel=1)
        logging.getLogger("library").warning("of a library")
        logging.getLogger("library").info("a detail")
        raise KeyError("defect")
    process_log.info("after it was closed")
    text = process_log.path_of(tmp_path, 3).read_text()
    assert process_log.path_of(tmp_path, 3) == tmp_path / "logs" / "rank-00003.log"
    lines = [line.split("  ", 1)[1] for line in text.splitlines()]
    assert lines[:4] == ["---- start ----", "host: node-3", "two", "lines"]
    assert any("UserWarning: careful" in line for line in lines)
    assert "WARNING library: of a library" in lines
    assert lines[-1] == "KeyError: 'defect'"
    assert "a detail" not in text and "before" not in text and "after" not in text
    assert shown == ["careful"]  # as before


def test_a_second_start_appends(tmp_path):
    for word in ("one", "two"):
        with process_log.session():
            process_log.open_log(tmp_path, rank=0, header={"command": word})
    text = process_log.path_of(tmp_path, 0).read_text()
    assert text.count("---- start ----") == 2
    assert text.index("command: one") < text.index("command: two")


def test_handlers_are_given_back(tmp_path):
    before = (list(logging.root.handlers), warnings.showwarning)
    with process_log.session():
        process_log.open_log(tmp_path, rank=0, header={})
    assert (logging.root.handlers, warnings.showwarning) == before


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_silences_the_log_and_not_the_run(tmp_path, capfd):
    path = process_log.path_of(tmp_path, 0)
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with process_log.session():
        process_log.open_log(tmp_path, rank=0, header={"host": "node"})
        for _ in range(3):
            process_log.info("x" * 10_000)
        logging.getLogger("library").warning("shown")
    assert "Traceback" not in capfd.readouterr().err


def test_a_library_whose_message_does_not_fit_its_arguments_is_no_error(tmp_path, capfd):
    with process_log.session():
        process_log.open_log(tmp_path, rank=0, header={})
        logging.root.handlers[-1].handle(logging.LogRecord("library", logging.ERROR, "", 0, "%d", ("x",), None))
        process_log.info("100% of this line is text")
    assert process_log.path_of(tmp_path, 0).read_text().endswith("  100% of this line is text\n")
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "logs").write_text("")
    with process_log.session(), pytest.raises(OSError):
        process_log.open_log(tmp_path, rank=0, header={})


def test_lines_of_the_log_stay_off_the_terminal_and_other_handlers(tmp_path, capfd):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.root.addHandler(handler)
    try:
        with process_log.session():
            process_log.open_log(tmp_path, rank=0, header={})
            process_log.info("for the file")
            logging.getLogger("library").warning("for both")
    finally:
        logging.root.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["for both"]
    assert capfd.readouterr().out == ""
