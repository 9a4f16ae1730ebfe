"""How many units go where: exact counts, even over pools, a global budget spent where it is cheap."""

from __future__ import annotations

import torch
from couplings import heads, neurons

from pyprune.structured.allocation import Member, choose, global_counts, uniform_count


def test_choice_is_exact_and_even_over_pools():
    group = heads(8, 2, pools=2)
    scores = torch.tensor([9, 8, 7, 6, 1, 2, 3, 4.0])
    assert choose(group, scores, 4).tolist() == [0, 1, 6, 7]
    assert choose(neurons(8), torch.ones(8), 3).tolist() == [0, 1, 2]  # ties keep the lower index
    assert [uniform_count(neurons(10), s) for s in (0.0, 0.25, 0.5, 0.99)] == [10, 8, 5, 1]
    assert uniform_count(group, 0.9) == 2  # one head stays in every pool


def test_global_allocation_spends_the_budget_where_it_is_cheap():
    """Standardised scores of both kinds in one ranking, each unit counting its parameters."""
    flat, spread = torch.arange(100.0), torch.cat([torch.arange(50.0), 1000 + torch.arange(50.0)])
    members = [
        Member(0, neurons(100), flat, 3),
        Member(1, neurons(100), spread, 3),
        Member(1, heads(10, 4), torch.arange(10.0), 40),
    ]
    for sparsity in (0.1, 0.3, 0.5, 0.7):
        counts = global_counts(members, sparsity)
        dropped = sum((m.group.units - n) * m.unit_size for m, n in zip(members, counts))
        assert abs(dropped / 1000 - sparsity) <= 0.02 and min(counts) >= 1
    z = [(s - s.mean()) / s.std() for s in (flat, spread, torch.arange(10.0))]
    counts = global_counts(members, 0.3)
    cut = max(float(v.sort().values[len(v) - n - 1]) for v, n in zip(z, counts) if n < len(v))
    assert all(float(v.sort().values[len(v) - n]) >= cut for v, n in zip(z, counts))
