"""benchmarks/wheel_tower.py: class means told from the rows of a classifier, on Gaussian classes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


def test_rows_of_a_classifier_tell_the_means_of_classes_without_pictures(
    load_script: Callable[[str], ModuleType],
) -> None:
    module = load_script("benchmarks/wheel_tower.py")
    torch.manual_seed(0)
    classes, size, each = 90, 48, 100
    spread = torch.randn(size, size, dtype=torch.double) / size**0.5
    # classes differ along what pictures of a class differ along, as in a trained tower
    truth = torch.randn(classes, size, dtype=torch.double) @ spread
    noise = torch.randn(classes, each, size, dtype=torch.double) @ spread
    within = (spread.T @ spread).cpu()
    # rows of the best classifier of such classes (linear discriminant analysis)
    rows = truth @ torch.linalg.inv(within + 0.1 * torch.eye(size, dtype=torch.double))
    known = torch.arange(60)
    f = (truth[known, None] + noise[known]).flatten(0, 1)
    y = known.repeat_interleave(each)
    own, means, covariance = module._own_classes(f, y)
    assert own.tolist() == known.tolist()
    torch.testing.assert_close(covariance, within, atol=0.2, rtol=0.2)
    told = module.told_means(f, means, known, rows)
    centre = f.mean(0)
    new = torch.cosine_similarity(told[60:] - centre, truth[60:] - centre)
    blind = torch.cosine_similarity(rows[60:], truth[60:] - centre)
    assert new.mean() > blind.mean() + 0.1
    # what is said of classes left out holds for classes without pictures: nothing of them leaks
    assert module.left_out(f, y, known, rows) == pytest.approx(float(new.mean()), abs=0.03)

    projection = module._projection(f, told, covariance, 12)
    assert projection.shape == (12, size)
    # units of the spread within classes; the first row is what all share
    inside = projection @ covariance @ projection.T
    torch.testing.assert_close(inside.diag()[1:], torch.ones(11, dtype=torch.double))
    assert abs(float(torch.cosine_similarity(projection[0], f.mean(0), dim=0))) > 0.99
    torch.testing.assert_close(projection[1:9] @ projection[0], torch.zeros(8, dtype=torch.double))
