"""Low precision, fused attention and gradient checkpointing change results by rounding only; every backbone, noise on."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mpformer_hf import MPFormerForUniversalSegmentation
from tests.factories import BACKBONE_KINDS, random_batch, random_images, tiny_model

# Relative to the largest value. One rounding is 2^-9 in bfloat16 and 2^-12 in float16; layers and matches add up.
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=BACKBONE_KINDS)
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


def run_seeded(model: nn.Module, **inputs: Any) -> Any:
    """Forward with the same noise and points in every call."""
    torch.manual_seed(0)
    return model(**inputs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).abs().max() / expected.abs().max()).item()


def checkpoint_layers(model: MPFormerForUniversalSegmentation, use_reentrant: bool) -> None:
    # transformers 5.23 deprecates the second name; older versions have no other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


# --------------------------------------------------------------------------------------------------------- low precision


@torch.no_grad()
def test_a_model_in_low_precision_predicts_almost_the_same(backbone: str, dtype: torch.dtype):
    images = random_images()
    expected = tiny_model(backbone)(images)
    outputs = tiny_model(backbone).to(dtype)(images.to(dtype))
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert outputs[name].dtype == dtype
        assert relative_distance(outputs[name], expected[name]) < ROUNDING[dtype]


def test_a_model_in_low_precision_trains(backbone: str, dtype: torch.dtype):
    batch = random_batch()
    expected = run_seeded(tiny_model(backbone).train(), **batch).loss
    model = tiny_model(backbone).to(dtype).train()
    outputs = run_seeded(model, **batch | {"pixel_values": batch["pixel_values"].to(dtype)})
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=ROUNDING[dtype])
    assert gradients(model).keys() == trained_names(model)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == dtype
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_a_step_under_autocast_is_almost_that_of_float32(backbone: str, dtype: torch.dtype):
    batch = random_batch()
    plain, model = tiny_model(backbone).train(), tiny_model(backbone).train()
    expected = run_seeded(plain, **batch).loss
    expected.backward()
    with torch.autocast("cpu", dtype):
        outputs = run_seeded(model, **batch)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() != expected.item()  # or autocast did nothing
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=0.03)
    assert gradients(model).keys() == trained_names(model)
    total, plain_total = (
        torch.cat([gradient.flatten() for gradient in gradients(one).values()]) for one in (model, plain)
    )
    assert torch.cosine_similarity(total, plain_total, dim=0) > 0.98


def test_matching_and_losses_do_not_notice_autocast():
    model, batch = tiny_model().train(), random_batch()
    calls = []
    model.criterion.register_forward_pre_hook(
        lambda _, arguments, keywords: calls.append((arguments, keywords)), with_kwargs=True
    )
    expected = run_seeded(model, **batch)
    (arguments, keywords) = calls[0]
    torch.manual_seed(1)
    plain_loss, plain_terms = model.criterion(*arguments, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        loss, terms = model.criterion(*arguments, **keywords)
    assert terms.keys() == expected.loss_dict.keys()
    assert torch.equal(loss, plain_loss)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, plain_terms[name]), name


def test_a_gradient_scaler_takes_every_step_in_float16():
    model, batch = tiny_model().train(), random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8  # halved after every step that overflows
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old) != weight.requires_grad


# ------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_eager_and_fused_attention_agree(backbone: str, output_attentions: bool, monkeypatch, tmp_path):
    tiny_model(backbone).save_pretrained(tmp_path)
    eager = MPFormerForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation="eager").train()
    fused = MPFormerForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation="sdpa").train()
    calls_of_eager, calls_of_fused = count_fused_calls(eager, monkeypatch), count_fused_calls(fused, monkeypatch)
    inputs = random_batch() | {"output_attentions": output_attentions}
    expected, outputs = run_seeded(eager, **inputs), run_seeded(fused, **inputs)
    # Cross-attention of all three layers, and self-attention unless its weights are asked for.
    assert (len(calls_of_eager), len(calls_of_fused)) == (0, 3 if output_attentions else 6)
    for name in ("loss", "class_queries_logits", "masks_queries_logits", "attentions"):
        torch.testing.assert_close(outputs.get(name), expected.get(name), **FLOAT32)
    if output_attentions:
        for weights in outputs.attentions:  # of the learnable queries, which see each other alone
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 6))


def count_fused_calls(model: MPFormerForUniversalSegmentation, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows with every call of torch's fused attention inside the transformer decoder."""
    calls: list[int] = []
    running: list[bool] = []
    original = nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        calls.extend(running)
        return original(*arguments, **keywords)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    decoder = model.model.transformer_module
    decoder.register_forward_pre_hook(lambda *_: running.append(True))
    decoder.register_forward_hook(lambda *_: running.clear())
    return calls


def test_attention_can_be_switched_after_loading():
    model, batch = tiny_model().train(), random_batch()
    expected = run_seeded(model, **batch).loss
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(run_seeded(model, **batch).loss, expected, **FLOAT32)


def test_attention_that_knows_no_masks_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="flex_attention"):
        MPFormerForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation="flex_attention")


# ------------------------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pilot_mask_noise": "shift_scale", "pilot_groups": 2, "pre_norm": True},
        {"pilot_noise_per_head": True, "pilot_layers": 1, "dropout": 0.1, "attn_implementation": "eager"},
    ],
    ids=["point", "shift_scale", "per_head"],
)
# Swin's layers are checkpointed inside checkpointed stages, whose first run has no gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointed_layers_of_backbone_and_decoders_have_equal_gradients(fields: dict[str, Any], use_reentrant: bool):
    batch = random_batch()
    plain, economical = tiny_model("swin", **fields).train(), tiny_model("swin", **fields).train()
    checkpoint_layers(economical, use_reentrant)
    counts = count_recomputations(economical)
    expected, loss = (run_seeded(model, **batch).loss for model in (plain, economical))
    assert torch.equal(loss, expected)
    assert set(counts.values()) == {0}
    expected.backward()
    loss.backward()
    assert min(counts.values()) > 0, f"Never recomputed: {[name for name, count in counts.items() if not count]}"
    assert {name.split(".")[2] for name in counts} == {"encoder", "decoder"}
    assert gradients(economical).keys() == gradients(plain).keys() == trained_names(plain)
    for name, gradient in gradients(economical).items():
        torch.testing.assert_close(
            gradient, gradients(plain)[name], **FLOAT32, msg=lambda text, name=name: f"{name}: {text}"
        )


def count_recomputations(model: nn.Module) -> dict[str, int]:
    """Returns a dictionary that counts, for every layer that can be checkpointed, its runs after the first."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, -1) + 1

    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # Inside of the layer: whether its own hooks run again depends on the version of transformers.
            inner = next(module for module in layer.modules() if isinstance(module, nn.LayerNorm))
            inner.register_forward_pre_hook(lambda *_, name=name: count(name))
    return counts


# --------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("pre_norm", [False, True])
def test_loss_falls_with_norms_before_and_after_the_layers(pre_norm: bool):
    model, batch = tiny_model(pre_norm=pre_norm).train(), random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = run_seeded(model, **batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
