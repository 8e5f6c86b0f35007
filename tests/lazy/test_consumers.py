"""Several consumers of one stand-in, and everything autograd can be asked to do with it, beside plain logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orpo_kernels.integrations import fusion_report
from tests.lazy.chains import CHAINS, Batch, Chain, Result, make_batch
from tests.lazy.tiny import KINDS, Tiny, compare, fused, second_step

BATCH, OTHER = make_batch(), make_batch(seed=1)
ROUNDING = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels. .*full logits")


def both(kind: str = "bias") -> tuple[Tiny, Tiny]:
    """The same model in float64, stock and fused."""
    return Tiny(kind, torch.float64), fused(Tiny(kind, torch.float64))


def same(one: Any, other: Any) -> None:
    """Entries of the order of one, in float64: twelve digits leave four for the order of sums."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def same_gradients(stock: Tiny, ours: Tiny) -> None:
    for (name, one), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            same(other.grad, one.grad)


def nll(logits: Tensor, batch: Batch = BATCH) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1))


def logps(logits: Tensor, batch: Batch = BATCH) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def dense(logits: Tensor) -> Tensor:
    """A loss no stand-in can foresee."""
    return torch.sort(logits, dim=-1).values[..., -3:].square().mean()


# ---- Pairs of chains


def _pairs() -> list[tuple[Chain, Chain]]:
    """Each chain with one near it and one far from it; what changes the logits comes first, as stock demands."""
    chains = list(CHAINS.values())
    found = []
    for apart in (1, 29):
        for index, one in enumerate(chains):
            other = chains[(index + apart) % len(chains)]
            if not (one.in_place and other.in_place):
                found.append((other, one) if other.in_place else (one, other))
    return found


@pytest.mark.parametrize("pair", _pairs(), ids=lambda pair: f"{pair[0].name}+{pair[1].name}")
def test_two_chains_share_logits(pair: tuple[Chain, Chain]) -> None:
    """The losses are added: one backward of the head serves both."""
    one, other = pair

    def together(logits: Tensor, batch: Batch) -> Result:
        first, second = one.run(logits, batch), other.run(logits, batch)
        losses = [loss for loss in (first.loss, second.loss) if loss is not None]
        values = {f"0 {k}": v for k, v in first.values.items()} | {f"1 {k}": v for k, v in second.values.items()}
        return Result(sum(losses, start=losses[0] * 0) if losses else None, values)

    kinds = [kind for kind in KINDS if kind not in one.unless + other.unless]
    kind = kinds[len(one.name) % len(kinds)]
    model = compare(together, BATCH, kind, torch.float64)
    if all(chain.lazy and not chain.in_place for chain in pair):
        assert fusion_report(model).materialised == []
        forward, products = second_step(model, together, BATCH)
        # Another temperature is a pass of its own, and there is one backward.
        assert forward <= one.passes + other.passes + ROUNDING
        assert products <= forward + 3 + ROUNDING


def test_lazy_and_dense_consumers_add() -> None:
    stock, ours = both("softcap")
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        (nll(logits) + dense(logits) + logps(logits).mean()).backward()
    same_gradients(stock, ours)


def test_consumer_without_gradient_beside_one_with() -> None:
    """In either order, and the quiet one leaves no trace in the gradient."""
    for quiet_first in (True, False):
        stock, ours = both()
        values = []
        for model in (stock, ours):
            logits = model(BATCH.ids).logits
            loss = None if quiet_first else nll(logits)
            with torch.no_grad():
                quiet = logps(logits)
            loss = nll(logits) if loss is None else loss
            assert not quiet.requires_grad
            loss.backward()
            values.append((quiet, loss))
        same(values[1], values[0])
        same_gradients(stock, ours)
        assert fusion_report(ours).products <= 4 + ROUNDING


# ---- Backward, again and again


def test_backward_twice() -> None:
    stock, ours = both()
    for model in (stock, ours):
        loss = nll(model(BATCH.ids).logits)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    same_gradients(stock, ours)


def test_two_losses_two_backwards() -> None:
    stock, ours = both("scale")
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        one, other = nll(logits), logps(logits).square().mean()
        one.backward(retain_graph=True)
        (other / 8).backward()
    same_gradients(stock, ours)


