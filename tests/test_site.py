"""A Site by itself, with strings for tensors: who may hand over what, when it fuses, and what it counts."""

import gc
import math
import threading

import pytest

from fd_fusion.reasons import FusionError, HandOverError
from fd_fusion.site import ForwardCount, site_of
from tests.support.sites import make_site


class Fake:
    """Stands for a tensor: only its shape and its version count."""

    inplace_version = 0

    def __init__(self, *shape):
        self.shape = shape

    def reshape(self, shape):
        return Fake(math.prod(self.shape[:-1]), *shape[1:]) if shape[0] == -1 else Fake(*shape)


def make(limit=4, proven=True, **kwargs):
    calls = []
    site = make_site(
        fused=lambda partial, residual: calls.append("fused") or (Fake(*partial.shape), Fake(*partial.shape)),
        reduce=lambda partial: calls.append("reduce") or partial,
        norm=lambda total, residual: calls.append("norm") or ("out", "sum"),
        limit=limit,
        **kwargs,
    )
    site.end_proof(proven)
    return site, calls


def finish(site, rows):
    return site.finish(site.hand_over(partial := Fake(rows, 8)), None) and partial


@pytest.mark.parametrize(
    "limit, rows, path, code",
    [
        (4, 1, ["fused"], "fused"),
        (4, 4, ["fused"], "fused"),
        (4, 5, ["reduce", "norm"], "too_many_rows"),
        (None, 10**6, ["fused"], "fused"),
        (4, 0, ["norm"], "no_rows"),
    ],
)
def test_the_path_is_chosen_by_rows_alone(limit, rows, path, code):
    site, calls = make(limit)
    finish(site, rows)
    assert calls == path and site.calls == {code: 1}
    assert site.fuses(rows) == (code == "fused")


def test_where_a_residual_stays_both_of_its_sites_have_the_limit_of_that():
    first, _ = make(staying_limit=9)
    second, _ = make(staying_limit=9)
    third, _ = make(staying_limit=9)
    first.leave_residual(second)
    assert [one.fuses(9) for one in (first, second, third)] == [True, True, False] and not first.fuses(10)
    for one in (first, second):
        one.start_proof(None)
        one.end_proof(True)
    assert not first.fuses(9) and not second.fuses(9) and first.fuses(4), "a new proof begins anew"


def test_rows_of_more_than_two_dimensions_are_counted_together():
    site, calls = make(4)
    assert [one.shape for one in site.complete(Fake(2, 2, 8), None)] == [(2, 2, 8)] * 2
    site.complete(Fake(2, 3, 8), None)
    assert calls == ["fused", "reduce", "norm"]


def test_nothing_fuses_before_the_proof():
    site, calls = make(proven=False)
    finish(site, 1)
    assert calls == ["reduce", "norm"] and site.calls == {"not_proven": 1} and not site.proven


class Prover:
    """The proving pass of a test: it notes what it is told."""

    def __init__(self):
        self.seen, self.missed = [], []

    def keep(self, site, partial):
        return ("kept", partial)

    def take(self, site, partial, kept):
        return partial if kept is None else kept[1]

    def prove(self, *args):
        self.seen.append(args)
        return "stock", "sum"

    def miss(self, reason):
        self.missed.append(reason.code)


def test_the_proving_pass_sees_every_finish_and_counts_hand_overs():
    site, calls = make(proven=False)
    site.checked = False  # a host's graphs: what proves is eager all the same
    site.start_proof(prover := Prover())
    partial = finish(site, 2)
    assert [args[:2] for args in prover.seen] == [(site, partial)] and site.handed == 1 and calls == []
    site.end_proof(True)
    finish(site, 2)
    assert calls == ["fused"]


def test_in_the_proving_pass_a_misuse_is_recorded_and_nothing_is_raised():
    site, _ = make()
    site.start_proof(prover := Prover())
    site.finish(Fake(1, 8), None)
    site.hand_over(Fake(1, 8))
    site.hand_over(partial := Fake(1, 8))
    partial.inplace_version += 1
    site.finish(partial, None)
    site.hand_over(Fake(1, 8))
    site.finish(Fake(1, 8), None)
    assert prover.missed == ["nothing_handed_over", "double_hand_over", "changed_in_place", "other_tensor"]


def test_a_change_in_place_between_the_ends_is_an_error():
    site, calls = make()
    partial = site.hand_over(Fake(1, 8))
    partial.inplace_version += 1
    with pytest.raises(HandOverError, match="a -> b") as error:
        site.finish(partial, None)
    assert error.value.reason.code == "changed_in_place" and calls == []
    finish(site, 1)


