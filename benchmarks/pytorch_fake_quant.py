"""The quantized forward of Evol-Q's recipe in PyTorch: float32 fake quantization around timm's ViT.

Written from the algorithm (FQ-ViT, Evol-Q), with timm's model definition. Each site of cptv_jax's `evol-q` preset is
quantized here under the same name. Values, not codes, flow between operations, as in the published code.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BIAS_CORRECTION_EPSILON = 1e-8

# Layout of IEEE 754 single precision: the integer LayerNorm reads and writes exponents.
_EXPONENT_MASK = 0x7F800000
_FRACTION_BITS = 23
_EXPONENT_OFFSET = 127
_MULTIPLIER_BITS = 8


class Quantizer(NamedTuple):
    """code = clamp(round(x / scale + zero_point), low, high); scale and zero point broadcast with x."""

    scale: Tensor
    zero_point: Tensor
    low: float
    high: float

    def __call__(self, x: Tensor) -> Tensor:
        """x fake-quantized, in a new tensor: five passes over it in place."""
        codes = x.div(self.scale).add_(self.zero_point).round_().clamp_(self.low, self.high)
        return codes.sub_(self.zero_point).mul_(self.scale)

    def overwrite(self, x: Tensor) -> Tensor:
        """x fake-quantized in place, for tensors that nothing else reads."""
        codes = x.div_(self.scale).add_(self.zero_point).round_().clamp_(self.low, self.high)
        return codes.sub_(self.zero_point).mul_(self.scale)


Quantizers = Mapping[str, Quantizer]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased deviation and mean [rows, 1]; torch.std_mean takes seventy times as long on a CPU."""
    mean = x.mean(1, keepdim=True)
    return torch.linalg.vector_norm(x - mean, dim=1, keepdim=True) / (x.shape[1] - 1) ** 0.5, mean


def quantized_weight(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """A weight [outputs, ...], fake-quantized per output channel, each channel's mean and deviation restored."""
    flat = weight.flatten(1)
    quantized = quantizer(flat)
    deviation, mean = _moments(flat)
    quantized_deviation, quantized_mean = _moments(quantized)
    gain = deviation / (quantized_deviation + BIAS_CORRECTION_EPSILON)
    return quantized.mul_(gain).add_(mean - gain * quantized_mean).view_as(weight)


def integer_layer_norm(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, out: Quantizer) -> Tensor:
    """LayerNorm by multiply and shift (FQ-ViT, section 3.2) of x on a grid of `scale`, quantized by `out`.

    scale: [channels], each a power of two times the smallest. In the published form 2^shift and the 8-bit mantissa come
    from floor(log2 |multiplier|); the exponent bits say the same in fewer passes over the tensor.
    """
    channels = x.shape[-1]
    smallest = scale.min()
    steps = x.div(scale).round_().mul_((scale / smallest).round_())
    total = steps.sum(-1, keepdim=True)
    spread = channels * (steps * steps).sum(-1, keepdim=True) - total * total
    deviation = spread.sqrt_() * (smallest / channels)
    multiplier = ((smallest / deviation) * weight).div_(out.scale)
    exponent = multiplier.view(torch.int32).bitwise_and(_EXPONENT_MASK)
    # shift = 2^clamp(7 - floor(log2 |multiplier|), 0, 31), by subtracting exponent fields
    highest = 2 * _EXPONENT_OFFSET + _MULTIPLIER_BITS - 1
    exponent = exponent.neg_().add_(highest << _FRACTION_BITS)
    shift = exponent.clamp_(_EXPONENT_OFFSET << _FRACTION_BITS, (_EXPONENT_OFFSET + 31) << _FRACTION_BITS)
    shift = shift.view(torch.float32)
    largest = 2**_MULTIPLIER_BITS - 1
    mantissa = multiplier.mul_(shift).trunc_().clamp_(-largest, largest)  # with the multiplier's sign
    offset = total.div_(channels).mul_(smallest).div_(deviation)
    intercept = torch.addcmul(bias, offset, weight, value=-1).div_(out.scale).mul_(shift).round_()
    y = intercept.addcmul_(mantissa, steps).div_(shift).round_()
    return y.add_(out.zero_point).clamp_(out.low, out.high).sub_(out.zero_point).mul_(out.scale)


def embed(model: nn.Module, weights: Mapping[str, Tensor], q: Quantizers, images: Tensor) -> Tensor:
    """Images [batch, channels, height, width] -> quantized tokens [batch, tokens, width]."""
    projection = model.patch_embed.proj
    x = F.conv2d(q["embed.input"](images), weights["embed.proj.weight"], projection.bias, projection.stride)
    x = q["embed.proj"].overwrite(x.flatten(2).transpose(1, 2).contiguous())
    prefix = model.cls_token.expand(len(x), -1, -1)
    x = q["embed.tokens"].overwrite(torch.cat([prefix, x], 1))
    return q["embed.sum"].overwrite(x.add_(q["embed.pos_embed"](model.pos_embed)))


def block(
    module: nn.Module, weights: Mapping[str, Tensor], q: Quantizers, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One transformer block; x lies on a grid of `scale`. Weights and quantizers by site, relative to the block.

    Returns the block's output and the scale of its grid.
    """
    batch, tokens, width = x.shape
    attention, mlp = module.attn, module.mlp
    heads = attention.num_heads
    y = integer_layer_norm(x, scale, module.norm1.weight, module.norm1.bias, q["norm1"])
    y = q["attn.qkv"].overwrite(F.linear(y, weights["attn.qkv.weight"], attention.qkv.bias))
    query, key, value = y.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q["attn.scores"].overwrite((query * attention.scale) @ key.transpose(-2, -1))
    scores = q["attn.softmax"].overwrite(scores.softmax(-1))
    y = q["attn.context"].overwrite((scores @ value).transpose(1, 2).reshape(batch, tokens, width))
    y = q["attn.proj"].overwrite(F.linear(y, weights["attn.proj.weight"], attention.proj.bias))
    x = q["residual1"].overwrite(y.add_(x))
    y = integer_layer_norm(x, q["residual1"].scale, module.norm2.weight, module.norm2.bias, q["norm2"])
    y = q["mlp.gelu"].overwrite(F.gelu(F.linear(y, weights["mlp.fc1.weight"], mlp.fc1.bias)))
    y = q["mlp.fc2"].overwrite(F.linear(y, weights["mlp.fc2.weight"], mlp.fc2.bias))
    return q["residual2"].overwrite(y.add_(x)), q["residual2"].scale


def head(model: nn.Module, weights: Mapping[str, Tensor], q: Quantizers, x: Tensor, scale: Tensor) -> Tensor:
    """Quantized logits [batch, classes] from the class token. Of the tokens only this one is read."""
    x = integer_layer_norm(x[:, 0], scale, model.norm.weight, model.norm.bias, q["head.norm"])
    return q["head.fc"].overwrite(F.linear(x, weights["head.fc.weight"], model.head.bias))
