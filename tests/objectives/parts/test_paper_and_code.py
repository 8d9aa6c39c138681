"""Where a paper and its released code differ: bounds, temperatures and means, by hand."""

from dataclasses import replace
from math import exp, log
from pathlib import Path

import pytest
import torch
from objective_cases import evaluate, make_world, recipe

PAGES = Path(__file__).parents[3] / "docs" / "methods"


def everywhere(teacher, student, signal="teacher"):
    """A world of two tokens whose teacher and live student say the same at every position."""
    world = make_world(2, vocabulary=2)
    tables = {**world.tables, signal: torch.tensor(teacher, dtype=torch.float64).log().expand(32, 2)}
    student_NV = torch.tensor(student, dtype=torch.float64).log().expand(32, 2)
    return replace(world, tables=tables, student_NV=student_NV)


@pytest.mark.parametrize(
    ("student", "wanted"),
    [
        ((0.9, 0.1), 0.0),
        # .9 log(.9 / .2) is cut to .05; .1 log(.1 / .8) = -.208 would lead below the teacher's 0.
        ((0.2, 0.8), 0.05),
        # .9 log(.9 / .99) = -.086, and .1 log(.1 / .01) is cut.
        ((0.99, 0.01), 0.05),
    ],
)
def test_renios_element_clip_has_a_lower_bound_so_that_nothing_is_below_the_teacher(student, wanted):
    value, gradient_NV, _ = evaluate(recipe("renio"), everywhere((0.9, 0.1), student))
    assert value == pytest.approx(wanted, abs=1e-12)
    assert gradient_NV.abs().max() == pytest.approx(0, abs=1e-12)


def test_renios_element_clip_keeps_the_gradient_of_an_outcome_between_its_bounds():
    value, gradient_NV, _ = evaluate(recipe("renio"), everywhere((0.5, 0.5), (0.48, 0.52)))
    assert value == pytest.approx(0.5 * log(0.5 / 0.48))
    # -T_0 of the one term that is counted, T_0 log(T_0 / s_0): d/dz = -T_0 (e_0 - s).
    row = gradient_NV[gradient_NV.abs().sum(1) > 0]
    torch.testing.assert_close(row / row[:, :1], torch.tensor([[1.0, -1.0]]).double().expand_as(row))
    assert (row[:, 0] < 0).all()


def tempered(probability, temperature):
    """Of two tokens, the first one's probability after both logits were divided."""
    return 1 / (1 + exp(-log(probability / (1 - probability)) / temperature))


def kl(t, s):
    return t * log(t / s) + (1 - t) * log((1 - t) / (1 - s))


@pytest.mark.parametrize(("name", "temperature"), [("opsd_code", 1.1), ("opsd", 1.0)])
def test_opsds_code_divides_both_logits_by_a_temperature_and_its_paper_does_not(name, temperature):
    t, s = tempered(0.9, temperature), tempered(0.4, temperature)
    wanted = (kl(t, (t + s) / 2) + kl(s, (t + s) / 2)) / 2
    value = evaluate(recipe(name), everywhere((0.9, 0.1), (0.4, 0.6), "privileged"))[0]
    assert value == pytest.approx(wanted)


def test_renios_code_divides_both_logits_by_a_temperature():
    t, s = tempered(0.52, 1.1), tempered(0.5, 1.1)
    terms = (t * log(t / s), (1 - t) * log((1 - t) / (1 - s)))
    wanted = sum(min(max(term, 0.0), 0.05) for term in terms)
    assert wanted != pytest.approx(0.52 * log(0.52 / 0.5), rel=0.01)
    value = evaluate(recipe("renio_code"), everywhere((0.52, 0.48), (0.5, 0.5)))[0]
    assert value == pytest.approx(wanted)


PER_TOKEN = {"g_opd": None, "exopd": None, "v_zero": None, "opsd": "opsd_code", "scope": "scope_code"}
"""Recipes whose code averages over the tokens of the batch, and the recipe of the code where there is one."""


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_the_page_says_how_paper_and_code_average_and_a_setting_does_either(name):
    page = (PAGES / Path({"exopd": "g_opd"}.get(name, name)).with_suffix(".md")).read_text()
    told = page.partition("## Paper and code")[2].partition("\n## ")[0]
    assert "token" in told
    assert (PER_TOKEN[name] or "reduce: token_mean") in told
    of_code = recipe(PER_TOKEN[name] or name, **({} if PER_TOKEN[name] else {"reduce": "token_mean"}))
    assert {term.reduce for term in of_code.terms} == {"token_mean"}
    assert not {term.reduce for term in recipe(name).terms} & {"token_mean"}


@pytest.mark.parametrize("name", ["g_opd", "v_zero", "opsd"])
def test_a_mean_over_tokens_weighs_rollouts_by_their_length_and_a_mean_over_rollouts_does_not(name):
    world = make_world(2)
    lengths = torch.tensor([len(world.tokens(row)) for row in range(world.size)], dtype=torch.float64)
    own, batch = (evaluate(recipe(name, reduce=one), world)[1] for one in ("sequence_mean", "token_mean"))
    share_R = lengths * world.size / lengths.sum()
    torch.testing.assert_close(batch, own * share_R[world.row_N][:, None], atol=1e-12, rtol=1e-9)


def test_the_likelihood_of_scopes_code_is_a_mean_over_the_tokens_of_correct_rollouts_alone():
    world = make_world(2)
    of_code = evaluate(recipe("scope_code"), world)[1]
    shorter = replace(world, loss_mask_N=world.loss_mask_N & ~((world.row_N == 4) & (world.index_N > 0)))
    assert world.rewards[4] == 0.0
    changed = evaluate(recipe("scope_code"), shorter)[1]
    is_right_N = torch.tensor([world.rewards[row] > 0.5 for row in world.row_N.tolist()])
    torch.testing.assert_close(changed[is_right_N], of_code[is_right_N], atol=1e-7, rtol=1e-6)
    assert (changed[~is_right_N] - of_code[~is_right_N]).abs().max() > 1e-4
