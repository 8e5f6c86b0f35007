"""One forward with the head intercepted: the first batch's check, what is refused, threads, settings, metrics."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from orpo_kernels import PreferenceOutput, preference_loss, reference
from orpo_kernels.integrations import fused as fusing
from orpo_kernels.integrations import intercept
from orpo_kernels.integrations import trainer as patching
from orpo_kernels.integrations.hf_head import Reading
from orpo_kernels.objectives import ORPO
from tests.integrations.models import VOCAB, FakePatch, FakeTrainer, batch, llama
from tests.integrations.test_hf_head import logps_of


def orpo(model: Any, data: Any = None, trainer: Any = None, patch: Any = None) -> Any:
    trainer = trainer or FakeTrainer()
    site = patching.find_site(trainer, model)
    assert isinstance(site, patching.Site), site
    return fusing.fused_loss(patch or FakePatch(), trainer, model, site, data or batch(), ORPO(0.5))


def logprobs(model: Any, data: Any = None) -> Any:
    trainer = FakeTrainer()
    site = patching.find_site(trainer, model)
    assert isinstance(site, patching.Site), site
    return fusing.fused_logprobs(FakePatch(), trainer, model, site, data or batch())


def stock_loss(model: Any, data: Any) -> Tensor:
    """ORPO of the model's own logits, by the specification: they are hidden states under a head that is one."""
    logits = model(**data.inputs).logits.double()
    return reference.orpo_loss(
        logits,
        torch.eye(logits.shape[-1], dtype=torch.float64),
        data.answer,
        nll_labels=data.nll,
        beta=0.5,
    )["loss"]


def changing(change: Any) -> type:
    """A Llama that does something to its logits."""

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output["logits"] = change(output["logits"])
            return output

    return Changed


def masked(value: float, first: int = 91) -> type:
    def change(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., first:] = value
        return logits

    return changing(change)


MASKS = {"finfo.min": torch.finfo(torch.float32).min, "-inf": -torch.inf, "-1e9": -1e9}


