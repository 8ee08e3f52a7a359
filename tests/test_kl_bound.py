"""The mathematics of the KL bound, against a bisection in float64 written here."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recontrol import kl_bound
from hf_recontrol.kl_bound import bounded


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kl_by_hand(logits, base):
    """KL(softmax(logits) ‖ softmax(base)) in float64, (..., 1); a token that is forbidden in both adds nothing."""
    log_p, log_q = torch.log_softmax(logits.double(), -1), torch.log_softmax(base.double(), -1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1, keepdim=True)


def merged_by_hand(base, edited, max_kl):
    """(1 − s) base + s edited with the largest s in [0, 1] that the bound allows, and s: 45 halvings in float64."""
    base, edited = base.double(), edited.double()
    low, high = torch.zeros_like(base[..., :1]), torch.ones_like(base[..., :1])
    for _ in range(45):
        middle = (low + high) / 2
        inside = kl_by_hand((1 - middle) * base + middle * edited, base) <= max_kl
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    share = torch.where(kl_by_hand(edited, base) <= max_kl, 1.0, low)
    return (1 - share) * base + share * edited, share


def hard_rows():
    """Names, and base and edited logits of a few rows each."""
    torch.manual_seed(0)
    noise, peak = torch.randn(8, 64), torch.zeros(8, 64)
    peak[:, 5] = 18.0  # p = 1 − 1e-6
    narrow, wide = torch.randn(8, 2), 3 * torch.randn(2, 50_000)
    return {
        "ordinary": (noise, noise + torch.randn(8, 64)),
        "uniform": (torch.zeros(8, 64), 3 * noise),
        "peaked": (peak, peak + 10 * noise),
        "peak moves": (peak, peak.roll(1, dims=-1)),
        "one rare token": (peak, peak + 1e4 * torch.nn.functional.one_hot(torch.tensor(7), 64)),
        "range 1e4": (noise, noise + 2e3 * torch.randn(8, 64)),
        "steep base": (100 * noise, 100 * noise + 100 * torch.randn(8, 64)),
        "vocabulary 2": (narrow, narrow + 5 * torch.randn(8, 2)),
        "vocabulary 2, range 1e4": (narrow, narrow + 1e4 * torch.randn(8, 2)),
        "vocabulary 50,000": (wide, wide + 2 * torch.randn(2, 50_000)),
    }


@pytest.mark.parametrize("max_kl", [1e-3, 0.05, 0.6, 3.0])
@pytest.mark.parametrize("rows", hard_rows())
def test_the_share_is_the_largest_that_the_bound_allows(rows, max_kl):
    base, edited = hard_rows()[rows]
    logits, share = bounded(base, edited, max_kl)
    expected, largest = merged_by_hand(base, edited, max_kl)
    kl = kl_by_hand(logits, base)
    torch.testing.assert_close(share.double(), largest, rtol=0, atol=3e-4)
    assert (kl <= max_kl + 1e-4).all()
    assert (kl[largest < 1] >= 0.99 * max_kl).all()
    torch.testing.assert_close(kl, kl_by_hand(expected, base), rtol=1e-2, atol=1e-6)
    assert logits.dtype == torch.float32
    assert share.shape == (len(base), 1)


def test_rows_inside_the_bound_are_the_edited_ones_bit_for_bit_whatever_their_neighbours_need():
    base = torch.randn(6, 64)
    edited = base + torch.tensor([0.2, 3.0, 0.0, 0.15, 5.0, 1e-4])[:, None] * torch.randn(6, 64)
    logits, share = bounded(base, edited, 0.05)
    inside = [0, 2, 3, 5]
    torch.testing.assert_close(logits[inside], edited[inside], rtol=0, atol=0)
    assert (share[:, 0] == 1).tolist() == [row in inside for row in range(6)]
    other = torch.randn(6, 64)  # unlike `edited`, no sum that can be undone without rounding
    torch.testing.assert_close(bounded(base, other, 100.0)[0], other, rtol=0, atol=0)


def test_a_constant_added_to_all_logits_is_no_change_to_hold_back():
    base = torch.cat([torch.randn(2, 64), torch.zeros(1, 64)])
    for constant in (0.0, 1.0, -30.0, 1e4):
        logits, share = bounded(base, base + constant, 1e-3)
        torch.testing.assert_close(logits, base + constant, rtol=0, atol=0)
        assert (share == 1).all()
    edited = base + torch.randn(3, 64) + 1e4
    logits, share = bounded(base, edited, 0.05)
    torch.testing.assert_close(share.double(), merged_by_hand(base, edited, 0.05)[1], rtol=0, atol=3e-4)
    assert (kl_by_hand(logits, base) <= 0.05 + 1e-4).all()


@pytest.mark.parametrize("forbidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_are_forbidden_in_both_stay_so_and_do_not_count(forbidden):
    base, edited = torch.randn(4, 64), torch.randn(4, 64)
    banned = torch.rand(4, 64) < 0.5
    logits, share = bounded(base.masked_fill(banned, forbidden), edited.masked_fill(banned, forbidden), 0.05)
    assert (logits[banned] == forbidden).all()
    for row, allowed in enumerate(~banned):
        alone, alone_share = bounded(base[row, allowed], edited[row, allowed], 0.05)
        torch.testing.assert_close(logits[row, allowed], alone, rtol=0, atol=2e-3)
        torch.testing.assert_close(share[row], alone_share, rtol=0, atol=3e-4)
        assert alone_share < 1  # else nothing is shown


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_with_an_entry_finite_on_one_side_only_stays_base(bad, side):
    pair = [torch.randn(3, 64), torch.randn(3, 64)]
    expected, expected_share = bounded(*pair, 0.05)
    pair[side][1, 7] = bad
    logits, share = bounded(*pair, 0.05)
    torch.testing.assert_close(logits[1], pair[0][1], rtol=0, atol=0, equal_nan=True)
    assert share[1] == 0
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(share[[0, 2]], expected_share[[0, 2]], rtol=0, atol=0)


def test_a_row_of_nothing_finite_comes_back_and_leaves_its_neighbours_alone():
    base, edited = torch.randn(3, 64), torch.randn(3, 64)
    expected, _ = bounded(base, edited, 0.05)
    for fill in (torch.nan, torch.inf, -torch.inf):
        base[1], edited[1] = fill, fill
        logits, _ = bounded(base, edited, 0.05)
        torch.testing.assert_close(logits[1], base[1], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_come_back_in_float32_and_keep_the_bound(dtype):
    base = (3 * torch.randn(50, 200)).to(dtype)
    edited = (base + torch.randn(50, 200)).to(dtype)
    logits, share = bounded(base, edited, 0.05)
    assert logits.dtype == share.dtype == torch.float32
    assert (kl_by_hand(logits, base) <= 0.05 + 1e-4).all()
    assert (kl_by_hand(logits.to(dtype), base) > 0.05 + 1e-4).any()  # why they are not rounded back
    torch.testing.assert_close(logits, bounded(base.float(), edited.float(), 0.05)[0], rtol=0, atol=0)


def test_float64_stays_float64_and_is_merged_in_it():
    base = torch.randn(8, 64, dtype=torch.float64)
    edited = base + torch.randn(8, 64, dtype=torch.float64)
    logits, share = bounded(base, edited, 0.05)
    assert logits.dtype == share.dtype == torch.float64
    torch.testing.assert_close(logits, base + share * (edited - base), rtol=1e-12, atol=1e-12)
    assert (kl_by_hand(logits, base) <= 0.05).all()  # float32 would be over it in some rows


def test_how_many_rows_are_done_at_once_does_not_matter(monkeypatch):
    base = torch.randn(2, 3, 5, 64)
    edited = base + torch.linspace(0.01, 3.0, 5)[:, None] * torch.randn(2, 3, 5, 64)
    results = []
    for elements in (1, 64 * 7, 2**30):
        monkeypatch.setattr(kl_bound, "ELEMENTS_AT_ONCE", elements)
        results.append(bounded(base, edited, 0.05))
    for logits, share in results:
        assert logits.shape == base.shape
        assert share.shape == (2, 3, 5, 1)
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(share, results[0][1], rtol=0, atol=0)
    torch.testing.assert_close(bounded(base[1, 2, 3], edited[1, 2, 3], 0.05)[0], results[0][0][1, 2, 3], rtol=0, atol=0)


def test_a_larger_bound_never_leaves_less():
    base, edited = torch.randn(20, 64), 2 * torch.randn(20, 64)
    shares = [bounded(base, edited, max_kl)[1] for max_kl in (1e-3, 1e-2, 0.1, 1.0, 10.0)]
    for smaller, larger in pairwise(shares):
        assert (smaller <= larger).all()
    assert (shares[0] < shares[2]).all()


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 300),
    steepness=st.floats(0, 30),
    reach=st.floats(-4, 4).map(lambda exponent: 10**exponent),
    max_kl=st.floats(-3, 1.5).map(lambda exponent: 10**exponent),
    forbidden=st.sampled_from([0.0, 0.0, 0.5]),
)
def test_no_row_passes_the_bound_or_falls_short_of_it(seed, vocabulary, steepness, reach, max_kl, forbidden):
    generator = torch.Generator().manual_seed(seed)
    base, delta = torch.randn(2, 4, vocabulary, generator=generator)
    banned = torch.rand(4, vocabulary, generator=generator) < forbidden
    banned[:, 0] = False
    base = (steepness * base).masked_fill(banned, -torch.inf)
    edited = base + reach * delta
    logits, share = bounded(base, edited, max_kl)
    kl, whole = kl_by_hand(logits, base), kl_by_hand(edited, base)
    assert (kl <= max_kl + 1e-4).all()
    assert (kl >= 0.99 * torch.clamp(whole, max=max_kl) - 1e-5).all()
    assert (share > 0).all()
    assert (logits.isinf() == banned).all()


@pytest.mark.parametrize("reach", [1e6, 1e8, 1e12])
def test_however_far_the_edit_goes_the_bound_holds(reach):
    torch.manual_seed(0)
    base = torch.randn(16, 64)
    edited = base + reach * torch.randn(16, 64)
    for max_kl in (1e-3, 0.05, 0.5, 3.0):
        kl = kl_by_hand(bounded(base, edited, max_kl)[0], base)
        assert (kl <= max_kl + 1e-4).all()
        assert (kl >= 0.99 * torch.clamp(kl_by_hand(edited, base), max=max_kl)).all()


def test_an_edit_whose_difference_overflows_leaves_its_row_base():
    base, edited = torch.tensor([[-3e38, 0.0, 1.0]] * 2), torch.tensor([[3e38, 0.0, 1.0], [-3e38, 0.1, 1.0]])
    logits, scale = bounded(base, edited, 0.05)
    torch.testing.assert_close(logits, torch.stack([base[0], edited[1]]), rtol=0, atol=0)
    assert scale.tolist() == [[0.0], [1.0]]


def test_the_share_carries_no_gradient_and_the_logits_do():
    base, edited = (torch.randn(2, 64, requires_grad=True) for _ in range(2))
    logits, scale = bounded(base, edited, 0.01)
    assert not scale.requires_grad
    logits.sum().backward()
    assert edited.grad is not None
