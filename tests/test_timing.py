"""Seconds of phases, by the clock of a CPU and by the events of a pretended GPU."""

import time

import pytest
import torch

from trainers.timing import PhaseTimer


class Event:
    """An event of a pretended queue, in which every event is reached 250 ms after the one before."""

    reached = 0
    synchronized: list[int] = []

    def __init__(self, device, enable_timing):
        assert device.type == "cuda" and enable_timing

    def record(self):
        Event.reached += 1
        self.number = Event.reached

    def synchronize(self):
        Event.synchronized.append(self.number)

    def elapsed_time(self, end):
        return 250.0 * (end.number - self.number)


def test_an_inner_phase_does_not_count_for_the_outer_one():
    timer = PhaseTimer(torch.device("cpu"))
    with timer.phase("backward"):
        time.sleep(0.02)
        with timer.phase("rollout"):
            time.sleep(0.2)
    seconds = timer.seconds()
    assert seconds["rollout"] >= 0.2 and 0.02 <= seconds["backward"] < 0.2
    assert timer.seconds() == {}


def test_a_gpu_is_timed_by_its_events_and_waited_for_once(monkeypatch):
    monkeypatch.setattr(torch, "Event", Event)
    timer = PhaseTimer(torch.device("cuda"))
    with timer.phase("backward"):  # events 1 and 8
        with timer.phase("rollout"), timer.phase("grading"):  # 2 and 5, 3 and 4
            pass
        with timer.phase("rollout"):  # 6 and 7
            pass
    assert Event.synchronized == []
    assert timer.seconds() == pytest.approx({"grading": 0.25, "rollout": 0.75, "backward": 0.75})
    assert Event.synchronized == [8] and timer.seconds() == {}
