"""How a matmul and its collective are cut, so that one chunk is sent while the next is computed.

Plain Python, no torch: the prediction of a step's collectives cuts in the same way.
"""

from __future__ import annotations

from colrow.partition import Partition, Range

MOST = 4  # chunks of one message: more of them hide little more, and each costs a latency


def chunk_count(message_bytes: int, units: int, chunk_bytes: int | None) -> int:
    """Into how many chunks a message is cut: as many as hold ``chunk_bytes`` each, at most 4.

    Args:
        message_bytes: size of the buffer that the collective works on.
        units: rows, or sequence positions of the rank with the fewest, that can be told apart.
        chunk_bytes: the smallest chunk that is worth its latency; None does not cut.
    """
    if chunk_bytes is None:
        return 1
    return max(1, min(MOST, units, message_bytes // chunk_bytes))


def row_chunks(rows: int, chunks: int) -> tuple[Range, ...]:
    """Rows from start to stop of each chunk, as equal as possible."""
    return Partition.even(rows, chunks).bounds


def sequence_chunks(sequence: Partition, chunks: int) -> list[tuple[Range, ...]]:
    """For each chunk, which positions of the whole sequence it has of each rank.

    Every chunk has a part of every rank's shard, as a gather or a scatter needs.
    """
    cuts = [
        [(start + first, start + last) for first, last in row_chunks(stop - start, chunks)]
        for start, stop in sequence.bounds
    ]
    return [tuple(rank[chunk] for rank in cuts) for chunk in range(chunks)]


def chunk_partition(ranges: tuple[Range, ...]) -> Partition:
    """How the positions of one chunk lie over the ranks."""
    return Partition.from_sizes([stop - start for start, stop in ranges])


def check_chunk_bytes(chunk_bytes: int | None, overlap: bool) -> None:
    """Raises ValueError for a size below 1, and for chunks without overlap."""
    if chunk_bytes is None:
        return
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes}: should be at least 1, or None for no chunks")
    if not overlap:
        raise ValueError(
            f"chunk_bytes={chunk_bytes} and overlap=False exclude each other: chunks are there to "
            "hide collectives; set overlap=True or chunk_bytes=None"
        )
