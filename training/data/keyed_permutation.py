"""A permutation of any number of rows that is computed, not stored: the place of one row takes microseconds and no memory.

A Feistel network permutes the numbers of an even count of bits, whatever its round function; those that fall outside of the
rows are sent through again until one falls inside (cycle walking), which is a permutation of the rows. A table for the paper's
129 million rows takes 2 GB and nine seconds in every process.
"""

from collections.abc import Sequence

MASK = (1 << 64) - 1
ROUNDS = (
    6  # four are enough for a random function (Luby and Rackoff 1988, Patarin 2004); halves may be one bit wide here
)


def mix(value: int) -> int:
    """64 bits in which every bit depends on each of `value`: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class KeyedPermutation:
    """A permutation of range(count), called with a place; another for each key, which is a sequence of whole numbers."""

    def __init__(self, count: int, key: Sequence[int]):
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits: at most four times as many numbers as rows
        self.low = (1 << self.half) - 1
        state = 0
        for part in (count, *key):
            state = mix(state ^ (part & MASK))
        self.keys = [mix(state ^ round_) for round_ in range(1, ROUNDS + 1)]

    def __call__(self, place: int) -> int:
        if not 0 <= place < self.count:
            raise IndexError(f"Place {place} is not one of {self.count}.")
        number = self.through(place)
        while number >= self.count:
            number = self.through(number)
        return number

    def through(self, number: int) -> int:
        left, right = number >> self.half, number & self.low
        for key in self.keys:
            left, right = right, left ^ (mix(right ^ key) & self.low)
        return left << self.half | right
