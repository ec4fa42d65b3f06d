"""The death latch: a robust mutex that a worker's main thread holds for as long as it lives.

The kernel hands a robust mutex of a dying thread to the next waiter BEFORE it frees the address
space, so the agent hears of a death in about a millisecond whatever the worker's size; pidfd and
socket ends come only after gigabytes were freed. Invariant: the page stays mapped while any
thread of this process may hold or wait for the mutex, because glibc keeps a pointer to it in the
thread's robust list.
"""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

from outlast.cluster.errors import Misuse

PAGE = 4096
_libc = ctypes.CDLL("libc.so.6", use_errno=True)  # calls through CDLL release the GIL


class Latch:
    """One mutex in a memfd: made by the agent, locked by the worker, awaited by the agent."""

    def __init__(self, file: int | None = None) -> None:
        """Make a fresh latch, or map the one behind an inherited descriptor `file`."""
        self.file = os.memfd_create("outlast-latch") if file is None else file
        if file is None:
            os.ftruncate(self.file, PAGE)
        self._page: mmap.mmap | None = mmap.mmap(self.file, PAGE)
        self._mutex = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._page)))
        if file is None:
            attributes = ctypes.create_string_buffer(64)
            _libc.pthread_mutexattr_init(attributes)
            _libc.pthread_mutexattr_setrobust(attributes, 1)
            _libc.pthread_mutexattr_setpshared(attributes, 1)
            if code := _libc.pthread_mutex_init(self._mutex, attributes):
                raise OSError(code, "pthread_mutex_init")

    def hold(self) -> None:
        """Lock it for good; called once by the worker's main thread, whose end it tells of."""
        if threading.current_thread() is not threading.main_thread():
            raise Misuse("outlast.init() must be called from the main thread")
        # An orderly interpreter unmaps its pages before the thread ends, and the kernel would find
        # nothing to mark: this reference is never given back.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._page))
        if code := _libc.pthread_mutex_lock(self._mutex):
            raise OSError(code, "pthread_mutex_lock")

    def watch(self, fired: Callable[[bool], None]) -> None:
        """Call `fired(died)` from a thread of its own when the holder is gone.

        died is False when the mutex was free, so that it says nothing about the worker.
        """

        def wait(page: mmap.mmap | None) -> None:
            code = _libc.pthread_mutex_lock(self._mutex)
            fired(code == errno.EOWNERDEAD)
            if code == errno.EOWNERDEAD:
                _libc.pthread_mutex_consistent(self._mutex)
            if code in (0, errno.EOWNERDEAD):
                _libc.pthread_mutex_unlock(self._mutex)

        # The thread has a reference of its own to the page.
        threading.Thread(target=wait, args=(self._page,), name="latch", daemon=True).start()

    def close(self) -> None:
        """Give the descriptor back; the page goes with the last thread that refers to it.

        It has a descriptor, too, which must not wait for the garbage collector of an idle agent.
        """
        if self.file >= 0:
            os.close(self.file)
            self.file, self._page = -1, None
