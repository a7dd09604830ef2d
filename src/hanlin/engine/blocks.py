"""Which blocks of the pool belong to whom, and which hold text that came before (prefix cache)."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict

import numpy as np

from hanlin.engine.sequence import Sequence

__all__ = ["BlockManager"]


class BlockManager:
    """Counts references to the blocks of a pool and finds computed blocks by the hash of all text up to their end.

    The hash is keyed with a secret of this manager, so that nobody outside can construct a collision, and chained from
    a root that holds everything else that changes keys and values: the sequence's salt, its RoPE length, what is given
    in place of embeddings, and the whole of a prefix whose tokens see each other both ways. A block that nobody uses
    keeps its content until it is needed again, the longest unused first.
    """

    def __init__(self, count: int, size: int, *, caching: bool = True) -> None:
        self.count = count
        self.size = size
        self.caching = caching
        self._key = secrets.token_bytes(32)
        self._references = [0] * count
        self._hash: list[bytes | None] = [None] * count
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self.most_used = 0  # blocks that have been touched; untouched ones take no memory

    @property
    def free(self) -> int:
        """Blocks that can be taken, cached content included."""
        return len(self._free)

    def need(self, sequence: Sequence, tokens: int) -> int:
        """How many more blocks `sequence` needs to hold its first `tokens` tokens."""
        return max(0, -(-(sequence.soft_len + tokens) // self.size) - len(sequence.blocks))

    def find(self, sequence: Sequence) -> list[int]:
        """Computed blocks that hold the start of the sequence, at least one token of which is left to compute."""
        if not self.caching or sequence.needs_all:
            return []
        found = []
        for index in range((sequence.soft_len + len(sequence) - 1) // self.size):
            block = self._by_hash.get(self._chained(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, sequence: Sequence, blocks: list[int]) -> None:
        """Give found blocks to a sequence that has none."""
        assert not sequence.blocks
        for block in blocks:
            self._take(block)
        sequence.blocks = list(blocks)
        sequence.computed = max(0, len(blocks) * self.size - sequence.soft_len)
        if not sequence.preemptions:  # later it would count what the sequence itself had computed
            sequence.cached = sequence.computed

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for the first `tokens` tokens; False, and nothing changed, when there are too few blocks."""
        need = self.need(sequence, tokens)
        if need > self.free:
            return False
        for _ in range(need):
            block = next(iter(self._free))
            self.most_used = max(self.most_used, block + 1)
            self._forget(block)
            self._take(block)
            sequence.blocks.append(block)
        return True

    def register(self, sequence: Sequence) -> None:
        """Let others find the blocks that this sequence has filled by now."""
        if not self.caching:
            return
        full = (sequence.soft_len + sequence.computed) // self.size
        for index in range(len(sequence.hashes), full):
            self._chained(sequence, index)
        for index in range(full - 1, -1, -1):
            block, name = sequence.blocks[index], sequence.hashes[index]
            if self._hash[block] is not None:  # and so are those before it
                break
            if name not in self._by_hash:
                self._hash[block] = name
                self._by_hash[name] = block

    def release(self, sequence: Sequence) -> None:
        """Give all blocks back; the last first, so that the start of a text outlives its end in the cache."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if not self._references[block]:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.blocks = []
        sequence.computed = 0

    def clear_cache(self) -> None:
        """Forget all text that nobody uses."""
        for block in self._free:
            self._forget(block)

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Assert that references, free list and hashes agree with what `sequences` hold."""
        held = [0] * self.count
        for sequence in sequences:
            for block in sequence.blocks:
                held[block] += 1
        assert held == self._references, "references differ from what the sequences hold"
        assert set(self._free) == {b for b in range(self.count) if not held[b]}, "free list is wrong"
        assert {n: b for b, n in enumerate(self._hash) if n is not None} == self._by_hash, "hash table is wrong"

    def _take(self, block: int) -> None:
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1

    def _forget(self, block: int) -> None:
        name = self._hash[block]
        if name is not None:
            del self._by_hash[name]
            self._hash[block] = None

    def _chained(self, sequence: Sequence, index: int) -> bytes:
        """The name of the sequence's block `index`; kept in the sequence, for tokens never change."""
        names = sequence.hashes
        while len(names) <= index:
            start = len(names) * self.size - sequence.soft_len
            digest = hashlib.blake2b(key=self._key, digest_size=32)
            digest.update(names[-1] if names else self._root(sequence))
            digest.update(np.asarray(sequence.tokens(max(0, start), max(0, start + self.size)), np.int64).tobytes())
            names.append(digest.digest())
        return names[index]

    def _root(self, sequence: Sequence) -> bytes:
        head = len(sequence.salt).to_bytes(8, "little") + sequence.salt
        head += sequence.adapter.key if sequence.adapter else bytes(16)
        head += sequence.rope_length.to_bytes(8, "little") + sequence.prefix_len.to_bytes(8, "little")
        for given in sequence.given:
            head += given.start.to_bytes(8, "little") + len(given.key).to_bytes(8, "little") + given.key
        prefix = np.asarray(sequence.prompt[: sequence.prefix_len], np.int64).tobytes()
        return hashlib.blake2b(head + prefix, digest_size=32).digest()