@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "both forwards first"])
def test_gradient_accumulation(at_once: bool) -> None:
    stock, ours = both()
    for model in (stock, ours):
        if at_once:
            first, second = model(BATCH.ids).logits, model(OTHER.ids).logits
            (nll(first) / 2).backward()
            (nll(second, OTHER) / 2).backward()
        else:
            for batch in (BATCH, OTHER):
                (nll(model(batch.ids).logits, batch) / 2).backward()
    same_gradients(stock, ours)
    assert fusion_report(ours).calls == 2


def test_two_forwards_one_loss() -> None:
    """Chosen and rejected sequences in calls of their own, as the ORPO paper does it."""
    stock, ours = both("softcap")
    for model in (stock, ours):
        chosen, rejected = model(BATCH.ids[:2]).logits, model(BATCH.ids[2:]).logits
        kept, lost = (logits.log_softmax(-1)[..., 3].mean() for logits in (chosen, rejected))
        (-F.logsigmoid(kept - lost) + F.cross_entropy(chosen.flatten(0, 1), BATCH.ids[:2].flatten())).backward()
    same_gradients(stock, ours)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_a_loss(reentrant: bool) -> None:
    stock, ours = both("softcap")
    losses = []
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        loss = checkpoint(nll, logits, use_reentrant=reentrant) + logps(logits).mean()
        loss.backward()
        losses.append(loss)
    same(losses[1], losses[0])
    same_gradients(stock, ours)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_the_whole_model(reentrant: bool) -> None:
    stock, ours = both()
    for model in (stock, ours):
        hidden = model.embedding(BATCH.ids)

        def rest(hidden: Tensor, model: Tiny = model) -> Tensor:
            return model.lm_head(torch.tanh(model.layer(hidden)))

        nll(checkpoint(rest, hidden, use_reentrant=reentrant)).backward()
    same_gradients(stock, ours)


# ---- Detach, leaves, hooks


def test_detach() -> None:
    """It has the values and no gradient; a loss of both flows through one of them."""
    stock, ours = both()
    values = []
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        apart = logits.detach()
        assert not apart.requires_grad
        assert apart.grad_fn is None
        weight = logps(apart).exp()
        assert not weight.requires_grad
        loss = (weight * logps(logits)).mean()
        loss.backward()
        values.append((weight, loss, apart.mean()))
    same(values[1], values[0])
    same_gradients(stock, ours)


def test_a_leaf_of_the_callers_own() -> None:
    """Detach, take the leaf's gradient, hand it back: how losses are computed in pieces."""
    stock, ours = both("scale")
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        leaf = logits.detach().requires_grad_()
        nll(leaf).backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == logits.shape
        logits.backward(leaf.grad)
    same_gradients(stock, ours)


def test_gradient_in_the_logits_themselves() -> None:
    grads = []
    for model in both():
        logits = model(BATCH.ids).logits
        logits.retain_grad()
        (found,) = torch.autograd.grad(nll(logits), logits, retain_graph=True)
        nll(logits).backward()
        grads.append((found + 0, logits.grad + 0, float(found.norm()), bool(torch.isnan(found).any())))
    same(grads[1], grads[0])


def test_hooks_on_logits() -> None:
    """One sees the gradient, one changes it; both fire once for all consumers."""
    stock, ours = both()
    seen: list[list[Tensor]] = []
    for model in (stock, ours):
        grads: list[Tensor] = []
        logits = model(BATCH.ids).logits
        logits.register_hook(lambda grad, grads=grads: grads.append(grad + 0))
        logits.register_hook(lambda grad: grad * 0.5)
        (nll(logits) + logps(logits).mean()).backward()
        seen.append(grads)
    assert [len(grads) for grads in seen] == [1, 1]
    same(seen[1], seen[0])
    same_gradients(stock, ours)


