"""timm's float ViT and its fake-quantized twin, with quantizers from an archive or from one batch's ranges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pytorch_fake_quant import Quantizer, block, embed, head, quantized_weight

# timm imports torchvision, whose compiled operators a plain torch lacks; the schemas are enough for a ViT.
_TORCHVISION = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _TORCHVISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

T = TypeVar("T")
BlockFunction = Callable[..., tuple[Tensor, Tensor]]


def float_model(name: str, weights: str | None) -> nn.Module:
    """timm's model of this name, from a safetensors file or with random weights."""
    model: nn.Module = timm.create_model(name, pretrained=False)
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.eval()


def weight_sites(model: nn.Module) -> dict[str, Tensor]:
    """Float weights by site."""
    sites = {"embed.proj.weight": model.patch_embed.proj.weight, "head.fc.weight": model.head.weight}
    for i, module in enumerate(model.blocks):
        sites[f"blocks.{i}.attn.qkv.weight"] = module.attn.qkv.weight
        sites[f"blocks.{i}.attn.proj.weight"] = module.attn.proj.weight
        sites[f"blocks.{i}.mlp.fc1.weight"] = module.mlp.fc1.weight
        sites[f"blocks.{i}.mlp.fc2.weight"] = module.mlp.fc2.weight
    return sites


@dataclass
class QuantizedViT:
    """A float model and the quantizers of its sites (full names); `block` is the plain function or a compiled one."""

    model: nn.Module
    quantizers: dict[str, Quantizer]
    block: BlockFunction = block

    def set_scale(self, site: str, scale: Tensor) -> None:
        self.quantizers[site] = self.quantizers[site]._replace(scale=scale)

    def weights(self) -> dict[str, Tensor]:
        """Fake-quantized, bias-corrected weights of every site, computed anew."""
        return {site: quantized_weight(w, self.quantizers[site]) for site, w in weight_sites(self.model).items()}

    def __call__(self, images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits [batch, classes] of normalised images [batch, channels, height, width]."""
        x, scale = embed(self.model, weights, self.quantizers, images), self.quantizers["embed.sum"].scale
        for i, module in enumerate(self.model.blocks):
            prefix = f"blocks.{i}."
            x, scale = self.block(module, _of_stage(weights, prefix), _of_stage(self.quantizers, prefix), x, scale)
        return head(self.model, weights, self.quantizers, x, scale)


def _of_stage(items: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {site.removeprefix(prefix): item for site, item in items.items() if site.startswith(prefix)}


def quantizers_from(archive: Mapping[str, np.ndarray], model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers that export_parameters wrote."""
    weights = weight_sites(model)
    quantizers = {}
    for key in archive:
        site, _, name = key.rpartition("/")
        if name != "scale":
            continue
        scale, zero_point = (
            torch.from_numpy(np.asarray(archive[f"{site}/{part}"])) for part in ("scale", "zero_point")
        )
        if site in weights:  # per output channel, which is the first axis here
            scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
        low, high = float(archive[f"{site}/low"]), float(archive[f"{site}/high"])
        quantizers[site] = Quantizer(scale, zero_point, low, high)
    return quantizers


class _Ranging:
    """Stands in for a quantizer: lets values pass and fits an 8-bit grid to their range.

    channels: power-of-two factors of an eighth of the step, as large as each channel's range needs.
    """

    def __init__(self, channels: bool = False) -> None:
        self.channels = channels
        self.scale = self.zero_point = torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        spread = x.max() - x.min()
        self.scale = spread / _ACTIVATION_LEVELS
        self.zero_point = (-x.min() / self.scale).round()
        if self.channels:
            axes = tuple(range(x.ndim - 1))
            factor = torch.log2((x.amax(axes) - x.amin(axes)) / spread * 8).ceil().clamp(0, 3)
            self.scale = self.scale / 8 * torch.exp2(factor)
        return x

    overwrite = __call__


_ACTIVATION_LEVELS = 255.0
_NORMALIZED_RANGE = 10.0  # of a LayerNorm with the weights of an untrained model: five deviations each way


def quantizers_by_range(model: nn.Module, images: Tensor, weight_bits: int) -> dict[str, Quantizer]:
    """Min-max quantizers of every site from one batch, for timing models that have random weights."""
    quantizers: dict[str, Quantizer] = {}
    weights = weight_sites(model)
    for site, weight in weights.items():
        low, high = weight.flatten(1).aminmax(dim=1, keepdim=True)
        scale = (high - low) / (2.0**weight_bits - 1)
        quantizers[site] = Quantizer(scale, (-low / scale).round(), 0.0, 2.0**weight_bits - 1)
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    step = torch.tensor(_NORMALIZED_RANGE / _ACTIVATION_LEVELS)
    for site in (*(f"{name}.norm{k}" for name in blocks for k in (1, 2)), "head.norm"):
        quantizers[site] = Quantizer(step, torch.tensor(128.0), 0.0, _ACTIVATION_LEVELS)

    ranging = {f"embed.{site}": _Ranging(site == "sum") for site in ("input", "proj", "tokens", "pos_embed", "sum")}
    inner = ("attn.qkv", "attn.scores", "attn.softmax", "attn.context", "attn.proj", "mlp.gelu", "mlp.fc2")
    for name in blocks:
        ranging |= {f"{name}.{site}": _Ranging() for site in inner}
        ranging |= {f"{name}.residual{k}": _Ranging(channels=True) for k in (1, 2)}
    ranging["head.fc"] = _Ranging()
    QuantizedViT(model, {**quantizers, **ranging})(images, weights)  # type: ignore[dict-item]
    for site, found in ranging.items():
        quantizers[site] = Quantizer(found.scale, found.zero_point, 0.0, _ACTIVATION_LEVELS)
    return quantizers


def normalized(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Tensor:
    """uint8 [N, height, width, channels] -> float32 [N, channels, height, width] as torchvision normalises."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return x.sub_(torch.from_numpy(mean).view(-1, 1, 1)).div_(torch.from_numpy(std).view(-1, 1, 1))
