"""Presets: each builds, and each can take a step with what it says."""
import pytest
import torch

from gptbook.core import GPTModel
from gptbook.presets import PRESETS
from gptbook.runs import TrainConfig


def test_presets_build():
    for name, preset in PRESETS.items():
        config = preset.model_config(512)
        assert config.vocab_size == 512 and isinstance(preset.training, TrainConfig), name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    preset = PRESETS[name]
    with torch.device("meta"):  # shapes without memory
        model = GPTModel(preset.model_config(preset.vocab_size))
    assert model.config.context_length == preset.sizes["context_length"]
    assert 0 < preset.warmup < 1 and 0 <= preset.floor < 1 and preset.batch_size >= 1
    assert preset.training.steps * preset.warmup >= 1, "the climb has at least a step"
