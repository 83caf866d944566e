"""A task on DNA that needs no download: which of two motifs comes first.

Every sequence is random but for one copy of either motif, and these are never neighbours, so the order is all that tells the
classes apart: a motif's presence, its surroundings and a count of short k-mers say nothing.
"""

from datasets import Dataset
from numpy.random import Generator, default_rng

MOTIFS = ("TATAAA", "GGCCAA")  # of two boxes that promoters have, TATA and CCAAT
SHORTEST, LONGEST, APART = 60, 100, 6  # bases
SPLITS = {"train": 20_000, "validation": 1_000, "test": 2_000}


def motif_order(split: str) -> Dataset:
    """The sequences of one split, "text", and their "label"; the same in every run, other ones in every split."""
    if split not in SPLITS:
        raise ValueError(f"data: got the split {split!r} of dna-motifs; wanted one of {', '.join(SPLITS)}. Name one of them.")
    random = default_rng(list(SPLITS).index(split))
    labels = [int(label) for label in random.integers(0, 2, SPLITS[split])]
    texts = [sequence(MOTIFS if label else MOTIFS[::-1], random) for label in labels]
    return Dataset.from_dict({"text": texts, "label": labels})


def sequence(motifs: tuple[str, ...], random: Generator) -> str:
    """Random bases with the motifs in this order, each exactly once, some bases between them."""
    while True:
        bases = "".join(random.choice(list("ACGT"), random.integers(SHORTEST, LONGEST + 1) - sum(map(len, motifs))))
        first, second = sorted(random.integers(0, len(bases) + 1, 2))
        text = bases[:first] + motifs[0] + bases[first:second] + motifs[1] + bases[second:]
        if second - first >= APART and all(text.count(motif) == 1 for motif in motifs):
            return text
