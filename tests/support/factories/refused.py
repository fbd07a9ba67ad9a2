"""Factories that `model.factory=refused:NAME` must refuse, for the images of `support.data` (8x8, 4 classes)."""

import os

import keras
import tensorflow as tf
from keras import layers


def network(*hidden, num_outputs=4, activation="softmax", dtype=None):
    """Flat images, these layers, and an output."""
    output = layers.Dense(num_outputs, activation=activation, name="output")
    return keras.Sequential([keras.Input((8, 8), dtype=dtype), layers.Flatten(), *hidden, output])


def good(width=4):
    return network(layers.Dense(width))


def raises():
    raise FileNotFoundError("no weights at /nowhere")


def leaves():
    os._exit(3)


def number():
    return 3


def compiled():
    model = good()
    model.compile("sgd", "categorical_crossentropy")
    return model


def integers():
    return network(layers.Rescaling(1 / 255), dtype="uint8")


def too_wide():
    return network(num_outputs=7)


def linear():
    return network(activation=None)


class Failing(layers.Layer):
    """Fails when it is called."""

    def call(self, inputs):
        raise RuntimeError("no such\n\x1b[1mthing")


def failing():
    return network(Failing())


class FailingWhileTraining(layers.Layer):
    """Fails in a training step only."""

    def call(self, inputs, training=False):
        if training:
            raise RuntimeError("not yet\nwritten")
        return inputs


def failing_while_training():
    return network(FailingWhileTraining())


class Pair(keras.Model):
    """Two layers of one name, which Keras lets pass in subclassed models."""

    def __init__(self, names=("same", "same"), **options):
        super().__init__(**options)
        self.one, self.other = (layers.Dense(4, name=name) for name in names)
        self.flatten, self.output_layer = layers.Flatten(), layers.Dense(4, activation="softmax")

    def call(self, images):
        return self.output_layer(self.other(self.one(self.flatten(images))))


def of_one_name():
    return Pair()


class Unsaved(Pair):
    """What Keras could not load again."""

    def __init__(self):
        super().__init__(("one", "other"))


def not_saved():
    return Unsaved()


class Centred(layers.Layer):
    """Mixes the images of a batch."""

    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0)


def mixing():
    return network(layers.Dense(4), Centred(name="centred"))


class InPython(layers.Layer):
    """Computes in Python."""

    def call(self, inputs):
        doubled = tf.ensure_shape(tf.numpy_function(lambda values: values * 2, [inputs], tf.float32), inputs.shape)
        return inputs + tf.stop_gradient(doubled)


def in_python():
    return network(InPython(name="in_python"))


def huge():
    return network(layers.Dense(50_000_000_000))


def only_on_rank_0():
    if os.environ["SLURM_PROCID"] != "0":
        raise FileNotFoundError("no weights here")
    return good()
