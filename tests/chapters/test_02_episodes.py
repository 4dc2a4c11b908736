"""Made from nbs/02_episodes.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metabook.classes import Classes
from metabook.episodes import (
    Episode,
    Examples,
    FewShot,
    Sinusoids,
    Tasks,
    VariedWayShot,
    choose,
    one_hot,
    uneven,
)
from metabook.structures import tree_leaves


def cell_08a2ae5d():
    # cell 08a2ae5d
    numbered = Classes(torch.arange(120.0)[:, None], torch.full((6,), 20))  # 6 classes of 20
    return numbered


def cell_43b6a85c():
    # cell 43b6a85c
    def best_memoriser(episodes, classes):
        "Accuracy of knowing each query's class and answering with the label that it has most often."
        seen = episodes.query.info["classes"]  # [tasks, way]: the class of each label
        counts = torch.zeros(classes, seen.shape[1])
        for label in range(seen.shape[1]):
            counts[:, label] = torch.bincount(seen[:, label], minlength=classes)
        answers = counts.argmax(1)[seen]  # [tasks, way]
        return (answers == torch.arange(seen.shape[1])).float()

    return best_memoriser


def test_examples_by_hand():
    # cell f11de87b
    tiny = Examples.of(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]), way=2)
    assert tiny.y.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert (tiny.y.T @ tiny.x / tiny.y.sum(0)[:, None]).flatten().tolist() == [
        0.5,
        5.0,
    ]  # class means


def test_wrong_labels_are_refused():
    # cell 7b1ad91f
    with pytest.raises(ValueError, match="way=2 allows 0 to 1"):
        Examples.of(torch.zeros(3, 1), torch.tensor([0, 1, 2]), way=2)
    with pytest.raises(ValueError, match="labels run from -1 to 1"):
        Examples.of(torch.zeros(3, 1), torch.tensor([0, 1, -1]), way=2)
    with pytest.raises(ValueError, match="exactly one label"):
        Examples.of(torch.zeros(3, 1), torch.tensor([0, 1]), way=2)
    with pytest.raises(ValueError, match=r"x\[2, 0\] is nan, expected finite numbers"):
        Examples.of(torch.tensor([[0.0], [1.0], [math.nan]]), torch.tensor([0, 1, 1]), way=2)
    nowhere = Examples.of(
        torch.zeros(2, 1, device="meta"), torch.zeros(2, device="meta").long(), way=2
    )
    assert nowhere.y.shape == (2, 2)  # where there are no numbers, nobody looks at them


def test_episode_moves_and_keeps_integers():
    # cell cb597a85
    pair = Episode(
        *[Examples(torch.zeros(2, 1), torch.eye(2), {"classes": torch.tensor([4, 7])})] * 2
    )
    moved = pair.to(dtype=torch.float64)
    assert moved.support.x.dtype == moved.query.y.dtype == torch.float64
    assert moved.support.info["classes"].dtype == torch.int64
    assert {t.device.type for t in tree_leaves(pair.to("meta"))} == {
        "meta"
    }  # a device without memory
    assert one_hot(torch.zeros(2, dtype=torch.int64, device="meta"), 3).device.type == "meta"


@pytest.mark.proves("eq-zero-baseline")
def test_predicting_zero_costs_what_the_formula_says():
    # cell d72b6bf2
    formula = (5**3 - 0.1**3) / (3 * (5 - 0.1)) / 2
    waves = Sinusoids(shot=1, query=1).sample(1_000_000, torch.Generator().manual_seed(0))
    squares = waves.query.y.square()
    four_errors = 4 * (squares.std() / 1000).item()  # of the mean of a million
    assert abs(squares.mean().item() - formula) < four_errors < 0.03


def test_a_task_is_one_curve_seen_at_different_points():
    # cell 4709f3e3
    support, query = Sinusoids(shot=4, query=6).sample(20_000, torch.Generator().manual_seed(0))
    assert support.x.shape == (20_000, 4, 1) and query.y.shape == (20_000, 6, 1)
    for part in (support, query):
        A, phase = part.info["task"].T[..., None, None]
        assert torch.allclose(part.y, A * torch.sin(part.x - phase))
        assert -5 <= part.x.min() < -4.99 and 4.99 < part.x.max() <= 5
        assert 0.1 <= A.min() < 0.11 and 4.99 < A.max() <= 5
    assert (support.x[:, :, None] != query.x[:, None]).float().mean() > 0.9999  # no point in both
    there = Sinusoids(device="meta").sample(2, torch.Generator())  # drawn here, made there
    assert there.support.y.device.type == "meta" and Sinusoids().describe()["kind"] == "regression"


def test_classes_by_hand():
    # cell 0e26c1a5
    animals = Classes.of({"cat": torch.zeros(3, 1, 2, 2), "dog": torch.ones(5, 1, 2, 2)})
    assert len(animals) == 2 and animals.x.shape == (8, 1, 2, 2)
    assert torch.equal(animals.of_class(1), torch.ones(5, 1, 2, 2))
    same = Classes(animals.x, sizes=torch.tensor([3, 5]), names=["cat", "dog"])
    assert same.digest == animals.digest and same.select([1]).names == ["dog"]


@pytest.mark.proves("eq-ordered-choice")
def test_every_ordered_choice_is_equally_likely():
    # cell dc677de9
    allowed = torch.tensor([True, True, False, True, True]).expand(24_000, 5)
    drawn = Counter(map(tuple, choose(allowed, 2, torch.Generator().manual_seed(0)).tolist()))
    pairs = list(permutations([0, 1, 3, 4], 2))
    assert set(drawn) == set(pairs) and len(pairs) == 12
    expected = 24_000 / 12
    chi2 = sum((drawn[pair] - expected) ** 2 / expected for pair in pairs)
    assert chi2 < 31.3  # 11 degrees of freedom: one run in a thousand exceeds this


def test_support_and_query_never_share_an_example():
    numbered = cell_08a2ae5d()
    # cell f1990ff6
    episodes = FewShot(numbered, way=3, shot=2, query=15).sample(500)
    support, query = episodes.support.x[..., 0], episodes.query.x[..., 0]
    assert support.shape == (500, 6) and query.shape == (500, 45)
    both = torch.cat([support, query], 1).sort(1).values
    assert (both[:, 1:] > both[:, :-1]).all()  # all different within each episode


def test_labels_name_the_classes_that_info_says():
    numbered = cell_08a2ae5d()
    # cell 97b90e66
    episode = FewShot(numbered, way=3, shot=2, query=4).sample(50)
    for part in episode:
        labels = part.y.argmax(-1)
        assert torch.equal(part.info["classes"].gather(1, labels), part.x[..., 0].long() // 20)
        assert (part.y.sum(1) == part.y.shape[1] // 3).all()  # balanced


def test_images_reach_the_learner_prepared():
    # cell 8bf56fba
    white = torch.full((4, 3, 3, 3), 255, dtype=torch.uint8)  # each channel has its own mean
    colour = Classes.of({"a": white[:2], "b": white[2:]}, mean=(0.0, 0.5, 1.0))
    x = FewShot(colour, way=2, shot=1, query=1).sample(6).query.x
    assert torch.equal(x, torch.tensor([1.0, 0.5, 0.0])[:, None, None].expand(6, 2, 3, 3, 3))


def test_support_and_query_stand_on_different_sides_of_a_cut():
    numbered = cell_08a2ae5d()
    # cell aa0b7ddc
    halves = Classes(numbered.x, numbered.sizes, cut=torch.full((6,), 12))
    episode = FewShot(halves, way=4, shot=3, query=8).sample(300)
    side = [(part.x[..., 0] % 20 < 12).unflatten(1, (4, -1)) for part in episode]
    assert (side[0].all(2) | (~side[0]).all(2)).all()  # of one side each
    assert (side[0][..., 0] != side[1][..., 0]).all()  # of different sides
    first = side[0][..., 0].float()
    assert 0.4 < first.mean() < 0.6  # either side may be support ...
    assert (first.mean(1) % 1 > 0).any()  # ... and each class throws its own coin
    frozen = [FewShot(halves, query=8).freeze(20, seed=1).hash for _ in range(2)]
    assert frozen[0] == frozen[1]  # the generator decides the coins too


def test_too_little_data_is_refused_by_name():
    numbered = cell_08a2ae5d()
    # cell fe14474e
    with pytest.raises(ValueError, match=r"way=7, but the data has 6 classes"):
        FewShot(numbered, way=7)
    with pytest.raises(
        ValueError, match=r"class '0' has 20 examples, but shot=6 and query=15 need 21"
    ):
        FewShot(numbered, shot=6)
    with pytest.raises(ValueError, match=r"shot=0, expected an integer of at least 1"):
        FewShot(numbered, shot=0)
    with pytest.raises(ValueError, match="on each side of its cut"):
        FewShot(Classes(numbered.x, numbered.sizes, cut=torch.full((6,), 12)), query=9)


def test_the_data_decides_where_tensors_are(device):
    numbered = cell_08a2ae5d()
    # cell 9e6b0fdf
    data = numbered.to(device)
    tasks = FewShot(data, way=2, query=3)
    assert tasks.sample(2).query.y.device == data.x.device
    assert tasks.draw(2).support.device == data.x.device  # drawn where the data is ...
    assert tasks.draw(2, torch.Generator()).support.device.type == "cpu"  # ... or where you say
    far = FewShot(numbered.to("meta"), way=2, query=3)
    assert far.sample(2, torch.Generator()).query.y.device.type == "meta"
    assert far.describe()["examples"]["shape"] == [1] and far.describe()["kind"] == "classification"


def test_a_draw_neither_waits_nor_copies(device):
    # cell 5125b4d3
    class OnDevice(TorchDispatchMode):
        "Refuses what waits for the device or copies from the host."

        refused = ("_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh")

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, kwargs = func.name().split(".")[0].removeprefix("aten::"), kwargs or {}
            assert name not in self.refused, f"{name} in a draw"
            if name in ("index", "index_put", "index_put_"):
                assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                    "a mask as an index"
                )
            if name == "_to_copy":
                assert kwargs.get("device") in (None, args[0].device), "a copy between devices"
            return func(*args, **kwargs)

    three = torch.arange(3.0, device=device)
    for waits in (
        lambda: int(three.sum()),
        lambda: three.sum().item(),
        lambda: three[three > 1],
        lambda: three.nonzero(),
        lambda: three.masked_select(three > 1),
        lambda: torch.tensor([1, 2], device=device),
    ):
        with pytest.raises(AssertionError), OnDevice():
            waits()
    small = Classes(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.full((4,), 10)).to(device)
    generator = torch.Generator(device)
    for ready in (
        FewShot(small, way=3, query=4),
        FewShot(replace(small, cut=torch.full((4,), 5)), way=3, query=4),
        Sinusoids(device=device),
    ):
        with OnDevice():
            ready.sample(2, generator)


def test_own_ways_of_drawing_are_not_recorded():
    # cell c3ddc9c5
    class Turned(FewShot):
        def gather(self, indices):
            return super().gather(indices)

    class Promised(Turned):
        recordable = True

    class Named(Promised):
        def __repr__(self):
            return "Named()"

    assert FewShot.recordable and Sinusoids.recordable
    assert not Turned.recordable and Promised.recordable and Named.recordable


def test_varied_tasks_keep_their_promises():
    numbered = cell_08a2ae5d()
    # cell 92ea4528
    tasks = VariedWayShot(numbered, way=(2, 6), shot=(1, 5), query=10)
    ways, shots, uneven_counts, ascending = set(), set(), 0, 0
    for seed in range(40):
        support, query = tasks.sample(8, torch.Generator().manual_seed(seed))
        per_class = support.y.sum(1)
        ways.add(support.y.shape[-1])
        shots.add(support.y.shape[1] / support.y.shape[2])
        uneven_counts += int((per_class != per_class[:, :1]).any())
        ascending += int((support.info["classes"].diff(dim=1) > 0).all())
        assert (per_class >= 1).all() and (query.y.sum(1) == 10).all()
        for s, q in zip(support.x[..., 0], query.x[..., 0], strict=True):
            assert len(set(s.tolist()) | set(q.tolist())) == len(s) + len(
                q
            )  # no overlap, no repeats
        labels = support.y.argmax(-1)
        assert torch.equal(
            support.info["classes"].gather(1, labels), support.x[..., 0].long() // 20
        )
    assert ways == {2, 3, 4, 5, 6} and shots == {1, 2, 3, 4, 5} and uneven_counts > 20
    assert ascending < 5  # labels are a fresh order of the classes here too


def test_classes_of_different_size_give_only_their_own():
    # cell 1d4f1bb0
    sizes = torch.tensor([4, 9, 5, 7])
    uneven_sizes = Classes(torch.arange(4.0).repeat_interleave(sizes)[:, None], sizes)
    for tasks in (
        FewShot(uneven_sizes, way=3, shot=1, query=3),
        VariedWayShot(uneven_sizes, way=(2, 4), shot=(1, 2), query=2),
    ):
        for part in tasks.sample(200):
            mine = part.info["classes"].gather(1, part.y.argmax(-1))
            assert torch.equal(part.x[..., 0].long(), mine)


def test_uneven_weights_spread_the_counts():
    # cell 27fe057e
    spare = torch.ones(2000, 2, 100, dtype=torch.bool)
    taken = (
        uneven(spare, 50, torch.Generator().manual_seed(0)) // 100
    )  # class of each taken example
    second = taken.sum(1).float()
    assert abs(second.mean() - 25) < 1  # no class is preferred
    assert second.std() > 5  # equal weights would give 3.1, the root of 50 * 1/4 * 150/199
    assert uneven(spare[:, :, :1], 2).sort(1).values.tolist() == [[0, 1]] * 2000  # one of each


def test_wrong_ranges_are_refused():
    numbered = cell_08a2ae5d()
    # cell 6526c753
    with pytest.raises(ValueError, match=r"shot=\(3, 2\), expected \(smallest, largest\)"):
        VariedWayShot(numbered, way=(2, 2), shot=(3, 2))
    with pytest.raises(ValueError, match="shot=11 and query=10 need 21"):
        VariedWayShot(numbered, way=(2, 6), shot=(1, 11))


def test_frozen_varied_tasks_hold_every_shape():
    numbered = cell_08a2ae5d()
    # cell c0df75bf
    tasks = VariedWayShot(numbered, way=(2, 6), shot=(1, 5))
    frozen = tasks.freeze(12, seed=1)
    shapes = {tuple(e.support.y.shape) for e in frozen.episodes()}
    assert len(frozen) == 12 and len(shapes) > 4


def test_a_seed_is_a_set_of_episodes():
    numbered = cell_08a2ae5d()
    # cell 84612dbe
    tasks = FewShot(numbered, way=3, shot=1, query=5)
    first, again, other = (
        tasks.freeze(50, seed=7),
        tasks.freeze(50, seed=7),
        tasks.freeze(50, seed=8),
    )
    assert first.hash == again.hash != other.hash and len(first.hash) == 12
    assert FewShot(numbered, way=3, shot=2, query=5).freeze(50, seed=7).hash != first.hash
    torch.manual_seed(123)  # the global seed has no say
    assert tasks.freeze(50, seed=7).hash == first.hash
    names = FewShot(replace(numbered, names=list("abcdef")), way=3, shot=1, query=5)
    assert names.freeze(50, seed=7).hash != first.hash  # the same numbers of other classes
    drawn = tasks.draw(50, torch.Generator().manual_seed(7))
    assert torch.equal(first.groups[0].support, drawn.support)  # the seed itself, not one near it
    other_queries = replace(first, groups=[drawn._replace(query=drawn.query.flip(1))])
    assert other_queries.hash != first.hash
    batches = [e.query.x for e in first.episodes(batch=16)]
    assert [len(b) for b in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat(batches), tasks.gather(again.groups[0]).query.x)
    with pytest.raises(ValueError, match="n=0, expected an integer of at least 1"):
        VariedWayShot(numbered, way=(2, 3)).freeze(0)


def test_the_same_episodes_on_every_device(device):
    numbered = cell_08a2ae5d()
    # cell b4e6d7d7
    here, there = FewShot(numbered, query=5), FewShot(numbered.to(device), query=5)
    assert here.freeze(20, seed=1).hash == there.freeze(20, seed=1).hash
    one, other = next(here.freeze(20).episodes()), next(there.freeze(20).episodes())
    assert torch.equal(one.query.x, other.query.x.cpu())
    assert Sinusoids(5).freeze(9).hash == Sinusoids(5, device=device).freeze(9).hash


@pytest.mark.proves("eq-no-memorisation")
def test_nobody_beats_chance_without_the_support_set():
    best_memoriser = cell_43b6a85c()
    # cell bbc95e9f
    many = Classes(torch.arange(400.0)[:, None], torch.full((20,), 20))
    episodes = FewShot(many, way=5, shot=1, query=1).sample(
        40_000, torch.Generator().manual_seed(0)
    )
    right = best_memoriser(episodes, classes=20)
    four_errors = 4 * 0.4 / 40_000**0.5 + 0.01  # the memoriser was fitted to these very tasks
    assert abs(right.mean().item() - 1 / 5) < four_errors


def test_sorted_labels_leak():
    best_memoriser = cell_43b6a85c()
    # cell bf5e85ca
    M, N = 20, 5
    total = math.comb(M - 1, N - 1)
    best = [
        max(math.comb(i, j) * math.comb(M - 1 - i, N - 1 - j) for j in range(N)) / total
        for i in range(M)
    ]
    leak = sum(best) / M
    print(
        f"sorted labels: {leak:.1%} without any learning from the support set; chance is {1 / N:.0%}"
    )
    assert leak > 0.5
    every = torch.ones(40_000, M, dtype=torch.bool)
    rows = choose(every, N, torch.Generator().manual_seed(0)).sort(1).values  # the mistake
    part = Examples(rows, rows, {"classes": rows})
    assert abs(best_memoriser(Episode(part, part), M).mean().item() - leak) < 0.02


def test_drawing_twice_makes_the_sets_meet():
    # cell 1ffefdce
    g = torch.Generator().manual_seed(0)
    support, query = (
        torch.randint(20, (50_000, 1), generator=g),
        torch.randint(20, (50_000, 15), generator=g),
    )
    meet = (support == query).any(1).float().mean().item()
    assert abs(meet - (1 - (19 / 20) ** 15)) < 0.01


def test_no_two_batches_are_alike():
    numbered = cell_08a2ae5d()
    # cell fecee98c
    generator = torch.Generator().manual_seed(0)
    tasks = FewShot(numbered, query=5)
    batches = [tasks.draw(4, generator).support.tolist() for _ in range(50)]
    rows = [tuple(row) for batch in batches for row in batch]
    assert (
        len(set(rows)) == 200
    )  # of 2.3 billion: chance would repeat one in 1 of 100,000 such runs


def test_redrawing_covers_every_example():
    numbered = cell_08a2ae5d()
    # cell f2c39587
    only = numbered.select([0, 1])
    episodes = FewShot(only, way=2, shot=1, query=1).sample(2000)
    for part in episodes:
        assert len(part.x.unique()) == 40  # every example has been support, and has been query


def test_nearest_neighbour_by_hand():
    # cell 78e49543
    def nearest_neighbour(episodes, angle=False):
        "Accuracy of every task: each query takes the label of the nearest support image."
        s, q = (part.x.flatten(2) for part in episodes)
        if angle:  # at length 1 the smallest distance is the smallest angle
            s, q = (torch.nn.functional.normalize(z, dim=-1) for z in (s, q))
        nearest = torch.cdist(q, s).argmin(-1)  # [tasks, queries]
        predicted = episodes.support.y.argmax(-1).gather(1, nearest)
        return (predicted == episodes.query.y.argmax(-1)).float().mean(1)

    # cell 49d3eec3
    support = Examples.of(torch.tensor([[[0.0], [10.0]]]), torch.tensor([[0, 1]]), way=2)
    query = Examples.of(
        torch.tensor([[[1.0], [4.0], [6.0], [9.0]]]), torch.tensor([[0, 1, 1, 1]]), way=2
    )
    assert nearest_neighbour(Episode(support, query)).tolist() == [0.75]  # 4 is nearer to 0
    corner = Examples.of(torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[0, 1]]), way=2)
    faint = Examples.of(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[1]]), way=2)
    assert (
        nearest_neighbour(Episode(corner, faint)).item() == 0
    )  # near in distance to the wrong one
    assert nearest_neighbour(Episode(corner, faint), angle=True).item() == 1


def test_lines_are_a_distribution_too():
    # cell 15457d8f
    class Lines(Tasks):
        kind = "regression"

        def draw(self, n, generator=None):
            return torch.randn(n, 2, generator=generator), torch.rand(n, 30, 1, generator=generator)

        def gather(self, indices):
            (w, b), x = indices[0].T[..., None, None], 2 * indices[1] - 1
            y = w * x + b
            return Episode(Examples(x[:, :10], y[:, :10]), Examples(x[:, 10:], y[:, 10:]))

    assert Lines().freeze(5, seed=1).hash == Lines().freeze(5, seed=1).hash
    cost = Lines().sample(100_000, torch.Generator().manual_seed(0)).query.y.square().mean()
    assert abs(cost - (1 / 3 + 1)) < 0.02  # E[w^2] E[x^2] + E[b^2]


def test_a_narrow_range_of_phases_can_be_memorised():
    # cell 6cd8da68
    # No single curve fits them all, so yes; but over phases in [0, pi] the mean curve is
    # E[A] E[sin(x - phase)] = -2.55 * (2 / pi) * cos(x), which is not zero. Predicting it already beats 4.25:
    # the best that ignores the support set costs 3.0. With phases in [0, 0.1] the mean
    # curve is nearly the task itself, up to its amplitude.
    waves = Sinusoids(shot=1, query=100).sample(20_000, torch.Generator().manual_seed(0)).query
    mean_curve = -2.55 * (2 / math.pi) * torch.cos(waves.x)
    assert (waves.y - mean_curve).square().mean() < 3.1 < 4.25
    amplitude, phase = waves.info["task"].T[..., None, None]
    narrow = amplitude * torch.sin(waves.x - phase * 0.1 / math.pi)  # phases in [0, 0.1]
    guess = 2.55 * torch.sin(waves.x - 0.05)  # the mean amplitude, the middle phase
    assert (narrow - guess).square().mean() < 1.1  # about Var[A] E[sin^2] = 2.0 * 0.53
