"""Which layers each stage runs."""


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Consecutive ranges, one a stage, none empty. The first and last stage also embed and project, so where the
    layers do not divide evenly the extra ones go to the stages in the middle first. Raises ValueError."""
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be split over {num_stages} stages")
    each, extra = divmod(num_layers, num_stages)
    middle_first = sorted(range(num_stages), key=lambda s: abs(2 * s - (num_stages - 1)))
    longer = set(middle_first[:extra])
    ranges, start = [], 0
    for stage in range(num_stages):
        end = start + each + (stage in longer)
        ranges.append(range(start, end))
        start = end
    return ranges
