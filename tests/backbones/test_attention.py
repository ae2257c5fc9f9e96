import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.checkpoint import checkpoint

from align_cluster.backbones.attention import ShortAttention
from align_cluster.backbones.sd3 import SD3


def inputs(length: int = 20, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_short_attention_and_its_gradient_are_pytorchs_in_fp64_up_to_rounding():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        exact, ours = [tensor.detach().to(dtype).double().requires_grad_() for tensor in inputs()], inputs(dtype=dtype)
        expected = attention(*exact)
        with ShortAttention():
            found = attention(*ours)
            named = attention(query=ours[0], key=ours[1], value=ours[2], dropout_p=0.0, is_causal=False)
        assert found.dtype == dtype and torch.equal(found, named) and not torch.equal(found, attention(*ours))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        expected.square().sum().backward()
        found.square().sum().backward()
        for own, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(own.grad.double(), other.grad, rtol=0, atol=20 * tolerance)


def test_masks_causal_order_scales_and_long_sequences_keep_pytorchs_kernel():
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    for arguments in ({"attn_mask": mask}, {"is_causal": True}, {"scale": 0.5}):
        with ShortAttention():
            found = attention(*inputs(), **arguments)
        assert torch.equal(found, attention(*inputs(), **arguments))
    with ShortAttention():
        found = attention(*inputs(300))
    assert torch.equal(found, attention(*inputs(300)))


def test_a_network_computes_it_in_forward_passes_and_where_a_backward_pass_computes_them_again(settings):
    backbone = SD3(settings)
    network, plain = (
        backbone.load_denoiser(),
        backbone.stock(backbone.network).from_pretrained(backbone.source, subfolder=backbone.part),
    )
    tokens, width, pooled = backbone.text_shape
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    rest = (torch.full((2,), 0.5), torch.zeros(2, tokens, width), torch.zeros(2, pooled))
    ours, stock = (backbone.velocity(one, x, *rest) for one in (network, plain))
    assert not torch.equal(ours, stock)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    grads = []
    for run in (backbone.velocity, lambda *args: checkpoint(backbone.velocity, *args, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        run(network, leaf, *rest).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
