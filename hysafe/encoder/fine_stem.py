"""Small residual networks without the pooling of their stem, known to timm by name.

Pictures of 64 pixels are 16 cells wide after a stem with two strides; without its pooling they are
32 cells wide, at two and a half times the work.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import register_model
from torch import nn

__all__ = ["hysafe_resnet10t_fine"]


@register_model
def hysafe_resnet10t_fine(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's resnet10t whose stem does not pool. There are no pretrained weights."""
    model = timm.create_model("resnet10t", pretrained=pretrained, **kwargs)
    model.maxpool = nn.Identity()
    return model
