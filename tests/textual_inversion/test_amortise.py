"""The regression against refitting by hand, and on made-up worlds in which the answer is known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.amortise import NUM_DRAWN_WORDS, _fit_ridge, choose_words_to_draw, fit_start_regression

WIDTH, DIM = 6, 9


def world(count: int = 80, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of words, their vectors (a line through them), and features of their pictures, which lie apart."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features = F.normalize(draw(count, WIDTH), dim=1)
    vectors = 0.3 + features @ draw(WIDTH, DIM) + noise * draw(count, DIM)
    return features, vectors, features + 0.4 * draw(WIDTH) + 0.02 * draw(count, WIDTH)


def plain_ridge(features: Tensor, vectors: Tensor, ridge: float) -> Tensor:
    """Least squares with a penalty on all but the intercept, by the normal equations."""
    rows = torch.cat([torch.ones(len(features), 1, dtype=torch.float64), features], dim=1)
    penalty = ridge * torch.eye(rows.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0
    return torch.linalg.solve(rows.T @ rows + penalty, rows.T @ vectors)


def test_each_drawn_word_is_left_out_as_if_refitted() -> None:
    features, vectors, _ = world(30, noise=0.3)
    chosen = torch.tensor([2, 7, 11, 25])
    seen = features[chosen] + 0.1 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    weights, r_squared = _fit_ridge(features, vectors, seen, chosen)
    scale = float((features - features.mean(0)).square().sum(0).mean())
    by_ridge = []
    for ridge in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        error = 0.0
        for i, probe in zip(chosen.tolist(), seen, strict=True):
            kept = torch.arange(30) != i
            refitted = plain_ridge(features[kept], vectors[kept], ridge * scale)
            error += float((vectors[i] - refitted[0] - probe @ refitted[1:]).square().sum())
        total = float((vectors[chosen] - vectors.mean(0)).square().sum())
        by_ridge.append((1 - error / total, ridge))
    best, ridge = max(by_ridge)
    assert abs(r_squared - best) < 1e-6
    torch.testing.assert_close(weights, plain_ridge(features, vectors, ridge * scale))


def test_a_new_concept_is_found_across_the_gap() -> None:
    features, vectors, pictures = world()
    known, drawn = list(range(70)), list(range(0, 70, 3))
    regression = fit_start_regression(features[known], {"k": vectors[known]}, pictures[drawn], drawn)
    assert regression.r_squared["k"] > 0.95
    for new in range(70, 80):
        prediction = regression.predict(pictures[new])
        assert torch.cosine_similarity(prediction.vectors["k"].double(), vectors[new], dim=0) > 0.98
        torch.testing.assert_close(prediction.vectors["k"].norm().double(), vectors[known].norm(dim=1).mean())
    without_gap = regression.predict(pictures[75] + regression.modality_gap).vectors["k"].double()
    assert torch.cosine_similarity(without_gap, vectors[75], dim=0) < 0.95


def test_photos_of_the_word_itself_start_at_the_word() -> None:
    """However badly the regression knows that word."""
    features, vectors, pictures = world(noise=0.5)
    regression = fit_start_regression(features, {"k": vectors}, pictures, list(range(80)))
    start = (
        regression.predict(features[5] + regression.modality_gap, (features[5], {"k": vectors[5]}))
        .vectors["k"]
        .double()
    )
    torch.testing.assert_close(F.normalize(start, dim=0), F.normalize(vectors[5], dim=0), atol=1e-6, rtol=0)


def test_doubt_where_nothing_is_near() -> None:
    features, vectors, pictures = world()
    half = features[:, 0] > 0
    known = features[half]
    regression = fit_start_regression(known, {"k": vectors[half]}, pictures[half], list(range(len(known))))
    unlike = [
        regression.predict(-feature + regression.modality_gap).unreliable_because
        for feature in known
        if feature[0] > 0.6
    ]
    assert unlike
    assert all("from all that is known, usual is up to" in doubt for doubt in unlike)
    like = [bool(regression.predict(picture).unreliable_because) for picture in pictures[half]]
    assert sum(like) <= 0.1 * len(like)


def test_doubt_where_words_say_nothing() -> None:
    features, _, pictures = world()
    unrelated = torch.randn(80, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prediction = fit_start_regression(features, {"k": unrelated}, pictures, list(range(80))).predict(pictures[0])
    assert "predicted no better than by their mean" in prediction.unreliable_because


def test_concepts_learned_before_are_fitted_on_too() -> None:
    features, vectors, pictures = world(noise=0.2)
    known, drawn, before = list(range(40)), list(range(0, 40, 2)), list(range(40, 79))
    few = fit_start_regression(features[known], {"k": vectors[known]}, pictures[drawn], drawn)
    more = fit_start_regression(
        features[known], {"k": vectors[known + before]}, pictures[drawn], drawn, photo_features=pictures[before]
    )
    assert len(more.features) == 79
    truth = vectors[79]
    distances = [
        1 - torch.cosine_similarity(a.predict(pictures[79]).vectors["k"].double(), truth, 0) for a in (few, more)
    ]
    assert distances[1] < distances[0]


def test_drawn_words_are_spread_over_the_list() -> None:
    assert choose_words_to_draw(5) == [0, 1, 2, 3, 4]
    many = choose_words_to_draw(1000)
    assert len(set(many)) == NUM_DRAWN_WORDS
    assert (many[0], many[-1]) == (0, 984)
