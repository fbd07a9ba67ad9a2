"""A subclassed network with layers of its own, which nothing has registered with Keras."""

import keras
from keras import layers


class Noise(layers.Layer):
    """Adds noise while training."""

    def __init__(self, size=0.1, **options):
        super().__init__(**options)
        self.size = size
        self.generator = keras.random.SeedGenerator(0)

    def call(self, inputs, training=False):
        if training:
            inputs += self.size * keras.random.normal(keras.ops.shape(inputs), seed=self.generator)
        return inputs

    def get_config(self):
        return {**super().get_config(), "size": self.size}


class Network(keras.Model):
    """Its call says nothing about training to the layers."""

    def __init__(self, width=4, **options):
        super().__init__(**options)
        self.width = width
        self.noise, self.convolution = Noise(), layers.Conv2D(width, 3, activation="relu")
        self.normalization, self.flatten = layers.BatchNormalization(), layers.Flatten()
        self.probabilities = layers.Dense(4, activation="softmax")

    def call(self, images, training=False):
        features = self.normalization(self.convolution(self.noise(images)))
        return self.probabilities(self.flatten(features))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def build(width=4):
    return Network(width)
