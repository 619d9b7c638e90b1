from __future__ import annotations

import doctest
import math
import random
from dataclasses import replace
from types import ModuleType

import pytest

from hf_edit.cli import events, job, simulation
from hf_edit.cli.events import elastic_uptime
from hf_edit.cli.job import FIRST_WINDOW_BYTES
from hf_edit.cli.simulation import (
    CPU_SECONDS_PER_BYTE,
    TOLERANCE,
    Numbers,
    Settings,
    candidates,
    needed_delay_steps,
    rank,
    recommend,
    simulate,
    steps_to_learn_in,
    synchronous,
)

# 25 MB of parameters; 25 MB sent by each of two replicas, 2.1 s at 100 Mbit/s with 5 % of headers.
SMALL = Numbers(parameters=6_250_000, num_replicas=2, step_seconds=0.5, bits_per_second=1e8)
NONE = Settings(sync_interval=8, overlap="none")


@pytest.mark.parametrize("module", [job, events, simulation])
def test_doctests(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# -- on paper ---------------------------------------------------------------------------------------------------------


def test_a_blocking_sync_costs_its_time_on_the_network() -> None:
    found = simulate(SMALL, NONE)
    assert found.share == pytest.approx(8 * 0.5 / (8 * 0.5 + 2.1))
    assert found.exposed_share == pytest.approx(1 - found.share)
    assert found.wait_share == 0
    assert found.network_seconds == pytest.approx(2.1)
    assert found.interval_seconds == pytest.approx(6.1)
    assert (found.bytes_per_sync, found.bytes_per_step) == (25e6, 25e6 / 8)


def test_the_closed_form_of_any_network() -> None:
    draws = random.Random(0)
    for _ in range(20):
        replicas, tau = draws.randint(2, 9), draws.choice([8, 32, 128])
        numbers = Numbers(draws.randint(10**5, 10**10), replicas, draws.uniform(0.1, 9), 10 ** draws.uniform(7, 11))
        network = 8 * 1.05 * 4 * numbers.parameters * 2 * (replicas - 1) / replicas / numbers.bits_per_second
        computing = tau * numbers.step_seconds
        share = simulate(numbers, replace(NONE, sync_interval=tau), steps=2 * tau).share
        assert share == pytest.approx(computing / (computing + network))


def test_a_message_takes_half_a_round_trip_each() -> None:
    numbers = replace(SMALL, round_trip_seconds=0.1, bits_per_second=math.inf)
    one_at_a_time = replace(NONE, units_in_flight=1)
    rounds = 2 * (10 + 1)  # of ten units and the exchange of norms
    ramp = math.log2(25e6 / FIRST_WINDOW_BYTES) - 1  # TCP's windows, doubled in each round trip
    found = simulate(numbers, one_at_a_time).network_seconds
    assert found == pytest.approx(rounds * 0.05 + ramp * 0.1)
    assert simulate(numbers, NONE).network_seconds < found  # two in flight


def test_forward_hides_all_of_a_forward_pass_but_its_last_unit() -> None:
    exposed = 2.1 - 0.5 / 3 * 9 / 10
    share = simulate(SMALL, replace(NONE, overlap="forward")).share
    assert share == pytest.approx(8 * 0.5 / (8 * 0.5 + exposed))


def test_a_delay_hides_its_steps() -> None:
    delayed = Settings(sync_interval=8, overlap="delayed")
    assert simulate(SMALL, replace(delayed, delay_steps=5)).share == 1  # 2.5 s
    found = simulate(SMALL, replace(delayed, delay_steps=3))
    assert found.share == pytest.approx(4 / (4 + 2.1 - 1.5))
    assert found.exposed_share == pytest.approx(0.6 / 4.6)
    assert simulate(SMALL, replace(delayed, delay_steps=8)).share == 1  # always under way


def test_by_steps_all_wait_for_the_slowest() -> None:
    numbers = replace(SMALL, speeds=(1.0, 0.5), bits_per_second=math.inf)
    found = simulate(numbers, NONE)
    assert found.share == pytest.approx((0.5 + 0.5) / (1 + 0.5))  # the fast one does half of what it could
    assert found.exposed_share == found.wait_share == pytest.approx(0.5 / 2)
    assert synchronous(numbers).share == pytest.approx(2 / 3)


def test_by_time_nobody_waits_long() -> None:
    numbers = replace(SMALL, speeds=(1.0, 0.5), bits_per_second=math.inf)
    by_time = Settings(sync_seconds=20.0, overlap="none")
    assert simulate(numbers, by_time).share > 0.97  # a running step of the slow one at most
    assert simulate(numbers, replace(by_time, overlap="delayed", delay_steps=4)).share == 1


def test_by_time_the_timer_starts_when_nobody_waits_any_more() -> None:
    found = simulate(SMALL, Settings(sync_seconds=4.0, overlap="none"))
    assert found.steps_per_sync == 8
    assert found.interval_seconds == pytest.approx(4 + 2.1)


def test_a_delayed_sync_by_time_ends_before_the_next() -> None:
    found = simulate(SMALL, Settings(sync_seconds=1.0, overlap="delayed", delay_steps=100))
    assert found.interval_seconds == pytest.approx(2.1)  # the network is always busy
    assert found.steps_per_sync == 2


def test_processors_have_work_with_a_sync() -> None:
    numbers = replace(SMALL, bits_per_second=math.inf, processor_seconds_per_byte=CPU_SECONDS_PER_BYTE)
    work = 25e6 * CPU_SECONDS_PER_BYTE
    for overlap in ("none", "forward", "delayed"):
        assert simulate(numbers, replace(NONE, overlap=overlap)).share == pytest.approx(4 / (4 + work))


def test_synchronous_training_waits_for_what_backward_does_not_hide() -> None:
    assert synchronous(replace(SMALL, gradients_overlap=False)).share == pytest.approx(0.5 / 2.6)
    hidden = 0.5 * 2 / 3 * 9 / 10  # the first unit's gradients come after a tenth of backward
    assert synchronous(SMALL).share == pytest.approx(0.5 / (0.5 + 2.1 - hidden))
    half = synchronous(replace(SMALL, gradient_bytes=2.0))
    assert half.bytes_per_step == 12.5e6


def test_one_replica_has_nobody_to_wait_for() -> None:
    numbers = replace(SMALL, num_replicas=1, round_trip_seconds=1.0)
    assert simulate(numbers, NONE).share == synchronous(numbers).share == 1


def test_compression_sends_less() -> None:
    sent = [
        simulate(SMALL, replace(NONE, compression=kind)).bytes_per_sync for kind in ("none", "bf16", "int8", "int4")
    ]
    assert sent == pytest.approx([25e6, 12.5e6, 25e6 * 260 / 1024, 25e6 * 36 / 256])


def test_moments_are_sent_too_and_in_fp32() -> None:
    sent = [
        simulate(replace(SMALL, moments=2), replace(NONE, compression=kind)).bytes_per_sync for kind in ("none", "int8")
    ]
    assert sent == pytest.approx([3 * 25e6, 2 * 25e6 + 25e6 * 260 / 1024])


def test_failures_cost_the_restart_and_what_was_not_saved() -> None:
    numbers = replace(SMALL, bits_per_second=math.inf, hours_between_failures=1.0, checkpoint_steps=1000)
    kept, wall, draws = 0.0, 0.0, random.Random(1)
    for _ in range(20_000):
        lasted = draws.expovariate(1 / 3600)
        kept += lasted // 500 * 500  # a checkpoint every 1000 steps of 0.5 s
        wall += lasted + numbers.restart_seconds
    assert simulate(numbers, NONE).goodput == pytest.approx(kept / wall, rel=0.02)
    assert simulate(replace(numbers, hours_between_failures=1e-5), NONE).goodput == 0


def test_where_the_others_train_on_a_failure_costs_one_replica() -> None:
    numbers = replace(SMALL, bits_per_second=math.inf, hours_between_failures=0.5, num_replicas=4)
    kept, wall, draws = 0.0, 0.0, random.Random(1)
    for _ in range(20_000):  # one replica, as it fails and as it waits for those of the others that failed meanwhile
        lasted = draws.expovariate(1 / (4 * 1800))
        kept += lasted // 64 * 64  # a sync every 64 s, of which each learns by the next one
        wall += lasted + numbers.restart_seconds + 5.0 * (lasted + numbers.restart_seconds) / 1800
    assert elastic_uptime(numbers, 64.0) == pytest.approx(kept / wall, rel=0.02)
    assert elastic_uptime(replace(numbers, hours_between_failures=None), 64.0) == 1.0
    assert simulate(numbers, NONE).goodput < 0.9 * elastic_uptime(numbers, 64.0), "else a failure stops them all"


# -- properties -------------------------------------------------------------------------------------------------------


def any_job(seed: int) -> tuple[Numbers, Settings]:
    draws = random.Random(seed)
    replicas = draws.randint(2, 5)
    numbers = Numbers(
        parameters=draws.randint(10**5, 10**9),
        num_replicas=replicas,
        step_seconds=draws.uniform(0.1, 4),
        bits_per_second=10 ** draws.uniform(7, 10),
        round_trip_seconds=draws.choice([0.0, 0.02]),
        speeds=tuple(draws.uniform(0.5, 1.5) for _ in range(replicas)) if draws.random() < 0.3 else (),
        processor_seconds_per_byte=draws.choice([0.0, CPU_SECONDS_PER_BYTE]),
    )
    tau = draws.choice([4, 16, 64])
    settings = Settings(tau, None, draws.choice(["none", "forward", "delayed"]), draws.randint(1, tau))
    return numbers, settings


@pytest.mark.parametrize("seed", range(30))
def test_what_can_only_help(seed: int) -> None:
    numbers, settings = any_job(seed)
    share = simulate(numbers, settings, steps=512).share
    assert 0 < share <= 1
    better = [
        (replace(numbers, bits_per_second=2 * numbers.bits_per_second), settings),
        (replace(numbers, parameters=numbers.parameters // 2), settings),
        (replace(numbers, round_trip_seconds=0.0), settings),
        (replace(numbers, processor_seconds_per_byte=0.0), settings),
        (numbers, replace(settings, sync_interval=2 * settings.sync_interval)),
        (numbers, replace(settings, units_in_flight=4)),
    ]
    for other_numbers, other_settings in better:
        assert simulate(other_numbers, other_settings, steps=512).share >= share - 1e-9
    blocking = simulate(numbers, replace(settings, overlap="none"), steps=512).share
    assert share >= blocking - 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_synchronous_training_gains_from_a_faster_link(seed: int) -> None:
    numbers, _ = any_job(seed)
    shares = [synchronous(replace(numbers, bits_per_second=rate)).share for rate in (1e7, 1e8, 1e9, math.inf)]
    assert shares == sorted(shares)


def test_the_same_seed_gives_the_same() -> None:
    numbers = replace(SMALL, step_spread=0.3)
    by_time = Settings(sync_seconds=10.0)
    assert simulate(numbers, by_time, seed=3) == simulate(numbers, by_time, seed=3)
    assert simulate(numbers, by_time, seed=3) != simulate(numbers, by_time, seed=4)


def test_varying_steps_have_the_mean_and_the_spread_asked_for() -> None:
    ends = events.drawn_ends(0.3, 20_001, 0, 0)
    steps = [after - before for before, after in zip([0.0, *ends], ends, strict=False)]
    mean = sum(steps) / len(steps)
    assert mean == pytest.approx(1, abs=0.01)
    assert (sum((step - mean) ** 2 for step in steps) / len(steps)) ** 0.5 == pytest.approx(0.3, rel=0.03)


def test_varying_steps_cost_waiting_which_grows_with_the_root_of_the_interval() -> None:
    numbers = replace(SMALL, step_spread=0.2, bits_per_second=math.inf)
    lost = [1 - simulate(numbers, replace(NONE, sync_interval=tau), steps=8_000).share for tau in (4, 64)]
    # The later of two sums of tau steps is 0.56 of their standard deviation late.
    assert lost == pytest.approx([0.2 * 0.564 / tau**0.5 for tau in (4, 64)], rel=0.15)
    assert 1 - synchronous(numbers).share == pytest.approx(0.2 * 0.564, rel=0.15)


# -- the recommendation -----------------------------------------------------------------------------------------------


def test_the_recommended_one_learns_most_of_the_fast() -> None:
    outcomes = recommend(SMALL)
    best = max(outcome.share for outcome in outcomes)
    near = [o.settings.sync_interval for o in outcomes if o.settings and o.share >= best - TOLERANCE]
    assert outcomes[0].settings == Settings(8, None, "delayed", 6)
    assert outcomes[0].settings.sync_interval == min(near)
    assert "rarer and later syncs learn less" in outcomes[0].reason


def test_a_step_of_delay_counts_as_two_of_the_interval() -> None:
    prompt, late = Settings(32), Settings(16, None, "delayed", 14)
    assert [steps_to_learn_in(SMALL, each) for each in (prompt, late)] == [32, 44]
    outcomes = [replace(simulate(SMALL, each), share=1.0) for each in (late, Settings(64), prompt)]
    assert [outcome.settings for outcome in rank(outcomes, SMALL)] == [prompt, late, Settings(64)]


def test_everything_is_tried() -> None:
    outcomes = recommend(SMALL)
    assert len(outcomes) == len(candidates(SMALL)) == 24


def test_equally_fast_the_plain_overlap_is_taken() -> None:
    fast = replace(SMALL, bits_per_second=1e11)
    assert recommend(fast)[0].settings == Settings(8, None, "forward")


def test_unequal_replicas_sync_by_time() -> None:
    settings = recommend(replace(SMALL, speeds=(1.0, 0.5)))[0].settings
    assert settings is not None
    assert settings.sync_seconds is not None
    assert settings.overlap == "delayed"


def test_the_delay_covers_the_network_and_a_step_of_the_slowest() -> None:
    assert needed_delay_steps(SMALL) == 6  # (2.1 + 0.5) / 0.5
    assert needed_delay_steps(replace(SMALL, speeds=(1.0, 0.25))) == 9  # (2.1 + 2.0) / 0.5


def test_order_is_by_share_beyond_the_near() -> None:
    shares = [outcome.share for outcome in recommend(SMALL)]
    far = [share for share in shares if share < max(shares) - TOLERANCE]
    assert far == sorted(far, reverse=True) == shares[-len(far) :]
    assert rank([simulate(SMALL, NONE)], SMALL)[0].settings == NONE


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"step_seconds": 0.0}, "step_seconds=0.0: a number above 0"),
        ({"num_replicas": 0}, "num_replicas=0: at least 1"),
        ({"speeds": (1.0,)}, "2 numbers above 0, one a replica"),
        ({"round_trip_seconds": -1.0}, "at least 0"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"overlap": "later"}, "known are overlap forward"),
        ({"overlap": "delayed", "delay_steps": 9}, "at most sync_interval=8"),
        ({"sync_interval": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(NONE, **changes)
