"""Metrics of one rank as sums, and of all ranks as means."""


def add(sums: dict[str, list[float]], name: str, value: float, weight: float, largest: float | None = None) -> None:
    entry = sums.setdefault(name, [0.0, 0.0, 0.0])
    entry[0] += value
    entry[1] += weight
    entry[2] = max(entry[2], abs(value) if largest is None else largest)


def merge(ranks: list[dict[str, tuple[float, float, float]]]) -> dict[str, tuple[float, float]]:
    """(mean, largest magnitude) of each metric over all ranks that have it."""
    merged = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        entries = [rank[name] for rank in ranks if name in rank]
        weight = sum(entry[1] for entry in entries)
        merged[name] = (sum(entry[0] for entry in entries) / max(weight, 1e-9), max(entry[2] for entry in entries))
    return merged
