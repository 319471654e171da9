"""Workers that prepare batches ahead of the step, in threads or processes, and hand them over in order."""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar, cast

from mmfn.errors import UserError

J = TypeVar("J")
T = TypeVar("T")
POLL_S = 0.2  # between two looks at whether what is waited for is still wanted
CLOSE_S = 5.0  # for what is under way when the rest is dropped
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
END = signal.SIGUSR2  # how this process ends a worker that reads what never comes


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How batches are prepared: `number` workers of a kind, up to `ahead` steps early; 0: none, in the caller."""

    number: int = 1
    ahead: int = 2
    kind: Literal["threads", "processes"] = "threads"

    @property
    def lead(self) -> int:
        """Jobs that are taken before the first result is asked for."""
        if self.number == 0:
            return 0
        return self.ahead if self.kind == "threads" else self.number * _per_process(self.number, self.ahead)


def wanted() -> bool:
    """Of whoever waits as long as it takes."""
    return True


def prefetch(
    make: Callable[[J], T], jobs: Iterable[J], workers: Workers, is_wanted: Callable[[], bool] | None = None
) -> Iterator[T]:
    """`make(job)` for each of `jobs`, in their order. The results do not depend on `workers`.

    Jobs are taken by the caller, at the same moments on all ranks. An error of a job is raised when it is due, with the
    traceback of the worker. Closing the iterator (or leaving the loop) drops the rest, and the workers end with what
    they do. `is_wanted`: asked again and again while a result is waited for; False ends the iterator without it. So
    that it can be asked, no workers are then one thread with nothing ahead.
    """
    if workers.number < 0 or workers.ahead < 1:
        raise UserError(f"prefetch needs workers >= 0 and ahead >= 1, got {workers.number} and {workers.ahead}")
    if workers.number == 0 and is_wanted is None:
        return map(make, jobs)
    run = _in_processes if workers.number and workers.kind == "processes" else _in_threads
    return run(make, jobs, workers, is_wanted or wanted)


def _in_threads(
    make: Callable[[J], T], jobs: Iterable[J], workers: Workers, is_wanted: Callable[[], bool]
) -> Iterator[T]:
    # decoding, resizing and copying release the interpreter lock, and samples stay shared
    pool = ThreadPoolExecutor(max_workers=max(1, workers.number), thread_name_prefix="mmfn-data")
    left = iter(jobs)
    pending: list[Future[T]] = []
    try:
        pending.extend(pool.submit(make, job) for job in islice(left, workers.ahead if workers.number else 0))
        while True:
            pending.extend(pool.submit(make, job) for job in islice(left, 1))
            if not pending:
                return
            while not wait(pending[:1], timeout=POLL_S).done:
                if not is_wanted():
                    return
            yield pending.pop(0).result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        running = [future for future in pending if future.running()]
        stuck = wait(running, timeout=CLOSE_S if is_wanted() else 0).not_done  # one may read what never comes
        pool.shutdown(wait=not stuck)


def _in_processes(
    make: Callable[[J], T], jobs: Iterable[J], workers: Workers, is_wanted: Callable[[], bool]
) -> Iterator[T]:
    """Processes of torch's DataLoader, started anew ("spawn").

    A fork would copy the locks of threads that it does not copy: those of process groups, of torch's pools, of an
    accelerator's runtime, whichever the run has at that moment. The loader asks for a job when a result has come, but
    taking one may be a collective: it gets those that were taken before the wait, whether or not the result comes.
    """
    from torch.utils.data import DataLoader

    _check_sendable(make)
    left = iter(jobs)
    taken: deque[J] = deque(next(left, NO_MORE) for _ in range(workers.lead))
    others = multiprocessing.active_children()
    loader: Any = DataLoader(
        _Keyed(make),  # type: ignore[arg-type]  # has what is asked of a data set
        sampler=iter(taken.popleft, NO_MORE),  # any iterable of keys, and jobs are the keys
        batch_size=None,
        collate_fn=_same,
        num_workers=workers.number,
        prefetch_factor=_per_process(workers.number, workers.ahead),
        multiprocessing_context="spawn",
        worker_init_fn=_ignore_signals,
        timeout=POLL_S,
    )
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, END})  # in the workers until they ignore them
    try:
        results = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    started = [child for child in multiprocessing.active_children() if child not in others]
    try:
        while True:
            taken.append(next(left, NO_MORE))
            while True:
                try:
                    result = next(results)
                    break
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not (said := str(error)).startswith(OF_THE_LOADER):
                        raise
                if TIMED_OUT not in said:
                    raise RuntimeError(said)  # out of its handler: the loader's own traceback would keep its processes
                if not is_wanted():
                    return
            yield result.get()
    finally:
        for child in () if is_wanted() else started:
            os.kill(cast(int, child.pid), END)
        del results, loader  # what asks the processes to end, and waits for them for a while
        for child in started:  # torch leaves one that has not come so far as to hear it
            child.kill()
            child.join()


NO_MORE: Any = object()  # behind the last job
OF_THE_LOADER = "DataLoader"  # how torch begins to say what has become of its processes
TIMED_OUT = "timed out"  # a result has not come in time; it may be asked for again


def _ignore_signals(worker: int) -> None:
    """What is meant for the run reaches its workers where it is sent to a group of processes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS, END})


def _check_sendable(make: Any) -> None:
    try:
        pickle.dumps(make)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise UserError(f"data.worker_kind 'processes' cannot send the data to one ({error}); use threads") from error


def _per_process(number: int, ahead: int) -> int:
    return max(1, -(-ahead // number))


class _Keyed(Generic[J, T]):
    """A data set whose keys are jobs."""

    def __init__(self, make: Callable[[J], T]) -> None:
        self.make = make

    def __len__(self) -> int:
        raise TypeError("jobs are not counted")

    def __getitem__(self, job: J) -> "_Result[T]":
        try:
            return _Result(value=self.make(job))
        except Exception as error:
            return _Result(error=error, trace=traceback.format_exc())


@dataclass(frozen=True, kw_only=True)
class _Result(Generic[T]):
    """What a process sends: torch would send an error as the text of another one."""

    value: T | None = None
    error: Exception | None = None
    trace: str = ""

    def get(self) -> Any:
        if self.error is None:
            return self.value
        self.error.add_note(f"in a worker process:\n{self.trace}")
        raise self.error


def _same(result: T) -> T:
    return result
