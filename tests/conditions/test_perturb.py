import copy
import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from align_cluster.backbones.levels import sd3_sigmas
from align_cluster.backbones.sd3 import SD3
from align_cluster.conditions import perturb
from align_cluster.conditions.exploration import E2po, gamma, strength
from align_cluster.conditions.perturb import initial_noise, learn, objective, optimise, render, tokenize
from align_cluster.conditions.precision import to_tensor

TEXTS = [
    "a photo of a red circle",
    "a photo of two blue squares",
    "a drawing of a red circle and a blue square",
    "a photo of a green triangle left of a red star",
    "",
    'a sign that says "CAT"',
    "a circle",
    "a photo of a red circle and a blue square",
]
BOUNDS = ("token_l2", "inf", "grad_norm")


@pytest.fixture(scope="module")
def clip(settings):
    """The embedded pipeline's CLIP-L and its tokenizer."""
    pipeline = SD3(settings)._text
    return pipeline.text_encoder.requires_grad_(False), pipeline.tokenizer


def start(clip, texts, config, seed=0):
    """(ids, content, initial noise) of prompts, at full length."""
    ids, content = tokenize(clip[1], texts)
    count, width = config.conditions - 1, clip[0].config.hidden_size
    noise = [
        initial_noise(text, seed, count, row, width, config.init) for text, row in zip(texts, content, strict=True)
    ]
    return ids, content, torch.stack(noise)


def learned(clip, texts, config, seed=0):
    return learn(*clip, texts, texts, config, seed)


def by_hand(encoder, ids, deltas, embedding):
    """Global embeddings [V, D] of one prompt, ids [S], under deltas [V, S, d], from the encoder's layers alone."""
    model, length = encoder.text_model, len(ids)
    hidden = model.embeddings.token_embedding.weight[ids] + deltas + model.embeddings.position_embedding.weight[:length]
    hidden = hidden.to(next(encoder.parameters()).dtype)
    mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    for layer in model.encoder.layers:
        hidden = layer(hidden, mask)
    pooled = model.final_layer_norm(hidden)[:, ids.tolist().index(encoder.config.eos_token_id)]
    return pooled if embedding == "pooled" else pooled @ encoder.text_projection.weight.T


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def loss_by_hand(encoder, ids, deltas, config):
    """The objective of one prompt, pair by pair."""
    vectors = by_hand(encoder, ids, deltas, config.embedding)
    anchor = by_hand(encoder, ids, torch.zeros_like(deltas[:1]), config.embedding)[0].detach()
    ring = sum(torch.relu((cosine(vector, anchor) - config.mu).abs() - config.margin) for vector in vectors)
    pairs = [cosine(a, b) for a, b in itertools.combinations(vectors, 2)]
    pairs = pairs or [cosine(vectors[0], anchor)]  # of two conditions, the variant and the original
    return config.diversity * sum(pairs) / len(pairs) + ring


# ---------------------------------------------------------------------------------------------- the schedule of phase 2


def test_the_weight_of_a_perturbed_condition_over_sd3s_ten_levels():
    sigmas = sd3_sigmas(10, 3.0)
    np.testing.assert_allclose(sigmas[:7], [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022], atol=5e-5)
    expected = [1, 0.900, 0.783, 0.644, 0.476, 0.268, 0.0055, 0, 0, 0, 0]
    np.testing.assert_allclose(gamma(sigmas, 0.4), expected, atol=5e-4)


@pytest.mark.parametrize("rho", [0.05, 0.1, 0.3, 0.4, 0.7, 1.0])
def test_the_weight_is_1_at_the_start_falls_and_is_0_from_one_minus_rho_down(rho):
    levels = np.linspace(1, 0, 1001)
    weights = gamma(levels, rho)
    assert weights[0] == 1 and weights[-1] == 0 and (np.diff(weights) <= 0).all()
    assert (weights[levels < 1 - rho] == 0).all() and (weights[levels > 1 - rho + 1e-9] > 0).all()
    np.testing.assert_allclose(gamma(levels, 1.0), levels, atol=1e-15)
    assert [float(gamma(float(level), rho)) for level in levels] == weights.tolist()
    np.testing.assert_array_equal(gamma(torch.from_numpy(levels), rho).numpy(), weights)


