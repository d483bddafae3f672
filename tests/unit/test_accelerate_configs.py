"""The files in training/accelerate: Accelerate reads them, and understands by them what their comments say."""

import importlib.machinery
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)

from mpformer_hf import modeling_mpformer
from tests.factories import tiny_model
from training.arguments import RecipeError, TrainingArguments
from training.deepspeed_state import configure_deepspeed

FOLDER = Path(__file__).parents[2] / "training" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = {
    "cpu": DistributedType.NO,
    "one_gpu": DistributedType.NO,
    "multi_gpu_ddp": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def launch_arguments(name, *words):
    """Read the command line as `accelerate launch` does."""
    parser = launch_command_parser()
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *words, "training/train.py", "RECIPE"]
    arguments, _, _ = _validate_launch_command(parser.parse_args(command))
    return arguments


@pytest.fixture
def launched(monkeypatch):
    """Set what a launched program finds in its environment."""

    def set_environment(name):
        arguments = launch_arguments(name, "--main_process_port", "0")
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` sets it for its messages
            _, environment = prepare_deepspeed_cmd_env(arguments)
        else:
            environment = prepare_multi_gpu_env(arguments)
        for variable, value in environment.items():
            if os.environ.get(variable) != value:
                monkeypatch.setenv(variable, value)

    return set_environment


def test_there_is_a_file_for_each_kind():
    assert {file.stem for file in FILES} == KINDS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file):
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    assert config.distributed_type == KINDS[file.stem]
    assert config.use_cpu == (file.stem == "cpu")
    assert config.mixed_precision is None  # the recipe says it
    assert (config.num_processes > 1) == (KINDS[file.stem] != DistributedType.NO)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_keys_of_plugins_are_options_of_launch(file):
    config = load_config_from_file(str(file))
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known  # others would be lost without a word


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_comment_shows_the_command(file):
    comment = file.read_text().partition("\n\n")[0]
    command = f"accelerate launch --config_file training/accelerate/{file.name}"
    assert command in comment
    assert "training/train.py RECIPE" in comment


def test_two_machines_share_the_processes():
    first = launch_arguments("multi_node", "--main_process_ip", "10.0.0.1", "--machine_rank", "0")
    second = launch_arguments("multi_node", "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
    for arguments in (first, second):
        assert (arguments.num_machines, arguments.num_processes, arguments.main_process_ip) == (2, 16, "10.0.0.1")
    assert (int(first.machine_rank), int(second.machine_rank)) == (0, 1)


def test_fsdp_is_of_the_second_version_and_wraps_parts_of_our_model(launched):
    launched("fsdp")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    names = plugin.transformer_cls_names_to_wrap
    classes = tuple(getattr(modeling_mpformer, name) for name in names)
    parts = [module for module in tiny_model().modules() if isinstance(module, classes)]
    assert len(parts) == len(names) == 2


@pytest.mark.parametrize(("max_gradient_norm", "clipping"), [(0.25, 0.25), (None, 0.0)])
def test_deepspeed_clips_and_accumulates_as_the_recipe_says(launched, max_gradient_norm, clipping):
    launched("deepspeed_zero2")
    plugin = DeepSpeedPlugin()
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    settings = {"batch_size": 3, "gradient_accumulation_steps": 5, "max_gradient_norm": max_gradient_norm}
    arguments = TrainingArguments(output_dir="unused", max_steps=100, model_name_or_path="unused", **settings)
    configure_deepspeed(accelerator, arguments)
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == clipping
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_micro_batch_size_per_gpu"] == 3


def test_the_third_stage_of_deepspeed_is_refused(launched):
    launched("deepspeed_zero2")
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3)))
    with pytest.raises(RecipeError, match="`zero_stage` is 3"):
        configure_deepspeed(
            accelerator, TrainingArguments(output_dir="unused", max_steps=100, model_name_or_path="unused")
        )


def test_the_folder_does_not_hide_the_library():
    # `accelerate launch training/train.py` puts training/, which has a folder of this name, first on the path.
    found = importlib.machinery.PathFinder.find_spec("accelerate", [str(FOLDER.parent), *sys.path])
    assert found.origin == accelerate.__file__