@pytest.mark.parametrize("first", [91, 45])
@pytest.mark.parametrize("value", MASKS)
def test_masked_columns_are_masked(value: str, first: int) -> None:
    """The columns have no share in the loss and none in the gradient."""
    data = batch()
    ids = data.inputs["input_ids"] % 40 + 3
    nll = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    data = data._replace(
        inputs={**data.inputs, "input_ids": ids}, answer=torch.where(data.answer == -100, -100, nll), nll=nll[:2]
    )
    model = llama(masked(MASKS[value], first))
    finite = llama(masked(-1e9, first))  # autograd of the specification's -inf is NaN
    finite.load_state_dict(model.state_dict())
    truth = stock_loss(finite, data)
    (wanted,) = torch.autograd.grad(truth, finite.lm_head.weight)
    for _ in range(2):  # the batch that is checked, and one that is not
        fused = orpo(model, data)
        (ours,) = torch.autograd.grad(fused[0].loss, model.lm_head.weight)
        torch.testing.assert_close(fused[0].loss.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
        assert ours[first:].abs().max() == 0


@pytest.mark.parametrize(
    "cls",
    [transformers.LlamaForCausalLM, masked(torch.finfo(torch.float32).min), changing(lambda z: z - 100)],
    ids=["llama", "masked", "offset"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_reading_is_caught(cls: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is what stands between a fault of ours and a wrong loss in silence; nothing far off loosens it."""
    model = llama(cls).to(dtype)
    read = intercept.read

    def wrong(given: Tensor, logits: Tensor) -> Any:
        found = read(given, logits)
        assert isinstance(found, Reading)
        return replace(found, logit_scale=0.8 * found.logit_scale)

    monkeypatch.setattr(intercept, "read", wrong)
    with pytest.raises(
        RuntimeError, match=r"does not reproduce the logits of .*: for 8 tokens .* are \[-.* and ours \[-"
    ):
        orpo(model)


def test_every_model_and_head_is_checked_under_one_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    read = intercept.read
    monkeypatch.setattr(intercept, "read", lambda *given: asked.append(given) or read(*given))
    trainer = FakeTrainer()
    first, second = llama(), llama(changing(lambda z: 3 * z))
    for model in (first, first, second, second):
        data = batch()
        fused = orpo(model, data, trainer)
        torch.testing.assert_close(fused[0].loss.double(), stock_loss(model, data), rtol=1e-5, atol=0)
    assert len(asked) == 2
    second.lm_head = nn.Linear(32, VOCAB, bias=False)
    orpo(second, trainer=trainer)
    assert len(asked) == 3
    second.eval()
    with torch.no_grad():
        orpo(second, trainer=trainer)
        orpo(second, trainer=trainer)
    assert len(asked) == 4


def test_asking_a_model_draws_no_random_numbers() -> None:
    """The call that asks is one more than stock has, and dropout must not tell."""
    model = llama(attention_dropout=0.5).train()
    losses = []
    for _ in range(2):  # the batch that asks, and one that does not
        torch.manual_seed(3)
        losses.append(orpo(model)[0].loss.item())
    assert losses[0] == losses[1]
    torch.manual_seed(4)
    assert orpo(model)[0].loss.item() != losses[0]


class Never(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


class InChunks(Never):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        logits = torch.cat([self.lm_head(part) for part in hidden.chunk(2, 1)], 1)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


class LastOnly(Never):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden[:, -1:]))


class Shaped(Never):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        logits = self.lm_head(hidden) + attention_mask[..., None]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


class Learned(transformers.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] / self.temperature
        return output


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Never, "Never: its forward did not call its head"),
        (InChunks, "InChunks: its forward called its head"),
        (LastOnly, r"LastOnly: its forward called its head on \[4, 1\] of \[4, 9\] positions"),
        (Shaped, "Shaped: its forward fails on logits of other rows than it gave its head"),
        (Learned, "Learned: it scales or shifts its logits by trained parameters"),
        (changing(lambda z: z - z.mean(-1, keepdim=True)), "Changed: it turns 1e"),
    ],
)
def test_models_that_keep_their_path(cls: type, sentence: str) -> None:
    model = llama(cls)
    for _ in range(2):
        found = orpo(model)
        assert isinstance(found, str)
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(found)
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks


class Moody(Never):
    """A model that calls its head in chunks when it is told to."""

    chunks = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        logits = torch.cat([self.lm_head(part) for part in hidden.chunk(self.chunks, 1)], 1)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_a_model_that_changes_its_ways_is_an_error() -> None:
    model = llama(Moody)
    orpo(model)
    model.chunks = 3
    with pytest.raises(RuntimeError, match="cannot follow Moody: its forward called its head more than once"):
        orpo(model)


def test_a_model_is_judged_in_each_mode() -> None:
    """One that cannot be fused in evaluation is fused in training all the same."""
    model = llama(Moody).eval()
    model.chunks = 3
    assert isinstance(orpo(model), str)
    model.train().chunks = 1
    assert not isinstance(orpo(model), str)
    model.eval()
    assert isinstance(orpo(model), str)


class ByKeyword(Never):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(input=hidden))


def test_a_head_called_by_keyword() -> None:
    data, model = batch(), llama(ByKeyword)
    torch.testing.assert_close(orpo(model, data)[0].loss.double(), stock_loss(model, data), rtol=1e-5, atol=0)


def test_an_error_of_the_model_is_its_own() -> None:
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, **_: Any) -> Any:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        orpo(llama(Broken))


def test_memory_that_runs_out_is_an_error_and_no_refusal() -> None:
    """The next batch may fit: the model is not judged by one that did not."""
    model = llama(OutOnce)
    with pytest.raises(torch.OutOfMemoryError):
        orpo(model)
    assert not isinstance(orpo(model), str)


class OutOnce(transformers.LlamaForCausalLM):
    """A model whose first batch does not fit."""

    due = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.due:
            self.due = False
            raise torch.OutOfMemoryError
        return output


def test_labels_out_of_range_are_an_error_and_no_refusal() -> None:
    data = batch()
    with pytest.raises(ValueError, match="labels"):
        orpo(llama(), data._replace(answer=torch.where(data.answer == -100, -100, 500)))


def test_other_threads_get_the_models_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs the model, and one a fused forward of its own, while the head is intercepted."""
    model, data = llama(), batch()
    with torch.no_grad():
        wanted = model(**data.inputs).logits
    truth = stock_loss(model, data).item()
    found: list[Any] = []

    def outside() -> None:
        with torch.no_grad():
            found.append(model(**data.inputs).logits)
        found.append(orpo(model, data)[0].loss.item())

    inside = fusing.preference_of_head

    def score(*args: Any, **kwargs: Any) -> PreferenceOutput:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=outside)
            other.start()
            other.join()
        return inside(*args, **kwargs)

    monkeypatch.setattr(fusing, "preference_of_head", score)
    for _ in range(2):
        assert orpo(model, data)[0].loss.item() == pytest.approx(truth, rel=1e-5)
        logits, loss = found
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
        assert loss == pytest.approx(truth, rel=1e-5)
        found.clear()
    assert "forward" not in vars(model.lm_head)


def test_the_nll_is_scored_with_its_own_labels() -> None:
    """A position may have another target in the NLL than in the answer."""
    data, model = batch(), llama()
    nll = torch.where(torch.arange(9) % 2 == 0, data.nll, (data.nll + 5) % 90)
    nll[:, -1] = -100
    nll[0, 1] = -100  # and one side may have none
    data = data._replace(nll=nll)
    logits = model(**data.inputs).logits
    truth = logps_of(logits, data.answer), logps_of(logits[:2], nll)
    for _ in range(2):
        fused = logprobs(model, data)
        torch.testing.assert_close(fused[0].answer.double(), truth[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(fused[0].nll.double(), truth[1], rtol=0, atol=1e-5)
    (ours,) = torch.autograd.grad(fused[0].nll.sum(), model.lm_head.weight)
    (wanted,) = torch.autograd.grad(truth[1].sum(), model.lm_head.weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="orpo_kernels")
    return caplog


class Unhashable(FakeTrainer):
    """As the class is that trl 0.26 to 0.28 give from their old home."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("cls", [FakeTrainer, Unhashable])
def test_a_fused_run_says_so_once(cls: type, log: pytest.LogCaptureFixture) -> None:
    trainer, model = cls(), llama()
    orpo(model, trainer=trainer)
    orpo(model, trainer=trainer)
    model.eval()
    orpo(model, trainer=trainer)
    (line,) = log.messages
    assert line.startswith(f"orpo_kernels: fused the loss of this {cls.__name__}: plan ")
    assert "% of 36 positions" in line
    assert "agree on the first batch (log-probabilities within " in line


def test_a_kernel_that_fails_gives_way_to_torch(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = fusing.preference_of_head

    def failing(hidden: Any, head: Any, labels: Any, settings: Any) -> PreferenceOutput:
        if settings.backend != "torch":
            raise RuntimeError("PassManager::run failed\n  on sm_999")
        return inside(hidden, head, labels, settings)

    monkeypatch.setattr(fusing, "preference_of_head", failing)
    patch, model, data = FakePatch(), llama(), batch()
    for _ in range(2):
        fused = orpo(model, data, patch=patch)
        torch.testing.assert_close(fused[0].loss.double(), stock_loss(model, data), rtol=1e-5, atol=0)
    assert patch.settings.backend == "torch"
    (line,) = (line for line in log.messages if "torch backend" in line)
    assert line.endswith("failed: RuntimeError: PassManager::run failed on sm_999")
    with pytest.raises(RuntimeError, match="PassManager"):  # a backend that was named is the only one that will do
        orpo(llama(), patch=FakePatch(backend="triton"))


def test_settings_come_from_arguments_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORPO_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("ORPO_KERNELS_WORKSPACE_BYTES", raising=False)
    assert patching.Settings.chosen(None, None) == patching.Settings("auto", None)
    monkeypatch.setenv("ORPO_KERNELS_BACKEND", "torch")
    monkeypatch.setenv("ORPO_KERNELS_WORKSPACE_BYTES", "1000000")
    assert patching.Settings.chosen(None, None) == patching.Settings("torch", 1_000_000)
    assert patching.Settings.chosen("triton", 5) == patching.Settings("triton", 5)
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of \[.*\], got 'cuda'"):
        patching.Settings.chosen("cuda", None)
    with pytest.raises(ValueError, match="workspace_bytes must be a positive number of bytes, got '-1'"):
        patching.Settings.chosen(None, -1)
    monkeypatch.setenv("ORPO_KERNELS_BACKEND", "tpu")
    with pytest.raises(ValueError, match="ORPO_KERNELS_BACKEND must be"):
        patching.Settings.chosen(None, None)
    monkeypatch.setenv("ORPO_KERNELS_WORKSPACE_BYTES", "1 GiB")
    with pytest.raises(
        ValueError, match="ORPO_KERNELS_WORKSPACE_BYTES must be a positive number of bytes, got '1 GiB'"
    ):
        patching.Settings.chosen("torch", None)


def test_settings_reach_the_loss(log: pytest.LogCaptureFixture) -> None:
    """The plan of a small workspace is another one."""
    for workspace, plan in ((None, ": 3 passes over"), (20_000, ": 4 passes over")):
        data = batch(pairs=4, length=40)
        truth = stock_loss(model := llama(), data)
        fused = orpo(model, data, patch=FakePatch(backend="torch", workspace_bytes=workspace))
        torch.testing.assert_close(fused[0].loss.double(), truth, rtol=1e-5, atol=0)
        assert plan in log.messages[-1]


class Ranks:
    """accelerate's side of two ranks that hold the same values, with a last batch of three samples."""

    gradient_state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    calls = 0

    def gather(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([tensor, tensor + 1])


def test_metrics_of_all_ranks_take_one_collective() -> None:
    torch.manual_seed(0)
    head = torch.randn(VOCAB, 8)
    out = preference_loss(torch.randn(4, 9, 8), head, batch().answer, ORPO(), nll_labels=batch().nll, backend="torch")
    ranks, logps = Ranks(), (out.pairs.chosen_mean, out.pairs.rejected_mean)
    metrics = patching.metrics_of_all_ranks(ranks, out, logps)
    assert ranks.calls == 1
    assert list(metrics) == list(out.metrics())
    kept = torch.cat([logps[0], logps[0] + 1])[:3]  # the fourth sample is the sampler's repetition
    assert metrics["logps/chosen"] == pytest.approx(kept.mean().item(), rel=1e-5)
    assert metrics["nll_loss"] == pytest.approx(out.nll_loss.item() + 0.5, rel=1e-5)
