"""Channels of one command: all are asked at the same time, each once however many models follow it, and each file is read once.

What is shared is what the server sent. Whether a model may have it is decided for every model by itself, as in `follow`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import Any, TypeVar, cast

from nestpatch.channels._memory import recall
from nestpatch.channels.listing import ListedFile
from nestpatch.channels.readers import ChannelFile, ChannelReader, open_reader
from nestpatch.events import OnEvent, ignore

T = TypeVar("T")


class Stop:
    """Ends the waits of several threads at once."""

    def __init__(self) -> None:
        self._called: Future[None] = Future()

    def call(self) -> None:
        """From now on, `check` and `result_of` raise."""
        self._called.set_result(None)

    def check(self) -> None:
        """Goes on.

        Raises:
            KeyboardInterrupt: `call` was called.
        """
        if self._called.done():
            raise KeyboardInterrupt

    def result_of(self, future: Future[T]) -> T:
        """Waits for a result.

        Args:
            future: Where it will be.

        Returns:
            The result. Its exception is raised as it is.

        Raises:
            KeyboardInterrupt: `call` was called first.
        """
        wait(cast("list[Future[Any]]", [future, self._called]), return_when=FIRST_COMPLETED)
        self.check()
        return future.result()


@dataclass(frozen=True, eq=False)
class SharedReader:
    """A reader whose answers are kept for as long as it exists. Threads that ask for the same wait for one answer."""

    reader: ChannelReader
    stop: Stop
    _answers: dict[object, Future[Any]] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def name(self) -> str | None:
        """As the reader has it."""
        return self.reader.name

    @property
    def address(self) -> str:
        """As the reader has it."""
        return self.reader.address

    def channel(self, known: str = "") -> ChannelFile:  # noqa: ARG002 - the answer is for all who ask, whatever they know
        """Reads the channel file, as the reader does; its content is there also where nothing is new."""
        return self._once("", self._ask)

    def read(self, revision: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:
        """Reads a listed file, as the reader does. `on_event` of the first who asks is called, from another thread."""
        return self._once((revision, file), lambda: self.reader.read(revision, file, on_event))

    def begin(self) -> None:
        """Asks for the channel file, and does not wait for the answer."""
        self._start("", self._ask)

    def _ask(self) -> ChannelFile:
        known = recall(self.address)
        found = self.reader.channel(known.revision if known else "")
        return found if found.data is not None or known is None else ChannelFile(found.revision, known.data)

    def _once(self, what: object, work: Callable[[], T]) -> T:
        return self.stop.result_of(self._start(what, work))

    def _start(self, what: object, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            first = what not in self._answers
            answer = self._answers.setdefault(what, Future())
        if first:
            # A thread of its own, so that whoever waits can be stopped.
            Thread(target=_answer, args=(answer, work), daemon=True).start()
        return cast("Future[T]", answer)


def _answer(answer: Future[T], work: Callable[[], T]) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
        answer.set_exception(error)


class SharedReaders:
    """The shared readers of one command, by address.

    Args:
        stop: Ends all waits for them.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._readers: dict[str, SharedReader] = {}
        self._lock = Lock()

    def open(self, text: str) -> SharedReader:
        """The reader of an address.

        Args:
            text: The address.

        Returns:
            The same reader for every text that names the same address. The first text decides with which login it is read.

        Raises:
            DataError: The text is not the address of a channel.
        """
        reader = open_reader(text)
        with self._lock:
            return self._readers.setdefault(reader.address, SharedReader(reader, self._stop))
