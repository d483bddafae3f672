"""The masked-attention decoder against a slow re-statement: one image, one head, one full-size mask at a time.

Axes: B images, P pilot slots, Q matched queries, N = P + Q, M cells of a feature level, C channels, D channels of the per-pixel
embedding, A attention heads.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpformer_hf.mask_decoder import (
    DecoderFeatures,
    DecoderOutput,
    MaskedAttentionDecoder,
    Pilot,
    attend,
    mask_attention,
    resize_to_levels,
)
from mpformer_hf.mask_piloting import isolate_pilot_groups

NUM_IMAGES, NUM_QUERIES, NUM_HEADS, NUM_LAYERS = 2, 5, 2, 4
CHANNELS, EMBEDDING = 8, 6
LEVEL_SIZES = ((2, 3), (4, 6), (8, 12))
FULL_SIZE = (16, 24)
NUM_GROUPS, MAX_TARGETS = 2, 3
NUM_SLOTS = NUM_GROUPS * MAX_TARGETS


def make_decoder(
    *, pre_norm: bool = False, dropout: float = 0.0, num_layers: int = NUM_LAYERS
) -> MaskedAttentionDecoder:
    """Random weights everywhere (also in biases and norms), double precision."""
    decoder = MaskedAttentionDecoder(
        hidden_dim=CHANNELS,
        mask_feature_size=EMBEDDING,
        num_layers=num_layers,
        num_heads=NUM_HEADS,
        feedforward_dim=10,
        dropout=dropout,
        activation="relu",
        pre_norm=pre_norm,
    ).double()
    for name, parameter in decoder.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.4)
    return decoder.eval()


def draw_features() -> DecoderFeatures:
    return DecoderFeatures(
        values=[torch.randn(NUM_IMAGES, h * w, CHANNELS, dtype=torch.float64) for h, w in LEVEL_SIZES],
        positions=[torch.randn(h * w, CHANNELS, dtype=torch.float64) for h, w in LEVEL_SIZES],
        sizes=LEVEL_SIZES,
        pixel_embedding=torch.randn(NUM_IMAGES, EMBEDDING, *FULL_SIZE, dtype=torch.float64),
    )


@dataclass
class RandomMasks:
    """Attention masks that are drawn anew at every call, and remembered."""

    num_heads: int = 1
    levels: list[int] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)

    def draw_attention_mask(self, level: int) -> Tensor:
        height, width = LEVEL_SIZES[level]
        blocked = torch.rand(NUM_IMAGES, self.num_heads, NUM_SLOTS, height * width) < 0.6
        blocked[..., 0] = False  # no row is blocked everywhere
        self.levels.append(level)
        self.drawn.append(blocked)
        return blocked


def make_pilot(masks: RandomMasks | None = None, num_layers: int = NUM_LAYERS) -> Pilot:
    return Pilot(
        queries=torch.randn(NUM_IMAGES, NUM_SLOTS, CHANNELS, dtype=torch.float64),
        self_attention_mask=isolate_pilot_groups(NUM_GROUPS, MAX_TARGETS, NUM_QUERIES, "cpu"),
        masks=masks or RandomMasks(),
        num_layers=num_layers,
    )


def draw_queries() -> tuple[Tensor, Tensor]:
    """Contents (B, Q, C) and positions (Q, C)."""
    return (
        torch.randn(NUM_IMAGES, NUM_QUERIES, CHANNELS, dtype=torch.float64),
        torch.randn(NUM_QUERIES, CHANNELS, dtype=torch.float64),
    )


def assert_same(one: DecoderOutput, other: DecoderOutput, rtol: float = 1e-9) -> None:
    for name in ("hidden_states", "normed_states", "mask_embeddings"):
        for level, (left, right) in enumerate(zip(getattr(one, name), getattr(other, name), strict=True)):
            torch.testing.assert_close(
                left, right, rtol=rtol, atol=rtol, msg=lambda text, at=f"{name}[{level}]": f"{at}: {text}"
            )


# ---------------------------------------------------------------------------------------------------------- restatement


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """One image: (N, C), (M, C), (M, C), forbidden (A or 1, N, M) to (N, C) and weights (A, N, M)."""
    size = CHANNELS // NUM_HEADS
    outputs, all_weights = [], []
    for head in range(NUM_HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / size**0.5
        scores = scores.masked_fill(forbidden[head % len(forbidden)], -torch.inf)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        outputs.append(weights @ value[:, part])
        all_weights.append(weights)
    return torch.cat(outputs, dim=1), torch.stack(all_weights)


def layer_plainly(
    layer: nn.Module,
    states: Tensor,
    positions: Tensor,
    cells: Tensor,
    cell_positions: Tensor,
    forbidden: Tensor,
    self_forbidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer for one image; zeros as positions where there are none."""
    weight, bias, cross = layer.cross_attn.in_proj_weight, layer.cross_attn.in_proj_bias, layer.cross_attn.out_proj

    def cross_attention(queries: Tensor) -> Tensor:
        query = (queries + positions) @ weight[:CHANNELS].T + bias[:CHANNELS]
        key = (cells + cell_positions) @ weight[CHANNELS : 2 * CHANNELS].T + bias[CHANNELS : 2 * CHANNELS]
        value = cells @ weight[2 * CHANNELS :].T + bias[2 * CHANNELS :]
        return cross(attend_plainly(query, key, value, forbidden)[0])

    all_weights = []

    def self_attention(queries: Tensor) -> Tensor:
        own = layer.self_attn
        positioned = queries + positions
        attended, weights = attend_plainly(
            own.q_proj(positioned), own.k_proj(positioned), own.v_proj(queries), self_forbidden[None]
        )
        all_weights.append(weights)
        return own.out_proj(attended)

    def feed_forward(queries: Tensor) -> Tensor:
        return layer.fc2(layer.fc1(queries).clamp(min=0))

    steps = (
        (cross_attention, layer.cross_attn_layer_norm),
        (self_attention, layer.self_attn_layer_norm),
        (feed_forward, layer.final_layer_norm),
    )
    for step, norm in steps:
        states = states + step(norm(states)) if layer.pre_norm else norm(states + step(states))
    return states, all_weights[0]


