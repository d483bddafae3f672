"""What every universal segmentation model of this package promises; a new model inherits these tests with a few lines.

    class TestSibling(ModelContract):
        model_class, base_class = SiblingForUniversalSegmentation, SiblingModel
        make_config = staticmethod(tiny_sibling_config)
        field_effects = SIBLING_FIELD_EFFECTS

`make_config(backbone, **fields)` makes a tiny config, like `tests.factories.tiny_config`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentationOutput,
    Mask2FormerModelOutput,
)

from mpformer_hf import MPFormerImageProcessor
from tests.factories import random_batch, random_images
from tests.logs import recorded_log

# float32; an image alone may take another summation order than in a batch. Logits are of size 1 here.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class FieldEffect:
    """Where a config field is seen to have an effect.

    Attributes:
        value: another value than that of `make_config`.
        seen_in: name of a probe, see `PROBES`.
        others: fields that both configs have, because the effect needs them.
    """

    value: Any
    seen_in: str
    others: dict[str, Any] = field(default_factory=dict)


class ModelContract:
    """Tests of one model; see the top of this file."""

    model_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    make_config: Callable[..., PreTrainedConfig]
    field_effects: dict[str, FieldEffect]
    fields_without_effect: frozenset[str] = frozenset()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "changed_field" in metafunc.fixturenames:
            metafunc.parametrize("changed_field", sorted(self.field_effects))

    def make_model(self, backbone: str = "resnet", **fields: Any) -> Any:
        torch.manual_seed(0)
        return self.model_class(self.make_config(backbone, **fields)).eval()

    # ---------------------------------------------------------------------------------------------------------------- outputs

    @pytest.mark.parametrize("size", [(64, 96), (50, 77)])
    def test_logits_have_a_quarter_of_the_size_of_the_images(self, size):
        model = self.make_model()
        output = predict(model, random_images(2, size))
        quarter = tuple(-(-length // 4) for length in size)
        assert output.class_queries_logits.shape == (2, model.config.num_queries, model.config.num_labels + 1)
        assert output.masks_queries_logits.shape == (2, model.config.num_queries, *quarter)
        assert output.image_sizes.tolist() == [list(size)] * 2

    def test_fields_of_the_outputs_begin_with_those_of_transformers(self):
        model = self.make_model()
        everything = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            base = model.model(random_images(1), **everything)
            output = model(**random_batch([1]), output_auxiliary_logits=True, **everything)
        for ours, theirs in ((base, Mask2FormerModelOutput), (output, Mask2FormerForUniversalSegmentationOutput)):
            expected = list(theirs.__dataclass_fields__)
            assert list(ours)[: len(expected)] == expected

    def test_hidden_states_attentions_and_auxiliary_logits_come_when_asked_for(self):
        model, images = self.make_model(), random_images(2)
        output = predict(model, images)
        asked = predict(model, images, output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True)
        num_queries, num_levels = model.config.num_queries, model.config.decoder_layers
        lengths = {
            "encoder_hidden_states": 4,
            "pixel_decoder_hidden_states": 3,
            "transformer_decoder_hidden_states": num_levels,
            "attentions": num_levels - 1,
            "auxiliary_logits": num_levels - 1,
        }
        for name, length in lengths.items():
            assert output[name] is None if name in output else True
            assert len(asked[name]) == length, name
        assert [tuple(level.shape[2:]) for level in asked.encoder_hidden_states] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        assert [tuple(level.shape[2:]) for level in asked.pixel_decoder_hidden_states] == [(2, 3), (4, 6), (8, 12)]
        for weights in asked.attentions:
            assert weights.shape == (2, model.config.num_attention_heads, num_queries, num_queries)
            assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        for level in asked.auxiliary_logits:
            assert level["masks_queries_logits"].shape == output.masks_queries_logits.shape
            assert level["class_queries_logits"].shape == output.class_queries_logits.shape

    def test_config_can_ask_for_hidden_states_attentions_and_tuples(self):
        model = self.make_model(output_hidden_states=True, output_attentions=True, return_dict=False)
        output = predict(model, random_images(1), return_dict=True)
        assert output.transformer_decoder_hidden_states is not None
        assert output.attentions is not None
        assert isinstance(predict(model, random_images(1)), tuple)
        assert isinstance(model.model(random_images(1)), tuple)

    def test_base_model_returns_masks_of_all_levels_only_with_hidden_states(self):
        model, images = self.make_model(), random_images(2)
        last = predict(model.model, images).masks_queries_logits
        all_levels = predict(model.model, images, output_hidden_states=True).masks_queries_logits
        assert (len(last), len(all_levels)) == (1, model.config.decoder_layers)
        assert_close(all_levels[-1], last[0])
        auxiliary = predict(model, images, output_auxiliary_logits=True).auxiliary_logits
        assert_close([*all_levels[:-1]], [level["masks_queries_logits"] for level in auxiliary])

    @pytest.mark.parametrize("labelled", [True, False])
    def test_tuple_has_the_values_of_the_dictionary_in_order(self, labelled):
        model, batch = self.make_model(), random_batch([2, 1])
        inputs = batch if labelled else {"pixel_values": batch["pixel_values"]}
        as_dict, as_tuple = (run_seeded(model, inputs, return_dict=wanted) for wanted in (True, False))
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(as_dict)
        for ours, expected in zip(as_tuple, as_dict.values(), strict=True):
            assert_close(ours, expected, rtol=0, atol=0)
        assert (as_tuple[0].ndim == 0) is labelled  # the loss comes first

    def test_tuple_of_the_base_model_has_only_tensors(self):
        as_tuple = self.make_model().model(random_images(1), return_dict=False)
        for value in as_tuple:
            assert isinstance(value, Tensor) or all(isinstance(level, Tensor) for level in value)

    def test_image_sizes_are_read_from_the_pixel_mask(self):
        pixel_mask = torch.zeros(2, 64, 96, dtype=torch.int64)
        pixel_mask[0, :50, :96] = 1
        pixel_mask[1, :64, :33] = 1
        for mask in (pixel_mask, pixel_mask.bool(), pixel_mask.float()):
            output = predict(self.make_model(), random_images(2), pixel_mask=mask)
            assert output.image_sizes.dtype == torch.int64
            assert output.image_sizes.tolist() == [[50, 96], [64, 33]]

    def test_the_network_sees_padding_like_any_other_pixel(self):
        model, images = self.make_model(), random_images(2)
        pixel_mask = torch.ones(2, 64, 96)
        pixel_mask[:, :, 50:] = 0
        plain, masked = predict(model, images), predict(model, images, pixel_mask=pixel_mask)
        assert_close(masked.masks_queries_logits, plain.masks_queries_logits, rtol=0, atol=0)

    def test_images_of_a_batch_do_not_influence_each_other(self):
        model, images = self.make_model(), random_images(3)
        together = predict(model, images)
        for index, image in enumerate(images):
            alone = predict(model, image[None])
            assert_close(together.class_queries_logits[index], alone.class_queries_logits[0], **ROUNDING)
            assert_close(together.masks_queries_logits[index], alone.masks_queries_logits[0], **ROUNDING)

    def test_post_processing_treats_images_of_a_padded_batch_as_alone(self):
        model = self.make_model()
        pixel_mask = torch.zeros(2, 64, 96)
        pixel_mask[0, :40], pixel_mask[1, :, :72] = 1, 1
        output = predict(model, random_images(2), pixel_mask=pixel_mask)
        processor = MPFormerImageProcessor(score_threshold=0.0)
        for task in ("semantic", "instance", "panoptic"):
            post_process = getattr(processor, f"post_process_{task}_segmentation")
            for index, together in enumerate(post_process(output)):
                one = copy.copy(output)
                for name in ("class_queries_logits", "masks_queries_logits", "image_sizes"):
                    one[name] = output[name][index : index + 1]
                (alone,) = post_process(one)
                maps = [result if task == "semantic" else result["segmentation"] for result in (together, alone)]
                assert torch.equal(*maps)
                assert tuple(maps[0].shape) == tuple(output.image_sizes[index].tolist())

    # --------------------------------------------------------------------------------------------------------------- training

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_terms_of_the_loss_are_detached_and_sum_to_it(self, training):
        output = self.make_model().train(training)(**random_batch())
        assert not any(term.requires_grad for term in output.loss_dict.values())
        assert output.loss.requires_grad
        assert_close(torch.stack(list(output.loss_dict.values())).sum(), output.loss.detach(), **ROUNDING)

    def test_every_training_step_has_the_same_terms(self):
        model = self.make_model().train()
        batches = ([2, 0, 3], [0, 0], [1], [0], [9, 1])
        terms = [set(model(**random_batch(num_segments)).loss_dict) for num_segments in batches]
        assert all(names == terms[0] for names in terms)
        assert {"loss_cross_entropy", "loss_mask", "loss_dice", "loss_dice_0"} <= terms[0]

    def test_batch_without_any_segment_has_a_finite_loss_of_the_class_alone(self):
        output = self.make_model().train()(**random_batch([0, 0]))
        assert output.loss.isfinite()
        for name, term in output.loss_dict.items():
            assert (term > 0) == name.startswith("loss_cross_entropy"), name

    def test_labels_do_not_change_the_predictions_of_evaluation(self):
        model, batch = self.make_model(), random_batch()
        plain, labelled = predict(model, batch["pixel_values"]), predict(model, **batch)
        assert plain.loss is None
        assert plain.loss_dict is None
        assert labelled.loss.isfinite()
        for name in ("class_queries_logits", "masks_queries_logits"):
            assert torch.equal(plain[name], labelled[name])

    @pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext", "timm"])
    @pytest.mark.parametrize("num_segments", [[2, 0, 3], [0, 0]], ids=["one image is empty", "all images are empty"])
    def test_every_trained_parameter_gets_a_gradient(self, backbone, num_segments):
        model = self.make_model(backbone).train()
        model(**random_batch(num_segments)).loss.backward()
        without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert without == []
        frozen = [
            name for name, weight in model.named_parameters() if not weight.requires_grad and weight.grad is not None
        ]
        assert frozen == []
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)

    def test_gradients_of_ordinary_steps_are_not_all_zero(self):
        model = self.make_model().train()
        with torch.no_grad():  # some start at zero, which hides gradients of what comes before them
            for name, weight in model.named_parameters():
                if "attention_weights" in name or "sampling_offsets" in name:
                    weight.add_(0.1 * torch.randn_like(weight))
        model(**random_batch([3, 2])).loss.backward()
        zero = [name for name, weight in model.named_parameters() if weight.grad is not None and not weight.grad.any()]
        assert zero == []

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_gives_equal_gradients(self, use_reentrant):
        batch = random_batch()
        plain, checkpointed = self.make_model(dropout=0.1).train(), self.make_model(dropout=0.1).train()
        old_name = checkpointed.gradient_checkpointing_enable  # deprecated in favour of a new one in transformers 5.23
        enable = getattr(checkpointed, "activation_checkpointing_enable", old_name)
        enable({"use_reentrant": use_reentrant})
        recomputed = count_calls(checkpointed)
        for model in (plain, checkpointed):
            torch.manual_seed(1)
            model(**batch).loss.backward()
        assert recomputed["forward"] > recomputed["layers"], "Nothing was recomputed."
        for (name, ours), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
            assert_close(ours.grad, expected.grad, **ROUNDING, msg=lambda text, name=name: f"{name}: {text}")

    def test_eager_and_fused_attention_agree(self):
        batch = random_batch([2, 1])
        outputs = []
        for implementation in ("eager", "sdpa"):
            model = self.make_model(attn_implementation=implementation).train()
            assert model.config._attn_implementation == implementation
            outputs.append(run_seeded(model, batch))
        assert_close(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits, **ROUNDING)
        assert_close(outputs[0].loss, outputs[1].loss, **ROUNDING)

    # ----------------------------------------------------------------------------------------------------- precision, compilers

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_trains_in_other_types(self, dtype):
        model, batch = self.make_model().to(dtype).train(), random_batch()
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        output = model(**batch)
        assert output.masks_queries_logits.dtype == dtype
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)

    def test_trains_under_autocast(self):
        model, batch = self.make_model().train(), random_batch()
        torch.manual_seed(1)
        full = model(**batch).loss.detach()
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            output = model(**batch)
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        assert_close(output.loss.detach(), full, rtol=0.1, atol=0)  # bfloat16 has 3 digits; matches may differ

    def test_compiles_to_one_graph_in_evaluation(self):
        model, images = self.make_model(decoder_layers=2), random_images(1, (64, 64))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = predict(model, images)
        output = predict(compiled, images)
        assert_close(output.masks_queries_logits, expected.masks_queries_logits, **ROUNDING)

    def test_moves_to_another_device(self, device):
        model, images = self.make_model(), random_images(2)
        expected = predict(model, images)
        output = predict(model.to(device), images.to(device))
        assert output.masks_queries_logits.device.type == device.type
        assert_close(output.class_queries_logits.cpu(), expected.class_queries_logits, rtol=1e-2, atol=1e-2)  # TF32

    # ----------------------------------------------------------------------------------------------------------------- folders

    @pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext", "timm"])
    def test_saving_and_loading_changes_no_bit(self, backbone, tmp_path):
        model = self.make_model(backbone)
        torch.manual_seed(1)
        with torch.no_grad():
            # Nothing that an initialisation would make again.
            for weight in model.parameters():
                weight.copy_(torch.rand_like(weight) - 0.5)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(2 * torch.rand_like(buffer) + 1)
        model.save_pretrained(tmp_path)
        with recorded_log() as log:
            loaded = self.model_class.from_pretrained(tmp_path)
        assert log == []
        assert not loaded.training
        assert_same_tensors(dict(loaded.named_parameters()), dict(model.named_parameters()))
        assert_same_tensors(dict(loaded.named_buffers()), dict(model.named_buffers()))
        images = random_images(1)
        expected, output = predict(model, images), predict(loaded, images)
        assert output.masks_queries_logits.isfinite().all()
        assert torch.equal(output.masks_queries_logits, expected.masks_queries_logits)
        assert torch.equal(output.class_queries_logits, expected.class_queries_logits)
        frozen, still_frozen = (
            {name for name, weight in one.named_parameters() if not weight.requires_grad} for one in (model, loaded)
        )
        assert frozen == still_frozen

    def test_auto_classes_find_the_model(self, tmp_path):
        model = self.make_model()
        model.save_pretrained(tmp_path)
        with recorded_log() as log:
            config = AutoConfig.from_pretrained(tmp_path)
            for_universal = AutoModelForUniversalSegmentation.from_pretrained(tmp_path)
            for_image = AutoModelForImageSegmentation.from_pretrained(tmp_path)
        assert log == []
        assert type(config) is self.model_class.config_class
        assert type(for_universal) is type(for_image) is self.model_class
        base = AutoModel.from_pretrained(tmp_path)  # transformers reports the unused head of any model here
        assert type(base) is self.base_class
        assert_same_tensors(base.state_dict(), model.model.state_dict())

    # ----------------------------------------------------------------------------------------------------------- configuration

    def test_every_config_field_is_listed_with_its_effect(self):
        fields = {name for name in self.model_class.config_class.__annotations__ if not name.startswith("_")}
        inherited = set(PreTrainedConfig.__annotations__) | {"model_type"}
        assert self.field_effects.keys() == fields - inherited - self.fields_without_effect

    def test_every_config_field_has_an_effect(self, changed_field):
        effect = self.field_effects[changed_field]
        without = probe_unchanged(type(self), effect.seen_in, tuple(effect.others.items()))
        assert without != self.probe(effect.seen_in, **{**effect.others, changed_field: effect.value})

    def test_without_a_change_there_is_no_effect(self):
        for seen_in, others in {
            (effect.seen_in, tuple(effect.others.items())) for effect in self.field_effects.values()
        }:
            assert self.probe(seen_in, **dict(others)) == probe_unchanged(type(self), seen_in, others), seen_in

    def probe(self, seen_in: str, **fields: Any) -> Any:
        return PROBES[seen_in](lambda: self.make_model(**fields))


# -------------------------------------------------------------------------------------------------------------------- helpers


@torch.no_grad()
def predict(model: Any, *arguments: Any, **keywords: Any) -> Any:
    return model(*arguments, **keywords)


def run_seeded(model: Any, batch: dict[str, Any], **keywords: Any) -> Any:
    """A forward without gradient whose random points and noise are those of every other call."""
    torch.manual_seed(1)
    return predict(model, **batch, **keywords)


def assert_same_tensors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(ours[name], tensor)]
    assert different == []


def count_calls(model: torch.nn.Module) -> dict[str, int]:
    """Count forward passes of the layers that can be checkpointed, and those layers."""
    counts = {"forward": 0, "layers": 0}

    def count(*_: Any) -> None:
        counts["forward"] += 1

    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            counts["layers"] += 1
            # A hook would run outside of the recomputation: listen to a part of the layer instead.
            next(iter(module.children())).register_forward_pre_hook(count)
    return counts


@cache
def probe_unchanged(contract: type[ModelContract], seen_in: str, fields: tuple[tuple[str, Any], ...]) -> Any:
    return contract().probe(seen_in, **dict(fields))


def to_plain(value: Any) -> Any:
    """Tensors as nested lists, so that `==` compares values."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return value


