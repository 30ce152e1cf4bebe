"""Layers of neural networks, finite and infinitely wide.

A layer is a triple `(init_fn, apply_fn, kernel_fn)`:

    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.Conv(32, (3, 3)), stax.Relu(), stax.Flatten(), stax.Dense(10)
    )
    output_shape, params = init_fn(rng, x1.shape)    # random parameters
    y = apply_fn(params, x1)                         # the finite network
    k = kernel_fn(x1, x2, "ntk")                     # kernels of the infinitely wide one

    compose      serial, parallel, repeat
    weights      Dense, Conv, ConvTranspose, ConvLocal, Embedding, GlobalSelfAttention
    pooling      AvgPool, SumPool, GlobalAvgPool, GlobalSumPool, Flatten
    normalise    LayerNorm, RMSNorm, Dropout
    shape        ImageResize, Index (with Slice), DotGeneral, Aggregate, Identity
    branches     FanOut, FanInSum, FanInProd, FanInConcat
    pointwise    Relu, LeakyRelu, Abs, ABRelu, Erf, Sigmoid_like, Sin, Cos, Rbf, Gabor, Gelu, Exp,
                 Gaussian, ExpNormalized, Hermite, Monomial, RectifiedMonomial, Polynomial, Sign,
                 Tanh, Softplus, SiLU (Swish), Mish, Elu, Selu, HardTanh,
                 Elementwise (any function), ElementwiseNumerical
    masks        MaskedArray, unmask_fn, and `mask_constant=` of apply_fn and kernel_fn
    your own     layer, requires, supports_masking, Diagonal, Bool; docs/infinite.md shows both ways

Trained layers are scaled so that widths may go to infinity ('ntk' parameterisation: y = W x /
sqrt(n) with standard normal W) or, on demand, as usual ('standard').
"""

from tangents._infinite.compose import (
    Bool,
    Diagonal,
    layer,
    parallel,
    repeat,
    requires,
    serial,
    supports_masking,
)
from tangents._infinite.layers.aggregate import Aggregate, AggregateImplementation
from tangents._infinite.layers.attention import (
    AttentionMechanism,
    GlobalSelfAttention,
    PositionalEmbedding,
)
from tangents._infinite.layers.branch import FanInConcat, FanInProd, FanInSum, FanOut
from tangents._infinite.layers.contraction import DotGeneral
from tangents._infinite.layers.conv import Conv, ConvLocal, ConvTranspose
from tangents._infinite.layers.dense import Dense, Embedding
from tangents._infinite.layers.dropout import Dropout
from tangents._infinite.layers.flatten import Flatten
from tangents._infinite.layers.nonlinearity_elementwise import Elementwise, ElementwiseNumerical
from tangents._infinite.layers.nonlinearity_expanded import (
    Elu,
    HardTanh,
    Mish,
    Selu,
    SiLU,
    Softplus,
    Swish,
    Tanh,
)
from tangents._infinite.layers.nonlinearity_kinked import (
    ABRelu,
    Abs,
    LeakyRelu,
    RectifiedMonomial,
    Relu,
    Sign,
)
from tangents._infinite.layers.nonlinearity_polynomial import Hermite, Monomial, Polynomial
from tangents._infinite.layers.nonlinearity_smooth import (
    Cos,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Rbf,
    Sigmoid_like,
    Sin,
)
from tangents._infinite.layers.norm import LayerNorm, RMSNorm
from tangents._infinite.layers.pool import AvgPool, GlobalAvgPool, GlobalSumPool, SumPool
from tangents._infinite.layers.shape import Identity, ImageResize, Index, Slice
from tangents._infinite.layers.window import Padding
from tangents._infinite.masking import MaskedArray, unmask_fn

__all__ = [
    "ABRelu",
    "Abs",
    "Aggregate",
    "AggregateImplementation",
    "AttentionMechanism",
    "AvgPool",
    "Bool",
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Cos",
    "Dense",
    "Diagonal",
    "DotGeneral",
    "Dropout",
    "Elementwise",
    "ElementwiseNumerical",
    "Elu",
    "Embedding",
    "Erf",
    "Exp",
    "ExpNormalized",
    "FanInConcat",
    "FanInProd",
    "FanInSum",
    "FanOut",
    "Flatten",
    "Gabor",
    "Gaussian",
    "Gelu",
    "GlobalAvgPool",
    "GlobalSelfAttention",
    "GlobalSumPool",
    "HardTanh",
    "Hermite",
    "Identity",
    "ImageResize",
    "Index",
    "LayerNorm",
    "LeakyRelu",
    "MaskedArray",
    "Mish",
    "Monomial",
    "Padding",
    "Polynomial",
    "PositionalEmbedding",
    "RMSNorm",
    "Rbf",
    "RectifiedMonomial",
    "Relu",
    "Selu",
    "SiLU",
    "Sigmoid_like",
    "Sign",
    "Sin",
    "Slice",
    "Softplus",
    "SumPool",
    "Swish",
    "Tanh",
    "layer",
    "parallel",
    "repeat",
    "requires",
    "serial",
    "supports_masking",
    "unmask_fn",
]
