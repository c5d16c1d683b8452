"""ResNet-18 and an LSTM, both from scratch. He et al. 2016, arXiv:1512.03385."""

from collections.abc import Mapping
from typing import Any

import timm
from baselines.heads import alignment_loss
from torch import Tensor, nn

from retriever.towers import DualEncoder, GRUTower


class ResNet(nn.Module):
    """timm's ResNet-18 whose BatchNorms learn: (b, 3, s, s) → (b, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("resnet18", num_classes=0)
        self.features: int = self.network.num_features

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) normalised pixels → (b, 512) features."""
        features: Tensor = self.network(pixels)
        return features


class LSTMTower(GRUTower):
    """The recurrent tower with the other cell. Hochreiter & Schmidhuber 1997."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        self.gru = nn.LSTM(width, width, batch_first=True, bidirectional=True)


class ResNetLSTM(DualEncoder):
    """A dual encoder with these two towers; `config` as of a "cnn" and a "gru"."""

    def __init__(self, config: Mapping[str, Any], objective: str) -> None:
        # 64 first channels give the small CNN, which is replaced, features as wide as ResNet's.
        super().__init__({**config, "image": {**config["image"], "tower": "cnn", "width": 64}})
        self.image_tower = ResNet()
        assert self.image_projection.linear.in_features == self.image_tower.features
        self.text_tower = LSTMTower(config["text"]["vocabulary"], config["text"]["width"])
        self.objective = objective

    def loss(self, images: Tensor, texts: tuple[Tensor, Tensor], owners: Tensor) -> Tensor:
        """See `fit.System`."""
        embedded = self.encode_images(images), self.encode_texts(*texts)
        return alignment_loss(self.objective, *embedded, owners, self.logit_scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return self.encode_images(images)

    def embed_texts(self, texts: tuple[Tensor, Tensor]) -> Tensor:
        """(b, d) unit rows."""
        return self.encode_texts(*texts)
