"""The load-balancing loss of mixture-of-experts students: the model's own value, however the step is cut."""

# B = sequences, T = positions, E = experts, L = routers, V = vocabulary

import json

import pytest
import torch
from model_families import MIXTURES, make_model
from safetensors.torch import load_file
from training_runs import micro_batches
from transformers.models.mixtral import modeling_mixtral

from lightopd.errors import ConfigError
from lightopd.objectives.base.batch import BatchTotals
from lightopd.objectives.loss import compute_loss
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.data.batches import collate, collect_rows
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.student.forward import routed_tokens, routers_of
from lightopd.training.student.router_loss import check_experts, count_load, experts_per_token, step_load
from lightopd.training.student.training_mode import prepare_student

CPU = torch.device("cpu")
REVERSE_KL = {"target": {"kind": "divergence"}}
# Adam divides by the root of its second moment: a larger floor keeps noise of near-zero gradients small.
SETTINGS = {
    "steps": 3,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "router_loss": 0.5,
}


def sharp_model(name):
    """A random model whose routers prefer some experts, so that the load is uneven."""
    model = make_model(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("gate.weight", "router.weight")):
                parameter.mul_(50)
    return model


def load_of(model, batches):
    top_k = experts_per_token(model)
    with torch.no_grad():
        counts = [count_load(routers_of(model, batch), batch.is_token_BT, top_k) for batch in batches]
    return step_load(counts, lambda counts_E: counts_E)


def losses_and_gradients(model, batches):
    """The objective's loss, the routers' loss, and the gradient of their sum, of a whole step."""
    model.zero_grad()
    load, objective = load_of(model, batches), ObjectiveConfig.model_validate(REVERSE_KL)
    total, balance = 0.0, 0.0
    for batch in batches:
        student, routers = routed_tokens(model, batch, ("teacher",))
        own = compute_loss(objective, batch.rollouts, student).value
        routed = load.loss(routers, batch.is_token_BT)
        (own + 0.5 * routed).backward()
        total, balance = total + float(own.detach()), balance + float(routed.detach())
    return total, balance, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(one, other):
    assert one[:2] == pytest.approx(other[:2], rel=1e-6, abs=1e-6)
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], rtol=1e-6, atol=1e-6)


def switch_loss(logits_LNE, top_k):
    """arXiv 2101.03961, equations 4 to 6, token by token in float64."""
    shares, probabilities, decisions = {}, {}, 0
    for logits_NE in logits_LNE:
        for logits_E in logits_NE.double():
            weights = logits_E.softmax(-1).tolist()
            best = sorted(range(len(weights)), key=lambda e: -weights[e])[:top_k]
            decisions += 1
            for e, weight in enumerate(weights):
                shares[e] = shares.get(e, 0) + (e in best)
                probabilities[e] = probabilities.get(e, 0) + weight
    return len(shares) * sum(shares[e] * probabilities[e] for e in shares) / decisions**2


@pytest.mark.parametrize("name", MIXTURES)
def test_one_sequence_has_the_loss_of_the_paper_and_of_the_model_itself(data, name):
    model = sharp_model(name)
    store, index = data
    batch = collate(collect_rows(store, index, index.lengths_P.argmax()[None], BatchTotals(1, 9)), CPU)
    output = model(input_ids=batch.input_ids_BT, output_router_logits=True, use_cache=False)
    load = load_of(model, [batch])
    ours = load.loss(routers_of(model, batch), batch.is_token_BT)
    reference = switch_loss(torch.stack(output.router_logits), 2)
    assert float(ours.detach()) == pytest.approx(reference, rel=1e-6)
    assert float(ours.detach()) == pytest.approx(float(output.aux_loss.detach()), rel=1e-6)
    assert abs(reference - 2) > 1e-3, "the load is even, which any formula gives"


def test_padding_does_not_count_and_prompts_do(data):
    model = sharp_model("Qwen3Moe")
    batch = micro_batches(data, 10_000)[0]
    assert not bool(batch.is_token_BT.all())
    assert int(batch.is_token_BT.sum()) == batch.num_tokens
    own = model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.is_token_BT.long(),
        output_router_logits=True,
        use_cache=False,
    ).aux_loss
    ours = load_of(model, [batch]).loss(routers_of(model, batch), batch.is_token_BT)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-6)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GraniteMoe", "GptOss"])
def test_losses_and_gradients_do_not_depend_on_micro_batches_layout_or_recomputation(data, name):
    model = prepare_student(sharp_model(name), gradient_checkpointing=False)
    alone = losses_and_gradients(model, micro_batches(data, 19))
    assert_equal(losses_and_gradients(model, micro_batches(data, 10_000)), alone)
    packed = micro_batches(data, 60, is_packed=name != "GptOss")  # which does not keep packed rollouts apart
    assert_equal(losses_and_gradients(model, packed), alone)
    recomputed = prepare_student(sharp_model(name), gradient_checkpointing=True)
    assert_equal(losses_and_gradients(recomputed, packed), alone)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("DeepseekV3", "its forward pass"),
        ("Llama", "its forward pass"),
        ("GPT2", "its forward pass"),
        ("Afmoe", "it computes no load-balancing loss of its own"),
    ],
)
def test_a_student_without_such_a_loss_is_refused_before_the_first_step(make_cache, tmp_path, name, says):
    make_model(name).save_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match=rf"router_loss does not fit \w+: {says}.* leave router"):
        run(make_cache(tmp_path / "cache"), tmp_path / "student", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_whose_layers_are_all_dense_is_refused():
    model = make_model("Qwen3Moe")
    dense = type(model)(model.config.__class__(**{**MIXTURES["Qwen3Moe"], "mlp_only_layers": [0, 1]}))
    with pytest.raises(ConfigError, match="its decoder returns no router logits"):
        check_experts(dense.eval())


def test_another_definition_of_the_loss_is_refused(monkeypatch):
    model = make_model("Mixtral")
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *_: torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"its own load-balancing loss is .*, this one "):
        check_experts(model)


