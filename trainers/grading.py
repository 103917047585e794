"""
Reward functions at work beside the trainer: started when the completions exist, collected when the rewards are needed.

The trainer computes log-probabilities meanwhile, those of the first micro-batch, whose loss needs the rewards (and of
all, where PPO needs the old ones beforehand); a batch with a slow program in it costs what the longer of the two costs.
Plain and async functions alike; reward models run on the trainer's device and are left to TRL.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trl.trainer.utils import get_callable_name, is_async_callable


class BackgroundReward:
    """
    A reward function whose call is started before its rewards are asked for. Calls take their turns, as in TRL.

    Args:
        function (`Callable`):
            A TRL reward function.
        threads (`ThreadPoolExecutor`):
            Where it runs.
    """

    def __init__(self, function: Callable, threads: ThreadPoolExecutor):
        self.function = function
        self.threads = threads
        self.seconds = 0.0  # of the last call

    def start(self, **kwargs) -> None:
        """Start a call with what TRL passes to a reward function."""
        self._call = self.threads.submit(self._run, **kwargs)

    def _run(self, **kwargs) -> list[float | None]:
        started = time.perf_counter()
        try:
            return self.function(**kwargs)
        except Exception as error:
            raise _failure(self.function, error) from error
        finally:
            self.seconds = time.perf_counter() - started

    def __call__(self, **kwargs) -> list[float | None]:
        """The rewards of the call that was started; the arguments are those it was started with."""
        return self._call.result()


class BackgroundAsyncReward:
    """
    The same for an async reward function. Calls of several run at the same time.

    Args:
        function (`Callable`):
            An async TRL reward function.
        loop (`asyncio.AbstractEventLoop`):
            Where it runs.
    """

    def __init__(self, function: Callable, loop: asyncio.AbstractEventLoop):
        self.function = function
        self.loop = loop
        self.seconds = 0.0

    def start(self, **kwargs) -> None:
        """Start a call with what TRL passes to a reward function."""
        self._call = asyncio.run_coroutine_threadsafe(self._run(**kwargs), self.loop)

    async def _run(self, **kwargs) -> list[float | None]:
        started = time.perf_counter()
        try:
            return await self.function(**kwargs)
        except Exception as error:
            raise _failure(self.function, error) from error
        finally:
            self.seconds = time.perf_counter() - started

    async def __call__(self, **kwargs) -> list[float | None]:
        """The rewards of the call that was started; the arguments are those it was started with."""
        return await asyncio.wrap_future(self._call)


def in_background(function: Callable, threads: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop | None):
    """
    Wrap a reward function.

    Args:
        function (`Callable`):
            A TRL reward function, plain or async.
        threads (`ThreadPoolExecutor`):
            Where plain functions run.
        loop (`asyncio.AbstractEventLoop` or `None`):
            Where async functions run.

    Returns:
        [`BackgroundReward`] or [`BackgroundAsyncReward`]
    """
    return BackgroundAsyncReward(function, loop) if is_async_callable(function) else BackgroundReward(function, threads)


def _failure(function: Callable, error: Exception) -> RuntimeError:
    return RuntimeError(f"the reward function {get_callable_name(function)!r} failed: {type(error).__name__}: {error}")
