"""A residual network with batch normalisation and augmentation, in plain Keras: no line of it knows of devices."""

import keras
from keras import layers


def build(width: int = 16, blocks: int = 2, dropout: float = 0.2) -> keras.Model:
    """Images (n, 28, 28, 1) -> probabilities (n, 10).

    Args:
        width: channels of the first block; each later one has twice as many, at half the resolution.
        blocks: number of residual blocks (He et al. 2016, arXiv 1603.05027).
        dropout: share of the features that are dropped before the last layer.
    """
    images = keras.Input((28, 28, 1))
    x = layers.RandomTranslation(0.07, 0.07, fill_mode="constant")(images)
    x = layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False)(x)
    for block in range(blocks):
        x = _residual_block(x, width * 2**block, strides=1 if block == 0 else 2)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(dropout)(x)
    return keras.Model(images, layers.Dense(10, activation="softmax")(x), name="residual")


def _residual_block(x: keras.KerasTensor, width: int, strides: int) -> keras.KerasTensor:
    shortcut = x
    if strides > 1 or x.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, strides=strides, use_bias=False)(x)
    for number in range(2):
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.Conv2D(width, 3, strides=strides if number == 0 else 1, padding="same", use_bias=False)(x)
    return layers.Add()([x, shortcut])
