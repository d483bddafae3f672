"""The pixel decoder against a plain re-statement, and what training asks of it."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpformer_hf.deformable_attention import ms_deform_attn_reference
from mpformer_hf.pixel_decoder import PixelDecoder
from mpformer_hf.position_embedding import sine_position_embedding

CHANNELS = (3, 4, 5, 6)
SIZE = 32
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2)]


def make_decoder(*, dropout: float = 0.0, num_layers: int = 2) -> PixelDecoder:
    """Random weights everywhere; offsets of a cell or so."""
    decoder = PixelDecoder(
        CHANNELS,
        feature_size=SIZE,
        mask_feature_size=7,
        num_heads=2,
        num_layers=num_layers,
        feedforward_dim=12,
        dropout=dropout,
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


def draw_features(sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    return [torch.randn(2, channels, *size) for channels, size in zip(CHANNELS, sizes, strict=True)]


def normalise_groups(maps: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of 32 groups of one channel: every channel of every image by itself, as there are 32 channels."""
    mean, variance = maps.mean((2, 3), keepdim=True), maps.var((2, 3), unbiased=False, keepdim=True)
    return (maps - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def convolve_cells(maps: Tensor, convolution: nn.Conv2d) -> Tensor:
    """1x1 convolution as a product of matrices."""
    result = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], maps)
    return result if convolution.bias is None else result + convolution.bias[:, None, None]


def decode_plainly(decoder: PixelDecoder, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The definition, from coarse to fine: strides 32, 16, 8 attend to each other; stride 4 is added at the end."""
    fine, *coarse = features
    coarse = coarse[::-1]
    shapes = [tuple(level.shape[2:]) for level in coarse]
    cells, positions, reference = [], [], []
    for level, (maps, (height, width)) in enumerate(zip(coarse, shapes, strict=True)):
        convolution, norm = decoder.input_projections[level]
        projected = normalise_groups(convolve_cells(maps, convolution), norm)
        sines = sine_position_embedding(height, width, SIZE, torch.float32, torch.device("cpu"))
        for i in range(height):
            for j in range(width):
                cells.append(projected[:, :, i, j])
                positions.append(sines[i * width + j] + decoder.level_embed[level])
                reference.append([(j + 0.5) / width, (i + 0.5) / height])
    states, positions = torch.stack(cells, dim=1), torch.stack(positions)
    reference = torch.tensor(reference)[:, None, None, None]  # (S, 1, 1, 1, 2)
    lengths = torch.tensor([(width, height) for height, width in shapes]).float()[:, None]

    for layer in decoder.encoder.layers:
        attention, num_cells = layer.self_attn, states.shape[1]
        queries = states + positions
        offsets = attention.sampling_offsets(queries).view(2, num_cells, 2, 3, 4, 2)
        weights = attention.attention_weights(queries).view(2, num_cells, 2, 12).softmax(-1).view(2, num_cells, 2, 3, 4)
        values = attention.value_proj(states).view(2, num_cells, 2, SIZE // 2)
        attended = ms_deform_attn_reference(values, shapes, reference + offsets / lengths, weights)
        states = layer.self_attn_layer_norm(states + attention.output_proj(attended.flatten(2)))
        states = layer.final_layer_norm(states + layer.fc2(layer.fc1(states).clamp(min=0)))

    maps, first = [], 0
    for height, width in shapes:
        level = states[:, first : first + height * width]
        maps.append(level.reshape(2, height, width, SIZE).permute(0, 3, 1, 2))
        first += height * width
    lateral = normalise_groups(convolve_cells(fine, decoder.adapter_1[0]), decoder.adapter_1[1])
    upsampled = nn.functional.interpolate(maps[-1], size=fine.shape[2:], mode="bilinear", align_corners=False)
    smoothed = nn.functional.conv2d(lateral + upsampled, decoder.layer_1[0].weight, padding=1)
    smoothed = normalise_groups(smoothed, decoder.layer_1[1]).clamp(min=0)
    return convolve_cells(smoothed, decoder.mask_projection), maps


@pytest.mark.parametrize(
    "sizes",
    [SIZES, [(16, 16), (8, 8), (4, 4), (2, 2)], [(9, 13), (5, 7), (3, 4), (2, 2)]],
    ids=["wide", "square", "odd"],
)
def test_decoder_equals_its_restatement(sizes: list[tuple[int, int]]):
    decoder, features = make_decoder(), draw_features(sizes)
    pixel_embedding, maps = decoder(features)
    expected_embedding, expected_maps = decode_plainly(decoder, features)
    torch.testing.assert_close(pixel_embedding, expected_embedding, rtol=1e-4, atol=1e-4)
    for level, expected in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_features_come_coarse_to_fine_and_the_embedding_at_stride_4():
    pixel_embedding, maps = make_decoder()(draw_features())
    assert pixel_embedding.shape == (2, 7, 8, 12)
    assert [tuple(level.shape) for level in maps] == [(2, SIZE, 1, 2), (2, SIZE, 2, 3), (2, SIZE, 4, 6)]


def test_no_deformable_layers_leave_the_projected_features():
    decoder, features = make_decoder(num_layers=0), draw_features()
    _, maps = decoder(features)
    for level, projection, feature in zip(maps, decoder.input_projections, features[:0:-1], strict=True):
        torch.testing.assert_close(level, projection(feature))


def test_every_level_reaches_every_other():
    """A change at stride 32 is seen at stride 8, and the other way round; stride 4 reaches the pixel embedding alone."""
    decoder, features = make_decoder(), draw_features()
    pixel_embedding, maps = decoder(features)
    for changed in range(4):
        moved = list(features)
        moved[changed] = moved[changed] + torch.randn_like(moved[changed])
        other_embedding, other_maps = decoder(moved)
        assert (other_embedding - pixel_embedding).abs().max() > 1e-3
        differs = [bool((other - level).abs().max() > 1e-5) for other, level in zip(other_maps, maps, strict=True)]
        assert differs == [changed > 0] * 3


def test_every_parameter_gets_a_gradient():
    decoder = make_decoder().train()
    pixel_embedding, maps = decoder(draw_features())
    (pixel_embedding.square().sum() + sum(level.square().sum() for level in maps)).backward()
    missing = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert missing == []


def test_gradient_checkpointing_gives_equal_gradients():
    decoder, features = make_decoder(dropout=0.1).train(), draw_features()
    gradients = []
    for uses_checkpointing in (False, True):
        for layer in decoder.encoder.layers:
            layer.gradient_checkpointing = uses_checkpointing
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        torch.manual_seed(0)  # the same dropout
        pixel_embedding, _ = decoder(features)
        gradients.append(torch.autograd.grad(pixel_embedding.square().sum(), list(decoder.parameters())))
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    decoder, features = make_decoder(dropout=0.5), draw_features()
    quiet, _ = decoder(features)
    assert torch.equal(decoder(features)[0], quiet)
    assert not torch.allclose(decoder.train()(features)[0], quiet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype: torch.dtype):
    decoder, features = make_decoder(), draw_features()
    expected, _ = decoder(features)
    pixel_embedding, maps = decoder.to(dtype)([level.to(dtype) for level in features])
    assert {pixel_embedding.dtype, *(level.dtype for level in maps)} == {dtype}
    error = (pixel_embedding.float() - expected).abs().mean() / expected.abs().mean()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
