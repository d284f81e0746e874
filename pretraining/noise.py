"""BART's noise on token sequences, as pure functions of a numpy Generator.

Lewis et al. 2020, section 2.2 (token masking, text infilling, sentence permutation) and section 3
(30% of the tokens, span lengths from a Poisson distribution with mean 3).
"""

from collections.abc import Set

import numpy as np

Tokens = np.ndarray


def mask_tokens(tokens: Tokens, rate: float, mask: int, rng: np.random.Generator) -> Tokens:
    """Replace each token by `mask` with probability `rate` (token masking)."""
    return np.where(rng.random(len(tokens)) < rate, mask, tokens).astype(tokens.dtype)


def span_lengths(budget: int, mean: float, rng: np.random.Generator) -> list[int]:
    """Draw Poisson lengths until they sum to `budget`; the last one is cut to fit."""
    lengths: list[int] = []
    left = budget
    while left > 0:
        length = min(int(rng.poisson(mean)), left)
        lengths.append(length)
        left -= length
    return lengths


def infill(
    tokens: Tokens, rate: float, mask: int, rng: np.random.Generator, mean: float = 3.0
) -> Tokens:
    """Replace spans that cover `rate` of the tokens by one `mask` each (text infilling).

    A span of length zero inserts a mask where nothing is missing. Spans do not touch each other
    except where a zero-length one stands beside another.
    """
    lengths = span_lengths(round(rate * len(tokens)), mean, rng)
    rng.shuffle(lengths)
    kept = len(tokens) - sum(lengths)
    # Each span sits in one of the kept+1 gaps between kept tokens; distinct gaps while they last.
    gaps = np.sort(rng.choice(kept + 1, size=len(lengths), replace=len(lengths) > kept + 1))
    pieces: list[Tokens] = []
    position = used = 0
    for gap, length in zip(gaps, lengths, strict=True):
        pieces.append(tokens[position : position + gap - used])
        pieces.append(np.array([mask], dtype=tokens.dtype))
        position += gap - used + length
        used = gap
    pieces.append(tokens[position:])
    return np.concatenate(pieces)


def sentences(tokens: Tokens, ends: Set[int]) -> list[Tokens]:
    """Split after every token that ends a sentence; what follows the last one is a sentence too."""
    cuts = [place + 1 for place, token in enumerate(tokens.tolist()) if token in ends]
    return [piece for piece in np.split(tokens, cuts) if len(piece)]


def permute_sentences(tokens: Tokens, ends: Set[int], rng: np.random.Generator) -> Tokens:
    """Shuffle the sentences (sentence permutation)."""
    pieces = sentences(tokens, ends)
    if not pieces:
        return tokens
    return np.concatenate([pieces[place] for place in rng.permutation(len(pieces))])