def run(cache, student, out, objective=REVERSE_KL, **settings):
    finetune = FinetuneConfig(**(SETTINGS | settings))
    return fit(cache, ModelConfig(path=str(student)), out, finetune, ObjectiveConfig(**objective))


@pytest.fixture
def mixture(tmp_path):
    sharp_model("Qwen3Moe").save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def assert_close_runs(one, other):
    left, right = (read_metrics(folder / "metrics.csv") for folder in (one, other))
    for name in ("loss", "router_loss", "grad_norm"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=1e-6, abs=1e-6)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-6, atol=1e-6)


# Pivots need a pass without gradient of their own.
PIVOTS = {**REVERSE_KL, "rollout_weights": [{"kind": "pivots", "threshold": 0.1}]}


@pytest.mark.parametrize("objective", [REVERSE_KL, PIVOTS], ids=["alone", "with statistics"])
def test_a_run_does_not_depend_on_the_size_of_micro_batches(make_cache, mixture, tmp_path, objective):
    cache = make_cache(tmp_path / "cache")
    run(cache, mixture, tmp_path / "small", objective, micro_batch_tokens=20)
    run(cache, mixture, tmp_path / "large", objective, micro_batch_tokens=10_000)
    assert_close_runs(tmp_path / "small", tmp_path / "large")


def test_the_loss_is_added_with_its_weight_and_training_evens_the_load(make_cache, mixture, tmp_path):
    cache = make_cache(tmp_path / "cache")
    rows = {}
    for weight in (None, 0.5, 2.0):
        out = tmp_path / str(weight)
        run(cache, mixture, out, router_loss=weight, steps=8, optimizer={"lr": 5e-3})
        rows[weight] = read_metrics(out / "metrics.csv")
    own = rows[None][0]["loss"]
    assert "router_loss" not in rows[None][0]
    for weight in (0.5, 2.0):
        first = rows[weight][0]
        assert first["loss"] == pytest.approx(own + weight * first["router_loss"], rel=1e-5)
    assert rows[2.0][-1]["router_loss"] < 0.5 * (rows[2.0][0]["router_loss"] + 2)


def test_without_the_setting_no_pass_is_added(make_cache, mixture, tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache")
    calls = []
    counted = torch.nn.Module.register_forward_pre_hook

    def passes(**settings):
        calls.clear()
        run(cache, mixture, tmp_path / str(settings), steps=1, micro_batch_tokens=10_000, **settings)
        return len(calls)

    prepare = prepare_student

    def noted(student, **settings):
        prepared = prepare(student, **settings)
        counted(prepared.get_decoder(), lambda *_: calls.append(1))
        return prepared

    monkeypatch.setattr("lightopd.training.fit.prepare_student", noted)
    assert passes(router_loss=None) == 1
    assert passes() == 2
    assert passes(objective=PIVOTS, router_loss=None) == passes(objective=PIVOTS) == 2


def test_an_adapter_feels_the_loss(make_cache, mixture, tmp_path):
    cache, adapter = make_cache(tmp_path / "cache"), {"rank": 2, "target_modules": ("q_proj",)}
    for weight in (None, 0.5):
        run(cache, mixture, tmp_path / str(weight), adapter=adapter, router_loss=weight)
    first, second = (read_metrics(tmp_path / name / "metrics.csv")[0] for name in ("None", "0.5"))
    assert second["loss"] == pytest.approx(first["loss"] + 0.5 * second["router_loss"], rel=1e-5)
    assert second["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-3)


def test_a_run_from_before_the_setting_goes_on_and_another_weight_is_refused(make_cache, mixture, tmp_path):
    cache, out = make_cache(tmp_path / "cache"), tmp_path / "out"
    run(cache, mixture, out, router_loss=None, steps=2)
    state_file = newest_checkpoint(out / "checkpoints")[0] / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state["recipe"].pop("router_loss", "absent") is None
    state_file.write_text(json.dumps(state))
    assert run(cache, mixture, out, router_loss=None).steps == 3
    with pytest.raises(Exception, match=r"router_loss is 0\.5, there it was null"):
        run(cache, mixture, out, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "recompute"), [("ddp", False), ("fsdp", True)])
def test_two_processes_give_the_run_of_one(ranks, make_cache, mixture, tmp_path, strategy, recompute):
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    run(cache, mixture, one)
    shared = {"devices": 2, "strategy": strategy, "gradient_checkpointing": recompute}
    ranks(cache, mixture, two, REVERSE_KL, **(SETTINGS | shared))
    assert_close_runs(one, two)
