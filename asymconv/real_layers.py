"""Layers of real networks on wide inputs: what `asymconv layers` compares with nn.Conv2d.

The sizes are those of an input that passed the layers before; padding keeps the size at stride 1,
as these networks have it.
"""

from __future__ import annotations

from typing import NamedTuple

from asymconv.problem import CONTRACT, ConvShape


class RealLayer(NamedTuple):
    """One layer.

    Attributes:
        data: what the network looks at, and its size.
        network: that has such a layer.
        shape: of one image.
        tf32: whether PyTorch's flags allow TF32, as they do unless told.
    """

    data: str
    network: str
    shape: ConvShape
    tf32: bool = True


def _conv(
    c: int, h: int, w: int, k: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> ConvShape:
    padding = dilation * (size - 1) // 2
    return ConvShape(1, c, h, w, k, size, stride, padding, dilation, groups)


STREET = "Cityscapes, 512×1024"
STREET_FULL = "Cityscapes, 1024×2048"
ROAD = "KITTI, 375×1242"
RANGE = "range image, 64×2048"
SOUND = "spectrogram, 128×1000"
WEATHER = "weather, 721×1440"

LAYERS: tuple[RealLayer, ...] = (
    RealLayer(STREET, "the contract", CONTRACT.with_(batch=1)),
    RealLayer(STREET, "ResNet stem", _conv(3, 512, 1024, 64, 7, stride=2)),
    RealLayer(STREET, "ResNet-18, layer 1", _conv(64, 128, 256, 64, 3)),
    RealLayer(STREET, "ResNet-18, layer 2, first", _conv(64, 128, 256, 128, 3, stride=2)),
    RealLayer(STREET, "ResNet-18, layer 2", _conv(128, 64, 128, 128, 3)),
    RealLayer(STREET, "ResNet-50, layer 1, widening", _conv(64, 128, 256, 256, 1)),
    RealLayer(STREET, "ResNet-50, layer 2, shortcut", _conv(256, 128, 256, 512, 1, stride=2)),
    RealLayer(STREET, "DeepLab, dilated", _conv(256, 64, 128, 256, 3, dilation=2)),
    RealLayer(STREET, "U-Net, first", _conv(3, 512, 1024, 64, 3)),
    RealLayer(STREET, "U-Net, level 1", _conv(64, 512, 1024, 64, 3)),
    RealLayer(STREET, "U-Net, level 2, first", _conv(64, 256, 512, 128, 3)),
    RealLayer(STREET, "U-Net, level 2", _conv(128, 256, 512, 128, 3)),
    RealLayer(STREET, "U-Net, level 1, merging", _conv(128, 512, 1024, 64, 3)),
    RealLayer(STREET, "U-Net, classes", _conv(64, 512, 1024, 19, 1)),
    RealLayer(STREET_FULL, "ResNet-18, layer 1", _conv(64, 256, 512, 64, 3)),
    RealLayer(STREET_FULL, "U-Net, level 1", _conv(64, 1024, 2048, 64, 3)),
    RealLayer(STREET_FULL, "MobileNet, depthwise", _conv(32, 512, 1024, 32, 3, groups=32)),
    RealLayer(ROAD, "DispNet, second", _conv(64, 188, 621, 128, 5, stride=2)),
    RealLayer(ROAD, "PSMNet, dilated", _conv(64, 188, 621, 64, 3, dilation=2)),
    RealLayer(ROAD, "U-Net, level 1", _conv(64, 375, 1242, 64, 3)),
    RealLayer(ROAD, "U-Net, level 2, first", _conv(64, 188, 621, 128, 3)),
    RealLayer(RANGE, "SalsaNext, context", _conv(32, 64, 2048, 32, 3, dilation=2)),
    RealLayer(RANGE, "U-Net, level 1", _conv(64, 64, 2048, 64, 3)),
    RealLayer(RANGE, "U-Net, level 1, widening", _conv(64, 64, 2048, 128, 3)),
    RealLayer(SOUND, "Cnn14, second", _conv(64, 128, 1000, 64, 3)),
    RealLayer(SOUND, "Cnn14, block 2, first", _conv(64, 64, 500, 128, 3)),
    RealLayer(SOUND, "Cnn6, block 2", _conv(64, 64, 500, 128, 5)),
    RealLayer(WEATHER, "U-Net, level 1", _conv(64, 721, 1440, 64, 3)),
    RealLayer(WEATHER, "U-Net, level 1, widening", _conv(64, 721, 1440, 128, 3)),
    RealLayer(WEATHER, "ConvNeXt, depthwise", _conv(96, 180, 360, 96, 7, groups=96)),
    RealLayer(WEATHER, "ResNeXt, grouped", _conv(128, 180, 360, 128, 3, groups=32)),
    # the same under flags that forbid TF32
    RealLayer(STREET, "the contract", CONTRACT.with_(batch=1), tf32=False),
    RealLayer(STREET, "U-Net, level 1", _conv(64, 512, 1024, 64, 3), tf32=False),
    RealLayer(STREET, "U-Net, level 2", _conv(128, 256, 512, 128, 3), tf32=False),
    RealLayer(STREET, "ResNet-18, layer 2, first", _conv(64, 128, 256, 128, 3, 2), tf32=False),
)

BATCHES = (1, 8)
