"""The line of progress: it changes on a terminal, and a pipe gets nothing."""

import io
import sys
import time

from fd_fusion.cli import messages


def test_the_line_changes_on_a_terminal_and_is_cleared(monkeypatch):
    monkeypatch.setattr(messages, "_SILENT_S", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    stderr.isatty = lambda: True
    with messages.progress_line("first") as show:
        for text, wanted in (("", "fd_fusion: first"), ("second, 2 of 2", "fd_fusion: second, 2 of 2")):
            if text:
                show(text)
            while wanted not in stderr.getvalue():
                time.sleep(0.01)
    assert stderr.getvalue().endswith("\r\x1b[K")


def test_a_pipe_gets_nothing(monkeypatch, capsys):
    monkeypatch.setattr(messages, "_SILENT_S", 0.0)
    with messages.progress_line("first") as show:
        show("second")
        time.sleep(0.02)
    assert capsys.readouterr() == ("", "")
