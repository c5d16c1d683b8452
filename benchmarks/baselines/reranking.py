"""The first candidates of a dual encoder, ranked again by something slower."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from baselines.features import Features, Rows, autocast
from numpy.typing import NDArray
from recall import Ranks

from retriever import metrics

if TYPE_CHECKING:
    from baselines.fusion import Matcher

Scores = NDArray[np.float32]
TOP = 50
# How much a logit counts beside a cosine, in units in which both spread alike among candidates.
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The candidates of q queries, k of each, best first.

    queries: (q,) rows of the asking side. candidates: (q, k) rows of the other side. scores: (q, k)
    cosines. is_match: (q, k) bool. ranks: (q,) zero-based rank of the best positive before.
    """

    queries: Rows
    candidates: Rows
    scores: Scores
    is_match: NDArray[np.bool_]
    ranks: Rows

    @classmethod
    def of(
        cls, asking: Scores, asked: Scores, own: Rows, others: Rows, queries: Rows, top: int
    ) -> "Direction":
        """The first `top` of `asked` for the chosen rows of `asking`, by cosine.

        Args:
            asking: (q, d) unit rows.
            asked: (g, d) unit rows.
            own: (q,) the picture of each row of `asking`.
            others: (g,) the same of `asked`.
            queries: rows of `asking`.
            top: how many.
        """
        rows = asking[queries]
        candidates = metrics.top_k(rows, asked, top)
        scores = np.einsum("qd,qkd->qk", rows, asked[candidates]).astype(np.float32)
        ranks = metrics.ranks_of_positives(rows, asked, own[queries], others).ranks
        is_match = others[candidates] == own[queries, None]
        return cls(queries, candidates, scores, is_match, ranks)

    def ranked_again(self, scores: NDArray[np.floating]) -> Rows:
        """(q,) ranks of the best positives by new scores of the candidates.

        Of equal scores the one that was before comes first. What is no candidate stays where it is.
        """
        best = np.where(self.is_match, scores, -np.inf).max(axis=1, keepdims=True)
        first = ((scores == best) & self.is_match).argmax(axis=1)[:, None]
        places = np.arange(scores.shape[1])
        before = (scores > best) | ((scores == best) & (places < first))
        return np.where(self.is_match.any(axis=1), before.sum(axis=1), self.ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Shortlist:
    """What a dual encoder found in both directions."""

    t2i: Direction
    i2t: Direction

    @classmethod
    def of(
        cls,
        images: Scores,
        texts: Scores,
        picture: Rows,
        *,
        top: int = TOP,
        captions: int | None = None,
        pictures: int | None = None,
    ) -> "Shortlist":
        """From (n, d) pictures and (m, d) captions; of some queries if that is enough.

        Args:
            images: unit rows.
            texts: unit rows.
            picture: (m,) the picture of each caption, rising.
            top: candidates.
            captions: of each picture that ask.
            pictures: that ask.
        """
        n = len(images)
        first = np.searchsorted(picture, picture)
        asking = np.flatnonzero(np.arange(len(picture)) - first < (captions or len(picture)))
        everyone = np.arange(n)
        asked = np.arange(0, n, max(n // (pictures or n), 1))
        return cls(
            Direction.of(texts, images, picture, everyone, asking, min(top, n)),
            Direction.of(images, texts, everyone, picture, asked, min(top, len(texts))),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Ranks in both directions with one weight of the classifier."""

    weight: float
    owners: Rows
    t2i: Rows
    i2t: Rows

    def recalls(self) -> dict[str, float]:
        """In percent."""
        return metrics.summarise_ranks(self.t2i, self.i2t)

    @property
    def worth(self) -> float:
        """What weights and epochs are chosen by: R@1 of both directions."""
        found = self.recalls()
        return found["t2i_r@1"] + found["i2t_r@1"]

    def ranks(self) -> Ranks:
        """The same for paired differences."""
        return Ranks(self.owners, self.t2i, self.i2t)


@dataclass(frozen=True, slots=True, eq=False)
class Reranked:
    """Logits of all candidates of a shortlist."""

    shortlist: Shortlist
    owners: Rows
    t2i: Scores
    i2t: Scores
    seconds_per_query: float  # CPU time, without encoding pictures
    stored_bytes: int  # of each picture, as 16-bit numbers, if that is kept

    def at(self, weight: float) -> Ranking:
        """Cosine plus `weight` times the logit; infinity is the classifier alone."""

        def ranks(direction: Direction, logits: Scores) -> Rows:
            if math.isinf(weight):
                return direction.ranked_again(logits)
            return direction.ranked_again(direction.scores + weight * logits)

        return Ranking(
            weight,
            self.owners,
            ranks(self.shortlist.t2i, self.t2i),
            ranks(self.shortlist.i2t, self.i2t),
        )

    def best(self) -> Ranking:
        """With the weight that is worth most here; of equals the smallest."""
        unit = spread(self.shortlist.t2i.scores) / spread(self.t2i)
        return max((self.at(unit * share) for share in WEIGHTS), key=lambda one: one.worth)


def spread(scores: Scores) -> float:
    """Standard deviation within the candidates of a query, of all queries."""
    return float(np.sqrt(np.mean(np.var(scores, axis=1)))) or 1.0


@torch.inference_mode()
def rerank(shortlist: Shortlist, matcher: "Matcher", features: Features) -> Reranked:
    """The classifier's logit of each candidate, one query after the other.

    Of pictures it keeps what does not depend on the query, as an index would.
    """
    matcher.eval()
    t2i, i2t = (np.empty(one.scores.shape, np.float32) for one in (shortlist.t2i, shortlist.i2t))
    with autocast():
        parts = np.array_split(np.arange(len(features.images)), -(-len(features.images) // 50))
        encoded = [matcher.encode_images(matcher.images_of(features, part)) for part in parts]
        images = [torch.cat(kind) for kind in zip(*encoded, strict=True)]

        def logits(pictures: Rows, captions: Rows) -> Scores:
            rows = torch.from_numpy(pictures)
            texts = matcher.encode_texts(matcher.texts_of(features, captions))
            return matcher.compare(tuple(kind[rows] for kind in images), texts).float().numpy()

        began = time.process_time()
        for row, caption in enumerate(shortlist.t2i.queries):
            t2i[row] = logits(shortlist.t2i.candidates[row], np.array([caption]))[:, 0]
        for row, picture in enumerate(shortlist.i2t.queries):
            i2t[row] = logits(np.array([picture]), shortlist.i2t.candidates[row])[0]
        seconds = (time.process_time() - began) / (len(t2i) + len(i2t))
    owners = features.picture[shortlist.t2i.queries]
    stored = 2 * sum(kind[0].numel() for kind in images)
    return Reranked(shortlist, owners, t2i, i2t, seconds, stored)