def test_the_strength_by_time_is_that_of_steps_and_a_static_one_never_fades():
    """SD3's ten levels: by sigma the weights sum to 4.08, by time to 1 + .75 + .5 + .25."""
    levels = sd3_sigmas(10, 3.0)
    by_time = [strength(float(level), levels, E2po(clock="time")) for level in levels]
    np.testing.assert_allclose(by_time, [1, 0.75, 0.5, 0.25] + [0] * 7, atol=1e-12)
    assert sum(strength(float(level), levels, E2po()) for level in levels) == pytest.approx(4.077, abs=1e-3)
    between = strength(float(levels[1] + levels[2]) / 2, levels, E2po(clock="time"))
    assert between == pytest.approx(0.625)
    assert {strength(float(level), levels, E2po(schedule="static")) for level in levels} == {1.0}
    even = np.linspace(1, 0, 11)  # where levels are not shifted, both clocks are one
    for level in even:
        assert strength(level, even, E2po(clock="time")) == pytest.approx(gamma(level, 0.4), abs=1e-12)
    for level in levels:  # fp32, as rollouts hand it over
        assert strength(float(np.float32(level)), levels, E2po(clock="time")) == pytest.approx(
            strength(float(level), levels, E2po(clock="time")), abs=1e-5
        )


# ------------------------------------------------------------------------------------------------------ content tokens


def test_content_is_what_stands_between_begin_and_first_end(clip):
    ids, content = tokenize(clip[1], ["a red circle", "", " ".join(["red"] * 30), "a <|endoftext|> red circle"])
    assert ids.shape == content.shape == (4, 16)
    positions = [row.nonzero().flatten().tolist() for row in content]
    assert positions == [[1, 2, 3], [], list(range(1, 15)), [1]]
    assert ids[2, 15] == clip[1].eos_token_id and ids[0, 5] == clip[1].pad_token_id


@pytest.mark.parametrize("bound", BOUNDS)
def test_only_content_tokens_are_perturbed_and_positions_are_added_inside(clip, bound):
    encoder, config = clip[0], E2po(iterations=4, bound=bound)
    ids, content, noise = start(clip, TEXTS[:5], config)
    seen = []
    handle = encoder.text_model.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output))
    deltas = optimise(encoder, ids, content, noise, config)
    handle.remove()
    table = encoder.text_model.embeddings
    plain = table.token_embedding(ids) + table.position_embedding.weight
    others = ~content.repeat_interleave(3, 0)
    assert len(seen) == 1 + 4
    np.testing.assert_array_equal(seen[0], plain)  # the anchor
    for output in seen[1:]:
        np.testing.assert_array_equal(output.detach()[others], plain.repeat_interleave(3, 0)[others])
    np.testing.assert_allclose(seen[1].unflatten(0, (5, 3)).detach(), plain[:, None] + noise, atol=1e-6)
    assert (deltas.flatten(0, 1)[others] == 0).all() and (deltas.flatten(0, 1)[~others] != 0).all()


# ------------------------------------------------------------------------------------------------------- the objective


def test_the_objective_of_vectors_that_can_be_reckoned_by_hand():
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.8, 0.6]]])
    losses = objective(vectors, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), E2po(diversity=50))
    # orthogonal: no pair, |1 - .8| - .01 + |0 - .8| - .01; equal and on the ring: one pair of cosine 1
    torch.testing.assert_close(losses, torch.tensor([0.19 + 0.79, 50.0]))


def test_three_variants_evenly_on_the_ring_reach_the_lowest_mean_cosine():
    turns = torch.arange(3) * 2 * torch.pi / 3
    vectors = torch.stack([torch.full((3,), 0.8), 0.6 * turns.cos(), 0.6 * turns.sin()], dim=1)[None]
    loss = objective(vectors, torch.tensor([[1.0, 0.0, 0.0]]), E2po(conditions=4, diversity=1))
    assert loss.item() == pytest.approx(0.8**2 - 0.6**2 / 2, abs=1e-6)  # mu^2 - (1 - mu^2) / (n - 1)


