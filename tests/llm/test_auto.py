import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tiny_models as tiny
from ppf.llm.architectures import FAMILIES, family_of
from ppf.llm.auto import register
from ppf.llm.pruned_model import PRUNED


def test_every_family_has_its_pruned_classes_registered():
    register()
    register()
    assert set(PRUNED) == set(FAMILIES)
    for family, (config_class, model_class, lm_class) in PRUNED.items():
        config = AutoConfig.for_model(f"ppf_{family}", **tiny.SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)
        assert type(config) is config_class and family_of(config) == family
        config.per_layer_config = {}
        with torch.device("meta"):
            assert type(AutoModel.from_config(config)) is model_class
            assert type(AutoModelForCausalLM.from_config(config)) is lm_class