def forbid_plainly(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Full-size mask logits (N, h, w) to forbidden cells of a level, (N, M), as the papers say it."""
    logits = nn.functional.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0].flatten(1)
    forbidden = torch.sigmoid(logits) < 0.5
    for row in forbidden:
        if row.all():
            row[:] = False
    return forbidden


def decode_plainly(
    decoder: MaskedAttentionDecoder,
    queries: Tensor,
    query_positions: Tensor | None,
    features: DecoderFeatures,
    pilot: Pilot | None,
    drawn: list[Tensor],
) -> list[dict[str, list[Tensor]]]:
    """Per image: hidden_states, normed_states, mask_embeddings and attentions of all levels (layers)."""
    images = []
    for image in range(NUM_IMAGES):
        positions = torch.zeros(NUM_QUERIES, CHANNELS) if query_positions is None else query_positions
        states = queries[image]
        self_forbidden = torch.zeros(NUM_QUERIES, NUM_QUERIES, dtype=torch.bool)
        if pilot is not None:
            states = torch.cat([pilot.queries[image], states])
            positions = torch.cat([torch.zeros(NUM_SLOTS, CHANNELS), positions])
            self_forbidden = pilot.self_attention_mask
        found = {"hidden_states": [states], "normed_states": [], "mask_embeddings": [], "attentions": []}
        for index in range(len(decoder.layers) + 1):
            normed = decoder.layernorm(states)
            embedding = decoder.mask_predictor(normed)
            found["normed_states"].append(normed)
            found["mask_embeddings"].append(embedding)
            if index == len(decoder.layers):
                break
            level = index % 3
            masks = torch.einsum("nd,dhw->nhw", embedding, features.pixel_embedding[image])
            forbidden = forbid_plainly(masks, LEVEL_SIZES[level])[None]
            if pilot is not None and index < pilot.num_layers:
                own = drawn[index][image]
                forbidden = torch.cat([own, forbidden[:, NUM_SLOTS:].expand(len(own), -1, -1)], dim=1)
            states, weights = layer_plainly(
                decoder.layers[index],
                states,
                positions,
                features.values[level][image],
                features.positions[level],
                forbidden,
                self_forbidden,
            )
            found["hidden_states"].append(states)
            found["attentions"].append(weights)
        images.append(found)
    return images


@pytest.mark.parametrize("use_sdpa", [True, False], ids=["sdpa", "eager"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("has_positions", [True, False], ids=["positions", "no_positions"])
@pytest.mark.parametrize("piloted_layers", [None, 4, 2, 1], ids=lambda number: f"piloted_{number}")
def test_decoder_equals_its_restatement(
    use_sdpa: bool, pre_norm: bool, has_positions: bool, piloted_layers: int | None
):
    decoder, features = make_decoder(pre_norm=pre_norm), draw_features()
    queries, positions = draw_queries()
    masks = RandomMasks()
    pilot = None if piloted_layers is None else make_pilot(masks, piloted_layers)
    query_positions = positions if has_positions else None

    output = decoder(queries, query_positions, features, pilot=pilot, output_attentions=not use_sdpa, use_sdpa=use_sdpa)

    expected = decode_plainly(decoder, queries, query_positions, features, pilot, masks.drawn)
    for image, found in enumerate(expected):
        for name, levels in found.items():
            if name == "attentions" and use_sdpa:
                assert output.attentions is None
                continue
            assert len(levels) == len(getattr(output, name))
            for level, value in enumerate(levels):
                torch.testing.assert_close(
                    getattr(output, name)[level][image],
                    value,
                    rtol=1e-8,
                    atol=1e-8,
                    msg=lambda text, at=f"{name}[{level}] of image {image}": f"{at}: {text}",
                )


def test_the_restatement_blocks_neither_nothing_nor_everything():
    """Otherwise the comparison above would say little about the attention masks."""
    features, (queries, _) = draw_features(), draw_queries()
    output = make_decoder()(queries, None, features)
    for level, size in enumerate(LEVEL_SIZES):
        masks = torch.einsum("bnd,bdhw->bnhw", output.mask_embeddings[level], features.pixel_embedding)
        share = torch.stack([forbid_plainly(image, size) for image in masks]).double().mean()
        assert 0.2 < share < 0.8


# ------------------------------------------------------------------------------------------------------ attention masks


@pytest.mark.parametrize("full_size", [(16, 24), (17, 23), (50, 68)], ids=str)
def test_resizing_the_pixel_embedding_equals_resizing_the_masks(full_size: tuple[int, int]):
    pixel_embedding = torch.randn(2, 16, *full_size, dtype=torch.float64)
    mask_embedding = torch.randn(2, 9, 16, dtype=torch.float64)
    masks = torch.einsum("bnd,bdhw->bnhw", mask_embedding, pixel_embedding)
    for size, level in zip(LEVEL_SIZES, resize_to_levels(pixel_embedding, LEVEL_SIZES), strict=True):
        expected = nn.functional.interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2)
        torch.testing.assert_close(mask_embedding @ level, expected, rtol=1e-10, atol=1e-13)


def test_a_query_that_would_see_nothing_sees_everything():
    level_embedding = torch.ones(1, 1, 4)
    level_embedding[0, 0, 3] = -1.0
    mask_embedding = torch.tensor([[[1.0], [-1.0], [0.0]]])
    blocked = mask_attention(mask_embedding, level_embedding, 0, 0, None)
    expected = [[False, False, False, True], [True, True, True, False], [False, False, False, False]]
    assert blocked.tolist() == [[expected]]  # a logit of 0 is a probability of 0.5, which is not below 0.5

    all_negative = mask_attention(torch.tensor([[[-1.0], [-2.0]]]), torch.ones(1, 1, 4), 0, 0, None)
    assert not all_negative.any()


def test_the_share_of_empty_masks_is_that_of_matched_queries_of_the_last_training_step():
    """Plainly: how many masks are negative in all cells of the level."""
    decoder, features = make_decoder(), draw_features()
    queries, _ = draw_queries()
    first = decoder.eval()(queries, None, features).mask_embeddings[0].detach().flatten(0, 1)
    assert decoder.last_blocked_share is None
    # Maps that hardly vary, orthogonal to the mean of the first masks: some of these are positive, the others negative everywhere.
    mean = first.mean(dim=0)
    constant = first[0] - (first[0] @ mean) / (mean @ mean) * mean
    features = replace(features, pixel_embedding=constant[:, None, None] + 0.01 * features.pixel_embedding)
    decoder.train()
    output = decoder(queries, None, features)
    expected = []
    for index in range(len(decoder.layers)):
        size = LEVEL_SIZES[index % len(LEVEL_SIZES)]
        masks = torch.einsum("bnd,bdhw->bnhw", output.mask_embeddings[index], features.pixel_embedding)
        resized = nn.functional.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        is_empty = [[bool((mask < 0).all()) for mask in image] for image in resized]
        expected.append(torch.tensor(is_empty).float().mean())
    assert 0 < sum(expected) < len(expected)
    torch.testing.assert_close(decoder.last_blocked_share, torch.stack(expected))
    decoder.eval()(queries, None, features)
    assert len(decoder.last_blocked_share) == len(decoder.layers)


@pytest.mark.parametrize("num_piloted", [0, 1], ids=["own_masks", "ground_truth"])
def test_pilot_slots_do_not_count_as_empty_masks(num_piloted: int):
    """Two slots whose own masks are empty, before a query that sees something and one that does not."""
    piloted = None
    if num_piloted:

        class Everything:
            def draw_attention_mask(self, level: int) -> torch.Tensor:
                return torch.zeros(1, 1, 2, 4, dtype=torch.bool)

        piloted = Pilot(torch.zeros(1, 2, 1), torch.zeros(4, 4, dtype=torch.bool), Everything(), num_piloted)
    recorded = []
    mask_embedding = torch.tensor([[[-1.0], [-1.0], [1.0], [-1.0]]])
    mask_attention(mask_embedding, torch.ones(1, 1, 4), 0, 2, piloted, recorded.append)
    assert [is_empty.tolist() for is_empty in recorded] == [[[False, True]]]


def test_attention_masks_carry_no_gradient():
    decoder, features = make_decoder(), draw_features()
    features.pixel_embedding.requires_grad_()
    queries, _ = draw_queries()
    output = decoder(queries.requires_grad_(), None, features)
    (gradient,) = torch.autograd.grad(
        output.hidden_states[-1].sum(), features.pixel_embedding, allow_unused=True, retain_graph=True
    )
    assert gradient is None
    assert torch.autograd.grad(output.hidden_states[-1].square().sum(), queries)[0].abs().sum() > 0


def test_masks_of_every_head_are_its_own():
    """With the same masks in all heads the result is that of one mask; with other ones it is the restatement's."""
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    masks = RandomMasks(num_heads=NUM_HEADS)
    pilot = make_pilot(masks, num_layers=3)
    output = decoder(queries, positions, features, pilot=pilot)
    expected = decode_plainly(decoder, queries, positions, features, pilot, masks.drawn)
    for image, found in enumerate(expected):
        torch.testing.assert_close(output.hidden_states[-1][image], found["hidden_states"][-1], rtol=1e-8, atol=1e-8)
    assert all((blocked[:, 0] != blocked[:, 1]).any() for blocked in masks.drawn)

    @dataclass
    class Replayed:
        masks: list[Tensor]

        def draw_attention_mask(self, level: int) -> Tensor:
            del level
            return self.masks.pop(0)

    single = [blocked[:, :1] for blocked in masks.drawn]
    doubled = [blocked.expand(-1, NUM_HEADS, -1, -1) for blocked in single]
    outputs = [
        decoder(
            queries, positions, features, pilot=Pilot(pilot.queries, pilot.self_attention_mask, Replayed(replay), 3)
        )
        for replay in (list(single), doubled)
    ]
    assert_same(*outputs)


# ------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("has_mask", [True, False])
def test_sdpa_equals_eager(has_mask: bool):
    query, key, value = (torch.randn(2, length, CHANNELS, dtype=torch.float64) for length in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) < 0.5 if has_mask else None
    if mask is not None:
        mask[..., 0] = False
    fast, no_weights = attend(query, key, value, NUM_HEADS, mask, dropout=0.0, need_weights=False)
    slow, weights = attend(query, key, value, NUM_HEADS, mask, dropout=0.0, need_weights=True)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    assert no_weights is None
    assert weights.shape == (2, NUM_HEADS, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, NUM_HEADS, 5, dtype=torch.float64))
    if mask is not None:
        assert (weights[mask.expand(-1, NUM_HEADS, -1, -1)] == 0).all()