def probe_graph(make_model: Callable[[], Any]) -> Any:
    return {name: tuple(tensor.shape) for name, tensor in make_model().state_dict().items()}


def probe_initial_weights(make_model: Callable[[], Any]) -> Any:
    return to_plain(make_model().state_dict())


def probe_trained_parameters(make_model: Callable[[], Any]) -> Any:
    return {name for name, weight in make_model().named_parameters() if weight.requires_grad}


def probe_prediction(make_model: Callable[[], Any]) -> Any:
    """What changes here is neither the graph nor its weights: both would be another probe's."""
    model = make_model()
    return to_plain(predict(model, random_images(1)).class_queries_logits)


def probe_output_fields(make_model: Callable[[], Any]) -> Any:
    return list(predict(make_model(), random_images(1)))


def probe_loss(make_model: Callable[[], Any]) -> Any:
    return to_plain(run_seeded(make_model().train(), random_batch()).loss_dict)


def probe_patience(make_model: Callable[[], Any]) -> Any:
    """Training steps until a diverged model gives up."""
    model, batch = make_model().train(), random_batch([1])
    with torch.no_grad():
        model.class_predictor.weight.fill_(float("nan"))
    for step in range(1, 10):
        try:
            predict(model, **batch)
        except FloatingPointError:
            return step
    return None


def probe_error(make_model: Callable[[], Any]) -> Any:
    try:
        make_model()
    except ValueError as error:
        return str(error)
    return None


PROBES: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "graph": probe_graph,
    "initial weights": probe_initial_weights,
    "trained parameters": probe_trained_parameters,
    "prediction": probe_prediction,
    "output fields": probe_output_fields,
    "loss": probe_loss,
    "patience": probe_patience,
    "error": probe_error,
}
