import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from align_cluster.planner.count import counting

MB = 2**20


def test_bytes_are_counted_from_where_they_are_made_until_they_are_let_go():
    with counting("cpu") as counter:
        kept = torch.empty(MB)  # 4 MiB

        def run():
            a = kept + 1
            b = a * 2
            del a
            c = b.view(2, -1).sum(0)  # 2 MiB; the view is no memory of its own
            del b
            return c.half()

        assert counter.measure(run).bytes == 8 * MB
        assert counter.bytes == 4 * MB, "nothing of the result is left"
        assert counter.measure(lambda: kept[:10]).bytes == 0


def test_what_autograd_keeps_is_counted_until_backward():
    with counting("cpu") as counter:
        weight = torch.empty(1024, 1024, requires_grad=True)
        x = torch.empty(512, 1024)
        before = counter.bytes
        y = F.gelu(F.linear(x, weight))
        # The input of gelu is kept, its output is here, and x and the weight were there already.
        assert counter.bytes - before == 2 * y.nbytes
        loss = y.sum()
        del y
        torch.autograd.backward(loss)
        del loss
        assert counter.bytes - before == weight.nbytes, "the gradient alone"


def test_bytes_agree_with_what_saved_tensors_hooks_see():
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with counting("cpu") as counter:
        layers = [torch.empty(256, 256, requires_grad=True) for _ in range(3)]
        x = first = torch.empty(64, 256)
        before = counter.bytes
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for weight in layers:
                x = F.layer_norm(F.silu(x @ weight), (256,))
        mine = {t.untyped_storage()._cdata for t in layers}
        kept = sum(storage.nbytes() for key, storage in saved.items() if key not in mine)
        # The first input was there before, and the last output is here although nothing needs it.
        assert counter.bytes - before == kept - first.nbytes + x.nbytes


def test_checkpointed_activations_are_let_go_and_computed_again():
    def block(x):
        for weight in weights:
            x = F.gelu(x @ weight)
        return x

    with counting("cpu") as counter:
        weights = [torch.empty(256, 256) for _ in range(4)]
        x = torch.empty(1024, 256, requires_grad=True)

        def update(call):
            y = x
            for _ in range(8):
                y = call(y)
            torch.autograd.backward(y.sum())
            x.grad = None

        whole = counter.measure(lambda: update(block))
        frugal = counter.measure(lambda: update(lambda y: checkpoint(block, y, use_reentrant=False)))
    assert frugal.bytes < whole.bytes / 2
    one_pass = 2 * 1024 * 256 * 256 * 4 * 8
    assert (whole.flops, frugal.flops) == (2 * one_pass, 3 * one_pass)


def test_flops_of_attention_are_counted_forward_and_backward():
    with counting("cpu") as counter:
        q, k, v = (torch.empty(2, 4, 128, 32, requires_grad=True) for _ in range(3))
        product = 2 * (2 * 4) * 128 * 128 * 32
        done = counter.measure(lambda: torch.autograd.backward(F.scaled_dot_product_attention(q, k, v).sum()))
    assert done.flops == (2 + 5) * product, "two products, and five with the scores computed again"
    assert done.bytes < 2 * 4 * 128 * 128 * 4 * 2, "no matrix of scores is kept for each operator"


def test_norms_have_the_precision_of_the_device_that_is_counted_for():
    x = torch.empty(2, 32, 8, 8, dtype=torch.bfloat16)
    for norm in (lambda: F.layer_norm(x, (8,)), lambda: F.group_norm(x, 4), lambda: F.rms_norm(x, (8,))):
        for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
            with counting(device), torch.autocast("cpu", torch.bfloat16):
                assert norm().dtype == dtype
                assert F.linear(norm(), torch.empty(8, 8)).dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16):
                assert norm().dtype == torch.bfloat16, "as before"