def test_a_hook_that_came_after_bind_is_told_once(caplog):
    hooks = {}
    site, _ = make(hooks=(hooks,))
    finish(site, 1)
    assert not caplog.records
    hooks[0] = "a hook"
    finish(site, 1)
    finish(site, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "a -> b" in caplog.text


def test_a_failure_in_the_fused_call_is_raised_and_never_falls_back():
    site, calls = make()
    site._op.finish = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        finish(site, 1)
    assert calls == []


def test_hand_over_errors_name_the_site_and_pass():
    site, _ = make()
    one, other = Fake(1, 8), Fake(1, 8)
    for misuse, code in (
        (lambda: site.finish(one, None), "nothing_handed_over"),
        (lambda: site.hand_over(one) and site.hand_over(other), "double_hand_over"),
        (lambda: site.hand_over(one) and site.finish(other, None), "other_tensor"),
    ):
        with pytest.raises(HandOverError, match="a -> b") as error:
            misuse()
        assert error.value.reason.code == code
        finish(site, 1)  # the next call starts afresh


def test_two_threads_on_a_site_are_an_error():
    site, _ = make()
    partial = Fake(1, 8)
    site.hand_over(partial)
    errors = []

    def other():
        for use in (lambda: site.hand_over(Fake(1, 8)), lambda: site.finish(partial, None)):
            try:
                use()
            except HandOverError as error:
                errors.append(error.reason.code)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert errors == ["two_callers", "two_callers"]


def test_two_streams_on_a_site_are_an_error():
    stream = [1]
    site, _ = make(caller=lambda: stream[0])
    partial = site.hand_over(Fake(1, 8))
    stream[0] = 2
    with pytest.raises(HandOverError) as error:
        site.finish(partial, None)
    assert error.value.reason.code == "two_callers"


def test_a_norm_given_with_the_call_takes_the_place_of_the_bound_one():
    site, calls = make(limit=1)
    partial = site.hand_over(Fake(3, 8))
    assert site.finish_stock(partial, None, lambda total, residual: ("other", total)) == ("other", partial)
    assert calls == ["reduce"]


def closed(use):
    with pytest.raises(FusionError) as error:
        use()
    return error.value.reason.code == "closed"


def test_a_closed_site_raises_from_every_entry():
    """What it calls is gone: at T above the limit too, and at T=0, and with a partial sum handed over before."""
    site, calls = make()
    kept = site.hand_over, site.finish, site.finish_stock
    more = site.fused, site.run_stock
    total = site.total
    site.hand_over(partial := Fake(1, 8))
    site.close()
    assert closed(lambda: kept[0](Fake(1, 8))) and closed(lambda: kept[1](Fake(1, 8), None))
    assert closed(lambda: kept[2](Fake(1, 8), None, lambda *_: ("out", "sum")))
    assert all(closed(lambda run=run: run(partial, None)) for run in more) and closed(lambda: total(partial))
    for rows in (0, 1, 5):
        assert closed(lambda: site.hand_over(Fake(rows, 8)))  # noqa: B023
        assert closed(lambda: site.finish(partial, None)) and closed(lambda: site.complete(Fake(rows, 8), None))  # noqa: B023
        assert closed(lambda: site.finish_stock(partial, None, lambda *_: ("out", "sum")))
    assert closed(lambda: site.fused(partial, None)) and not site.fuses(1) and calls == []
    site.close()


def test_a_forward_may_start_at_a_layer_that_holds_all_pairs():
    """A model whose decoder is called by itself: what a forward left behind when it raised costs the next nothing."""
    forwards, done = ForwardCount(), []
    site, calls = make(forwards=forwards)
    forwards.at_second(lambda: done.append(True) or True)
    for _ in range(3):
        forwards.start_inside()
        site.hand_over(Fake(1, 8))  # and then the forward raises
    forwards.start_inside()
    finish(site, 1)
    assert calls == ["fused"] and not done, "forwards of the whole model are counted apart"


def test_the_number_of_a_site_that_is_gone_is_closed():
    site, _ = make()
    number = site.number
    assert site_of(number) is site
    del site
    gc.collect()
    assert closed(lambda: site_of(number)) and closed(lambda: site_of("no such number"))


def test_a_forward_that_raised_costs_the_next_one_nothing():
    """On this rank alone perhaps: an error in its next forward would leave the other ranks waiting."""
    forwards = ForwardCount()
    site, calls = make(forwards=forwards)
    forwards.start()
    left = site.hand_over(Fake(1, 8))  # and then the forward raises
    forwards.start()
    finish(site, 1)
    assert calls == ["fused"]
    forwards.start()
    site.hand_over(Fake(1, 8))
    with pytest.raises(HandOverError) as error:
        site.hand_over(Fake(1, 8))
    assert error.value.reason.code == "double_hand_over", "twice in one forward is still an error"
    site.hand_over(left)
    forwards.start()
    with pytest.raises(HandOverError) as error:
        site.finish(left, None)
    assert error.value.reason.code == "nothing_handed_over", "nor may a forward finish what another began"


def test_two_forwards_at_once_are_an_error_of_one_of_them():
    forwards = ForwardCount()
    caller = [1]
    site, _ = make(forwards=forwards, caller=lambda: caller[0])
    forwards.start()
    first = site.hand_over(Fake(1, 8))
    forwards.start()
    caller[0] = 2
    site.hand_over(Fake(1, 8))
    caller[0] = 1
    with pytest.raises(HandOverError) as error:
        site.finish(first, None)
    assert error.value.reason.code == "two_callers"


def test_what_is_to_be_done_at_the_second_forward_is_done_once_and_waits_until_it_may():
    forwards, done, may = ForwardCount(), [], [False, True]
    forwards.start()
    forwards.at_second(lambda: done.append(forwards.number) or may[len(done) - 1])
    for _ in range(6):
        forwards.start()
    assert done == [3, 4]


def test_what_waits_for_the_second_forward_runs_in_a_later_one_too():
    """A second forward that is skipped, since its start raised in another hook for example, skips nothing."""
    forwards, done = ForwardCount(), []
    forwards.at_second(lambda: done.append(forwards._whole) or True)
    forwards._whole = 2
    for _ in range(3):
        forwards.start()
    assert done == [3]


def test_the_hosts_own_sum_does_not_outlive_the_proving_pass():
    """A tensor of all rows of a profile run."""
    site = make_site()
    site.whole = object()
    site.end_proof(True)
    assert site.whole is None