def test_sdpa_and_eager_have_equal_gradients():
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    parameters = list(decoder.parameters())
    gradients = []
    for use_sdpa in (True, False):
        output = decoder(queries, positions, features, use_sdpa=use_sdpa)
        gradients.append(torch.autograd.grad(output.mask_embeddings[-1].square().sum(), parameters, allow_unused=True))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_asking_for_attention_weights_changes_nothing_else():
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    plain = decoder(queries, positions, features)
    asked = decoder(queries, positions, features, output_attentions=True)
    assert_same(plain, asked)
    assert [weights.shape for weights in asked.attentions] == [(NUM_IMAGES, NUM_HEADS, NUM_QUERIES, NUM_QUERIES)] * 4


# ---------------------------------------------------------------------------------------------------------------- pilot


class SameMasks(RandomMasks):
    """The same masks in every run: what a slot sees does not depend on the order of the draws."""

    def draw_attention_mask(self, level: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.levels))
            return super().draw_attention_mask(level)


@pytest.mark.parametrize("num_layers", [NUM_LAYERS, 2])
def test_matched_queries_are_those_of_a_decoder_without_pilot(num_layers: int):
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    piloted = decoder(queries, positions, features, pilot=make_pilot(num_layers=num_layers))
    plain = decoder(queries, positions, features)
    matched = DecoderOutput(
        *(
            tuple(level[:, NUM_SLOTS:] for level in levels)
            for levels in (piloted.hidden_states, piloted.normed_states, piloted.mask_embeddings)
        ),
        attentions=None,
    )
    assert_same(matched, plain)


