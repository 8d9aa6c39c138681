"""Methods that are one another at some setting."""

from dataclasses import replace

import pytest
import torch
from objective_cases import evaluate, make_world, objective, recipe
from objective_equations import batch_mean, kl
from torch import Tensor

from lightopd.objectives.state import ObjectiveState
from lightopd.schemas.objectives.objective import ObjectiveConfig

PLAIN = {"kind": "log_ratio", "clip": None}


def same(one: ObjectiveConfig, other: ObjectiveConfig, **keys: object) -> None:
    """Equal values and gradients on a student that has drifted."""
    world = keys.pop("world", make_world(2, drift=0.5))
    left, right = (evaluate(config, world, **keys) for config in (one, other))
    assert left[0] == pytest.approx(right[0], abs=1e-7)
    torch.testing.assert_close(left[1], right[1], atol=1e-8, rtol=1e-7)


def with_keys(config: ObjectiveConfig, **keys: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({**config.model_dump(mode="json"), **keys})


def without_ratio(world_seed: int = 2) -> Tensor:
    """Student logits at rollout: every ratio is 1."""
    return make_world(world_seed, drift=0.5).tables["rollout_student"]


def test_the_default_objective_is_reverse_kl_on_the_top_k():
    assert ObjectiveConfig() == recipe("recommended_topk_reverse_kl")


def test_the_paper_s_loss_is_the_target_log_ratio_as_it_stands():
    assert objective(target="log_ratio") == recipe("lightning_opd")


def test_lightning_without_a_clip_that_binds_is_plain_opd():
    same(recipe("lightning_opd"), recipe("effopd"))


@pytest.mark.parametrize("name", ["exopd", "exopd_baseline"])
def test_a_factor_of_one_is_opd_for_any_reference(name):
    plain = objective(
        target=PLAIN, token_weights=[{"kind": "ratio", "cap": 5.0}], baseline=recipe(name).terms[0].baseline
    )
    same(recipe(name, extrapolate={"kind": "constant", "factor": 1.0}), plain)


def test_a_reference_equal_to_the_teacher_makes_the_factor_irrelevant():
    same(
        recipe("exopd", extrapolate={"kind": "constant", "reference": "teacher", "factor": 3.0}),
        recipe("exopd", extrapolate={"kind": "constant", "factor": 1.0}),
    )


def test_a_factor_below_one_lies_between_reference_and_teacher():
    world = make_world(2)
    means = [
        evaluate(recipe("exopd", extrapolate={"kind": "constant", "factor": factor}), world)[2]["advantage"]
        for factor in (0.5, 1.0)
    ]
    only = evaluate(objective(target=PLAIN, signal="reference"), world)[2]["advantage"]
    assert means[0] == pytest.approx((only + means[1]) / 2, abs=1e-6)


def test_uni_opd_without_a_wanted_margin_is_clipped_opd():
    clipped = recipe("uni_opd", advantage=[])
    same(recipe("uni_opd", advantage=[{"kind": "margin", "delta": -1e9}]), clipped)


def test_prune_opd_without_a_drop_is_opd():
    same(recipe("prune_opd", token_weights=[{"kind": "drift_fade", "drop": 0.0}]), recipe("effopd"))


@pytest.mark.parametrize("name", ["tip", "tip_entropy"])
def test_keeping_every_token_is_the_reverse_kl(name):
    score = recipe(name).terms[0].token_weights[0].score
    every = recipe(name, token_weights=[{"kind": "select_tokens", "score": score, "keep": 1.0}])
    same(every, recipe("f_reverse_kl"), top_k=4)


def test_tcod_past_the_last_turn_is_opd():
    late = ObjectiveState(steps=100)
    same(recipe("tcod"), recipe("effopd"), state=late)


def test_renio_without_pivots_is_its_divergence():
    none = recipe("renio", rollout_weights=[{"kind": "pivots", "threshold": 1e30}])
    same(none, recipe("renio", rollout_weights=[]))


def test_sod_with_weight_one_and_the_exact_kl_is_dgrpo():
    """At the student that sampled: the token mean of A_group + 0.1 (log T - log s)."""
    sod = recipe("sod", advantage=[{"kind": "coefficient", "value": 0.1}, {"kind": "group_reward"}])
    dgrpo = recipe("dgrpo").model_dump(mode="json")
    for term in dgrpo["terms"]:
        term["reduce"] = "token_mean"
    dgrpo["terms"][1].update(target=PLAIN)
    same(sod, ObjectiveConfig.model_validate(dgrpo), student_NV=without_ratio())


def test_sod_scales_by_one_where_every_turn_has_drifted_alike():
    world = make_world(2)
    shifted = world.tables["rollout_student"] + 0.25 * torch.where(torch.arange(7) % 2 == 0, 1.0, -1.0)
    even = replace(world, tables={**world.tables, "teacher": shifted})
    scaled = recipe("sod", advantage=[{"kind": "step_drift"}])
    same(scaled, recipe("sod", advantage=[]), world=even)


def test_constant_strength_makes_aligndistil_the_expected_exopd_gradient():
    """KL(s || T^lambda B^(1-lambda) / Z) has the gradient of E_s[A grad log s]."""
    factor = {"kind": "constant", "reference": "reverse_dpo", "factor": 2.0}
    world = make_world(2)
    exact = recipe("aligndistil", extrapolate=factor, token_weights=[])
    _, gradient_NV, _ = evaluate(exact, world)
    student_NV = world.student_NV.log_softmax(-1)
    advantage_NV = 2 * world.tables["dpo"] - world.tables["reverse_dpo"] - student_NV
    p_NV = student_NV.exp()
    mean_N1 = (p_NV * advantage_NV).sum(1, keepdim=True)
    counts_R = torch.tensor([len(world.tokens(row)) for row in range(world.size)])
    share_N = world.loss_mask_N / counts_R[world.row_N] / world.size
    torch.testing.assert_close(gradient_NV, -share_N[:, None] * p_NV * (advantage_NV - mean_N1))


@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_an_extrapolation_on_cut_supports_is_that_of_the_common_tokens_and_one_for_the_rest(top_k):
    world = make_world(2)
    target = {"kind": "divergence", "divergence": "reverse_kl"}
    config = objective(signal="dpo", target=target, extrapolate={"reference": "teacher", "factor": 1.5})
    value, gradient_NV, _ = evaluate(config, world, top_k=top_k)
    logits_NV = world.student_NV.clone().requires_grad_()
    student_NV = logits_NV.log_softmax(-1)

    def merged(table_V: Tensor, common: list[int]) -> Tensor:
        rest = [token for token in range(7) if token not in common]
        return torch.cat([table_V[common], table_V[rest].logsumexp(0, keepdim=True)])

    def loss(n: int) -> Tensor:
        kept = [set(world.tables[name][n].topk(top_k).indices.tolist()) for name in ("dpo", "teacher")]
        common = sorted(kept[0] & kept[1])
        teacher, base = (merged(world.tables[name][n], common) for name in ("dpo", "teacher"))
        return kl(merged(student_NV[n], common), (1.5 * teacher - 0.5 * base).log_softmax(0))

    wanted = batch_mean(world, loss)
    assert value == pytest.approx(wanted.item(), abs=1e-9)
    torch.testing.assert_close(gradient_NV, torch.autograd.grad(wanted, logits_NV)[0])


def test_equal_models_leave_aligndistil_its_first_model_at_the_floor():
    equal = {"kind": "by_distance", "reference": "dpo", "floor": 1e-3}
    plain = recipe("f_reverse_kl", signal="dpo", weight=100.0)
    same(recipe("aligndistil", extrapolate=equal), plain, top_k=4)


def test_jsd_ends_are_the_two_kls():
    for beta, name in ((0.0, "f_forward_kl"), (1.0, "f_reverse_kl")):
        jsd = {"kind": "divergence", "divergence": "jsd", "parameter": beta}
        same(objective(target=jsd), recipe(name), top_k=4)


def test_scope_with_equal_weights_on_incorrect_rollouts_is_summed_opd():
    world = replace(make_world(2), rewards=(0.0,) * 8)
    plain = recipe("scope").model_dump(mode="json")["terms"][1]
    term = {**plain, "rollout_weights": [{"kind": "perplexity", "of": "teacher", "tau": 1e12}]}
    opd = objective(target=PLAIN, reduce="sequence_sum")
    same(ObjectiveConfig.model_validate({"terms": [term]}), opd, world=world)


def test_video_opd_of_all_prompts_is_opd():
    every = {"kind": "teacher_validated", "answers": "unused", "min_teacher": -1.0, "prompts": 1000}
    same(with_keys(recipe("video_opd"), select=[every]), recipe("effopd"))


def test_sampled_token_methods_differ_in_context_and_clip_alone():
    mgsd = recipe("mgsd", token_weights=[], reduce="sequence_mean")
    v_zero = recipe("v_zero", token_weights=[], rollout_weights=[])
    same(mgsd, recipe("opsd_sampled"))
    same(v_zero, recipe("opsd_sampled"))
    same(recipe("opsd_sampled", signal="teacher"), recipe("effopd"))


def test_hy_embodied_is_the_forward_kl_and_a_context_makes_it_other():
    same(recipe("hy_embodied"), recipe("f_forward_kl"), top_k=4)
    assert evaluate(recipe("opsd"), make_world(2))[0] != evaluate(recipe("f_jsd"), make_world(2))[0]


def test_mixed_kl_ends_are_the_two_kls():
    mixed = recipe("decoupling_mix").model_dump(mode="json")
    for kept, name in ((0, "f_reverse_kl"), (1, "f_forward_kl")):
        term = {**mixed["terms"][kept], "weight": 1.0}
        same(ObjectiveConfig.model_validate({"terms": [term]}), recipe(name), top_k=4)


def test_identical_contexts_give_every_v_zero_rollout_weight_one():
    alike = recipe("v_zero", rollout_weights=[{"kind": "contrast", "negative": "privileged"}])
    same(alike, recipe("v_zero", rollout_weights=[]))


def test_raft_untempered_is_the_sum_of_likelihood_and_forward_kl():
    raft = recipe("raft").model_dump(mode="json")
    raft["terms"][1]["target"].update(temperature=1.0)
    by_hand = objective(
        terms=[
            {"name": "sft", "rows": "teacher", "average_over": "rows", "target": "mle"},
            {
                "name": "kl",
                "rows": "student",
                "average_over": "rows",
                "signal": "privileged",
                "target": {"kind": "divergence", "divergence": "forward_kl"},
            },
        ]
    )
    same(ObjectiveConfig.model_validate(raft), by_hand)


def test_preference_is_log_two_at_the_reference_and_its_gradient_turns_with_the_pair():
    world = make_world(2)
    value, gradient_NV, _ = evaluate(recipe("soda"), world, student_NV=world.tables["warmup"])
    assert value == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    swapped = replace(world, origins=("student", "teacher") * 4)
    _, turned_NV, _ = evaluate(recipe("soda"), swapped, student_NV=world.tables["warmup"])
    torch.testing.assert_close(turned_NV, -gradient_NV)


def test_preference_does_not_see_what_shifts_both_answers_of_the_reference():
    world = make_world(2)
    two = {"warmup": world.tables["warmup"].clone()}
    for row in range(8):
        two["warmup"][world.tokens(row)[0]] += 3.0
    moved = replace(world, tables={**world.tables, **two})
    left, right = (evaluate(recipe("soda"), one) for one in (world, moved))
    assert left[0] == pytest.approx(right[0], abs=1e-12)


def test_a_pair_of_equal_texts_has_no_gradient():
    world = make_world(2)
    places = [world.tokens(6), world.tokens(7)]
    first, second = (torch.tensor(tokens) for tokens in places)
    second = second[: len(first)]
    logits_NV, warmup_NV = world.student_NV.clone(), world.tables["warmup"].clone()
    logits_NV[second], warmup_NV[second] = logits_NV[first], warmup_NV[first]
    ids_N, trained_N = world.ids_N.clone(), world.loss_mask_N.clone()
    ids_N[second] = ids_N[first]
    trained_N[places[1][len(first) :]] = False
    alike = replace(world, ids_N=ids_N, loss_mask_N=trained_N, tables={**world.tables, "warmup": warmup_NV})
    _, gradient_NV, _ = evaluate(recipe("soda"), alike, student_NV=logits_NV)
    torch.testing.assert_close(gradient_NV[first], -gradient_NV[second])


def test_a_router_that_knows_no_domain_is_none():
    routed = objective(target=PLAIN, router={"signals": {"physics": "code_teacher"}})
    same(routed, objective(target=PLAIN))


@pytest.mark.parametrize("target", [PLAIN, {"kind": "divergence"}])
def test_a_router_gives_each_domain_its_teacher(target):
    world = make_world(2)
    is_code_N1 = torch.tensor([domain == "code" for domain in world.domains])[world.row_N][:, None]
    merged_NV = torch.where(is_code_N1, world.tables["code_teacher"], world.tables["teacher"])
    one = replace(world, tables={**world.tables, "teacher": merged_NV})
    routed = evaluate(objective(target=target, router={"signals": {"code": "code_teacher"}}), world, top_k=4)
    merged = evaluate(objective(target=target), one, top_k=4)
    torch.testing.assert_close(routed[1], merged[1])


def test_a_term_counts_with_its_weight():
    twice = recipe("f_reverse_kl", weight=2.0)
    half = recipe("f_reverse_kl")
    assert evaluate(twice, make_world(2))[0] == pytest.approx(2 * evaluate(half, make_world(2))[0])


def test_token_mean_and_sequence_sum_follow_their_definitions():
    world = make_world(2)
    counts = [len(world.tokens(row)) for row in range(world.size)]
    values = {
        reduce: evaluate(recipe("f_reverse_kl", reduce=reduce), world)[0]
        for reduce in ("sequence_sum", "token_mean")
    }
    assert values["token_mean"] * sum(counts) == pytest.approx(values["sequence_sum"] * world.size)


def test_the_clip_bounds_the_advantage_after_baseline_and_shift():
    clipped = recipe("lightning_opd", target={"kind": "log_ratio", "clip": 0.5})
    _, _, metrics = evaluate(clipped, make_world(2))
    assert 0 < metrics["clipped"] < 1
    assert abs(metrics["advantage"]) <= 0.5


def test_dual_clip_leaves_a_positive_advantage_alone_however_likely_its_token_has_become():
    """The upper clip is set out of reach, so that only the dual clip could silence a token."""
    world = make_world(2)
    ids_N1, base_NV = world.ids_N[:, None], world.tables["rollout_student"]
    grown_NV = base_NV.scatter_add(1, ids_N1, torch.full_like(ids_N1, 2, dtype=torch.float64))
    teacher_NV = base_NV.scatter_add(1, ids_N1, torch.full_like(ids_N1, 9, dtype=torch.float64))
    one = replace(world, tables={**world.tables, "teacher": teacher_NV.log_softmax(-1)})
    free, dual = (
        evaluate(
            objective(target=PLAIN, token_weights=[{"kind": "ppo_clip", "high": 1e9, "dual": limit}]),
            one,
            student_NV=grown_NV,
        )
        for limit in (None, 1.0 + 1e-9)
    )
    assert free[1].abs().max() > 0.01
    torch.testing.assert_close(dual[1], free[1], atol=0, rtol=0)


def test_dual_clip_silences_a_negative_advantage_that_has_grown_likely():
    world = make_world(2)
    ids_N1, base_NV = world.ids_N[:, None], world.tables["rollout_student"]
    grown_NV = base_NV.scatter_add(1, ids_N1, torch.full_like(ids_N1, 6, dtype=torch.float64))
    teacher_NV = base_NV.scatter_add(1, ids_N1, torch.full_like(ids_N1, -6, dtype=torch.float64))
    one = replace(world, tables={**world.tables, "teacher": teacher_NV.log_softmax(-1)})
    weights = [[{"kind": "ppo_clip", "dual": dual}] for dual in (None, 1.0 + 1e-9)]
    free, dual = (
        evaluate(objective(target=PLAIN, token_weights=weight), one, student_NV=grown_NV)
        for weight in weights
    )
    assert free[1].abs().max() > 0.01
    assert dual[1].abs().max() == 0


def test_rollouts_whose_tokens_all_weigh_nothing_add_nothing():
    cut = [{"kind": "log_ratio_cut", "limit": 1e-12}]
    value, gradient, _ = evaluate(
        objective(target=PLAIN, token_weights=cut, normalise_token_weights=True), make_world(2)
    )
    assert value == 0
    assert gradient.abs().max() == 0
