"""Seconds and peak memory of a step."""

from __future__ import annotations

import threading
import time
from typing import Self

import psutil


class Meter:
    """Context manager: wall seconds, and the largest resident memory sampled meanwhile (bytes)."""

    seconds: float = 0.0
    peak: int = 0

    def __enter__(self) -> Self:
        self._process = psutil.Process()
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            if self._stop.wait(0.02):
                return

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._sampler.join()
        self.peak = max(self.peak, self._process.memory_info().rss)
