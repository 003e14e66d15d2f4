"""Small random models of any family, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def build_model(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Saved to `folder`. Every parameter is drawn anew, wide enough that logits vary by several units and that each
    bias and norm weight matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1]
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=0.3 if "embed" in name else 1.5 * fan_in**-0.5)
    model.save_pretrained(folder)
    return model
