"""CLIP's image tower from the weights of the vision-only encoder, so that it sees shapes before it reads captions."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, Dinov2WithRegistersModel


@torch.no_grad()
def copy_image_tower(source: Dinov2WithRegistersModel, clip: CLIPModel) -> None:
    """Copy the blocks and embeddings of `source` into the image tower of `clip`, which has the same sizes.

    The scales behind attention and MLP, which CLIP has not, go into the linear layers before them, and the bias of
    the patches into their positions. Register tokens are left out, and CLIP's norm before the first block stays: the
    copy starts near the source, not at it.
    """
    # The type checker does not know the modules inside the towers.
    tower: Any = clip.vision_model
    blocks: Any = source.encoder.layer
    embeddings, old = tower.embeddings, source.embeddings
    projection = old.patch_embeddings.projection
    embeddings.class_embedding.copy_(old.cls_token[0, 0])
    embeddings.patch_embedding.weight.copy_(projection.weight)
    embeddings.position_embedding.weight.copy_(old.position_embeddings[0])
    embeddings.position_embedding.weight[1:] += projection.bias
    for layer, block in zip(tower.encoder.layers, blocks, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        new = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2]
        new += [layer.layer_norm1, layer.layer_norm2]
        # In this order they lie in a block, under names that differ between releases of transformers.
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        for target, module in zip(new, [*linears, block.norm1, block.norm2], strict=True):
            target.load_state_dict(module.state_dict())
        for linear, scale in ((attention.out_proj, block.layer_scale1), (mlp.fc2, block.layer_scale2)):
            linear.weight *= scale.lambda1[:, None]
            linear.bias *= scale.lambda1
    tower.post_layernorm.load_state_dict(source.layernorm.state_dict())
