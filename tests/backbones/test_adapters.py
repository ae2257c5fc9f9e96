import shutil

import pytest
import torch

from align_cluster.backbones.adapters import Merged, active_adapter, adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.errors import UserError

from ..cases import SLOW_DEVICES


@pytest.fixture(scope="module")
def backbone(settings):
    return SD3(settings)


@pytest.fixture
def denoiser(backbone):
    return add_adapters(backbone, backbone.load_denoiser(), ("default", "old"))


@pytest.fixture(scope="module")
def inputs(backbone):
    generator = torch.Generator().manual_seed(0)
    config = backbone.network_config
    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    sequence = torch.randn(2, 7, config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(2, config["pooled_projection_dim"], generator=generator)
    return x, torch.full((2,), 0.6), sequence, pooled


def set_b(denoiser, name, value):
    with torch.no_grad():
        for full, parameter in adapter_parameters(denoiser, name).items():
            if "lora_B" in full:
                parameter.fill_(value)


def test_new_adapters_change_nothing(backbone, denoiser, inputs):
    bare = backbone.velocity(backbone.load_denoiser(), *inputs)
    for name in ("default", "old", None):
        with active_adapter(denoiser, name):
            assert torch.equal(backbone.velocity(denoiser, *inputs), bare)


def test_without_adapter_a_trained_network_is_the_base(backbone, denoiser, inputs):
    bare = backbone.velocity(backbone.load_denoiser(), *inputs)
    set_b(denoiser, "default", 0.1)
    assert not torch.allclose(backbone.velocity(denoiser, *inputs), bare)
    with active_adapter(denoiser, None):
        assert torch.equal(backbone.velocity(denoiser, *inputs), bare)
    with active_adapter(denoiser, "old"):
        assert torch.equal(backbone.velocity(denoiser, *inputs), bare)


def test_each_adapter_answers_with_its_own_weights(backbone, denoiser, inputs):
    set_b(denoiser, "default", 0.1)
    first = backbone.velocity(denoiser, *inputs)
    set_b(denoiser, "old", 0.1)
    with active_adapter(denoiser, "old"):
        assert torch.equal(backbone.velocity(denoiser, *inputs), first)
    set_b(denoiser, "old", -0.1)
    assert torch.equal(backbone.velocity(denoiser, *inputs), first)


def test_the_adapter_that_was_active_comes_back_even_after_an_error(denoiser, backbone, inputs):
    set_b(denoiser, "old", 0.1)
    with active_adapter(denoiser, "old"):
        old = backbone.velocity(denoiser, *inputs)
        with active_adapter(denoiser, None):
            pass
        assert torch.equal(backbone.velocity(denoiser, *inputs), old)
        with pytest.raises(ZeroDivisionError), active_adapter(denoiser, "default"):
            _ = 1 / 0
        assert torch.equal(backbone.velocity(denoiser, *inputs), old)
    assert not torch.allclose(backbone.velocity(denoiser, *inputs), old)


def test_only_the_first_adapter_is_ever_trainable_and_switching_moves_no_flag(denoiser, backbone, inputs):
    def flags():
        return {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}

    before = flags()
    assert before == {name for name, _ in denoiser.named_parameters() if ".default." in name and "lora_" in name}
    set_b(denoiser, "default", 0.1)
    set_b(denoiser, "old", 0.1)
    with active_adapter(denoiser, "old"):
        assert flags() == before
        assert not backbone.velocity(denoiser, *inputs).requires_grad
    with active_adapter(denoiser, None):
        assert flags() == before
        assert not backbone.velocity(denoiser, *inputs).requires_grad
    assert flags() == before
    backbone.velocity(denoiser, *inputs).square().mean().backward()
    assert all(parameter.grad is None for parameter in adapter_parameters(denoiser, "old").values())
    assert all(parameter.grad is not None for parameter in adapter_parameters(denoiser, "default").values())


def test_adapters_start_equal_and_do_not_depend_on_or_disturb_the_global_random_state(backbone, denoiser):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    assert torch.equal(torch.get_rng_state(), state)
    default, old = (adapter_parameters(denoiser, name) for name in ("default", "old"))
    others = adapter_parameters(again, "default")
    assert default.keys() == old.keys() == others.keys() and len(default) > 0
    for name, parameter in default.items():
        assert torch.equal(parameter, old[name]) and torch.equal(parameter, others[name])
        assert (parameter == 0).all() == ("lora_B" in name)


def test_adapters_are_fp32_on_the_eight_attention_projections_with_the_chosen_rank(backbone):
    denoiser = backbone.load_denoiser().to(torch.bfloat16)
    parameters = adapter_parameters(add_adapters(backbone, denoiser, ("default",)), "default")
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert {p.shape[0] for name, p in parameters.items() if "lora_A" in name} == {backbone.config.lora.rank}
    blocks = backbone.network_config["num_layers"]
    # The last block's text stream ends there, so it has no text output projection.
    assert len(parameters) == 2 * (len(backbone.lora_targets) * blocks - 1)


def test_targets_can_be_chosen(settings):
    lora = settings.lora.model_copy(update={"targets": ("attn.to_q",)})
    backbone = SD3(settings.model_copy(update={"lora": lora}))
    parameters = adapter_parameters(add_adapters(backbone, backbone.load_denoiser(), ("default",)), "default")
    assert parameters and all(".attn.to_q." in name for name in parameters)


def test_a_target_that_names_no_layer_is_refused_though_another_one_does(settings):
    lora = settings.lora.model_copy(update={"targets": ("attn.to_q", "attn.to_queue")})
    backbone = SD3(settings.model_copy(update={"lora": lora}))
    with pytest.raises(UserError, match=r"'attn\.to_queue', which no layer's name ends with; did you mean attn\.to_q"):
        add_adapters(backbone, backbone.load_denoiser(), ("default",))


def test_a_merged_adapter_answers_as_beside_the_base(backbone, denoiser, inputs):
    bare = backbone.velocity(backbone.load_denoiser(), *inputs)
    beside = {}
    for value in (0.02, -0.05):
        set_b(denoiser, "default", value)
        beside[value] = backbone.velocity(denoiser, *inputs)
    merged = Merged(denoiser, "default")
    for value, expected in beside.items():  # the second merge takes the place of the first
        set_b(denoiser, "default", value)
        merged.merge()
        within = backbone.velocity(denoiser, *inputs)
        assert not torch.equal(within, bare)
        torch.testing.assert_close(within, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_adapters_begin_as_the_settings_say(settings, init):
    wide = SD3(settings.model_copy(update={"lora": settings.lora.model_copy(update={"init": init, "rank": 16})}))
    parameters = adapter_parameters(add_adapters(wide, wide.load_denoiser(), ("default",)), "default")
    down = [value for name, value in parameters.items() if "lora_A" in name]
    assert all(not value.any() for name, value in parameters.items() if "lora_B" in name)
    for value in down:
        if init == "gaussian":
            assert value.std().item() == pytest.approx(1 / 16, rel=0.1)
        else:  # uniform with bound sqrt(6 / (1 + 5) / fan_in)
            assert value.abs().max().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.02)


def test_an_attention_backend_that_is_not_there_is_one_sentence(settings):
    with pytest.raises(UserError, match="^backbone.attention is no_such, which cannot be used here .*leave it out"):
        SD3(settings.model_copy(update={"attention": "no_such"})).load_denoiser()


def test_the_native_attention_backend_changes_nothing(backbone, settings, inputs):
    native = SD3(settings.model_copy(update={"attention": "native"})).load_denoiser()
    assert torch.equal(backbone.velocity(native, *inputs), backbone.velocity(backbone.load_denoiser(), *inputs))


@pytest.mark.parametrize("device", SLOW_DEVICES)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_answer_as_the_eager_ones_and_follow_a_new_adapter(settings, inputs, device):
    plain, other = (SD3(settings.model_copy(update={"compile": yes}), device) for yes in (False, True))
    eager, compiled = (add_adapters(one, one.load_denoiser(), ("default",)) for one in (plain, other))
    assert any(block._compiled_call_impl is not None for block in compiled.transformer_blocks)
    given, answers = [tensor.to(device) for tensor in inputs], []
    for value in (0.0, 0.1):
        for network in (eager, compiled):
            set_b(network, "default", value)
        with torch.no_grad():
            answers.append(plain.velocity(eager, *given))
            torch.testing.assert_close(other.velocity(compiled, *given), answers[-1], rtol=0, atol=1e-4)
    assert (answers[0] - answers[1]).abs().max() > 1e-2


@pytest.mark.parametrize("text", ["keep", "cpu", "free"])
def test_text_encoders_stay_or_go_as_the_settings_say(settings, backbone, text):
    one = SD3(settings.model_copy(update={"text": text}))
    (condition,) = one.encode(["a red circle"])
    (expected,) = backbone.encode(["a red circle"])
    assert condition.sequence.tobytes() == expected.sequence.tobytes()
    assert ("_text" in one.__dict__) == (text != "free")
    assert one.encode(["a red circle"])[0].pooled.tobytes() == expected.pooled.tobytes()
