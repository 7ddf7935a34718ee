"""The version rules, as plain values."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.errors import ChainError, DowngradeError, OverlapError, RequirementError
from nestpatch.patcher.chain import Action, Allowed, Link, steps_to_apply, steps_to_revert
from nestpatch.version import Version


def link(name, version="1.0.0", strength=1.0, supersedes=(), requires=()):
    return Link(f"{name}-{version}", name, version, strength, tuple(supersedes), tuple(requires))


def never(a, b):
    return False


def always(a, b):
    return True


def actions(steps):
    return [(step.action.name, step.link.pack_id) for step in steps]


def test_the_order_of_versions_is_that_of_semver():
    """The example of semver.org, section 11."""
    order = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1"]
    order += ["1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0"]
    versions = [Version.parse(text) for text in order]
    falling = versions[::-1]
    assert sorted(falling) == versions
    assert all(a < b for a, b in itertools.pairwise(versions))
    assert Version.parse("1.0.0+build.5") == Version.parse("1.0.0")


def test_the_first_pack_is_checked_and_applied():
    assert actions(steps_to_apply([], link("a"), never)) == [("CHECK", "a-1.0.0"), ("APPLY", "a-1.0.0")]


def test_the_same_pack_at_the_same_strength_is_nothing_to_do():
    assert steps_to_apply([link("a")], link("a"), always) == ()


def test_another_strength_replaces():
    steps = steps_to_apply([link("a")], link("a", strength=0.5), always)
    assert actions(steps) == [("UNDO", "a-1.0.0"), ("CHECK", "a-1.0.0"), ("APPLY", "a-1.0.0")]
    assert steps[0].link.strength == 1.0
    assert steps[-1].link.strength == 0.5


def test_an_upgrade_undoes_the_old_version_first():
    steps = steps_to_apply([link("a")], link("a", "1.1.0"), always)
    assert actions(steps) == [("UNDO", "a-1.0.0"), ("CHECK", "a-1.1.0"), ("APPLY", "a-1.1.0")]


def test_downgrades_have_to_be_allowed():
    with pytest.raises(DowngradeError, match=r"a 1\.0\.0 is older than a 1\.1\.0") as caught:
        steps_to_apply([link("a", "1.1.0")], link("a"), never)
    assert "--allow-downgrade" in caught.value.advice
    assert actions(steps_to_apply([link("a", "1.1.0")], link("a"), never, Allowed(downgrade=True)))[0] == ("UNDO", "a-1.1.0")


@pytest.mark.parametrize("version", ["1.0.0", "1.0.0+rebuilt"])
def test_one_version_means_one_content(version):
    other = Link("x", "a", version)
    with pytest.raises(ChainError, match="another pack is applied as a 1"):
        steps_to_apply([link("a")], other, never, Allowed(downgrade=True))


def test_superseded_packs_go_whatever_their_name():
    old, new = link("a"), link("b", supersedes=["a-1.0.0"])
    assert actions(steps_to_apply([old], new, never)) == [("UNDO", "a-1.0.0"), ("CHECK", "b-1.0.0"), ("APPLY", "b-1.0.0")]
    with pytest.raises(DowngradeError, match="superseded by b"):
        steps_to_apply([new], old, never)
    assert actions(steps_to_apply([new], old, never, Allowed(downgrade=True)))[0] == ("UNDO", "b-1.0.0")


def test_disjoint_packs_stack_untouched():
    assert actions(steps_to_apply([link("a")], link("b"), never)) == [("CHECK", "b-1.0.0"), ("APPLY", "b-1.0.0")]


def test_overlaps_have_to_be_allowed_and_are_checked_on_the_base_below():
    with pytest.raises(OverlapError, match=r"b 1\.0\.0 changes rows that a 1\.0\.0 changed"):
        steps_to_apply([link("a")], link("b"), always)
    steps = actions(steps_to_apply([link("a")], link("b"), always, Allowed(overlap=True)))
    assert steps == [("UNDO", "a-1.0.0"), ("CHECK", "b-1.0.0"), ("REDO", "a-1.0.0"), ("APPLY", "b-1.0.0")]


def test_what_lies_above_and_shares_rows_is_put_back_in_order():
    applied = [link("a"), link("b"), link("c"), link("d")]

    def overlap(x, y):
        return {x.name, y.name} in ({"a", "b"}, {"b", "d"})

    steps = actions(steps_to_apply(applied, link("a", "2.0.0"), overlap, Allowed(overlap=True)))
    assert steps == [
        ("UNDO", "d-1.0.0"),
        ("UNDO", "b-1.0.0"),
        ("UNDO", "a-1.0.0"),
        ("CHECK", "a-2.0.0"),
        ("REDO", "b-1.0.0"),
        ("REDO", "d-1.0.0"),
        ("APPLY", "a-2.0.0"),
    ]


def test_requirements_hold_on_the_way_in_and_on_the_way_out():
    needy = link("b", requires=["a-1.0.0"])
    with pytest.raises(RequirementError, match="requires the pack a-1"):
        steps_to_apply([], needy, never)
    assert steps_to_apply([link("a")], needy, never)
    with pytest.raises(RequirementError):
        steps_to_apply([link("a"), needy], link("a", "2.0.0"), never)
    with pytest.raises(RequirementError):
        steps_to_revert([link("a"), needy], [link("a")], never)
    assert actions(steps_to_revert([link("a"), needy], [link("a"), needy], never)) == [("UNDO", "b-1.0.0"), ("UNDO", "a-1.0.0")]


@given(st.data())
def test_steps_never_undo_what_is_not_on_top_of_its_rows(data):
    """Whatever the stack: each UNDO finds its pack with nothing above that shares rows, and the end holds what it should."""
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=5))
    pairs = data.draw(st.sets(st.frozensets(st.sampled_from("abcdef"), min_size=2, max_size=2)))

    def overlap(x, y):
        return x.name == y.name or frozenset((x.name, y.name)) in pairs

    applied = [link(name) for name in names]
    new = link(data.draw(st.sampled_from("abcdef")), "2.0.0")
    stack = list(applied)
    for step in steps_to_apply(applied, new, overlap, Allowed(overlap=True)):
        if step.action is Action.UNDO:
            above = stack[stack.index(step.link) + 1 :]
            assert not any(overlap(step.link, other) for other in above)
            stack.remove(step.link)
        elif step.action is Action.CHECK:
            assert not any(overlap(step.link, other) for other in stack)
        else:
            stack.append(step.link)
    assert stack[-1] == new
    kept = [old for old in applied if old.name != new.name]
    assert sorted(stack[:-1], key=applied.index) == kept
    for x, y in itertools.combinations(kept, 2):
        if overlap(x, y):
            assert stack.index(x) < stack.index(y)
