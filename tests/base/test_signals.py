"""Signals that ask a command to stop."""

import signal

import pytest

from ig_jax.base import signals
from ig_jax.base.errors import Preempted
from ig_jax.base.signals import StopRequest, stop_on_signals


def test_sigterm_ends_a_command_where_it_stands(monkeypatch):
    with StopRequest():  # which brings back what was there
        stop_on_signals()
        with pytest.raises(Preempted, match="SIGTERM; rerun the same command to resume"):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_stop_request_is_noted_and_what_was_there_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name == ""
        signal.raise_signal(number)
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_asks_for_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.name == "" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
