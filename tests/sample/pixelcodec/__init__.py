"""An image encoder as third parties ship them: made for inference, and sealed against training."""

from pixelcodec.encoder import PixelCodec

__all__ = ["PixelCodec"]
