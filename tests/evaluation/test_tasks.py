"""Sentence similarity and classification: correlation, sentence vectors, bootstrap and linear head by known answers."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyprune.config import ConfigError
from pyprune.evaluation.tasks import encode, fit_head, paired_bootstrap, predict, spearman, sts_spearman


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is an extra; it is only the reference here")
    x = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)).float()
    y = x + 3 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-9)


def test_sentence_vectors_do_not_depend_on_company():
    """Mean pooling over real tokens only: a short sentence beside a long one equals the same one alone."""
    model = tiny.model("bert")
    rows = [tiny.ids(1, n, seed=n)[0] for n in (5, 9, 5, 12)]
    together = encode(model, rows)
    for row, vector in zip(rows, together):
        torch.testing.assert_close(encode(model, [row])[0], vector, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], model(rows[1][None])[0][0].mean(0), rtol=1e-4, atol=1e-5)


def test_sts_of_identical_and_opposite_orders(tmp_path):
    model, tokenizer = tiny.model("bert", vocab_size=tiny.CHARACTERS), tiny.tokenizer(encoder=True)
    first, second = ["abcd", "hello", "x y z", "12345"], ["abce", "h", "x y", "qwert"]
    found = sts_spearman(model, tokenizer, (first, second, torch.arange(4.0)))["similarities"]
    ranks = found.argsort().argsort().float()
    assert sts_spearman(model, tokenizer, (first, second, ranks))["spearman"] == pytest.approx(1)
    assert sts_spearman(model, tokenizer, (first, second, -ranks))["spearman"] == pytest.approx(-1)
    with pytest.raises(ConfigError, match="jsonl of sentence1"):
        sts_spearman(model, tokenizer, tmp_path / "none.jsonl")


def test_paired_bootstrap_knows_a_sure_difference():
    a = torch.arange(200.0)
    found = paired_bootstrap(lambda rows: float((a[rows] + 0.5 - a[rows]).mean()), 200, samples=200)
    assert found["difference"] == found["low"] == found["high"] == 0.5 and found["standard_error"] == 0
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = paired_bootstrap(lambda rows: float(noise[rows].mean()), 400, samples=500)
    assert found["standard_error"] == pytest.approx(1 / 20, rel=0.15) and found["low"] < 0 < found["high"]


def test_linear_head_separates_what_a_line_separates():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    labels = (x @ torch.tensor([1, 0.2, 5, 0, 0, -1]) > 4).long()
    assert float(((predict(x, fit_head(x, labels)) > 0).long() == labels).float().mean()) > 0.98