def test_a_group_does_not_depend_on_another_groups_content():
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    pilot = make_pilot()
    changed_queries = pilot.queries.clone()
    changed_queries[:, :MAX_TARGETS] = torch.randn(MAX_TARGETS, CHANNELS).double()  # the first group
    before, after = (
        decoder(
            queries, positions, features, pilot=Pilot(content, pilot.self_attention_mask, SameMasks(), NUM_LAYERS)
        ).hidden_states[-1]
        for content in (pilot.queries, changed_queries)
    )
    torch.testing.assert_close(after[:, MAX_TARGETS:], before[:, MAX_TARGETS:], rtol=1e-10, atol=1e-12)
    assert ((after - before)[:, :MAX_TARGETS].abs().amax(-1) > 1e-3).all()


def test_slots_of_a_group_and_the_matched_queries_reach_a_slot():
    decoder, features, (queries, positions) = make_decoder(), draw_features(), draw_queries()
    pilot = make_pilot()

    def last_states(slots: Tensor, matched: Tensor) -> Tensor:
        with_content = Pilot(slots, pilot.self_attention_mask, SameMasks(), NUM_LAYERS)
        return decoder(matched, positions, features, pilot=with_content).hidden_states[-1]

    base = last_states(pilot.queries, queries)
    neighbour = pilot.queries.clone()
    neighbour[:, 1] = torch.randn(CHANNELS).double()
    assert ((last_states(neighbour, queries) - base)[:, 0].abs().amax(-1) > 1e-4).all()
    assert ((last_states(pilot.queries, torch.randn_like(queries)) - base)[:, :NUM_SLOTS].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize(("num_layers", "levels"), [(5, [0, 1, 2, 0, 1]), (4, [0, 1, 2, 0]), (1, [0])])
def test_masks_are_drawn_anew_for_every_piloted_layer_at_its_level(num_layers: int, levels: list[int]):
    masks = RandomMasks()
    decoder, features, (queries, positions) = make_decoder(num_layers=5), draw_features(), draw_queries()
    decoder(queries, positions, features, pilot=make_pilot(masks, num_layers))
    assert masks.levels == levels


def test_pilot_slots_take_the_type_of_the_queries():
    decoder, features, (queries, _) = make_decoder(), draw_features(), draw_queries()
    pilot = make_pilot()
    single = Pilot(pilot.queries.float(), pilot.self_attention_mask, pilot.masks, pilot.num_layers)
    assert decoder(queries, None, features, pilot=single).hidden_states[0].dtype == torch.float64


# ---------------------------------------------------------------------------------------------- checkpointing and dropout


def test_gradient_checkpointing_draws_once_a_layer_and_gives_equal_gradients():
    features, (queries, positions) = draw_features(), draw_queries()
    decoder = make_decoder().train()
    pilot = make_pilot()
    gradients = []
    for uses_checkpointing in (False, True):
        for layer in decoder.layers:
            layer.gradient_checkpointing = uses_checkpointing
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        masks = SameMasks()
        output = decoder(
            queries, positions, features, pilot=Pilot(pilot.queries, pilot.self_attention_mask, masks, NUM_LAYERS)
        )
        gradients.append(torch.autograd.grad(output.mask_embeddings[-1].square().sum(), list(decoder.parameters())))
        assert len(masks.levels) == NUM_LAYERS
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_sdpa", [True, False], ids=["sdpa", "eager"])
def test_dropout_acts_in_training_only_and_skips_no_layer(use_sdpa: bool):
    decoder, features, (queries, positions) = make_decoder(dropout=0.5), draw_features(), draw_queries()
    quiet = decoder(queries, positions, features, use_sdpa=use_sdpa)
    assert_same(decoder(queries, positions, features, use_sdpa=use_sdpa), quiet)
    decoder.train()
    noisy = decoder(queries, positions, features, use_sdpa=use_sdpa)
    for before, after in zip(noisy.hidden_states, noisy.hidden_states[1:], strict=False):
        assert not torch.equal(before, after)
    assert not torch.allclose(noisy.hidden_states[1], quiet.hidden_states[1])


def test_half_precision_decodes_to_half_precision():
    features, (queries, positions) = draw_features(), draw_queries()
    half = DecoderFeatures(
        [value.bfloat16() for value in features.values],
        [position.bfloat16() for position in features.positions],
        features.sizes,
        features.pixel_embedding.bfloat16(),
    )
    output = make_decoder().bfloat16()(queries.bfloat16(), positions.bfloat16(), half)
    assert output.mask_embeddings[-1].dtype == torch.bfloat16
    assert output.mask_embeddings[-1].isfinite().all()
