"""A frozen base in four bits, which makes an adapter QLoRA's (Dettmers et al. 2023).

tensor.py   a tensor in four bits: pack, unpack
linear.py   NF4Linear: a frozen linear layer whose weight is such a tensor
model.py    quantize a model, and dequantize it again
loftq.py    start A and B with what quantization rounded away
"""

from minilora.nf4.tensor import BLOCK, CODEBOOK, MIDPOINTS, NF4, normal_quantiles, pack, unpack

__all__ = ["BLOCK", "CODEBOOK", "MIDPOINTS", "NF4", "normal_quantiles", "pack", "unpack"]
