"""One process at a time writes an output folder; a second one says who it is, since when, and what to do.

The lock is `fcntl.lockf` on OUTPUT/.lock: the system lets go of it when its holder dies, whatever kills it, also on network
file systems, and loader workers do not inherit it. What the file says is for people; it is also what decides where locks
are not shared: a folder that a process of another host has marked and not released is refused, and so is one on a
file system without locks as long as the process that marked it lives.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

HELD = (errno.EACCES, errno.EAGAIN)
LARGEST_PID = 2**31
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked_folder(folder: str | Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold `folder`, which is made where there is none, and removed again if nothing has been written into it.

    Raises ValueError, with nothing changed, where another process holds it; a lock whose holder is dead is taken over.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        descriptor = take(path, say)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: who opens it from now on makes a new one
            os.close(descriptor)
    finally:
        for path in made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


def take(path: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the locked file, which names this process; closing it lets go."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            free = try_lock(descriptor)
            if free is not False and not is_at(path, descriptor):
                os.close(descriptor)  # its holder has removed it in the meantime
                continue
            holder = read_holder(descriptor)
            if free is False or (holder and not may_take_over(holder, free)):
                raise ValueError(in_use(path, holder))
            if holder:
                say(f"Taking over {path.parent} from {describe(holder)}, which is gone.")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def try_lock(descriptor: int) -> bool | None:
    """True: it is ours. False: another process has it. None: this file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def read_holder(descriptor: int) -> dict:
    """Who is named in the file; {} for nobody, or where a process died while it wrote."""
    try:
        holder = json.loads(os.pread(descriptor, 10_000, 0))
        named = {"host", "pid", "since"} <= holder.keys() and type(holder["pid"]) is int
        return holder if named and 0 < holder["pid"] < LARGEST_PID else {}
    except (ValueError, AttributeError):
        return {}


def may_take_over(holder: dict, free: bool | None) -> bool:
    """Whether the process that is named is gone: the system says so on its own host only."""
    if holder["host"] != socket.gethostname():
        return False
    return bool(free) or holder.get("started") != start_of(holder["pid"])


def this_process() -> dict:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "started": start_of(os.getpid())}


def start_of(pid: int) -> str | None:
    """When a process of this host started, in ticks since boot, which tells it from another of its number; None: gone."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:  # a system without /proc: whether there is such a process at all
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def describe(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def in_use(path: Path, holder: dict) -> str:
    if not holder:
        return f"{path.parent} is in use by another process. Wait for it, stop it, or choose another --output_dir."
    if holder["host"] == socket.gethostname():
        return f"{path.parent} is in use by {describe(holder)}. Wait for it, stop it, or choose another --output_dir."
    return (
        f"{path.parent} is in use by {describe(holder)}, another host, on which this one cannot see whether it still runs. "
        f"If it does not, delete {path} and give the same command again; else choose another --output_dir."
    )
