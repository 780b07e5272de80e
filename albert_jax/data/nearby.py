"""The tokens of a few shards at a time, for a corpus that is larger than the disk.

In:  how to make the tokens of a shard local and how to drop them again (`Store.fetch`,
     `Store.drop`), how large each is, and how many bytes may be kept.
Out: the arrays of the shards that are wanted now; those of the shards that come next are fetched
     meanwhile, in a thread.

Promise: what is kept never takes more than the bound, but for shards that are wanted right now by
several threads. What was wanted last is dropped last, so that a split that fits into the bound is
fetched once. An array that was given out stays readable for as long as it is held. Which shards
there are has no part in what the examples are.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from albert_jax.data import store
from albert_jax.errors import UserError

_GIB = 2**30


class NearShards:
    """Safe to call from many threads at once.

    Args:
        fetch: makes a shard's tokens local; returns them, memory-mapped.
        drop: deletes a shard's local tokens.
        bytes_K: of each shard's tokens.
        most_bytes: that may be kept.
    """

    def __init__(
        self,
        fetch: Callable[[int], np.ndarray],
        drop: Callable[[int], None],
        bytes_K: Sequence[int],
        most_bytes: int,
    ) -> None:
        self._fetch, self._drop, self._bytes_K, self._most = fetch, drop, bytes_K, most_bytes
        self._lock = threading.Lock()
        # In the order in which they were last wanted.
        self._kept: dict[int, concurrent.futures.Future[np.ndarray]] = {}

    def held(self, now: Sequence[int], coming: Sequence[int]) -> Mapping[int, np.ndarray]:
        """The tokens of the shards of `now`, by number; fetches what is missing of them, and then
        lets those of `coming` be fetched in the background.

        Raises:
            UserError: `now` is larger than what may be kept, or as `fetch` does.
        """
        wanted = sum(self._bytes_K[shard] for shard in now)
        if wanted > self._most:
            raise UserError(
                f"data.cache_gib={self._most / _GIB:g} is less than the {wanted / _GIB:.3g} GiB of "
                f"the {len(now)} shards that are read at a time; raise it, or lower "
                "data.shuffle_shards."
            )
        with self._lock:
            missing = self._started(now, now)
            futures = {shard: self._kept[shard] for shard in now}
        for shard, future in missing:
            self._finish(shard, future)
        held = {shard: future.result() for shard, future in futures.items()}
        with self._lock:
            ahead = self._started(self._fitting(wanted, coming), [*now, *coming])
        if ahead:
            threading.Thread(
                target=lambda: [self._finish(*each) for each in ahead], name="fetch", daemon=True
            ).start()
        return held

    def _fitting(self, taken: int, coming: Sequence[int]) -> list[int]:
        """As many of the shards, from the first one on, as there is room for beside `taken`."""
        found = []
        for shard in coming:
            taken += self._bytes_K[shard]
            if taken > self._most:
                break
            found.append(shard)
        return found

    def _started(
        self, shards: Sequence[int], spared: Sequence[int]
    ) -> list[tuple[int, "concurrent.futures.Future[np.ndarray]"]]:
        """Notes that shards are wanted, and drops others for their room but not the spared ones;
        returns those that have to be fetched. The lock is held.
        """
        missing = []
        for shard in shards:
            if shard in self._kept:
                self._kept[shard] = self._kept.pop(shard)
                continue
            self._kept[shard] = concurrent.futures.Future()
            missing.append((shard, self._kept[shard]))
        room = self._most - sum(self._bytes_K[shard] for shard in self._kept)
        for shard in list(self._kept):
            if room >= 0:
                break
            if shard not in spared and shard not in shards and self._kept[shard].done():
                del self._kept[shard]
                self._drop(shard)
                room += self._bytes_K[shard]
        return missing

    def _finish(self, shard: int, future: "concurrent.futures.Future[np.ndarray]") -> None:
        """Fetches a shard. A failure is of those who wait for it now; the next who want it try
        again.
        """
        try:
            future.set_result(self._fetch(shard))
        except BaseException as error:
            with self._lock:
                if self._kept.get(shard) is future:
                    del self._kept[shard]
            future.set_exception(error)


def of_store(
    data: store.Store, split: str, most_bytes: int
) -> tuple[tuple[store.Shard, ...], NearShards]:
    """The shards of a split by their offsets alone, which are made local, and their tokens a few
    at a time.
    """
    shards = data.offsets(split)
    near = NearShards(
        lambda shard: data.fetch(split, shard, ("tokens",)).tokens,
        lambda shard: data.drop(split, shard, ("tokens",)),
        [len(shard.tokens) * shard.tokens.itemsize for shard in shards],
        most_bytes,
    )
    return shards, near