def test_hooks_on_the_head() -> None:
    """Hooks of the module fire as ever: before, after, and with the gradients of both ends."""
    stock, ours = both()
    calls: list[list[str]] = []
    grads: list[list[Tensor]] = []
    for model in (stock, ours):
        names: list[str] = []
        found: list[Tensor] = []

        def backward(module: Any, ins: Any, outs: Any, names: list[str] = names, found: list[Tensor] = found) -> None:
            names.append("backward")
            found.extend((ins[0] + 0, outs[0] + 0))

        model.lm_head.register_forward_pre_hook(lambda module, args, names=names: names.append("before"))
        model.lm_head.register_forward_hook(lambda module, args, out, names=names: names.append("after"))
        model.lm_head.register_full_backward_hook(backward)
        nll(model(BATCH.ids).logits).backward()
        calls.append(names)
        grads.append(found)
    assert calls[1] == calls[0] == ["before", "after", "backward"]
    same(grads[1], grads[0])
    same_gradients(stock, ours)


def test_hook_that_replaces_the_output() -> None:
    """What a hook of the head returns is what the model goes on with."""
    stock, ours = both()
    for model in (stock, ours):
        model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
        nll(model(BATCH.ids).logits).backward()
    same_gradients(stock, ours)
    assert fusion_report(ours).materialised == []


# ---- Losses that hardly use the logits


def test_unused_logits() -> None:
    """A loss that leaves them out, and one that multiplies them by zero."""
    stock, ours = both()
    for model in (stock, ours):
        logits = model(BATCH.ids).logits
        ((logits * 0).sum() + model.layer.weight.square().sum()).backward()
        model(OTHER.ids)  # never used: costs nothing
    same_gradients(stock, ours)
    before = fusion_report(ours).products
    ours(OTHER.ids)
    assert fusion_report(ours).products == before


def test_part_of_the_logits_used() -> None:
    """A chunk nobody uses has no gradient, and the rows of the other pay for themselves alone."""
    stock, ours = both()
    for model in (stock, ours):
        chosen, _ = model(BATCH.ids).logits.chunk(2)
        F.cross_entropy(chosen.flatten(0, 1), BATCH.ids[:2].flatten()).backward()
    same_gradients(stock, ours)
    assert fusion_report(ours).products <= 2 + ROUNDING
    assert fusion_report(ours).materialised == []


# ---- Modes of torch


def _autocast(consume: Callable[[], None]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        consume()


def _anomaly(consume: Callable[[], None]) -> None:
    with torch.autograd.set_detect_anomaly(True):
        consume()


def _saved_on_cpu(consume: Callable[[], None]) -> None:
    with torch.autograd.graph.save_on_cpu():
        consume()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", [_anomaly, _saved_on_cpu])
def test_modes(mode: Callable[[Callable[[], None]], None]) -> None:
    stock, ours = both("softcap")
    for model in (stock, ours):
        mode(lambda model=model: nll(model(BATCH.ids).logits).backward())
    same_gradients(stock, ours)
    assert fusion_report(ours).materialised == []


def test_autocast() -> None:
    """The head gives 16 bits under autocast, and the loss is as near to float64 as stock's is."""
    found = []
    for wide in (True, False, False):
        model = Tiny("bias", torch.float64 if wide else torch.float32)
        if len(found) == 2:
            fused(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not wide):
            logits = model(BATCH.ids).logits
            loss = nll(logits)
            kept = logps(logits)
        loss.backward()
        found.append((logits.dtype, loss.dtype, kept.dtype, loss.detach().double(), model.lm_head.weight.grad.double()))
    truth, stock, ours = found
    assert ours[:3] == stock[:3]
    for true, plain, value in zip(truth[3:], stock[3:], ours[3:], strict=True):
        assert (value - true).norm() <= max(2 * (plain - true).norm(), 4e-3 * true.norm())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode: Callable[[], Any]) -> None:
    """The first batch shows what is asked of one pass; from the second on it is one."""
    stock, ours = both()
    values = []
    for model in (stock, ours, ours):
        model.eval()
        fusion_report(ours).reset()
        with mode():
            logits = model(BATCH.ids).logits
            values.append((nll(logits), logits.argmax(-1), logps(logits)))
    same(values[1], values[0])
    same(values[2], values[0])
    assert fusion_report(ours).products <= 1 + ROUNDING
    assert fusion_report(ours).materialised == []
