"""asymconv: an executable study of one CUDA convolution, and a layer that comes out of it.

    from asymconv import ModelNew, Model, get_inputs, get_init_inputs
    from asymconv import Conv2d, convert, explain

Importing builds nothing: kernels are compiled at their first use (`asymconv.build`).
"""

from asymconv.layers import Conv2d, convert, explain
from asymconv.model import ModelNew
from asymconv.problem import CONTRACT, ConvShape, Model, get_init_inputs, get_inputs

__version__ = "0.1.0"

__all__ = [
    "CONTRACT",
    "Conv2d",
    "ConvShape",
    "Model",
    "ModelNew",
    "convert",
    "explain",
    "get_init_inputs",
    "get_inputs",
]
