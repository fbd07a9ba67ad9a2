"""Which operations of a compiled program a GPU would run, found out on a machine without one.

The program's graph is optimised as TensorFlow would optimise it for a GPU, and TensorFlow's registry of kernels, which
is in every build, says for each operation where its inputs and outputs would be. Both are parts of TensorFlow that are
not in its public interface.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import tensorflow as tf
from tensorflow.core.framework import graph_pb2, kernel_def_pb2, op_def_pb2
from tensorflow.core.protobuf import config_pb2, device_properties_pb2, rewriter_config_pb2
from tensorflow.python.framework import function_def_to_graph, kernels, meta_graph
from tensorflow.python.grappler import cluster, tf_optimizer

_GPU = "/job:localhost/replica:0/task:0/device:GPU:0"
_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf")
"""Operations that run functions; these are examined instead."""
_NOTHING_TO_DO = ("Const", "Placeholder", "NoOp", "Identity", "IdentityN", "_Arg", "_Retval", "Switch", "Merge")
_VIEWS = ("Reshape", "Bitcast", "ReadVariableOp", "ExpandDims", "Squeeze")
"""Operations that give their input's memory another shape or type."""


@dataclass(frozen=True)
class Operations:
    """The operations of a program, each with how often it is in the graph."""

    device: Counter[str] = field(default_factory=Counter)
    """Those that a GPU runs."""
    views: Counter[str] = field(default_factory=Counter)
    """Those on a GPU that move no data."""
    host: list[str] = field(default_factory=list)
    """Those that a GPU has no kernel for, or whose data would be in the host's memory; each in words."""


def examine(program: tf.types.experimental.ConcreteFunction) -> Operations:
    """The operations of a program and of all functions that it calls.

    32-bit integers and truth values that are scalars (the counters and conditions of loops) and the handles of
    variables count as control, which may be on the host.
    """
    found = Operations()
    for graph in _graphs(_optimize(program)):
        for operation in graph.get_operations():
            if operation.type in _NOTHING_TO_DO or operation.type in _CALLS:
                continue
            if problem := _problem(operation):
                found.host.append(f"{operation.type} ({operation.name}): {problem}")
            elif all(map(_is_control, operation.outputs)) and operation.outputs:
                continue
            else:
                (found.views if operation.type in _VIEWS else found.device)[operation.type] += 1
    return found


def _optimize(program: tf.types.experimental.ConcreteFunction) -> graph_pb2.GraphDef:
    definition = program.graph.as_graph_def()
    for node in [*definition.node, *(node for function in definition.library.function for node in function.node_def)]:
        node.device = _GPU
        node.attr.pop("_lower_using_switch_merge", None)  # loops stay calls of functions, whose tensors have shapes
    exported = meta_graph.create_meta_graph_def(graph_def=definition, graph=program.graph)
    results = [*(tensor.op.name for tensor in program.outputs), *(op.name for op in program.graph.control_outputs)]
    exported.collection_def["train_op"].node_list.value.extend(results)
    session = config_pb2.ConfigProto()
    options = session.graph_options.rewrite_options
    options.arithmetic_optimization = rewriter_config_pb2.RewriterConfig.OFF  # as in `engine.runtime`
    options.min_graph_nodes = -1
    properties = device_properties_pb2.DeviceProperties(
        type="GPU",
        vendor="NVIDIA",
        num_cores=100,
        frequency=1000,
        memory_size=1 << 34,
        environment={"architecture": "8.0"},
    )
    gpu = cluster.Cluster(devices=[device_properties_pb2.NamedDevice(name=_GPU, properties=properties)])
    return tf_optimizer.OptimizeGraph(session, exported, cluster=gpu)


def _graphs(definition: graph_pb2.GraphDef) -> Iterator[tf.Graph]:
    """The graph itself, and those of the functions that it calls."""
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    yield graph
    called = {
        value.func.name
        for node in [*definition.node, *(node for item in definition.library.function for node in item.node_def)]
        for value in node.attr.values()
        if value.HasField("func")
    }
    for function in definition.library.function:
        if function.signature.name in called:
            with graph.as_default():
                yield function_def_to_graph.function_def_to_graph(function)


def _problem(operation: tf.Operation) -> str | None:
    kernel = _kernel(operation)
    if kernel is None:
        return "no GPU kernel for " + ", ".join(tensor.dtype.name for tensor in operation.inputs)
    on_host = set(kernel.host_memory_arg)
    names = _names(operation, operation.op_def.input_arg)
    for name, tensor in zip(names, operation.inputs, strict=True):
        if name in on_host and tensor.op.type != "Const" and not _is_control(tensor):
            return f"reads {tensor.dtype.name} {tensor.shape} from the host's memory"
    for name, tensor in zip(_names(operation, operation.op_def.output_arg), operation.outputs, strict=True):
        if name in on_host and not _is_control(tensor):
            return f"leaves {tensor.dtype.name} {tensor.shape} in the host's memory"
    return None


def _kernel(operation: tf.Operation) -> kernel_def_pb2.KernelDef | None:
    """The kernel for a GPU with the highest priority, None if there is none for these types."""

    def fits(kernel: kernel_def_pb2.KernelDef) -> bool:
        return kernel.device_type in ("GPU", "DEFAULT") and all(
            operation.get_attr(constraint.name) in types
            for constraint in kernel.constraint
            if (types := [tf.as_dtype(value) for value in constraint.allowed_values.list.type])
        )

    fitting = filter(fits, kernels.get_registered_kernels_for_op(operation.type).kernel)
    return max(fitting, key=lambda kernel: (kernel.device_type == "GPU", kernel.priority), default=None)


def _names(operation: tf.Operation, arguments: list[op_def_pb2.OpDef.ArgDef]) -> Iterator[str]:
    """The name of each input or output in its operation's definition; a list has one name."""
    for argument in arguments:
        if argument.number_attr:
            yield from [argument.name] * operation.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            yield from [argument.name] * len(operation.get_attr(argument.type_list_attr))
        else:
            yield argument.name


def _is_control(tensor: tf.Tensor) -> bool:
    # The optimiser sometimes loses the shape of a loop's counter.
    return tensor.dtype == tf.resource or (tensor.dtype in (tf.int32, tf.bool) and tensor.shape.rank in (0, None))