@pytest.mark.parametrize("conditions", [2, 3, 5])
def test_the_objectives_gradient_is_that_of_finite_differences(clip, conditions):
    encoder, config = copy.deepcopy(clip[0]).double(), E2po(conditions=conditions, diversity=2.0)
    ids, content, noise = start(clip, TEXTS[:1], config)
    deltas = (3 * noise).double().requires_grad_()

    def loss(values):
        vectors = by_hand(encoder, ids[0], values[0], "projected")
        anchor = by_hand(encoder, ids[0], torch.zeros_like(values[0, :1]), "projected")
        unit = torch.nn.functional.normalize
        return objective(unit(vectors, dim=-1)[None], unit(anchor, dim=-1), config)[0]

    assert loss(deltas).item() == pytest.approx(loss_by_hand(encoder, ids[0], deltas[0], config).item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss(deltas), deltas)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        way = torch.randn(deltas.shape, generator=generator, dtype=torch.float64) * content[:, None, :, None]
        step = 1e-6 * way
        slope = (loss(deltas + step) - loss(deltas - step)) / 2e-6
        assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("conditions", "embedding"), [(2, "projected"), (4, "projected"), (4, "pooled")])
def test_learning_is_adamw_on_the_objective_with_the_bound_after_every_step(clip, bound, conditions, embedding):
    encoder = copy.deepcopy(clip[0]).double()
    radius = {"token_l2": 0.05, "inf": 0.012, "grad_norm": 0.05}[bound]
    config = E2po(bound=bound, conditions=conditions, embedding=embedding, radius=radius, lr=3e-3)
    texts = [TEXTS[0], TEXTS[2]]
    ids, content, noise = start(clip, texts, config)
    for prompt in range(2):
        deltas = noise[prompt].double()
        first, second = torch.zeros_like(deltas), torch.zeros_like(deltas)
        for step in range(1, 6):
            deltas.requires_grad_()
            (gradient,) = torch.autograd.grad(loss_by_hand(encoder, ids[prompt], deltas, config), deltas)
            gradient = gradient * content[prompt][None, :, None]
            if bound == "grad_norm":
                gradient = gradient * min(1, radius / gradient.norm().item())
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            deltas = deltas.detach() - 3e-3 * update
            if bound == "token_l2":
                norms = deltas.norm(dim=-1, keepdim=True)
                deltas = torch.where(norms > radius, deltas * radius / norms, deltas)
            elif bound == "inf":
                deltas = deltas.clamp(-radius, radius)
            ours = optimise(encoder, ids, content, noise.double(), config.model_copy(update={"iterations": step}))
            torch.testing.assert_close(ours[prompt], deltas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bound", ["token_l2", "inf"])
def test_the_bound_holds_after_every_step_and_is_reached(clip, bound):
    config = E2po(bound=bound, radius=0.03, lr=1e-2)
    arguments = start(clip, TEXTS[:4], config)
    assert size(arguments[2], bound) > 0.03
    for iterations in range(1, 12):
        deltas = optimise(clip[0], *arguments, config.model_copy(update={"iterations": iterations}))
        assert 0.0299 < size(deltas, bound) <= 0.03 * (1 + 1e-6), iterations


def size(deltas, bound):
    return (deltas.norm(dim=-1) if bound == "token_l2" else deltas.abs()).max().item()


def test_learning_spreads_the_variants_within_the_bound_and_logs_their_true_cosines(clip):
    config = E2po(iterations=60)
    ids, content, noise = start(clip, TEXTS[:4], config)
    precise = copy.deepcopy(clip[0]).double()
    found = learned(clip, TEXTS[:4], config)
    for prompt, perturbation in enumerate(found):
        # As `learn` does: the sequence is cut after its end token, at a multiple of 8.
        length = -(-(int(content[prompt].sum()) + 2) // 8) * 8
        part = (ids[prompt : prompt + 1, :length], content[prompt : prompt + 1, :length])
        deltas = optimise(clip[0], *part, noise[prompt : prompt + 1, :, :length], config)[0]
        assert deltas.norm(dim=-1).max() <= 0.05 * (1 + 1e-6)
        before, after = (by_hand(precise, part[0][0], d, "projected") for d in (noise[prompt, :, :length], deltas))
        anchor = by_hand(precise, part[0][0], torch.zeros_like(deltas[:1]), "projected")[0]
        pairwise = [np.mean([cosine(a, b) for a, b in itertools.combinations(v, 2)]) for v in (before, after)]
        np.testing.assert_allclose(perturbation.pooled, after, atol=2e-5)
        np.testing.assert_allclose(perturbation.cosines, [cosine(v, anchor) for v in after], atol=1e-6)
        assert perturbation.pairwise == pytest.approx(pairwise[1], abs=1e-6)
        assert pairwise[1] < pairwise[0] - 0.2


def test_cosines_of_unprojected_embeddings_are_logged_where_those_are_learned_on(clip):
    config = E2po(embedding="pooled", iterations=3)
    ids, content, noise = start(clip, TEXTS[:1], config)
    found = render(clip[0], "key", ids[0], 5 * noise[0], config)
    precise = copy.deepcopy(clip[0]).double()
    vectors = by_hand(precise, ids[0], torch.cat([torch.zeros_like(noise[0, :1]), 5 * noise[0]]), "pooled")
    np.testing.assert_allclose(found.cosines, [cosine(vector, vectors[0]) for vector in vectors[1:]], atol=1e-6)
    np.testing.assert_allclose(
        found.pooled, by_hand(precise, ids[0], 5 * noise[0], "projected"), atol=2e-5
    )  # SD3's pooled stays the projected one


def test_two_conditions_have_one_variant_that_diversity_moves_away_from_the_original(clip):
    """Without diversity it goes to the ring; its term, the cosine to the original, then takes it beyond."""
    ring, beyond = (
        learned(clip, TEXTS[:1], E2po(conditions=2, iterations=150, radius=0.2, diversity=diversity))[0]
        for diversity in (0.0, 50.0)
    )
    assert ring.hidden.shape == (1, 16, 64) and np.isnan(ring.pairwise)
    assert abs(ring.cosines[0] - 0.8) < 0.03 and beyond.cosines[0] < 0.5


def test_the_objective_of_one_variant_is_its_cosine_to_the_original_and_its_distance_from_the_ring():
    vector, anchor = torch.tensor([[[0.6, 0.8]]]), torch.tensor([[1.0, 0.0]])
    assert objective(vector, anchor, E2po(conditions=2, diversity=50)).item() == pytest.approx(50 * 0.6 + 0.2 - 0.01)


def test_one_condition_has_nothing_to_learn(clip):
    (found,) = learned(clip, TEXTS[:1], E2po(conditions=1))
    assert found.hidden.shape == (0, 16, 64) and found.pooled.shape == (0, 64) and found.cosines.shape == (0,)
    assert np.isnan(found.pairwise)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_prompt_without_content_keeps_its_encoding(clip, settings, bound):
    (found,) = learned(clip, [""], E2po(bound=bound, iterations=3))
    (condition,) = SD3(settings).encode([""])
    for hidden, pooled in zip(found.hidden, found.pooled, strict=True):
        np.testing.assert_array_equal(hidden, condition.sequence[:16, :64])
        np.testing.assert_array_equal(pooled, condition.pooled[:64])
    np.testing.assert_allclose(found.cosines, 1, atol=1e-12)
    assert found.pairwise == pytest.approx(1, abs=1e-12)


# -------------------------------------------------------------------------------------------------------- independence


def assert_numbers_equal(one, other):
    assert one.key == other.key
    for name in ("hidden", "pooled", "cosines", "pairwise"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{name} of {one.key!r}")


@pytest.mark.parametrize(("bound", "conditions"), [("token_l2", 4), ("inf", 3), ("grad_norm", 4), ("grad_norm", 2)])
def test_a_prompts_perturbations_do_not_depend_on_its_company(clip, bound, conditions, monkeypatch):
    config = E2po(bound=bound, conditions=conditions, iterations=12, lr=1e-2)
    together = {found.key: found for found in learned(clip, TEXTS, config)}
    order = [5, 2, 7, 0, 6, 3, 1, 4]
    for found in learned(clip, [TEXTS[i] for i in order], config):
        assert_numbers_equal(found, together[found.key])
    for text in TEXTS:
        assert_numbers_equal(learned(clip, [text], config)[0], together[text])
    monkeypatch.setattr(perturb, "BATCH", 3)
    for found in learned(clip, TEXTS, config):
        assert_numbers_equal(found, together[found.key])


def test_perturbations_follow_from_seed_and_text(clip):
    config = E2po(iterations=2)
    (first,), (again,), (other,) = (learned(clip, TEXTS[:1], config, seed) for seed in (0, 0, 1))
    assert_numbers_equal(first, again)
    assert np.abs(first.pooled - other.pooled).max() > 1e-3
    ids, content = tokenize(clip[1], ["a red circle", "a blue circle"])
    noise = [initial_noise(text, 0, 3, row, 64, 0.5) for text, row in zip(["x", "y"], content, strict=True)]
    assert (noise[0][:, 1:4] != noise[1][:, 1:4]).all() and (noise[0][:, 4:] == 0).all() and (noise[0][:, 0] == 0).all()
    many = initial_noise("x", 0, 500, content[0], 64, 0.5)[:, content[0]]
    assert many.std().item() == pytest.approx(0.5, rel=0.01) and abs(many.mean().item()) < 0.01


def test_the_encoder_stays_as_it_was(clip):
    encoder = clip[0]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    plain = encoder(torch.tensor([[2, 5, 3]])).text_embeds
    learned(clip, TEXTS[:2], E2po(iterations=3))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(plain, encoder(torch.tensor([[2, 5, 3]])).text_embeds)
    with pytest.raises(RuntimeError), perturb.perturbed(encoder, torch.zeros(7, 7, 7)):
        encoder(torch.tensor([[2, 5, 3]]))
    assert torch.equal(plain, encoder(torch.tensor([[2, 5, 3]])).text_embeds)


def test_an_encoder_stored_in_bf16_is_learned_in_fp32_and_encodes_in_its_own_type(clip):
    stored = copy.deepcopy(clip[0]).bfloat16()
    config = E2po(iterations=10)
    (coarse,) = learned((stored, clip[1]), TEXTS[:1], config)
    (fine,) = learned((copy.deepcopy(stored).float(), clip[1]), TEXTS[:1], config)
    hidden, pooled = to_tensor(coarse.hidden), to_tensor(coarse.pooled)
    assert stored.dtype == hidden.dtype == pooled.dtype == torch.bfloat16 and fine.hidden.dtype == np.float32
    assert 2 * coarse.hidden.nbytes == fine.hidden.nbytes
    scale = np.abs(fine.pooled).max()
    assert 0 < np.abs(pooled.float().numpy() - fine.pooled).max() < 0.03 * scale
    ids, _, noise = start(clip, TEXTS[:1], config)
    plain = stored(ids, output_hidden_states=True)
    same = render(stored, "key", ids[0], torch.zeros_like(noise[0]), config)
    assert torch.equal(to_tensor(same.hidden)[0], plain.hidden_states[-2][0])
    assert torch.equal(to_tensor(same.pooled)[0], plain.text_embeds[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": 0},
        {"rho": 1.1},
        {"conditions": 0},
        {"iterations": 0},
        {"lr": 0},
        {"radius": 0},
        {"bound": "l2"},
        {"clock": "steps"},
        {"encoders": "clip_g"},
        {"k": 4},
    ],
)
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValidationError):
        E2po(**wrong)
