"""Time the phases of training."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """
    A timer of phases that may be nested; the seconds of an inner phase do not count for the outer one.

    An accelerator works behind the host, so its phases are timed with events in its queue. Nothing waits for them until
    [`~PhaseTimer.seconds`] is called.

    Args:
        device (`torch.device`):
            The run's device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._running: list[str] = []
        self._spans: list[tuple[str, str | None, float | torch.Event, float | torch.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """
        Count the seconds of a phase.

        Args:
            name (`str`):
                The phase.
        """
        outer = self._running[-1] if self._running else None
        self._running.append(name)
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((name, outer, start, self._now()))
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """
        Return the seconds of each phase since the last call.

        Returns:
            `dict[str, float]`: Seconds by phase.
        """
        if self._spans and isinstance(last := self._spans[-1][-1], torch.Event):
            last.synchronize()
        total = Counter()
        for name, outer, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1000 if isinstance(start, torch.Event) else end - start
            total[name] += seconds
            if outer is not None:
                total[outer] -= seconds
        self._spans.clear()
        return dict(total)

    def _now(self) -> float | torch.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event
