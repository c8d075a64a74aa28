"""Files in object stores and on web servers: s3://, gs://, az://, http(s):// and hf://datasets/USER/NAME/PATH.

By obstore: one wheel for all stores, which repeats a request that fails, where fsspec needs a client for each. Credentials
and endpoints are those of the environment, as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and HF_TOKEN.
"""

import fnmatch
import functools
import io
import os
import re
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import obstore
from obstore.exceptions import BaseError

REMOTE = re.compile(r"(s3|gs|az|https?|hf)://", re.IGNORECASE)
HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?$")
PART = 2**24  # bytes of a request: what has to be repeated when one breaks off
TRIES = 4  # of a part, each with the requests that obstore repeats by itself
RETRY = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
TIMEOUT = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=60), "allow_http": True}


def is_remote(name: object) -> bool:
    """Whether a name is an address."""
    return isinstance(name, str) and bool(REMOTE.match(name))


@functools.lru_cache(64)
def store_of(root: str, token: str | None):
    """The store of a bucket or host; token: of the hub."""
    options = TIMEOUT | ({"default_headers": {"Authorization": f"Bearer {token}"}} if token else {})
    return obstore.store.from_url(root, client_options=options, retry_config=RETRY)


def located(url: str) -> tuple[object, str]:
    """Store and path in it of an address."""
    token = None
    hub = HUB.match(url)
    if hub:
        repository, revision, path = hub[1], hub[2] or "main", hub[3] or ""
        token = huggingface_hub.get_token()
        url = f"{huggingface_hub.constants.ENDPOINT}/datasets/{repository}/resolve/{revision}/{path}"
    scheme, _, rest = url.partition("://")
    root, _, path = rest.partition("/")
    return store_of(f"{scheme.lower()}://{root}", token), path


def unreachable(url: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{url} cannot be read ({type(error).__name__}: {reason}). Check the address, the network and the credentials; the "
        "same command then goes on."
    )


def about(url: str) -> tuple[int, str]:
    """Size in bytes, and what tells this content from another: the store's ETag, or the time of the last change.

    Raises ValueError where the file cannot be found.
    """
    store, path = located(url)
    try:
        found = obstore.head(store, path)
    except (BaseError, OSError, ValueError) as error:
        raise unreachable(url, error) from error
    return found["size"], str(found["e_tag"] or found["last_modified"])


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes of a file, asked for again where the connection breaks off. Raises ValueError where they cannot be had."""
    store, path = located(url)
    for attempt in range(1, TRIES + 1):
        try:
            content = obstore.get_range(store, path, start=offset, length=size).to_bytes()
            if len(content) == size:
                return content
            error = OSError(f"{len(content)} bytes came, not {size}")
        except (BaseError, OSError, ValueError) as found:
            error = found
        if attempt == TRIES:
            raise unreachable(url, error) from error
    raise AssertionError


def download(url: str, size: int, target: Path) -> None:
    """Fetch a whole file of `size` bytes; `target` has its name when it is whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for offset in range(0, size, PART):
                file.write(read_range(url, offset, min(PART, size - offset)))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class RangeFile(io.RawIOBase):
    """A remote file that is read by ranges, as parquet is."""

    def __init__(self, url: str):
        self.url, self.position, self.size = url, 0, about(url)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self.size - self.position)
        if count <= 0:
            return 0
        buffer[:count] = read_range(self.url, self.position, count)
        self.position += count
        return count


def listed(url: str) -> list[str]:
    """Addresses that a pattern with * or ? names, or all below one that ends in a slash or names a repository; sorted.

    Raises ValueError for a web server, which cannot be asked what it has, and where nothing is found.
    """
    hub = HUB.match(url)
    if hub:
        repository, revision, path = hub[1], hub[2], hub[3] or ""
        try:
            names = huggingface_hub.list_repo_files(repository, revision=revision, repo_type="dataset")
        except Exception as error:  # of the hub's client, of its network library, or of ours
            raise unreachable(url, error) from error
        start = f"hf://datasets/{repository}" + (f"@{revision}" if revision else "") + "/"
    elif url.lower().startswith("http"):
        raise ValueError(
            f"{url} names no single file, and a web server does not tell what it has. Name the files: "
            "https://HOST/{00000..00099}.tar"
        )
    else:
        store, path = located(url)
        fixed = re.split(r"[*?]", path)[0].rpartition("/")[0]
        try:
            names = [entry["path"] for chunk in obstore.list(store, prefix=fixed or None) for entry in chunk]
        except (BaseError, OSError, ValueError) as error:
            raise unreachable(url, error) from error
        start = url[: len(url) - len(path)]
    if re.search(r"[*?]", path):
        kept = [name for name in names if fnmatch.fnmatchcase(name, path)]
    else:
        kept = [name for name in names if name.startswith(f"{path.rstrip('/')}/" if path.strip("/") else "")]
    if not kept:
        raise ValueError(f"There is nothing at {url}. Check the address.")
    return [start + name for name in sorted(kept)]
