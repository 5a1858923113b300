"""What is called out in an RL run, when, and how often."""

import pytest

from r1fast.stages.alarms import FIRST, IN_A_ROW, SILENT, WINDOW, Alarms

HEALTHY = {
    "reward": 0.6,
    "rewards": {"accuracy": 0.5, "format": 0.9},
    "rollouts": 512,
    "errors": 0,
    "groups_sampled": 32,
    "groups_trained": 20,
    "truncated": 0.01,
    "response_length": 100.0,
    "entropy": 0.5,
    "logprob_difference_mean": 1e-6,
}
SICK = {
    "no_reward": ({"reward": 0.0, "rewards": {"accuracy": 0.0, "format": 0.0}}, "every reward is zero"),
    "no_variance": ({"groups_trained": 1}, "31 of 32 groups"),
    "length": ({"response_length": 210.0, "truncated": 0.6}, "from 100 to 210 tokens and 60% are cut off"),
    "entropy": ({"entropy": 0.02}, "from 0.500 to 0.0200"),
    "sampler_difference": ({"logprob_difference_mean": 0.02}, "differ by 0.02 nats a token, the bound is 0.001"),
    "verifier": ({"errors": 30}, "failed on 30 of 512"),
}


def run(alarms, *steps):
    return [[alarm.name for alarm in alarms.look({**HEALTHY, **changes})] for changes in steps]


def test_a_healthy_run_raises_none():
    assert run(Alarms(1e-3), *[{}] * 200) == [[]] * 200


@pytest.mark.parametrize("name", SICK)
def test_what_lasts_is_told_once(name):
    alarms = Alarms(1e-3)
    changes, words = SICK[name]
    run(alarms, *[{}] * (FIRST + 1))
    told = run(alarms, *[changes] * SILENT)
    assert told == [[]] * (IN_A_ROW - 1) + [[name]] + [[]] * (SILENT - IN_A_ROW)
    again = [alarm for _ in range(IN_A_ROW) for alarm in alarms.look({**HEALTHY, **changes})]
    assert [alarm.name for alarm in again] == [name] and words in again[0].text


@pytest.mark.parametrize("name", SICK)
def test_what_passes_is_not_told(name):
    alarms = Alarms(1e-3)
    run(alarms, *[{}] * (FIRST + 1))
    assert run(alarms, *[SICK[name][0], SICK[name][0], {}] * 10) == [[]] * 30


@pytest.mark.parametrize(("form", "right", "told"), [(0.2, -0.2, True), (0.2, 0.2, False), (-0.2, -0.2, False)])
def test_form_that_rises_while_accuracy_falls(form, right, told):
    alarms, before = Alarms(1e-3), {"rewards": {"accuracy": 0.5, "format": 0.5}}
    after = {"rewards": {"accuracy": 0.5 + right, "format": 0.5 + form}}
    run(alarms, *[before] * WINDOW)
    assert (["reward_hacking"] in run(alarms, *[after] * WINDOW)) == told


def test_general_prompts_without_a_right_answer_are_no_alarm():
    assert run(Alarms(1e-3), *[{"rewards": {"preference": 0.4}, "entropy": None}] * 50) == [[]] * 50


def test_a_resumed_run_tells_the_same():
    steps = [{}] * 8 + [SICK["entropy"][0]] * 5 + [SICK["no_variance"][0]] * 5
    whole, first, second = Alarms(1e-3), Alarms(1e-3), Alarms(1e-3)
    expected = run(whole, *steps)
    found = run(first, *steps[:10])
    second.load_state_dict(first.state_dict())
    assert found + run(second, *steps[10:]) == expected
    assert sum(map(len, expected)) == 2
